"""The recommendation as a study: tables and findings from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hip_trt.evaluate.recommend import BASELINES
from hip_trt.evaluate.retrieval_report import EQUAL
from hip_trt.evaluate.study import Cell, Study, Table

_MODES = {"prefill": "Prefill", "decode": "Decode"}
FEW = 0.9
"""Of what dense finds: a config that finds less is not to be used where facts must be found."""


def study(
    data: Mapping[str, Any], *, command: str, parameters: Mapping[str, Any], measured_on: Mapping[str, Any]
) -> Study:
    """The study of what :func:`hip_trt.evaluate.recommend.recommend` gave."""
    return Study(
        "recommend", "Which config for which length and loss of quality", command, parameters, measured_on, data,
        tables=[*(_table(data, mode) for mode in _MODES if _of(data, mode)), *_retrieval_table(data)],
        findings=findings(data),
        notes=[
            "Loss is the change of perplexity on the worst text of the perplexity study, ± its standard error, at the "
            "length that the table names: one small model, so a guide and no promise. Measure your own model before "
            "you rely on it.",
            "Only budgets are recommended, the smallest that keeps within the limit: of dozens of configs that were "
            "tried, one that does so by chance would be picked. Speed-up is over the fastest dense kernel, one layer, "
            "one sequence, where that very config was timed.",
            *(f"{name}: {what}." for name, what in data["sources"].items()),
        ],
    )


def _of(data: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    return [row for row in data["rows"] if row["mode"] == mode]


def _table(data: Mapping[str, Any], mode: str) -> Table:
    body: list[list[Cell]] = [
        [f"{row['tokens']:,}", row["speedup"], *(_cell(row, choice) for choice in row["choices"]), _where(row),
         *_facts(row)]
        for row in _of(data, mode)
    ]
    return Table(
        f"{_MODES[mode]}, by length",
        ["tokens", "default's speed-up", *(f"loss up to {budget:g}%" for budget in data["budgets"]),
         "quality measured at", "facts found, default", "facts found, best config"],
        body, note="Stay dense: the budget that keeps within the limit, or a smaller one, is no faster than dense, for "
        "one sequence; in batches decode is ahead from shorter lengths on (the study of break-even). At least: quality "
        "was measured at a shorter length only, and losses grow with length. Facts: of those that dense attention "
        "finds, in the kind of context in which fewest are.", formats={"default's speed-up": ".2f"},
    )


def _where(row: Mapping[str, Any]) -> str:
    """Which texts the losses are of."""
    at = row["quality_at"]
    if at is None:
        return ""
    words = [f"{at:,}"]
    if row["scaling"] != "none":
        words += [f"RoPE {row['scaling']}, with which dense works on {row['dense_works']} texts"]
    return ", ".join(words)


def _facts(row: Mapping[str, Any]) -> list[Cell]:
    best = row["retrieval_best"]
    return [None if row["retrieval"] is None else f"{row['retrieval']:.0%}",
            None if best is None else f"{best['share']:.0%} ({best['label']})"]


def _cell(row: Mapping[str, Any], choice: Mapping[str, Any] | None) -> str:
    if row["exact"]:
        return "stay dense" if stays_dense(row) else "any: nothing is pruned"
    if choice is None:
        return "stay dense" if stays_dense(row) else "none tried suffices"
    if choice["dense"]:
        return "stay dense"
    speed = "" if choice["speedup"] is None else f"{choice['speedup']:.1f}x"
    if beyond(row):
        return f"at least {choice['label']}" + (f" ({speed})" if speed else "")
    loss = f"{choice['loss']:+.2f}%" + ("" if choice["error"] is None else f" ± {choice['error']:.2f}")
    return f"{choice['label']} ({', '.join(filter(None, [loss, speed]))})"


def stays_dense(row: Mapping[str, Any]) -> bool:
    """Whether the default was timed at this length and is no faster than dense."""
    return row["speedup"] is not None and row["speedup"] <= 1


def beyond(row: Mapping[str, Any]) -> bool:
    """Whether quality was measured on shorter texts only."""
    return row["quality_at"] is not None and row["quality_at"] < row["tokens"]


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
        note="Facts found, of those that dense attention finds, in the kind of context in which fewest are. "
        + " ".join(f"{lengths}: {models}." for models, lengths in _by_model(data)),
        formats=dict.fromkeys(columns, ".0f"),
    )]


def _by_model(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Models of the retrieval studies, and their lengths."""
    return [(models, _span(lengths)) for models, lengths in _lengths_by_model(data).items()]


def _lengths_by_model(data: Mapping[str, Any]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for tokens in data["retrieval"]:
        groups.setdefault(", ".join(data["retrieval_of"][tokens]), []).append(int(tokens))
    return groups


def _span(lengths: Sequence[int]) -> str:
    return f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "") + " tokens"


def _retrieval_findings(data: Mapping[str, Any]) -> list[str]:
    """What the default finds, and which configs find as much as dense."""
    said = []
    for models, lengths in _lengths_by_model(data).items():
        found = [data["retrieval"][str(tokens)] for tokens in lengths]
        what = f"Retrieval, {models}, {_span(lengths)}"
        shares = [by_config["default"] for by_config in found if "default" in by_config]
        if shares:
            said.append(f"{what}: the default finds {_percents(shares)} of the facts that dense attention finds"
                        + (": where facts anywhere in such a context must be found, do not use it."
                           if min(shares) < FEW else "."))
        least = {label: min(by_config[label] for by_config in found) for label in found[0]
                 if label not in BASELINES and all(label in by_config for by_config in found)}
        equal = [label for label, share in least.items() if share >= 1 - EQUAL]
        best = max(least, key=least.__getitem__, default=None)
        if equal:
            said.append(f"{what}, at least {1 - EQUAL:.0%} of what dense finds: {'; '.join(equal)}.")
        elif best is not None:
            said.append(f"{what}: no config tried finds {1 - EQUAL:.0%} of what dense finds in every kind of context; "
                        f"the best is {best}, {least[best]:.0%} at worst.")
    return said


def _percents(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def findings(data: Mapping[str, Any]) -> list[str]:
    """What follows, in sentences."""
    said = []
    for mode, name in _MODES.items():
        rows = _of(data, mode)
        timed = [row for row in rows if row["speedup"] is not None]
        if timed:
            said.append(f"{name}: {_when(timed)}")
        for number, budget in enumerate(data["budgets"]):
            useful = [row for row in rows if not row["exact"] and row["quality_at"]]
            if useful:
                said.append(f"{name}, loss up to {budget:g}%: {_ranges(useful, number)}.")
        unknown = [row["tokens"] for row in rows if beyond(row)]
        if unknown:
            said.append(f"{name}: from {unknown[0]:,} tokens on quality was not measured.")
    said += _retrieval_findings(data)
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
        if choice["dense"] if choice else stays_dense(row):
            label = "stay dense"
        elif choice is None:
            label = "no budget tried suffices"
        else:
            label = f"at least {choice['label']}" if beyond(row) else f"{choice['label']} ({choice['loss']:+.2f}%)"
        if groups and groups[-1][0] == label:
            groups[-1][1].append(row["tokens"])
        else:
            groups.append((label, [row["tokens"]]))
    return "; ".join(f"{label} at {_span(lengths)}" for label, lengths in groups)
