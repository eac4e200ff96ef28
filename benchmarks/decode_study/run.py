"""Measure everything, most important first, and stop in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hip_trt.evaluate.models import encode
from hip_trt.evaluate.texts import Text

from . import facts, mass, perplexity
from .case import Case
from .methods import CHOSEN, CHOSEN_RAW, EXACT, FINALISTS, REUSED, THRESHOLDED
from .selection import DENSE

BUDGET = 8192
"""Tokens that are chosen, by default."""
WIDER = 12_288
"""Tokens that might be chosen for quality."""
THRESHOLDS = (1e-5, 3e-5, 1e-4)
INTERVAL = 8
STRETCH, STRETCHES = 8192, 16
"""Tokens of a stretch, and stretches, of the contexts in which attention is looked at."""

Save = Callable[[str, list[dict[str, Any]]], None]


def stretches_of(tokenizer: Any, text: Text, count: int) -> list[list[int]]:
    """Up to ``count`` stretches of a text, one after the other, for perplexity."""
    tokens = perplexity.TOKENS
    ids = encode(tokenizer, text.content[1000:], count * tokens, text.name, least=tokens)
    return [ids[first : first + tokens] for first in range(0, len(ids) - tokens + 1, tokens)]


def cases_at_default() -> list[Case]:
    """The default budget, choices that are kept, values that are left out."""
    return [
        *(Case(method, BUDGET) for method in FINALISTS),
        *(Case(method, BUDGET, INTERVAL) for method in REUSED),
        *(Case(method, BUDGET, 1, threshold) for method in THRESHOLDED for threshold in THRESHOLDS),
        *(Case(CHOSEN, BUDGET, 1, threshold, renormalised=True) for threshold in THRESHOLDS),
    ]


def cases_to_choose() -> list[Case]:
    """More blocks, and other intervals, for what may be chosen."""
    return [
        Case(CHOSEN, WIDER), Case(CHOSEN, BUDGET, 2), Case(CHOSEN, BUDGET, 0), Case(CHOSEN, WIDER, INTERVAL),
        Case(CHOSEN, BUDGET, 4), Case(EXACT, WIDER), Case(CHOSEN_RAW, WIDER), Case(EXACT, BUDGET, 0),
    ]


def facts_to_choose() -> list[Case]:
    """The same for facts, and dense."""
    return [
        Case(DENSE, 0), Case(CHOSEN, WIDER), Case(CHOSEN, 2 * BUDGET), Case(CHOSEN, BUDGET, 2), Case(CHOSEN, BUDGET, 0),
        Case(CHOSEN, BUDGET, 4), Case(CHOSEN, WIDER, INTERVAL), Case(CHOSEN, 2 * BUDGET, INTERVAL),
        Case(EXACT, BUDGET, 0), Case(EXACT, BUDGET, 2), Case(EXACT, 2 * BUDGET, INTERVAL), Case(CHOSEN_RAW, WIDER),
    ]


def cases_below() -> list[Case]:
    """Smaller budgets."""
    quarter, eighth, least = map(perplexity.budget_of, perplexity.SHARES)
    return [
        *(Case(method, budget) for budget in (quarter, least) for method in FINALISTS),
        *(Case(method, BUDGET // 2, INTERVAL) for method in REUSED),
        *(Case(method, eighth) for method in FINALISTS),
    ]


def _after(before: list[dict[str, Any]], save: Save, rows: list[dict[str, Any]]) -> None:
    save("perplexity", before + rows)


def measure(
    model: Any, tokenizer: Any, recall: Any, texts: Mapping[str, Text], long: Sequence[int], *, seconds: float,
    say: Callable[[str], None], save: Save,
) -> None:
    """All of it.

    Args:
        model, tokenizer: the sample, in float32.
        recall: the recall model.
        texts: for perplexity.
        long: STRETCHES x STRETCH tokens, for attention.
        seconds: after which nothing more of perplexity is begun.
        say: is told what is done.
        save: gets a part's name and its rows so far.
    """
    began = time.monotonic()
    stretches = [long[first : first + STRETCH] for first in range(0, len(long), STRETCH)]
    save("mass", mass.measure(
        model, stretches, (32_768, 131_072), FINALISTS, (4096, 8192, 16_384), say=lambda line: None))
    say("mass is done")

    def left() -> bool:
        return time.monotonic() - began < seconds

    rows: list[dict[str, Any]] = []
    for count, cases in ((2, [*cases_at_default(), *cases_to_choose()]), (1, cases_below())):
        read = {name: stretches_of(tokenizer, text, count) for name, text in texts.items()}
        rows += perplexity.measure(model, read, cases, say=lambda line: None, go_on=left,
                                   save=partial(_after, list(rows), save))
        say(f"perplexity of {count} stretches a text is done")
        if count == 2:
            asked = [*(Case(method, BUDGET) for method in FINALISTS),
                     *(Case(method, BUDGET, INTERVAL) for method in REUSED),
                     *(Case(method, BUDGET // 2) for method in REUSED), *facts_to_choose()]
            facts.measure(recall, (131_072, 65_536, 32_768), asked, contexts=10, say=lambda line: None,
                          save=lambda found: save("facts", found))
            say("facts are done")
