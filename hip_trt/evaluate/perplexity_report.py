"""Tables, findings and the plot of the perplexity study, from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hip_trt.config import HipConfig
from hip_trt.evaluate.study import Cell, Study, Table
from hip_trt.evaluate.variations import in_words

GOAL = 1.0
"""Percent of perplexity that pruning may cost on every text."""
BROKEN = 5.0
"""Percent by which a long context may be worse than the trained one, on the same tokens, before it counts as broken."""

_MODES = {"prefill": "Prefill", "decode": "Decode"}


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study's files.

    Args:
        data: from :func:`hip_trt.evaluate.perplexity_run.run`.
        command, parameters, measured_on: see :class:`Study`.
    """
    return Study(
        "perplexity", "Perplexity: dense against HiP", command, parameters, measured_on, data,
        tables=tables(data), findings=findings(data), notes=_notes(data),
    )


def tables(data: Mapping[str, Any]) -> list[Table]:
    """One for each setting and mode that has rows, and one of dense attention beyond the model's context."""
    made = []
    for section in data["sections"]:
        for mode in _MODES:
            rows = [row for row in section["rows"] if row["mode"] == mode]
            if rows:
                made.append(_rows_table(section, mode, rows))
    long = [section for section in data["sections"] if _is_long(section)]
    if long:
        made.append(_dense_table(long))
    return made


def _rows_table(section: Mapping[str, Any], mode: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(section["dense"])
    body: list[list[Cell]] = []
    for row in rows:
        if "failed" in row:
            body.append([row["label"], *([None] * len(names)), None, row["failed"]])
            continue
        cells = [f"{row['texts'][name]['change']:+.2f}{_plus_minus(row['texts'][name]['error'])}" for name in names]
        body.append([row["label"], *cells, row["worst"], "yes" if row["worst"] <= GOAL else "no"])
    return Table(
        f"{_MODES[mode]}, {_where(section)}",
        ["what differs from the default", *(f"{name}, %" for name in names), "worst, %", f"within {GOAL:g}%"],
        body,
        note=f"Change of perplexity against dense attention (± its standard error); {_counted(section, mode)}. Dense: "
        + ", ".join(f"{name} {entry['perplexity']:.3f}" for name, entry in section["dense"].items()) + ".",
        formats={"worst, %": "+.2f"},
    )


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2f}"


def _counted(section: Mapping[str, Any], mode: str) -> str:
    if mode == "prefill":
        return f"predictions after token {section['skip']:,} count"
    return f"the first {section['prompt']:,} tokens are prefilled, each later one is a decode step"


def _where(section: Mapping[str, Any]) -> str:
    scaling = "" if section["scaling"] == "none" and not _is_long(section) else (
        f", RoPE scaling {section['scaling']}" + ("" if section["scaling"] == "none" else f" x{section['factor']:g}")
    )
    return f"{section['tokens']:,} tokens, {section['dtype']}{scaling}"


def _is_long(section: Mapping[str, Any]) -> bool:
    return any("within_context_by_position" in entry for entry in section["dense"].values())


def _dense_table(sections: Sequence[Mapping[str, Any]]) -> Table:
    positions = list(dict.fromkeys(
        place for section in sections for entry in section["dense"].values() for place in entry["by_position"]
    ))
    body: list[list[Cell]] = []
    for section in sections:
        for name, entry in section["dense"].items():
            excess = _excess(entry)
            body.append([
                f"{section['tokens']:,}", section["scaling"], name, *(excess.get(place) for place in positions),
                "works" if works(entry) else "breaks",
            ])
    return Table(
        "Dense attention beyond the model's context", ["tokens", "RoPE scaling", "text", *positions, "verdict"], body,
        note="By position, percent by which dense attention over everything predicts worse (+) or better (-) than the "
        "unscaled model that sees at most its own context, on the same tokens. It works where no stretch "
        f"is more than {BROKEN:g}% worse.",
        formats=dict.fromkeys(positions, "+.1f"),
    )


def _excess(entry: Mapping[str, Any]) -> dict[str, float]:
    """Percent by which a long dense context is worse than the model's own, by position."""
    within = entry["within_context_by_position"]
    return {place: 100 * (value / within[place] - 1) for place, value in entry["by_position"].items()}


def works(entry: Mapping[str, Any]) -> bool:
    """Whether the dense model reads a text of the data's "dense" well, as far as it goes beyond the model's context."""
    return "within_context_by_position" not in entry or all(value <= BROKEN for value in _excess(entry).values())


def findings(data: Mapping[str, Any]) -> list[str]:
    """What follows, in sentences."""
    said = []
    for section in data["sections"]:
        for mode in _MODES:
            said += _findings(section, mode)
    long = [section for section in data["sections"] if _is_long(section)]
    for length in dict.fromkeys(section["tokens"] for section in long):
        said.append(_limit([section for section in long if section["tokens"] == length]))
    if data["unfinished"]:
        said.append(f"Not measured, for lack of time: {len(data['unfinished'])} rows, from "
                    f"{data['unfinished'][0]} on.")
    return said


def _findings(section: Mapping[str, Any], mode: str) -> list[str]:
    rows = [row for row in section["rows"] if row["mode"] == mode and "failed" not in row]
    hip = [row for row in rows if row["method"] == "hip"]
    default = next((row for row in hip if not row["changes"]), None)
    said = []
    where = f"{_MODES[mode]}, {_where(section)}"
    if default:
        said.append(f"{where}: the default changes perplexity by {_range(default)}: {_verdict(default)}.")
        if scores_everything(default["changes"], mode, section["tokens"]):
            said.append(f"{where}: with the default, one level of the tree holds all candidates, so the search scores "
                        "every block and chooses the best ones exactly; rows with a smaller leaf_branch show the tree.")
        if default["worst"] > GOAL:
            said.append(_remedy(hip, where))
    baselines = [row for row in rows if row["method"] != "hip" and not row["changes"]]
    if baselines:
        said.append(f"{where}, other ways to choose with the same budget, worst text: " + ", ".join(
            f"{row['label']} {row['worst']:+.1f}% ({row['worst_text']})" for row in baselines) + ".")
    said += _reuse(hip, where)
    return said


def _range(row: Mapping[str, Any]) -> str:
    changes = sorted(result["change"] for result in row["texts"].values())
    if len(changes) == 1:
        return f"{changes[0]:+.2f}%"
    return f"{changes[0]:+.2f}% to {changes[-1]:+.2f}% (worst: {row['worst_text']})"


def _verdict(row: Mapping[str, Any]) -> str:
    error = row["texts"][row["worst_text"]]["error"]
    verdict = f"within {GOAL:g}% on every text" if row["worst"] <= GOAL else f"not within {GOAL:g}% on every text"
    if error is not None and abs(row["worst"] - GOAL) < 2 * error:
        verdict += f", though only {abs(row['worst'] - GOAL) / error:.1f} standard errors from it"
    return verdict


def _remedy(hip: Sequence[Mapping[str, Any]], where: str) -> str:
    within = sorted((row for row in hip if row["worst"] <= GOAL), key=lambda row: _budget(row))
    if not within:
        best = min(hip, key=lambda row: float(row["worst"]))
        return f"{where}: no config tried is within {GOAL:g}% on every text; the best is {best['label']} " \
               f"({best['worst']:+.2f}%)."
    named = "; ".join(f"{row['label']} ({row['worst']:+.2f}%)" for row in within[:4])
    return f"{where}: within {GOAL:g}% on every text, smallest budget first: {named}."


def _budget(row: Mapping[str, Any]) -> tuple[int, float]:
    config = HipConfig.create(**row["changes"])
    return (config.mask_k if row["mode"] == "prefill" else config.decode_mask_k) + config.window_tokens, row["worst"]


def scores_everything(changes: Mapping[str, Any], mode: str, tokens: int) -> bool:
    """Whether a search over ``tokens`` begins at the blocks themselves: then it is exact, and keeps no nodes."""
    config = HipConfig.create(**changes)
    blocks = config.mask_blocks if mode == "prefill" else config.decode_mask_blocks
    candidates = (tokens - config.window_tokens - config.sink_tokens) // config.block_k
    return candidates <= blocks * config.leaf_branch


def _reuse(hip: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """What the refresh interval costs the worst text, for each group of rows that differ in nothing else."""
    return [
        f"{where}, {what or 'the default'}, worst text by refresh interval: "
        + ", ".join(f"{interval}: {worst:+.2f}%" for interval, worst in series) + "."
        for what, series in _by_interval(hip).items()
    ]


def _by_interval(hip: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(refresh interval, change for the worst text) of decode rows that differ in nothing else, where there are three
    or more, by what they have in common."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for row in hip:
        if row["mode"] == "decode":
            others = {name: value for name, value in sorted(row["changes"].items()) if name != "refresh_interval"}
            interval = HipConfig.create(**row["changes"]).refresh_interval
            groups.setdefault(in_words(others), []).append((interval, row["worst"]))
    return {what: sorted(series) for what, series in groups.items() if len(series) > 2}


def _limit(sections: Sequence[Mapping[str, Any]]) -> str:
    """Where the dense model itself breaks, at one length."""
    verdicts = []
    for section in sections:
        entries = section["dense"].values()
        worst = max(max(_excess(entry).values()) for entry in entries)
        working = sum(works(entry) for entry in entries)
        verdicts.append(f"{section['scaling']} {worst:+.1f}% (works on {working} of {len(entries)} texts)")
    return (f"Dense attention over {sections[0]['tokens']:,} tokens, worst stretch against the same tokens read within "
            f"the model's own context, by RoPE scaling: {'; '.join(verdicts)}. Where dense does not work, rows of HiP "
            "say how it follows dense, not how well a model can use the context.")


def _notes(data: Mapping[str, Any]) -> list[str]:
    return [
        "Decode steps are teacher-forced: the text's own tokens, all steps of a stretch in one call, with the schedule "
        "and the kernels of step-by-step decoding. reuse_level is 0 or 1: the operator has no other.",
        "The standard error comes from means over 64 neighbouring predictions; it says how sure the change is for this "
        "text, not for other texts or models.",
        "HiP has no budget for quality below sink + window + mask_k tokens: there it is dense attention exactly.",
    ]


def plot(data: Mapping[str, Any]) -> Any:
    """What draws the study: budget, refresh interval, dense beyond the model's context."""
    def draw(figure: Any) -> None:
        read = [section for section in data["sections"] if section["rows"]]
        figure.set_size_inches(19, 6.8)
        axes = figure.subplots(1, 4)
        for place, mode in zip(axes, _MODES, strict=False):
            _plot_budget(place, read, mode)
        _plot_intervals(axes[2], read)
        _plot_dense(axes[3], [section for section in data["sections"] if _is_long(section)])

    return draw


def _plot_budget(axes: Any, sections: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Loss over the budget, and over a window that is longer by as much; a line style for each length."""
    budget, default = ("mask_k" if mode == "prefill" else "decode_mask_k"), HipConfig.create()
    styles = {"hip": ("HiP", "black"), "exact": ("best blocks, all scored", "tab:green"),
              "random": ("random blocks", "tab:red"), "none": ("a longer window instead", "tab:blue")}
    usual = [section for section in sections if section["dtype"] == sections[0]["dtype"]]
    for section, line in zip(usual, ("-", "--", ":", "-."), strict=False):
        for method, (label, color) in styles.items():
            field, start, base = (("window_tokens", default.window_tokens, default.window_tokens) if method == "none"
                                  else (budget, getattr(default, budget), 0))
            points = sorted(
                (row["changes"].get(field, start) - base, row["worst"]) for row in section["rows"]
                if row["mode"] == mode and row["method"] == method and "failed" not in row
                and set(row["changes"]) <= {field}
            )
            points = [point for point in points if point[0] > 0]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", linestyle=line, color=color,
                          label=f"{section['tokens']:,}: {label}")
    axes.axhline(GOAL, color="gray", linestyle=":")
    axes.set(xlabel=f"{budget}, or what the window is longer by, tokens", ylabel="change of perplexity, worst text, %",
             title=_MODES[mode])
    _finish(axes, (128, 256, 512, 1024, 2048, 4096))


def _plot_intervals(axes: Any, sections: Sequence[Mapping[str, Any]]) -> None:
    for section in sections:
        hip = [row for row in section["rows"] if row["method"] == "hip" and "failed" not in row]
        for what, series in _by_interval(hip).items():
            axes.plot(*zip(*series, strict=True), marker="o", label=f"{section['tokens']:,}: {what or 'default'}")
    axes.axhline(GOAL, color="gray", linestyle=":")
    axes.set(xlabel="refresh interval, steps", ylabel="change of perplexity, worst text, %",
             title="Decode, by refresh interval")
    _finish(axes, (1, 2, 4, 8, 16, 32, 64))


def _plot_dense(axes: Any, sections: Sequence[Mapping[str, Any]]) -> None:
    longest = max((section["tokens"] for section in sections), default=0)
    for section in sections:
        if section["tokens"] == longest:
            excess = [_excess(entry) for entry in section["dense"].values()]
            places = list(excess[0])
            axes.plot(places, [max(entry[place] for entry in excess) for place in places], marker="o",
                      label=section["scaling"])
    axes.axhline(BROKEN, color="gray", linestyle=":")
    axes.set(xlabel="position", ylabel="dense against its own context, worst text, %",
             title=f"Dense, {longest:,} tokens, by RoPE scaling")
    axes.tick_params(axis="x", labelrotation=20)
    _finish(axes, ())


def _finish(axes: Any, ticks: Sequence[int]) -> None:
    """Scales with plain numbers: percents linear up to 1, logarithmic beyond; a legend below."""
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yscale("symlog", linthresh=1)
    if all(value >= 0 for line in axes.get_lines() for value in line.get_ydata()):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
