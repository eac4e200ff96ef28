"""How alike the attention scores of neighbouring keys are, and what a representative key says about its neighbours.

Sizes: N queries, H heads, T keys, n nodes (aligned runs of keys, all of one width). Every figure is of one query and
one head: [N, H].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def correlation(scores: Tensor, valid: Tensor, distance: int) -> Tensor:
    """Correlation of a key's score with that of the key ``distance`` tokens later.

    Args:
        scores: [N, H, T].
        valid: [N, T] bool, the keys that count.
    """
    deviations, variance = _centred(scores, valid)
    pairs = valid[:, :-distance] & valid[:, distance:]
    products = deviations[..., :-distance] * deviations[..., distance:] * pairs[:, None]
    return products.sum(-1) / pairs.sum(-1)[:, None] / variance


def random_correlation(scores: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """The same of pairs drawn at random: what no locality looks like."""
    deviations, variance = _centred(scores, valid)
    noise = torch.rand(valid.shape, generator=generator, device=valid.device)
    ascending = (~valid).int().argsort(dim=-1, stable=True)  # the valid ones first
    shuffled = noise.masked_fill(~valid, 2.0).argsort(-1)
    one, other = (deviations.gather(-1, order[:, None].expand_as(scores)) for order in (ascending, shuffled))
    return (one * other).sum(-1) / valid.sum(-1)[:, None] / variance


def _centred(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from each query's mean, 0 where not valid, and their variance."""
    count = valid.sum(-1)[:, None]
    mask = valid[:, None]
    scores = scores.masked_fill(~mask, 0.0)
    deviations = (scores - (scores.sum(-1) / count)[..., None]) * mask
    return deviations, (deviations.square().sum(-1) / count).clamp(min=1e-30)


@dataclass(frozen=True)
class Nodes:
    """Whole nodes of one width.

    Attributes:
        scores: [N, H, n, width].
        weights: [N, H, n], softmax weight of each node's keys, of all valid keys'.
        whole: [N, n] bool: all keys of the node are valid.
    """

    scores: Tensor
    weights: Tensor
    whole: Tensor

    @classmethod
    def of(cls, scores: Tensor, valid: Tensor, width: int) -> Nodes:
        """Cut the keys into nodes from key 0 on; the rest at the end is left out."""
        nodes = scores.shape[-1] // width
        grid = (nodes, width)
        weights = scores.masked_fill(~valid[:, None], float("-inf")).softmax(-1)
        scores = scores.masked_fill(~valid[:, None], 0.0)
        return cls(
            torch.unflatten(scores[..., : nodes * width], -1, grid),
            torch.unflatten(weights[..., : nodes * width], -1, grid).sum(-1),
            torch.unflatten(valid[:, : nodes * width], -1, grid).all(-1),
        )

    @property
    def width(self) -> int:
        return self.scores.shape[-1]

    def between(self) -> Tensor:
        """Share of the scores' variance that lies between nodes: the intraclass correlation.

        0 where keys of a node are no more alike than any others, 1 where they are all the same; -1 / (width - 1) at
        least. (From mean squares, so that it does not grow by chance as nodes get narrow.)
        """
        count, mask = self.whole.sum(-1)[:, None], self.whole[:, None]
        means = self.scores.mean(-1)
        centre = (means * mask).sum(-1) / count
        among = self.width * ((means - centre[..., None]).square() * mask).sum(-1) / (count - 1)
        inside = (self.scores.var(-1) * mask).sum(-1) / count
        return (among - inside) / (among + (self.width - 1) * inside).clamp(min=1e-30)

    def largest(self) -> Tensor:
        """Largest score of each node: [N, H, n]."""
        return self.scores.amax(-1)

    def middle_token(self) -> Tensor:
        """Score of the middle key, the paper's representative: [N, H, n]."""
        return self.scores[..., self.width // 2]

    def middle_block(self, block_k: int) -> Tensor:
        """Largest score in the middle key block, as hip-trt searches: [N, H, n]."""
        first = self.width // block_k // 2 * block_k
        return self.scores[..., first : first + block_k].amax(-1)

    def rank_correlation(self, values: Tensor) -> Tensor:
        """Spearman's, of the nodes' values, [N, H, n], and their largest scores."""
        mask, count = self.whole[:, None], self.whole.sum(-1)[:, None]
        ranks = [_ranks(tensor.masked_fill(~mask, float("-inf"))) for tensor in (values, self.largest())]
        centred = [(rank - ((rank * mask).sum(-1) / count)[..., None]) * mask for rank in ranks]
        product, (one, other) = (centred[0] * centred[1]).sum(-1), (rank.square().sum(-1) for rank in centred)
        return product / (one * other).clamp(min=1e-30).sqrt()

    def held(self, values: Tensor, share: float) -> Tensor:
        """Weight of the nodes of largest value, of which so large a share is kept, relative to that of all nodes."""
        mask = self.whole[:, None]
        order = values.masked_fill(~mask, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        keep = (self.whole.sum(-1) * share).ceil()[:, None, None]
        weights = (self.weights * mask).gather(-1, order)
        kept = torch.arange(weights.shape[-1], device=weights.device) < keep
        return (weights * kept).sum(-1) / weights.sum(-1).clamp(min=1e-30)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value along the last dimension, 0 for the smallest; of equal values the first ranks lower."""
    return values.argsort(dim=-1, stable=True).argsort(-1).to(values.dtype)
