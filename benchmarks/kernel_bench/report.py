"""Results as JSON, written as they come, and as a Markdown table made from that JSON alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hip_trt.bench.break_even import BreakEven, break_even
from hip_trt.bench.roofline import Rates, Work
from hip_trt.bench.timing import Timing


@dataclass(frozen=True)
class Header:
    """What stands above the rows.

    Attributes:
        benchmark: name of the script, and of its files.
        what: what is timed, for the table's corner.
        unit: of all times, "ms" or "µs".
        ours, dense: columns of hip-trt, and of dense attention.
        peers: columns of other pruned attention.
    """

    benchmark: str
    what: str
    unit: str
    ours: tuple[str, ...]
    dense: tuple[str, ...]
    peers: tuple[str, ...]


class Report:
    """Rows of one benchmark, in a folder.

    Args:
        folder: where BENCHMARK.json, .md and .png go; made if absent.
        facts: environment, settings, seed: whatever says what the rows belong to.
    """

    def __init__(self, folder: Path, header: Header, rates: Rates, facts: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stem, self._rates, self._header = folder / header.benchmark, rates, header
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}
        self._facts = dict(facts)

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**json.loads(json.dumps(asdict(self._header))), "rates": asdict(self._rates), **self._facts,
                "rows": list(self._rows.values())}

    def time(self, column: str, tokens: int, batch: int, timing: Timing | Mapping[str, Any]) -> None:
        """Enter a timing; a mapping is one as JSON has it, or {"failed": reason}."""
        entry = timing.as_json() if isinstance(timing, Timing) else dict(timing)
        if "failed" in entry:  # an exception's text may be long, and have lines
            entry["failed"] = " ".join(str(entry["failed"]).split())[:300].rstrip(".")
        self._row(tokens, batch)["times"][column] = entry
        self.write()

    def work(self, column: str, tokens: int, batch: int, work: Work) -> None:
        """Enter what a column has to do, counted, and the least time for it in the report's unit."""
        scale = {"ms": 1e3, "µs": 1e6}[self._header.unit]
        least = work.least_seconds(self._rates) * scale
        self._row(tokens, batch)["work"][column] = {**asdict(work), "least": least}

    def check(self, column: str, tokens: int, batch: int, result: Mapping[str, Any]) -> None:
        """Enter what was compared before timing."""
        self._row(tokens, batch)["checks"][column] = dict(result)

    def write(self) -> None:
        """Write JSON and Markdown; a reader never sees half a file."""
        content = self.content
        _replace(self._stem.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _replace(self._stem.with_suffix(".md"), markdown(content))

    def _row(self, tokens: int, batch: int) -> dict[str, Any]:
        empty = {"tokens": tokens, "batch": batch, "times": {}, "work": {}, "checks": {}}
        return self._rows.setdefault((batch, tokens), empty)


def markdown(content: Mapping[str, Any]) -> str:
    """The table: a column for each case, a row for each implementation, ratios, limits; then break-even and reasons."""
    rows, ours = content["rows"], content["ours"]
    columns = [*content["dense"], *content["peers"], *ours]
    lines = [_line(f"{content['what']}, {content['unit']}", [case_name(row["tokens"], row["batch"]) for row in rows]),
             "|" + "---|" * (len(rows) + 1)]
    for column in columns:
        name = f"**{column}**" if column in ours else column
        lines.append(_line(name, [_cell(row["times"].get(column)) for row in rows]))
    for dense in content["dense"]:
        for column in ours:
            ratios = [_ratio(row["times"].get(dense), row["times"].get(column)) for row in rows]
            lines.append(_line(f"{dense} / {column}", ratios))
    flop, byte = ("TFLOP", "GB") if content["unit"] == "ms" else ("GFLOP", "MB")
    for column in ours:
        work = [row["work"].get(column) for row in rows]
        lines.append(_line(f"{column}: {flop}, search + attention",
                           [_counts(entry, "search_flops", " + ", "attention_flops", flop) for entry in work]))
        lines.append(_line(f"{column}: {byte} of device memory / gathered",
                           [_counts(entry, "device_bytes", " / ", "gathered_bytes", byte) for entry in work]))
    for column in [*content["dense"], *ours]:
        lines.append(_line(f"{column}: of the limit", [_share(row, column) for row in rows]))
    return "\n".join([*lines, "", *_footer(content), ""])


def times(content: Mapping[str, Any], column: str, *, batch: int = 1) -> dict[int, float]:
    """Median over tokens, of one column."""
    return {
        row["tokens"]: row["times"][column]["median"] for row in content["rows"]
        if row["batch"] == batch and "median" in row["times"].get(column, {})
    }


def break_evens(content: Mapping[str, Any]) -> dict[tuple[str, str], BreakEven]:
    """Where each hip-trt column begins to be ahead of each dense one, at batch 1."""
    found = {
        (ours, dense): break_even(times(content, ours), times(content, dense))
        for ours in content["ours"] for dense in content["dense"]
    }
    return {pair: value for pair, value in found.items() if value is not None}


def case_name(tokens: int, batch: int) -> str:
    """Such as "128k" or "1M, batch 16"."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens % unit == 0:
            length = f"{tokens // unit}{letter}"
            break
    else:
        length = str(tokens)
    return length if batch == 1 else f"{length}, batch {batch}"


def _footer(content: Mapping[str, Any]) -> list[str]:
    rates, machine = content["rates"], content.get("environment", {})
    lines = [f"- Break-even of {ours} against {dense}, batch 1: {value}."
             for (ours, dense), value in break_evens(content).items()]
    lines.append(
        f"- Limit: the larger of counted FLOP at {rates['flops_per_second'] / 1e12:.0f} TFLOP/s and counted bytes of "
        f"device memory at {rates['bytes_per_second'] / 1e12:.1f} TB/s."
    )
    for column in [*content["ours"], *content["peers"]]:
        results = [row["checks"][column] for row in content["rows"] if column in row["checks"]]
        if results:
            lines.append(f"- {column}, before timing: {_checks(results)}.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in content["rows"]:
        for column, entry in row["times"].items():
            outside = content["unit"] == "µs" and entry.get("how") == "single calls"
            reason = "not captured: single calls, launches included" if outside else entry.get("failed")
            if reason:
                reasons.setdefault((column, reason), []).append(case_name(row["tokens"], row["batch"]))
    lines += [f"- {column} at {'; '.join(cases)}: {reason}." for (column, reason), cases in reasons.items()]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    return [*lines, f"- {facts}."] if facts else lines


def _line(name: str, cells: list[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return _number(entry["median"]) if "median" in entry else "not run" if "not run" in entry["failed"] else "failed"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None) -> str:
    if not above or not below or "median" not in above or "median" not in below:
        return ""
    return f"{above['median'] / below['median']:.2g}"


def _counts(work: Mapping[str, Any] | None, first: str, sign: str, second: str, unit: str) -> str:
    scale = {"T": 1e12, "G": 1e9, "M": 1e6}[unit[0]]
    return "" if work is None else f"{work[first] / scale:.2g}{sign}{work[second] / scale:.2g}"


def _share(row: Mapping[str, Any], column: str) -> str:
    entry, work = row["times"].get(column, {}), row["work"].get(column)
    return f"{work['least'] / entry['median']:.0%}" if work and "median" in entry else ""


def _checks(results: Sequence[Mapping[str, Any]]) -> str:
    errors = [result["error"] for result in results]
    text = "output is not finite" if None in errors else f"largest relative error {max(errors):.1e}"
    if "chosen_blocks" in results[0]:
        rows, agreed, chosen = (sum(result[name] for result in results)
                                for name in ("rows", "agreed_blocks", "chosen_blocks"))
        text += f" over {rows:,} rows, {agreed:,} of {chosen:,} chosen blocks the same as the reference's"
    if "triton" in results[0]:
        text += f"; it ran with Triton {results[0]['triton']}"
    return text


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
