"""Time over length, as a picture. Needs matplotlib; a report without it can be plotted elsewhere, with --from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from kernel_bench.report import case_name, times


def plot(content: Mapping[str, Any], path: Path) -> bool:
    """Draw batch 1 of a report.

    Args:
        content: of the report's JSON.
        path: of the picture.

    Returns:
        Whether it was drawn: False without matplotlib.
    """
    try:
        import_module("matplotlib").use("Agg")
    except ImportError:
        return False
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)  # more columns than the default has colours
    lengths: set[int] = set()
    for column in (*content["dense"], *content["peers"], *content["ours"]):
        points = times(content, column)
        if points:
            lengths |= points.keys()
            ours = column in content["ours"]
            style = {"linewidth": 3, "color": "black", "linestyle": "-" if column == content["ours"][0] else "--"}
            axes.plot(list(points), list(points.values()), marker="o", label=column, **(style if ours else {}))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=content["unit"], title=f"{content['what']}, batch 1")
    axes.set_xticks(sorted(lengths), [case_name(length, 1) for length in sorted(lengths)])
    axes.set_xticks([], minor=True)
    axes.grid(True, alpha=0.3)
    if lengths:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
