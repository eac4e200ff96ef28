"""Dense attention of sampled rows, and how much of it a choice of key blocks holds.

Sizes: N query blocks, Hq query heads, Hm mask heads, R rows of a query block (1 for a decoded token), T keys, nb key
blocks of the text, K blocks to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.evaluate.mass_recall_masks import candidates

METHODS = {
    "hip": "HiP",
    "exact": "exact block top-k",
    "best": "best blocks by mass",
    "recent": "sink + longer window",
    "random": "random blocks",
    "tokens": "exact token top-k",
}
"""Ways to choose, by key, and what tables call them. All but HiP's are made here, with the same number of tokens."""


def dense_rows(queries: Tensor, keys: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores and softmax weights of sampled rows over the whole text, float32: [N, Hq, R, T] each.

    Args:
        queries: [Hq, T, D].
        keys: [Hkv, T, D].
        positions: [N, R] int64, of the rows.
    """
    heads, tokens, _ = keys.shape
    rows = queries[:, positions].float().transpose(0, 1)  # [N, Hq, R, D]
    grouped = torch.unflatten(rows, 1, (heads, -1))
    scores = scale * torch.einsum("nhgrd,htd->nhgrt", grouped, keys.float()).flatten(1, 2)
    later = torch.arange(tokens, device=keys.device) > positions[:, None, :, None]
    scores = scores.masked_fill_(later, float("-inf"))
    return scores, scores.softmax(-1)


@dataclass(frozen=True)
class Blocks:
    """What there is to choose from, block by block.

    Attributes:
        weights: [N, Hq, nb] float32, softmax weight of each block, summed over its tokens and the rows.
        top: the same, of those tokens only that are among a row's K block_k heaviest candidates.
        scores: [N, Hm, nb] float32, the search's own score of each block, had it scored all of them.
        allowed: [N, nb] bool, the candidates.
        rows: R.
    """

    weights: Tensor
    top: Tensor
    scores: Tensor
    allowed: Tensor
    rows: int

    @classmethod
    def of(
        cls, scores: Tensor, weights: Tensor, firsts: Sequence[int], config: HipConfig, *, kv_heads: int, budget: int
    ) -> Blocks:
        """Sum up what :func:`dense_rows` gives.

        Args:
            firsts: N, position of the first row of each query block.
            kv_heads: Hkv.
            budget: K.
        """
        masks, rows = config.num_masks(scores.shape[1], kv_heads), scores.shape[2]
        padding = -scores.shape[-1] % config.block_k
        grid = (-1, config.block_k)
        weights = torch.nn.functional.pad(weights, (0, padding))
        ranges = torch.tensor([candidates(config, first) for first in firsts], device=scores.device)
        index = torch.arange(weights.shape[-1] // config.block_k, device=scores.device)
        allowed = (index >= ranges[:, :1]) & (index < ranges[:, 1:])
        candidate_weights = weights * allowed.repeat_interleave(config.block_k, 1)[:, None, None]
        heaviest = candidate_weights.topk(min(budget * config.block_k, weights.shape[-1]), sorted=False)
        top = torch.zeros_like(weights).scatter_(-1, heaviest.indices, heaviest.values)
        sampled = scores[:, :, (rows - 1) % config.stride_q :: config.stride_q].amax(2)
        sampled = torch.nn.functional.pad(sampled, (0, padding), value=float("-inf"))
        best = torch.unflatten(sampled, -1, grid)[..., :: config.stride_k].amax(-1)
        return cls(
            weights=torch.unflatten(weights.sum(2), -1, grid).sum(-1),
            top=torch.unflatten(top.sum(2), -1, grid).sum(-1), scores=torch.unflatten(best, 1, (masks, -1)).amax(2),
            allowed=allowed, rows=rows,
        )

    def choices(self, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Each method's choice of blocks: [N, Hm, nb] bool, by key; "tokens" chooses no blocks and is not among them.

        Args:
            chosen: [N, Hm, K] int64, HiP's, then -1.
            generator: of random blocks, on the tensors' device.
        """
        masks, budget = chosen.shape[1], chosen.shape[2]
        by_mask = torch.unflatten(self.weights, 1, (masks, -1)).sum(2)
        noise = torch.rand(self.scores.shape, generator=generator, device=self.scores.device)
        index = torch.arange(self.scores.shape[-1], device=self.scores.device).float().expand_as(self.scores)
        return {
            "hip": _marked(chosen, self.scores.shape[-1]),
            "exact": self._best(self.scores, budget), "best": self._best(by_mask, budget),
            "recent": self._best(index, budget), "random": self._best(noise, budget),
        }

    def _best(self, values: Tensor, budget: int) -> Tensor:
        values = values.masked_fill(~self.allowed[:, None], float("-inf"))
        best = values.topk(min(budget, values.shape[-1]), sorted=False)
        return _marked(best.indices.masked_fill(best.values == float("-inf"), -1), values.shape[-1])


@dataclass
class Masses:
    """Attention mass, summed over rows, by query head: [Hq] float64 each.

    Attributes:
        rows: how many rows.
        always: on sink and window.
        outside: on all candidates.
        top: on each row's heaviest candidates, as many as may be chosen.
        held: on the chosen blocks, by method.
        shared: on those of the heaviest candidates that are in chosen blocks, by method.
    """

    rows: int
    always: Tensor
    outside: Tensor
    top: Tensor
    held: dict[str, Tensor]
    shared: dict[str, Tensor]

    @classmethod
    def of(cls, blocks: Blocks, choices: dict[str, Tensor]) -> Masses:
        """Of :meth:`Blocks.choices`, or others."""
        heads = blocks.weights.shape[1]

        def mass(weights: Tensor, mask: Tensor) -> Tensor:
            mask = mask.repeat_interleave(heads // mask.shape[1], 1)
            return (weights * mask).sum((0, 2), dtype=torch.float64).cpu()

        allowed = blocks.allowed[:, None]
        top = mass(blocks.top, allowed)
        return cls(
            rows=len(blocks.weights) * blocks.rows, always=mass(blocks.weights, ~allowed),
            outside=mass(blocks.weights, allowed), top=top,
            held={**{name: mass(blocks.weights, choice) for name, choice in choices.items()}, "tokens": top},
            shared={**{name: mass(blocks.top, choice) for name, choice in choices.items()}, "tokens": top},
        )

    def add(self, other: Masses) -> None:
        """Add the masses of more rows."""
        self.rows += other.rows
        for name in ("always", "outside", "top"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.held, other.held), (self.shared, other.shared)):
            for method in mine:
                mine[method] = mine[method] + theirs[method]


def _marked(indices: Tensor, size: int) -> Tensor:
    """Whether each of ``size`` blocks is among the indices, of which negative ones are none."""
    marks = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter_(-1, indices.where(indices >= 0, size), True)[..., :size]
