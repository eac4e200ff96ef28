"""What a row of the study's results is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention import Decoding
from .selection import Method


@dataclass(frozen=True)
class Case:
    """A method, the tokens it may choose, the steps between searches, the threshold for values."""

    method: Method
    budget: int
    interval: int = 1
    threshold: float = 0.0
    renormalised: bool = False

    def decoding(self) -> Decoding:
        return Decoding(self.method, self.budget, self.threshold, self.renormalised)

    def as_json(self) -> dict[str, Any]:
        return {"method": self.method.name, "budget": self.budget, "interval": self.interval,
                "threshold": self.threshold, "renormalised": self.renormalised}
