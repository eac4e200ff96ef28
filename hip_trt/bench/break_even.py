"""The length from which one implementation is faster than another, between the lengths that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Literal


@dataclass(frozen=True)
class BreakEven:
    """Where ``ours`` begins to be the faster one, for good.

    Attributes:
        side: "at" an interpolated length, or everywhere ("below") or nowhere ("above") in what was measured.
        tokens: that length; the shortest, or longest, measured one.
    """

    side: Literal["at", "below", "above"]
    tokens: float

    def __str__(self) -> str:
        if self.side == "at":
            return f"at about {self.tokens:,.0f} tokens"
        ahead, edge = ("ahead", "shortest") if self.side == "below" else ("not ahead", "longest")
        return f"{ahead} at every measured length; the {edge} is {self.tokens:,.0f} tokens"


def break_even(ours: Mapping[int, float], theirs: Mapping[int, float]) -> BreakEven | None:
    """Where the times cross for the last time, both taken as straight lines between points in log-log scale.

    Args:
        ours, theirs: time over tokens, in one unit; only lengths in both count.

    Returns:
        None if no length is in both.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        return None
    lead = [log(theirs[length] / ours[length]) for length in lengths]  # above 0 where ours is faster
    if lead[-1] <= 0:
        return BreakEven("above", lengths[-1])
    behind = [index for index, value in enumerate(lead) if value <= 0]
    if not behind:
        return BreakEven("below", lengths[0])
    left = behind[-1]
    share = -lead[left] / (lead[left + 1] - lead[left])
    tokens = exp(log(lengths[left]) + share * (log(lengths[left + 1]) - log(lengths[left])))
    return BreakEven("at", tokens)
