"""Which config for which length and loss of quality, and when to stay dense: from the results of the other studies.

Nothing is measured here. Quality is the worst text of eval_perplexity.json; speed is eval_break_even.json, or the
kernel_*.json of the benchmarks; retrieval is eval_retrieval*.json. What is not there is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hip_trt.bench import roofline
from hip_trt.bench.geometry import LLAMA_8B
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.perplexity_grid import METHODS
from hip_trt.evaluate.perplexity_report import works
from hip_trt.evaluate.retrieval import DENSE
from hip_trt.evaluate.retrieval_report import PASSED, counts, of_dense
from hip_trt.evaluate.study import Study

BUDGETS = (0.5, 1.0, 2.0)
"""Percent of perplexity that may be lost on the worst text."""
BASELINES = (METHODS["exact"], METHODS["none"])
"""Labels of retrieval's rows that are no config of HiP."""

_BUDGET_FIELDS = {"prefill": "mask_k", "decode": "decode_mask_k"}
_ONLY_DECODE = {"decode_mask_k", "reuse_level", "refresh_interval"}
_ONLY_PREFILL = {"mask_k", "block_q", "stride_q"}


@dataclass(frozen=True)
class Curve:
    """Times of one layer over the length.

    Attributes:
        mode: "prefill", "decode" or "decode, reused".
        config: fields of HipConfig; None for dense attention.
        times: by tokens, in one unit for a mode.
    """

    mode: str
    config: Mapping[str, Any] | None
    times: Mapping[int, float]


@dataclass
class Evidence:
    """What was found in a folder of results.

    Attributes:
        sections: of the perplexity study, by mode rows, shortest text first; those of checks left out.
        curves: of one sequence.
        retrieval: data of retrieval studies, and "model", whose they are.
        sources: the files, with the machine and date of each.
        missing: what is not there, and how to make it.
    """

    sections: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    retrieval: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def gather(folder: str | Path) -> Evidence:
    """Read what a folder holds.

    Raises:
        RuntimeInputError: the folder is not there, a file is damaged, or there is no perplexity study.
    """
    folder, found = Path(folder), Evidence()
    if not folder.is_dir():
        raise RuntimeInputError(f"{folder}: no such folder.", "Name the --out of the other studies.")
    file = folder / "eval_perplexity.json"
    if not file.is_file():
        raise RuntimeInputError(
            f"{file}: not there, so nothing is known of quality.", "Make it with hip-trt eval perplexity."
        )
    study = _study(file, found)
    sections = [section for section in study.data["sections"] if any("worst" in row for row in section["rows"])]
    usual = sections[0]["dtype"] if sections else None
    found.sections = sorted((part for part in sections if part["dtype"] == usual), key=lambda part: int(part["tokens"]))
    for name, read, how in (
        ("eval_break_even.json", _break_even, "speed of each config: hip-trt eval break-even"),
        ("kernel_prefill.json", _kernel, "speed in prefill beside all peers: benchmarks/kernel_prefill.py"),
        ("kernel_decode.json", _kernel, "speed in decode beside all peers: benchmarks/kernel_decode.py"),
    ):
        if (folder / name).is_file():
            found.curves += read(folder / name, found)
        else:
            found.missing.append(f"{name} ({how})")
    for path in sorted(folder.glob("eval_retrieval*.json")):
        study = _study(path, found)
        found.retrieval.append({**study.data, "model": str(study.parameters.get("model", "a model"))})
    if not found.retrieval:
        found.missing.append("eval_retrieval*.json (facts found in long contexts: hip-trt eval retrieval)")
    return found


def _study(path: Path, found: Evidence) -> Study:
    study = Study.read(path)
    machine = study.measured_on
    found.sources[path.name] = f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('date')}"
    return study


def _break_even(path: Path, found: Evidence) -> list[Curve]:
    curves = _study(path, found).data["curves"]
    return [_curve(one["mode"], one["config"], one["times"]) for one in curves if one["batch"] == 1]


def _kernel(path: Path, found: Evidence) -> list[Curve]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["environment"]
        found.sources[path.name] = f"{machine.get('gpu')}, {machine.get('date')}"
        modes = {"hip-trt": "prefill", "hip-trt, searched": "decode", "hip-trt, reused nodes": "decode, reused"}
        rows = [row for row in content["rows"] if row["batch"] == 1]
        columns = [*((name, modes[name], content["config"]) for name in content["ours"]),
                   *((name, content["what"].split(",")[0], None) for name in content["dense"])]
        return [
            _curve(mode, config, {row["tokens"]: row["times"][name]["median"] for row in rows
                                  if "median" in row["times"].get(name, {})})
            for name, mode, config in columns
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeInputError(f"{path}: not a benchmark's JSON: {error!r}.", "Make it again.") from None


def _curve(mode: str, config: Mapping[str, Any] | None, times: Mapping[Any, float]) -> Curve:
    return Curve(mode, config, {int(tokens): float(time) for tokens, time in times.items()})


def recommend(evidence: Evidence, budgets: Sequence[float] = BUDGETS) -> dict[str, Any]:
    """One row for each mode and length that was timed, or read by the perplexity study.

    Only budgets (mask_k, decode_mask_k) are recommended: of dozens of configs that were tried, one that is within a
    limit by chance would be picked, and loss falls with the budget as with nothing else.

    Returns:
        {"rows", "retrieval": shares by length and config's label, "retrieval_of": models by length, "budgets",
        "missing", "sources"}. A row has mode; tokens; speedup, of the default over the fastest dense kernel, None where
        it was not timed; exact, whether HiP chooses everything; quality_at and scaling, the length and RoPE scaling of
        the texts that losses are of; dense_works, on how many of the texts; retrieval, the share of what dense finds
        that the default finds; retrieval_best, the label and share of the config that finds most; and choices, for
        each limit the smallest budget, or None where none that was tried keeps within it: its changes, label, loss,
        error (of the loss), speedup, work over the default's, and dense: whether it, or a smaller budget, was timed
        and is no faster than dense attention.
    """
    rows = []
    for mode in _BUDGET_FIELDS:
        timed = {tokens for curve in evidence.curves if curve.mode.startswith(mode) and curve.config
                 for tokens in curve.times}
        read = {int(section["tokens"]) for section in evidence.sections if _rows(section, mode)}
        rows += [_row(evidence, mode, tokens, budgets) for tokens in sorted(timed | read)]
    lengths = sorted({row["tokens"] for data in evidence.retrieval for row in data["rows"]})
    found = {str(tokens): shares for tokens in lengths if (shares := retrieval(evidence.retrieval, tokens))}
    models = {tokens: list(dict.fromkeys(data["model"] for data in evidence.retrieval if _judged(data, int(tokens))))
              for tokens in found}
    return {"rows": rows, "retrieval": found, "retrieval_of": models, "budgets": list(budgets),
            "missing": evidence.missing, "sources": evidence.sources}


def _row(evidence: Evidence, mode: str, tokens: int, budgets: Sequence[float]) -> dict[str, Any]:
    default = HipConfig.create()
    section = _nearest([part for part in evidence.sections if _rows(part, mode)], tokens)
    shares = retrieval(evidence.retrieval, tokens)
    tried = [label for label in shares if label not in BASELINES]
    best = max(tried, key=shares.__getitem__, default=None)
    return {
        "mode": mode, "tokens": tokens, "speedup": speedup(evidence.curves, default, mode, tokens),
        "exact": tokens <= default.sink_tokens + default.window_tokens + getattr(default, _BUDGET_FIELDS[mode]),
        "quality_at": section and section["tokens"], "scaling": section and section["scaling"],
        "dense_works": section and f"{sum(map(works, section['dense'].values()))} of {len(section['dense'])}",
        "retrieval": shares.get("default"),
        "retrieval_best": None if best is None else {"label": best, "share": shares[best]},
        "choices": [_smallest(evidence, section, mode, tokens, budget) for budget in budgets],
    }


def _rows(section: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    """The first one of a mode, and those that differ from it in the budget alone, smallest first."""
    rows = [row for row in section["rows"] if row["mode"] == mode and row["method"] == "hip" and "worst" in row]
    field = _BUDGET_FIELDS[mode]

    def others(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row["changes"].items() if name != field}

    return sorted((row for row in rows if others(row) == others(rows[0])), key=lambda row: _budget(row, mode))


def _budget(row: Mapping[str, Any], mode: str) -> int:
    return int(getattr(HipConfig.create(**row["changes"]), _BUDGET_FIELDS[mode]))


def _nearest(sections: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any] | None:
    """The shortest section that is long enough, else the longest: quality is not taken from where less is pruned."""
    return next((section for section in sections if section["tokens"] >= tokens), sections[-1] if sections else None)


def _smallest(
    evidence: Evidence, section: Mapping[str, Any] | None, mode: str, tokens: int, budget: float
) -> dict[str, Any] | None:
    rows = _rows(section, mode) if section else []
    row = next((row for row in rows if row["worst"] <= budget), None)
    if row is None:
        return None
    times = [speedup(evidence.curves, HipConfig.create(**other["changes"]), mode, tokens)
             for other in rows[:rows.index(row) + 1]]
    return {"label": row["label"], "changes": row["changes"], "loss": row["worst"], "text": row["worst_text"],
            "error": row["texts"].get(row["worst_text"], {}).get("error"),
            "speedup": times[-1], "dense": any(time is not None and time <= 1 for time in times),
            "work": work(HipConfig.create(**row["changes"]), mode, tokens) / work(HipConfig.create(), mode, tokens)}


def work(config: HipConfig, mode: str, tokens: int) -> float:
    """What a layer of Llama-3.1-8B's geometry has to do: operations in prefill, bytes read in a decode step (the mean
    of an interval between searches from the top)."""
    if mode == "prefill":
        return roofline.prefill(LLAMA_8B, config, tokens).flops
    searched, reused = (roofline.decode(LLAMA_8B, config, tokens, 1, reused=flag).device_bytes
                        for flag in (False, True))
    return (searched + (config.refresh_interval - 1) * reused) / config.refresh_interval


def speedup(curves: Iterable[Curve], config: HipConfig, mode: str, tokens: int) -> float | None:
    """How many times as fast as the fastest dense kernel; None where one or the other was not timed.

    The first curve of a config counts. A decode step is the mean of an interval between searches from the top.
    """
    curves = list(curves)
    dense = [curve.times[tokens] for curve in curves
             if curve.config is None and curve.mode == mode and tokens in curve.times]

    def own(name: str) -> float | None:
        return next((curve.times[tokens] for curve in curves
                     if curve.mode == name and curve.config is not None and tokens in curve.times
                     and _same(curve.config, config, mode)), None)

    time = own(mode)
    if mode == "decode" and time is not None:
        reused = own("decode, reused")
        interval = config.refresh_interval
        if reused is not None:
            time = (time + (interval - 1) * reused) / interval
    return None if time is None or not dense else min(dense) / time


def _same(fields: Mapping[str, Any], config: HipConfig, mode: str) -> bool:
    """Whether two configs compute the same in a mode."""
    other = config.model_dump(mode="json")
    apart = _ONLY_DECODE if mode == "prefill" else _ONLY_PREFILL | {"refresh_interval"}
    apart = apart | {"dense_layers", "page_size"}
    return not config.dense_layers and all(fields[name] == other[name] for name in other if name not in apart)


def retrieval(studies: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, float]:
    """By config's label, the least share, over studies and kinds of contexts, of what dense finds that it finds at a
    length. Kinds in which dense itself fails are left out, and configs that were not tried in every other."""
    shares: dict[str, list[float]] = {}
    kinds = 0
    for data in studies:
        rows = {(row["kind"], row["config"]): row for row in data["rows"] if row["tokens"] == tokens and "right" in row}
        for kind in _judged(data, tokens):
            kinds += 1
            for (other, label), row in rows.items():
                if other == kind and label != DENSE:
                    found, of = of_dense(data, row)
                    shares.setdefault(label, []).append(found / of)
    return {label: min(found) for label, found in shares.items() if len(found) == kinds}


def _judged(data: Mapping[str, Any], tokens: int) -> list[str]:
    """Kinds of contexts in which dense attention finds enough at a length."""
    kinds = []
    for row in data["rows"]:
        if row["tokens"] == tokens and row["config"] == DENSE and "right" in row:
            right, asked = counts(data, row)
            kinds += [row["kind"]] if asked and right / asked >= PASSED else []
    return kinds
