"""The margin rule itself: what it decides and what it catches."""

from __future__ import annotations

import math

import pytest
import torch
from margin_rule import assert_agree, compare


def test_rows_with_a_margin_are_decided() -> None:
    expected = torch.tensor([[10.0, 9.9, 0.0], [10.0, 5.0, 0.0], [-10.0, -9.0, 1.0]])
    assert compare(expected, expected, 0.02).decided == 2  # 0.1 of 10 is no margin
    assert compare(expected, expected, 0.0).decided == 3


def test_close_tokens_may_change_places_and_decided_ones_may_not() -> None:
    expected = torch.tensor([[10.0, 9.9, 0.0]])
    found = torch.tensor([[9.9, 10.0, 0.0]])
    assert assert_agree(expected, found, 0.02).wrong == 0
    with pytest.raises(AssertionError, match=r"off by 1\.00e-02"):
        assert_agree(expected, found, 1e-3)
    assert compare(torch.tensor([[10.0, 5.0]]), torch.tensor([[5.0, 10.0]]), 0.02).wrong == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_agree(value: float) -> None:
    with pytest.raises(AssertionError):
        assert_agree(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, value]]), 0.1)
