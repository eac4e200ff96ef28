"""The perplexity study from beginning to end: which settings are read, in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.perplexity import Section, Setting, begin, best_scaling, line, measure
from hip_trt.evaluate.perplexity_grid import LONG, Case
from hip_trt.evaluate.rope_scaling import check

DECODED = 8192
"""Tokens at the end of a long text that are decoded; those before them are prefilled."""


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        tokens: read of each text within the model's context.
        skip: first predictions that do not count, and the prompt of decode rows.
        cases: rows.
        lengths: longer texts to read with scaled RoPE; () for none.
        scalings: of RoPE to try there.
        long_cases: rows there, under the scaling that serves dense attention best.
        float32_check: whether the first prefill and the first decode row are measured once more in float32, at the end.
        seed: of random blocks.
        time_limit: seconds after which no row is begun; None for no limit.
    """

    tokens: int
    skip: int
    cases: Sequence[Case]
    lengths: Sequence[int] = ()
    scalings: Sequence[str] = ("none",)
    long_cases: Sequence[Case] = field(default_factory=lambda: LONG)
    float32_check: bool = False
    seed: int = 0
    time_limit: float | None = None


def run(
    model: Any, texts: Mapping[str, Sequence[int]], options: Options, *, say: Callable[[str], object],
    save: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Measure everything.

    Args:
        model: of transformers, not patched.
        texts: tokens by the text's name; a text that is shorter than a setting is left out of it.
        options: what to measure.
        say: told a line about each finished piece of work.
        save: given the data so far, after each piece.

    Returns:
        {"sections": one for each setting, "unfinished": rows that the time limit left out}. The section of a length
        beyond the model's context that has rows is the one whose scaling serves dense attention best.

    Raises:
        RuntimeInputError: no text is as long as a setting asks, RoPE cannot be scaled so, or predictions are not
            finite.
    """
    for length in (options.tokens, *options.lengths):
        if not any(len(tokens) >= length for tokens in texts.values()):
            raise RuntimeInputError(f"No text has {length:,} tokens.", "Give longer texts, or ask for fewer tokens.")
    for scaling in options.scalings if options.lengths else ():
        check(model, scaling)
    end = None if options.time_limit is None else time.monotonic() + options.time_limit
    sections: list[Section] = []
    unfinished: list[str] = []

    def data() -> dict[str, Any]:
        return {"sections": [section.as_json() for section in sections], "unfinished": unfinished}

    def late(what: str) -> bool:
        if end is None or time.monotonic() < end:
            return False
        unfinished.append(what)
        return True

    def rows(section: Section, cases: Sequence[Case]) -> None:
        for case in cases:
            if not late(f"{section.setting.tokens} tokens, {case.mode}, {case.label}"):
                measure(model, texts, section, case, seed=options.seed)
                say(line(section.rows[-1]))
                save(data())

    def start(setting: Setting) -> Section:
        enough = {name: tokens for name, tokens in texts.items() if len(tokens) >= setting.tokens}
        section = begin(model, enough, setting)
        sections.append(section)
        losses = ", ".join(f"{name} {entry['perplexity']:.3f}" for name, entry in section.as_json()["dense"].items())
        say(f"dense, {setting.tokens:,} tokens, RoPE scaling {setting.scaling}, {setting.dtype}: {losses}")
        save(data())
        return section

    dtype = str(model.dtype).removeprefix("torch.")
    within = Setting(options.tokens, options.skip, options.skip, dtype=dtype)
    rows(start(within), options.cases)
    context = model.config.max_position_embeddings
    for length in options.lengths:
        prompt = max(options.skip, length - DECODED)
        tried = [
            start(Setting(length, options.skip, prompt, scaling, length / context, dtype))
            for scaling in options.scalings if not late(f"{length} tokens, dense, RoPE scaling {scaling}")
        ]
        if tried:
            rows(best_scaling(tried), options.long_cases)
    first = [next((case for case in options.cases if case.mode == mode and case.method == "hip"), None)
             for mode in ("prefill", "decode")]
    checked = [case for case in first if case is not None]
    if options.float32_check and dtype != "float32" and checked and not late("the check in float32"):
        model.float()
        exact = Setting(options.tokens, options.skip, options.skip, dtype="float32")
        rows(start(exact), checked)
        model.to(getattr(torch, dtype))
    return data()
