"""Ways to choose the key blocks of a decode step, from scores of blocks.

Shapes: H KV heads, G query heads of each, R rows, N blocks. Scores [H, G, R, N] are -inf where a block is no candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .representatives import BOUNDS, Representative

NOTHING = float("-inf")

Pool = Callable[[Tensor, Tensor], Tensor]
"""Scores [H, G, R, N], and the log-sum [H, G, R] over sink and window, to one score for the KV head [H, R, N]."""


def largest(scores: Tensor, near: Tensor) -> Tensor:
    """The largest score of all query heads."""
    return scores.amax(1)


def normalised(scores: Tensor, near: Tensor) -> Tensor:
    """The largest, of each head's scores less their own log-sum over the candidates."""
    return (scores - _log_sum(scores)).amax(1)


def summed_mass(scores: Tensor, near: Tensor) -> Tensor:
    """The sum of each head's softmax over the candidates (its logarithm)."""
    return torch.logsumexp(scores - _log_sum(scores), 1)


def share_of_all(scores: Tensor, near: Tensor) -> Tensor:
    """The sum of what each head would give a block of all its attention, sink and window included (its logarithm). With
    exact log-sums no choice of blocks holds more attention."""
    return torch.logsumexp(scores - torch.logaddexp(_log_sum(scores), near[..., None]), 1)


POOL_NAMES: dict[Pool, str] = {
    largest: "raw", normalised: "normalised", summed_mass: "mass", share_of_all: "share of all",
}


def _log_sum(scores: Tensor) -> Tensor:
    return torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0.0)


def best(pooled: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The ``count`` best candidates (all, if there are no more): [H, R, N] bool. Candidates: [H, R, N] bool."""
    places = pooled.masked_fill(~candidates, NOTHING).topk(min(count, pooled.shape[-1]), -1).indices
    return torch.zeros_like(candidates).scatter_(-1, places, True) & candidates


@dataclass(frozen=True)
class Ranking:
    """An order of blocks.

    Attributes:
        representative: what scores them.
        pool: how heads agree.
        share: of the blocks that are chosen by it, where several rankings take turns.
    """

    representative: Representative
    pool: Pool
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.representative.name}, {POOL_NAMES[self.pool]}"


@dataclass(frozen=True)
class Method:
    """A way to choose.

    Attributes:
        first: rankings of all candidates, one after the other; each takes its share of what is still there.
        widen: how many times as many blocks the first stage keeps, where there is a second.
        second: ranking of those.
        block: keys in a block; the budget is of tokens.
        special: "dense", "sink and window only" or "random blocks", which need no ranking.
    """

    first: tuple[Ranking, ...] = ()
    widen: int = 1
    second: Ranking | None = None
    block: int = 64
    special: str = ""

    @property
    def name(self) -> str:
        if self.special:
            return self.special
        shares = len(self.first) > 1
        name = " + ".join(f"{ranking.share:.0%} {ranking.name}" if shares else ranking.name for ranking in self.first)
        if self.second is not None:
            name = f"{self.widen}K by {name}; then {self.second.name}"
        return name + (f", blocks of {self.block}" if self.block != 64 else "")

    @property
    def rankings(self) -> tuple[Ranking, ...]:
        return self.first if self.second is None else (*self.first, self.second)

    @property
    def needs_near(self) -> bool:
        return any(ranking.pool is share_of_all for ranking in self.rankings)

    def chooser(self, keys: Tensor) -> Chooser:
        """Prepare the state of blocks of keys [H, N, block, D]."""
        return Chooser(self, keys)

    def state_bytes(self, dim: int) -> float:
        """Bytes kept of a block and KV head besides keys and values; rankings share the bounds."""
        kept = {_kept(ranking): ranking.representative.state(self.block, dim) for ranking in self.rankings}
        if BOUNDS in kept:
            within = {_kept(ranking) for ranking in self.rankings if ranking.representative.bounds}
            return sum(kept.values()) - kept[BOUNDS] * len(within)
        return sum(kept.values())

    def bytes_per_step(self, tokens: int, budget: int, *, heads: int, dim: int, near: int) -> dict[str, float]:
        """Bytes that a step reads of one layer and sequence.

        Args:
            tokens: of the context.
            budget: tokens chosen.
            heads: KV heads.
            dim: of a head.
            near: tokens of sink and window.

        Returns:
            By part: scan, second stage, attention.
        """
        candidates = max(0, tokens - near) / self.block
        every = self.special == "dense" or candidates * self.block <= budget
        scan, second = (
            sum({_kept(ranking): ranking.representative.read(self.block, dim) for ranking in stage}.values())
            for stage in (self.first, self.rankings[len(self.first) :])
        )
        attended = tokens if every else near + (0 if self.special == "sink and window only" else budget)
        return {
            "scan": 0.0 if every else heads * candidates * scan,
            "second": 0.0 if every else heads * self.widen * budget / self.block * second,
            "attention": float(heads * attended * dim * 2 * 2),
        }


def _kept(ranking: Ranking) -> str:
    """Of the state: rankings that are read off one state read it once."""
    return ranking.representative.kept or ranking.representative.name


class Chooser:
    """A method with the state of some blocks."""

    def __init__(self, method: Method, keys: Tensor) -> None:
        self._method = method
        self._states = [ranking.representative.prepare(keys) for ranking in method.rankings]

    def choose(
        self, queries: Tensor, candidates: Tensor, budget: int, near: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Blocks for each row.

        Args:
            queries: [H, G, R, D], scaled.
            candidates: [R, N] bool.
            budget: blocks.
            near: [H, G, R], the log-sum over sink and window.
            generator: of "random".

        Returns:
            [H, R, N] bool.
        """
        method = self._method
        allowed = candidates.expand(len(queries), -1, -1)
        if method.special:
            return _special(method.special, allowed, budget, generator)
        count = budget * method.widen
        chosen = torch.zeros_like(allowed)
        for index, ranking in enumerate(method.first):
            take = count - int(chosen.sum(-1).amax()) if index else math.ceil(ranking.share * count)
            chosen = chosen | best(self._pooled(index, queries, allowed, near), allowed & ~chosen, take)
        if method.second is not None:
            chosen = best(self._pooled(-1, queries, chosen, near), chosen, budget)
        return chosen

    def _pooled(self, index: int, queries: Tensor, counted: Tensor, near: Tensor) -> Tensor:
        """Scores of the KV heads [H, R, N]; ``counted`` [H, R, N] are the blocks that heads are normalised over."""
        ranking = self._method.rankings[index]
        scores = ranking.representative.score(queries.flatten(1, 2), self._states[index])
        scores = scores.reshape(*queries.shape[:3], -1).masked_fill(~counted[:, None], NOTHING)
        return ranking.pool(scores, near)


def _special(name: str, allowed: Tensor, budget: int, generator: torch.Generator | None) -> Tensor:
    if name == "dense":
        return allowed
    if name == "sink and window only":
        return torch.zeros_like(allowed)
    assert name == "random blocks"
    return best(torch.rand(allowed.shape, generator=generator, device=allowed.device), allowed, budget)


DENSE = Method(special="dense")
WINDOW_ONLY = Method(special="sink and window only")
RANDOM = Method(special="random blocks")
