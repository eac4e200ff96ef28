"""Tables, findings and plots of the study of attention mass, from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, quantiles
from typing import Any

from hip_trt.evaluate.mass_recall_rows import METHODS
from hip_trt.evaluate.study import Cell, Plot, Study, Table

_STEPS = (
    ("tokens", "best", "choosing whole blocks, one choice for the heads and rows that share it"),
    ("best", "exact", "choosing by the largest score in place of the mass"),
    ("exact", "hip", "searching a tree in place of scoring every block"),
)
"""From the most that a budget can hold down to HiP: what each step gives up."""


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study of what :func:`hip_trt.evaluate.mass_recall.measure` gave."""
    return Study(
        name="recall", title="Attention mass that the chosen blocks hold", command=command, parameters=parameters,
        measured_on=measured_on, data=data, findings=findings(data),
        tables=[
            *(_methods(mode, entries[0]) for mode, entries in data.items()),
            *(_configs(mode, entries) for mode, entries in data.items()),
            _by_text(data),
        ],
        notes=[
            "Softmax weights of dense attention, in float32, of sampled rows spread over that part of each text in "
            "which every config searches. A head counts as much as any other: figures are means over layers and heads.",
            "All methods choose as many tokens as HiP, beyond the same sink and window. Random blocks and best blocks "
            "are chosen per mask head and query block, as HiP's are; tokens per query head and row.",
            "Exact block top-k scores every block as the search scores those that it visits. With one level, HiP is "
            "just that.",
        ],
    )


def plots(data: Mapping[str, Any]) -> dict[str, Plot]:
    """By what their files' names end in."""
    return {"": lambda figure: _draw_configs(figure, data), "_heads": lambda figure: _draw_heads(figure, data)}


def mean(entry: Mapping[str, Any], method: str, share: str = "outside") -> float:
    """Over layers and heads."""
    value: float = entry["means"][method][share]
    return value


def findings(data: Mapping[str, Any]) -> list[str]:
    """What the figures say."""
    said = []
    for mode, (base, *others) in data.items():
        held = {method: mean(base, method) for method in METHODS}
        said.append(
            f"In {mode}, {base['tokens']} tokens chosen by HiP hold {held['hip']:.1%} of the attention outside sink "
            f"and window; as many hold {held['exact']:.1%} chosen by exact block top-k, {held['recent']:.1%} in a "
            f"longer window, {held['random']:.1%} at random, and {held['tokens']:.1%} at most. With sink and window, "
            f"{mean(base, 'hip', 'all'):.1%} of all attention is held "
            f"(worst head {min(_heads(base, 'hip', 'all')):.1%})."
        )
        lost = {what: held[above] - held[below] for above, below, what in _STEPS}
        said.append(
            f"In {mode}, HiP holds {_points(held['tokens'] - held['hip'])} points less than the best choice of tokens: "
            + ", ".join(f"{_points(price)} for {what}" for what, price in lost.items()) + "."
        )
        if base["levels"] == 1:
            said.append(
                f"In {mode} at this length the base config scores every block (its tree has one level): what a search "
                f"loses shows only in configs with more levels."
            )
        equal = [entry for entry in others if entry["tokens"] == base["tokens"]]
        if equal:
            gain = {entry["name"]: mean(entry, "hip") - held["hip"] for entry in equal}
            best, worst = max(gain, key=gain.__getitem__), min(gain, key=gain.__getitem__)
            said.append(
                f"In {mode}, of the other configs with the same budget, {best} holds most "
                f"({_points(gain[best], '+')} points against the base) and {worst} least "
                f"({_points(gain[worst], '+')})."
            )
    return said


def _points(difference: float, sign: str = "") -> str:
    """Percentage points."""
    return format(100 * difference + 0.0, f"{sign}.1f")


def _heads(entry: Mapping[str, Any], method: str, share: str) -> list[float]:
    return [value for layer in entry["heads"][method][share] for value in layer]


def _low(values: Sequence[float]) -> float:
    """The tenth percentile."""
    return quantiles(values, n=10, method="inclusive")[0] if len(values) > 1 else values[0]


def _methods(mode: str, entry: Mapping[str, Any]) -> Table:
    columns = ["chosen", "outside", "10th percentile of heads", "worst head", "of the heaviest tokens",
               "of all attention", "all, worst head"]
    rows: list[list[Cell]] = []
    for method, name in METHODS.items():
        outside, everything = (_heads(entry, method, share) for share in ("outside", "all"))
        rows.append([name, fmean(outside), _low(outside), min(outside), mean(entry, method, "top"), fmean(everything),
                     min(everything)])
    return Table(
        f"{mode.capitalize()}, base config: {entry['tokens']} tokens by different choices", columns, rows,
        note=f"{entry['rows']} rows of each head. Outside: share of the attention outside sink and window, which "
        f"itself is {fmean(value for layer in entry['weight_outside'] for value in layer):.1%} of all attention.",
        formats=dict.fromkeys(columns[1:], ".1%"),
    )


def _configs(mode: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    names = {"exact": "exact blocks", "best": "best blocks", "tokens": "exact tokens", "recent": "longer window",
             "random": "random"}
    columns = ["config", "tokens", "levels", "HiP", *names.values(), "HiP, of heaviest tokens", "HiP, of all attention"]
    rows = [
        [entry["name"], entry["tokens"], entry["levels"], mean(entry, "hip"), *(mean(entry, name) for name in names),
         mean(entry, "hip", "top"), mean(entry, "hip", "all")]
        for entry in entries
    ]
    return Table(
        f"{mode.capitalize()}, by config", columns, rows,
        note="Share of the attention outside sink and window, mean over layers and heads. Levels: of the tree that a "
        "search scores at the end of the text.", formats=dict.fromkeys(columns[3:], ".1%"),
    )


def _by_text(data: Mapping[str, Any]) -> Table:
    columns = ["text", "mode", *METHODS.values()]
    rows = [
        [text, mode, *(shares[method]["outside"] for method in METHODS)]
        for mode, entries in data.items() for text, shares in entries[0]["texts"].items()
    ]
    return Table("By text, base config", columns, rows, note="Share of the attention outside sink and window.",
                 formats=dict.fromkeys(METHODS.values(), ".1%"))


_MARKS = {"hip": ("o", "black"), "exact": ("s", "tab:blue"), "best": ("^", "tab:green"), "recent": ("v", "tab:orange"),
          "random": ("x", "tab:red"), "tokens": ("*", "tab:gray")}


def _draw_configs(figure: Any, data: Mapping[str, Any]) -> None:
    most = max(map(len, data.values()))
    figure.set_size_inches(12, 1.6 + 0.42 * most)
    for axes, (mode, entries) in zip(figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True):
        for method, name in METHODS.items():
            marker, color = _MARKS[method]
            ours = method == "hip"
            axes.scatter([mean(entry, method) for entry in entries], range(len(entries)), marker=marker, color=color,
                         label=name, s=70 if ours else 40, zorder=3 if ours else 2,
                         facecolors="none" if method == "exact" else color)
        axes.set_yticks(range(len(entries)), [f"{entry['name']} ({entry['tokens']})" for entry in entries])
        axes.invert_yaxis()
        axes.set(title=mode, xlabel="share of the attention outside sink and window", xlim=(0, 1.02))
        axes.grid(True, alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))


def _draw_heads(figure: Any, data: Mapping[str, Any]) -> None:
    figure.set_size_inches(11, 4 + 0.11 * len(next(iter(data.values()))[0]["weight_outside"]) * len(data))
    grid = figure.subplots(len(data), 3, squeeze=False)
    for row, (mode, (base, *_)) in zip(grid, data.items(), strict=True):
        hip, tokens = (base["heads"][method]["outside"] for method in ("hip", "tokens"))
        missed = [[best - ours for best, ours in zip(*layers, strict=True)] for layers in zip(tokens, hip, strict=True)]
        for axes, title, values, colors, limits in (
            (row[0], f"{mode}: weight outside sink and window", base["weight_outside"], "viridis", (0, None)),
            (row[1], "share of it that HiP holds", hip, "viridis", (0, 1)),
            (row[2], "exact token top-k holds more by", missed, "magma_r", (0, None)),
        ):
            image = axes.imshow(values, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1], origin="lower")
            axes.set(title=title, xlabel="query head", ylabel="layer")
            axes.title.set_fontsize(10)
            figure.colorbar(image, ax=axes)
