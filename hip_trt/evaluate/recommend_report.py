"""The recommendation as a study: tables and findings from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hip_trt.evaluate.retrieval_report import EQUAL
from hip_trt.evaluate.study import Cell, Study, Table

_MODES = {"prefill": "Prefill", "decode": "Decode"}


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study of what :func:`hip_trt.evaluate.recommend.recommend` gave."""
    return Study(
        "recommend", "Which config for which length and loss of quality", command, parameters, measured_on, data,
        tables=[*(_table(data, mode) for mode in _MODES if _of(data, mode)), *_retrieval_table(data)],
        findings=findings(data),
        notes=[
            "Loss is the change of perplexity on the worst text of the perplexity study, at the length that the table "
            "names: one small model, so a guide and no promise. Measure your own model before you rely on it.",
            "Cheapest means the least work counted from the operator's definition for a layer of Llama-3.1-8B's "
            "geometry: operations in prefill, bytes read in a decode step. Speed-up is over the fastest dense kernel, "
            "one sequence, where that very config was timed.",
            *(f"{name}: {what}." for name, what in data["sources"].items()),
        ],
    )


def _of(data: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    return [row for row in data["rows"] if row["mode"] == mode]


def _table(data: Mapping[str, Any], mode: str) -> Table:
    body: list[list[Cell]] = []
    for row in _of(data, mode):
        body.append([
            f"{row['tokens']:,}", row["speedup"], *(_cell(row, choice) for choice in row["choices"]),
            _where(row),
            None if row["retrieval"] is None else f"{row['retrieval']:.0%}",
        ])
    return Table(
        f"{_MODES[mode]}, by length",
        ["tokens", "default's speed-up", *(f"loss up to {budget:g}%" for budget in data["budgets"]),
         "quality measured at", "default's retrieval"],
        body, note="Stay dense where the default is not faster than dense. Retrieval: facts found, of those that dense "
        "attention finds.", formats={"default's speed-up": ".2f"},
    )


def _where(row: Mapping[str, Any]) -> str:
    """Which texts the losses are of."""
    at = row["quality_at"]
    if at is None:
        return ""
    words = [f"{at:,}"]
    words += [f"RoPE {row['scaling']}"] if row["scaling"] != "none" else []
    words += ["shorter texts"] if at < row["tokens"] else []
    words += [] if row["dense_works"] else ["dense breaks there"]
    return ", ".join(words)


def _cell(row: Mapping[str, Any], choice: Mapping[str, Any] | None) -> str:
    if stays_dense(row):
        return "stay dense"
    if row["exact"]:
        return "any: nothing is pruned"
    if choice is None:
        return "none tried"
    speed = "" if choice["speedup"] is None else f", {choice['speedup']:.1f}x"
    return f"{choice['label']} ({choice['loss']:+.2f}%{speed})"


def stays_dense(row: Mapping[str, Any]) -> bool:
    """Whether the default was timed at this length and is no faster than dense."""
    return row["speedup"] is not None and row["speedup"] <= 1


def _retrieval_table(data: Mapping[str, Any]) -> list[Table]:
    found: Mapping[str, Mapping[str, float]] = data["retrieval"]
    if not found:
        return []
    labels = list(dict.fromkeys(label for shares in found.values() for label in shares))
    body: list[list[Cell]] = [
        [label, *(100 * shares[label] if label in shares else None for shares in found.values())] for label in labels
    ]
    columns = [f"{int(tokens):,} tokens, %" for tokens in found]
    return [Table(
        "Retrieval, by config", ["what differs from the default", *columns], body,
        note="Facts found, of those that dense attention finds, in the kind of context in which fewest are.",
        formats=dict.fromkeys(columns, ".0f"),
    )]


def _retrieval_findings(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the default finds, and which configs find as much as dense."""
    if not found:
        return []
    said = []
    shares = [by_config["default"] for by_config in found.values() if "default" in by_config]
    lengths = f"{int(min(found, key=int)):,} to {int(max(found, key=int)):,} tokens"
    if shares:
        said.append(f"Retrieval over {lengths}: the default finds {min(shares):.0%} to {max(shares):.0%} of the facts "
                    "that dense attention finds"
                    + (": where facts anywhere in the context must be found, do not use it."
                       if min(shares) < 1 - EQUAL else "."))
    least = {
        label: min(by_config[label] for by_config in found.values())
        for label in next(iter(found.values())) if all(label in by_config for by_config in found.values())
    }
    equal = [label for label, share in least.items() if share >= 1 - EQUAL]
    best = max(least, key=least.__getitem__, default=None)
    if equal:
        said.append(f"Retrieval over {lengths}, at least {1 - EQUAL:.0%} of what dense finds everywhere: "
                    f"{'; '.join(equal)}.")
    elif best is not None:
        said.append(f"Retrieval over {lengths}: no config tried finds {1 - EQUAL:.0%} of what dense finds everywhere; "
                    f"the best is {best}, {least[best]:.0%} at worst.")
    return said


def findings(data: Mapping[str, Any]) -> list[str]:
    """What follows, in sentences."""
    said = []
    for mode, name in _MODES.items():
        rows = _of(data, mode)
        timed = [row for row in rows if row["speedup"] is not None]
        if timed:
            said.append(f"{name}: {_when(timed)}")
        for number, budget in enumerate(data["budgets"]):
            useful = [row for row in rows if not stays_dense(row) and not row["exact"] and row["quality_at"]]
            if useful:
                said.append(f"{name}, loss up to {budget:g}%: {_ranges(useful, number)}.")
        beyond = [row["tokens"] for row in rows if row["quality_at"] and row["quality_at"] < row["tokens"]]
        if beyond:
            said.append(f"{name}: from {beyond[0]:,} tokens on quality was not measured; it is that of shorter texts.")
    said += _retrieval_findings(data["retrieval"])
    said += [f"Missing: {what}." for what in data["missing"]]
    return said


def _when(timed: Sequence[Mapping[str, Any]]) -> str:
    """From which measured length on the default is faster, for good."""
    behind = [row for row in timed if stays_dense(row)]
    ahead = [row for row in timed if not behind or row["tokens"] > behind[-1]["tokens"]]
    if not ahead:
        return f"the default is not faster than dense at any timed length, up to {timed[-1]['tokens']:,} tokens: " \
               "stay dense."
    gain = f"{ahead[-1]['speedup']:.1f} times as fast at {ahead[-1]['tokens']:,}"
    if not behind:
        return f"the default is faster than dense at every timed length, from {ahead[0]['tokens']:,} tokens on; {gain}."
    return (f"stay dense up to {behind[-1]['tokens']:,} tokens; of the lengths timed, the default is faster from "
            f"{ahead[0]['tokens']:,} on; {gain}.")


def _ranges(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """Lengths with one choice together."""
    groups: list[tuple[str, list[int]]] = []
    for row in rows:
        choice = row["choices"][number]
        label = "no config that was tried" if choice is None else f"{choice['label']} ({choice['loss']:+.2f}%)"
        if groups and groups[-1][0] == label:
            groups[-1][1].append(row["tokens"])
        else:
            groups.append((label, [row["tokens"]]))
    return "; ".join(
        f"{label} at {lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "") + " tokens"
        for label, lengths in groups
    )
