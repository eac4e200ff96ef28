"""The margin rule: when two implementations that differ by rounding must pick the same token (docs/evidence.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BOUNDS: Final = {"float32": 5e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest error of a logit, relative to the largest logit of its row, by the type that a model computes in."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison of logits found.

    Attributes:
        rows: of logits.
        worst: largest error of a logit relative to the largest logit of its row.
        decided: rows whose margin decides the token.
        wrong: decided rows with another token.
    """

    rows: int
    worst: float
    decided: int
    wrong: int


def compare(expected: Tensor, found: Tensor, bound: float) -> Comparison:
    """Compare logits of the same tokens, row by row.

    A row's token is decided where its first logit is ahead of its second by more than twice the bound: each of the two
    may be wrong by the bound, in opposite directions.

    Args:
        expected, found: [N, V].
        bound: see :data:`BOUNDS`.
    """
    expected, found = expected.double().cpu(), found.double().cpu()
    scale = expected.abs().amax(dim=1, keepdim=True)
    errors = (found - expected).abs() / scale
    best = expected.topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > 2 * bound * scale[:, 0]
    wrong = decided & (expected.argmax(dim=1) != found.argmax(dim=1))
    worst = errors.max() if bool(found.isfinite().all()) else torch.tensor(float("inf"))
    return Comparison(len(expected), float(worst), int(decided.sum()), int(wrong.sum()))


def assert_agree(expected: Tensor, found: Tensor, bound: float) -> Comparison:
    """Errors within the bound, and the same tokens wherever the margin decides."""
    result = compare(expected, found, bound)
    assert result.worst <= bound, f"a logit is off by {result.worst:.2e} of its row's largest; allowed is {bound:.0e}"
    assert result.wrong == 0, f"{result.wrong} of {result.decided} decided rows have another token"
    return result
