"""Tables, findings and plots of the study of attention locality, from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, quantiles
from typing import Any

from hip_trt.evaluate.study import Cell, Plot, Study, Table

REPRESENTATIVES = {"token": "middle token", "block": "middle block"}


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study of what :func:`hip_trt.evaluate.locality.measure` gave."""
    return Study(
        name="locality", title="Locality of attention scores", command=command, parameters=parameters,
        measured_on=measured_on, data=data, findings=findings(data),
        tables=[_distances(data), _widths(data), _by_text(data)],
        notes=[
            "Scores q.k of single queries and heads, dense, in float32, of the keys between sink and window; queries "
            "from the second half of each text. Means over queries, then over texts, for each layer and head.",
            f"Lost: attention outside sink and window that the best {data['keep']:.0%} of the nodes hold by their "
            "largest score, less what those hold that are best by their representative: what one level of a search "
            "would lose for one head. Its masks are shared by heads and rows, whose largest score counts.",
        ],
    )


def plots(data: Mapping[str, Any]) -> dict[str, Plot]:
    """By what their files' names end in."""
    return {"": lambda figure: _draw_curves(figure, data), "_heads": lambda figure: _draw_heads(figure, data)}


def heads(data: Mapping[str, Any], name: str) -> list[float]:
    """A figure of every layer and head."""
    return [value for layer in data["heads"][name] for value in layer]


def findings(data: Mapping[str, Any]) -> list[str]:
    """What the figures say."""
    near, far = min(data["distances"]), max(data["distances"])
    one, other = heads(data, f"correlation {near}"), heads(data, f"correlation {far}")
    said = [
        f"Scores of keys {near} token{'s' * (near > 1)} apart correlate by {fmean(one):.2f} on average over "
        f"{len(one)} heads (from {min(one):.2f} to {max(one):.2f}), {far} apart by {fmean(other):.2f}, random pairs by "
        f"{fmean(heads(data, 'random')):.2f}."
    ]
    block = data["block_k"]
    if block in data["distances"]:
        values = heads(data, f"correlation {block}")
        weak = sum(value < 0.1 for value in values)
        said.append(
            f"A key block ({block} tokens) apart the correlation is {fmean(values):.2f}; it is below 0.1 in {weak} of "
            f"{len(values)} heads, where the assumption does not hold across blocks."
        )
    for width in sorted({min(data["widths"]), max(data["widths"])}):
        said.append(
            f"Nodes of {width} tokens: {_mean(data, f'between {width}'):.0%} of the variance of scores lies between "
            f"nodes. The rank correlation with a node's largest score is {_mean(data, f'rank token {width}'):.2f} for "
            f"its middle token, {_mean(data, f'rank block {width}'):.2f} for its middle block. Keeping the best "
            f"{data['keep']:.0%} of the nodes by the middle token loses {_mean(data, f'lost token {width}'):.1%} of "
            f"the attention outside sink and window, by the middle block {_mean(data, f'lost block {width}'):.1%} "
            f"(worst head {max(heads(data, f'lost block {width}')):.1%}), at random "
            f"{_mean(data, f'held {width}') - data['keep']:.1%}."
        )
    return said


def _mean(data: Mapping[str, Any], name: str) -> float:
    return fmean(heads(data, name))


def _spread(values: Sequence[float]) -> list[Cell]:
    """Mean, least, tenth and ninetieth percentile, largest."""
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return [fmean(values), min(values), tenths[0], tenths[-1], max(values)]


def _distances(data: Mapping[str, Any]) -> Table:
    columns = ["distance, tokens", "mean", "least", "10th percentile", "90th percentile", "largest"]
    rows: list[list[Cell]] = [
        [str(distance), *_spread(heads(data, f"correlation {distance}"))] for distance in data["distances"]
    ]
    rows.append(["random pairs", *_spread(heads(data, "random"))])
    return Table("Correlation of scores, by distance", columns, rows, note="Over layers and heads.",
                 formats=dict.fromkeys(columns[1:], ".2f"))


def _widths(data: Mapping[str, Any]) -> Table:
    columns = ["node, tokens", "variance between nodes", "rank, middle token", "rank, middle block", "held by largest",
               "lost by middle token", "lost by middle block", "worst head", "lost at random"]
    rows: list[list[Cell]] = [
        [width, _mean(data, f"between {width}"), _mean(data, f"rank token {width}"), _mean(data, f"rank block {width}"),
         _mean(data, f"held {width}"), _mean(data, f"lost token {width}"), _mean(data, f"lost block {width}"),
         max(heads(data, f"lost block {width}")), _mean(data, f"held {width}") - data["keep"]]
        for width in data["widths"]
    ]
    return Table(
        "What a representative says of its node", columns, rows,
        note="Rank: Spearman's correlation with the node's largest score. Held and lost: by the best "
        f"{data['keep']:.0%} of the nodes, of the attention outside sink and window. Means over layers and heads.",
        formats={"variance between nodes": ".0%", "rank, middle token": ".2f", "rank, middle block": ".2f",
                 **dict.fromkeys(columns[4:], ".1%")},
    )


def _by_text(data: Mapping[str, Any]) -> Table:
    near, width = data["distances"][0], data["widths"][-1]
    names = [f"correlation {near}", f"between {width}", f"rank block {width}", f"lost block {width}"]
    rows = [[text, *(figures[name] for name in names)] for text, figures in data["texts"].items()]
    columns = ["text", f"correlation at {near}", f"variance between nodes of {width}", f"rank, middle block, {width}",
               f"lost by middle block, {width}"]
    return Table("By text", columns, rows, formats=dict(zip(columns[1:], (".2f", ".0%", ".2f", ".1%"), strict=True)))


def _draw_curves(figure: Any, data: Mapping[str, Any]) -> None:
    figure.set_size_inches(14, 5.4)
    left, middle, right = figure.subplots(1, 3)
    _band(left, data, data["distances"], "correlation {}", "black", "by distance")
    left.axhline(_mean(data, "random"), color="tab:red", linestyle=":", label="random pairs")
    left.set(title="correlation of scores", xlabel="distance, tokens")
    for name, color in (("token", "tab:orange"), ("block", "tab:blue")):
        _band(middle, data, data["widths"], f"rank {name} {{}}", color, REPRESENTATIVES[name])
        _band(right, data, data["widths"], f"lost {name} {{}}", color, REPRESENTATIVES[name])
    chance = [_mean(data, f"held {width}") - data["keep"] for width in data["widths"]]
    right.plot(data["widths"], chance, color="tab:red", linestyle=":", label="random nodes")
    middle.set(title="rank correlation with the node's largest score", xlabel="node, tokens")
    right.set(title=f"attention lost, best {data['keep']:.0%} of nodes kept", xlabel="node, tokens")
    for axes, ticks in ((left, data["distances"]), (middle, data["widths"]), (right, data["widths"])):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _band(axes: Any, data: Mapping[str, Any], places: Sequence[int], name: str, color: str, label: str) -> None:
    """Median over heads, the middle 80% of them, and the extremes."""
    every = [heads(data, name.format(place)) for place in places]
    _, least, low, high, most = zip(*map(_spread, every), strict=True)
    axes.plot(places, [median(values) for values in every], color=color, marker="o", label=f"{label}, median head")
    axes.fill_between(places, low, high, color=color, alpha=0.2, label="80% of heads")
    for edge in (least, most):
        axes.plot(places, edge, color=color, linewidth=0.7, linestyle="--")


def _draw_heads(figure: Any, data: Mapping[str, Any]) -> None:
    near, width = data["distances"][0], data["widths"][-1]
    maps = (
        (f"correlation {near}", f"correlation of scores, {near} token apart", "viridis"),
        (f"between {width}", f"variance between nodes of {width}", "viridis"),
        (f"rank block {width}", f"rank correlation, middle block, {width}", "viridis"),
        (f"lost block {width}", f"attention lost by middle block, {width}", "magma_r"),
    )
    figure.set_size_inches(14, 3 + 0.1 * len(data["heads"]["random"]))
    for axes, (name, title, colors) in zip(figure.subplots(1, len(maps)), maps, strict=True):
        image = axes.imshow(data["heads"][name], aspect="auto", origin="lower", cmap=colors)
        axes.set(xlabel="query head", ylabel="layer")
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes)
