"""Tables, findings and plots of the break-even study, from its data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hip_trt.bench.break_even import BreakEven, break_even
from hip_trt.evaluate.study import Cell, Plot, Study, Table


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study of what :func:`hip_trt.evaluate.break_even.measure` gave."""
    return Study(
        name="break-even", title="From which length HiP is faster than dense attention", command=command,
        parameters=parameters, measured_on=measured_on, data=data, findings=findings(data),
        tables=[_crossings(data), *(_times(data, mode, batch) for mode, batch in _shapes(data))],
        notes=[
            "One layer, random data. Prefill: between CUDA events, each call from a cold L2 cache. Decode: per step "
            "inside a replayed CUDA graph. Medians. Dense attention is PyTorch's, by each of its kernels.",
            "The break-even length is where the curves cross for the last time, both taken as straight lines between "
            "points, time and length in logarithms. At short lengths, where there are no more candidates than may be "
            "chosen, HiP is dense attention too, computed by hip-trt.",
            "Before timing, each config's output at its longest length was compared with the reference.",
        ],
    )


def plots(data: Mapping[str, Any]) -> dict[str, Plot]:
    """By what their files' names end in."""
    return {"": lambda figure: _draw_curves(figure, data), "_configs": lambda figure: _draw_crossings(figure, data)}


def crossing(data: Mapping[str, Any], curve: Mapping[str, Any]) -> BreakEven | None:
    """Where a curve of HiP falls below the faster one of dense attention's at each length."""
    fastest: dict[int, float] = {}
    for other in _dense(data, curve["mode"], curve["batch"]):
        for tokens, value in _points(other).items():
            fastest[tokens] = min(value, fastest.get(tokens, value))
    return break_even(_points(curve), fastest)


def findings(data: Mapping[str, Any]) -> list[str]:
    """What the figures say."""
    said = []
    for mode, batch in _shapes(data):
        for curve in _ours(data, mode, batch):
            found = crossing(data, curve)
            if curve["name"] == "base" and found is not None:
                last = max(_points(curve))
                dense = min(_points(other).get(last, float("inf")) for other in _dense(data, mode, batch))
                gain = f"; at {last:,} tokens it is {dense / _points(curve)[last]:.1f} times as fast"
                said.append(
                    f"{_shape(mode, batch)}: the base config is ahead of the faster dense kernel {_where(found)}"
                    f"{gain if dense < float('inf') else ''}."
                )
        others = {
            curve["name"]: found.tokens for curve in _ours(data, mode, batch)
            if (found := crossing(data, curve)) is not None and found.side == "at"
        }
        if len(others) > 1:
            early, late = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
            said.append(
                f"{_shape(mode, batch)}: of the {len(others)} configs that break even within the measured lengths, "
                f"{early} does first, at about {others[early]:,.0f} tokens, {late} last, at about {others[late]:,.0f}."
            )
    return said


def _where(found: BreakEven) -> str:
    if found.side == "at":
        return f"from about {found.tokens:,.0f} tokens on"
    if found.side == "below":
        return f"at every measured length, from {found.tokens:,.0f} tokens on"
    return f"nowhere up to {found.tokens:,.0f} tokens"


def _short(found: BreakEven | None) -> Cell:
    if found is None:
        return None
    return {"at": "", "below": "< ", "above": "> "}[found.side] + f"{found.tokens:,.0f}"


def _shape(mode: str, batch: int) -> str:
    return mode.capitalize() if batch == 1 else f"{mode.capitalize()}, batch {batch}"


def _shapes(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((curve["mode"], curve["batch"]) for curve in data["curves"] if curve["config"]))


def _ours(data: Mapping[str, Any], mode: str, batch: int) -> list[Mapping[str, Any]]:
    return [curve for curve in data["curves"]
            if curve["config"] and (curve["mode"], curve["batch"]) == (mode, batch) and curve["times"]]


def _dense(data: Mapping[str, Any], mode: str, batch: int) -> list[Mapping[str, Any]]:
    mode = mode.partition(",")[0]
    return [curve for curve in data["curves"]
            if not curve["config"] and (curve["mode"], curve["batch"]) == (mode, batch)]


def _points(curve: Mapping[str, Any]) -> dict[int, float]:
    return {int(tokens): value for tokens, value in curve["times"].items()}


def _crossings(data: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(curve["name"] for curve in data["curves"] if not curve["config"]))
    rows: list[list[Cell]] = []
    for mode, batch in _shapes(data):
        for curve in _ours(data, mode, batch):
            each = {other["name"]: break_even(_points(curve), _points(other)) for other in _dense(data, mode, batch)}
            rows.append([_shape(mode, batch), curve["name"], *(_short(each.get(name)) for name in names),
                         _short(crossing(data, curve))])
    columns = ["", "config", *(f"against {name}" for name in names), "against the faster one"]
    return Table(
        "Break-even length, tokens", columns, rows,
        note="Less than (<): ahead at the shortest measured length already. More than (>): not ahead at the longest.",
    )


def _times(data: Mapping[str, Any], mode: str, batch: int) -> Table:
    curves = [*_dense(data, mode, batch), *_ours(data, mode, batch)]
    lengths = sorted({tokens for curve in curves for tokens in _points(curve)})
    columns = ["", *(f"{tokens:,}" for tokens in lengths)]
    rows: list[list[Cell]] = [[curve["name"], *(_points(curve).get(tokens) for tokens in lengths)] for curve in curves]
    reasons = {reason for curve in curves for reason in curve["failed"].values()}
    return Table(
        f"{_shape(mode, batch)}, {curves[0]['unit']}", columns, rows, formats=dict.fromkeys(columns[1:], ".4g"),
        note=f"Not measured: {'; '.join(sorted(reasons))}." if reasons else "",
    )


def _draw_curves(figure: Any, data: Mapping[str, Any]) -> None:
    shapes = _shapes(data)
    plain = [(mode, batch) for mode, batch in shapes if "," not in mode]
    figure.set_size_inches(5 * len(plain), 4.4)
    for axes, (mode, batch) in zip(figure.subplots(1, len(plain), squeeze=False)[0], plain, strict=True):
        for curve in _dense(data, mode, batch):
            _line(axes, curve, curve["name"], linestyle="--")
        for ours, label in ((mode, "HiP, base"), (f"{mode}, reused", "HiP, base, nodes reused")):
            for curve in _ours(data, ours, batch):
                if curve["name"] == "base":
                    _line(axes, curve, label, linewidth=2.5)
        lengths = sorted({tokens for curve in _dense(data, mode, batch) for tokens in _points(curve)})
        unit = _ours(data, mode, batch)[0]["unit"] if _ours(data, mode, batch) else ""
        axes.set_yscale("log", subs=(2, 5))
        axes.set(xscale="log", xlabel="tokens", ylabel=unit, title=_shape(mode, batch))
        axes.set_xticks(lengths, [f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens) for tokens in lengths])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)


def _line(axes: Any, curve: Mapping[str, Any], label: str, **style: Any) -> None:
    points = _points(curve)
    axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=label, **style)


def _draw_crossings(figure: Any, data: Mapping[str, Any]) -> None:
    """One bar a config: how far it must go to be ahead of the faster dense kernel."""
    shown = [
        (f"{_shape(mode, batch)}: {curve['name']}", found) for mode, batch in _shapes(data)
        for curve in _ours(data, mode, batch) if (found := crossing(data, curve)) is not None
    ]
    figure.set_size_inches(9, 1.5 + 0.27 * len(shown))
    axes = figure.subplots()
    colors = {"at": "tab:blue", "below": "tab:green", "above": "tab:red"}
    axes.barh(range(len(shown)), [found.tokens for _, found in shown], color=[colors[found.side] for _, found in shown])
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    for place, (_, found) in enumerate(shown):
        axes.annotate(str(_short(found)), (found.tokens, place), xytext=(3, 0), textcoords="offset points", va="center",
                      fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="tokens from which HiP is ahead of the faster dense kernel")
    axes.margins(x=0.12)
