"""What may stand for a block of keys, so that a decode step scores blocks without reading all of their keys.

Shapes: H KV heads, M queries (query heads and rows together), N blocks, B keys in a block, D head size. Queries are
scaled, so a score stands beside the logits of attention. State that a kernel would hold in bfloat16 is rounded to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]

STORED = 2
"""Bytes of a number in bfloat16."""
BOUNDS = "bounds of block, 16 bits"
"""The state that most representatives share."""


@dataclass(frozen=True)
class Representative:
    """One of them.

    Attributes:
        name: for tables.
        state: bytes that are kept of a block and KV head besides its keys, given B and D.
        read: bytes that scoring a block reads, given B and D.
        prepare: keys [H, N, B, D] to state.
        score: queries [H, M, D] and state to scores [H, M, N].
        kept: what the state is, where several representatives are read off one; else the name.
        bounds: whether bounds of the block in bfloat16 are part of the state and of what is read.
    """

    name: str
    state: Callable[[int, int], float]
    read: Callable[[int, int], float]
    prepare: Callable[[Tensor], State]
    score: Callable[[Tensor, State], Tensor]
    kept: str = ""
    bounds: bool = False


def stored(number: Tensor) -> Tensor:
    """As it comes back from bfloat16."""
    return number.bfloat16().to(number.dtype)


def power_of_two(largest: Tensor, levels: int) -> Tensor:
    """The smallest power of two that is not below largest / levels."""
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-20) / levels)))


def rounded(vectors: Tensor, bits: int = 8) -> Tensor:
    """Vectors [..., D] in so many bits: to nearest, each with its own scale, a power of two."""
    scale = power_of_two(vectors.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1)
    return torch.round(vectors / scale) * scale


def outward(low: Tensor, high: Tensor, bits: int = 8) -> State:
    """Bounds [..., D] in so many bits: low down and high up, both by one scale, a power of two."""
    scale = power_of_two(torch.maximum(low.abs(), high.abs()).amax(-1, keepdim=True), 2 ** (bits - 1) - 1)
    return torch.floor(low / scale) * scale, torch.ceil(high / scale) * scale


def bounds_of(keys: Tensor) -> State:
    """The smallest and the largest of each channel: two [H, N, D]."""
    return stored(keys.amin(2)), stored(keys.amax(2))


def discounted(queries: Tensor, low: Tensor, high: Tensor, factor: float) -> Tensor:
    """q.centre + factor |q|.radius of boxes [H, N, D]: [H, M, N]. With factor 1 no key in the box scores higher."""
    return queries @ ((low + high) / 2).mT + factor * (queries.abs() @ ((high - low) / 2).mT)


def log_sum_of_parts(scores: Tensor, blocks: int) -> Tensor:
    """Scores of parts [H, M, N x parts] to the log-sum of each block's: [H, M, N]."""
    return torch.logsumexp(scores.reshape(*scores.shape[:-1], blocks, -1), -1)


def largest_of_parts(scores: Tensor, blocks: int) -> Tensor:
    """Scores of parts [H, M, N x parts] to the largest of each block's: [H, M, N]."""
    return scores.reshape(*scores.shape[:-1], blocks, -1).amax(-1)


def parts(keys: Tensor, size: int) -> Tensor:
    """Blocks [H, N, B, D] cut: [H, N x B / size, size, D]."""
    return keys.reshape(len(keys), -1, size, keys.shape[-1])


def box(factor: float, *, bits: int = 16, part: int | None = None, log_sum: bool = True) -> Representative:
    """Bounds with a discounted radius: of the block, or of its parts."""

    def prepare(keys: Tensor) -> State:
        low, high = bounds_of(keys if part is None else parts(keys, part))
        return (low, high) if bits == 16 else outward(low, high, bits)

    def score(queries: Tensor, state: State) -> Tensor:
        scores = discounted(queries, state[0], state[1], factor)
        return scores if part is None else join(scores, scores.shape[-1] // per_block)

    per_block = 1 if part is None else 64 // part
    join = log_sum_of_parts if log_sum else largest_of_parts
    name = "bounds" if factor == 1 else f"centre + {factor:g} radius"
    name += "" if part is None else f" of {part} tokens, {'log-sum' if log_sum else 'largest'}"
    name += "" if bits == 16 else f", {bits} bits"

    def size(_: int, dim: int) -> float:
        return per_block * (2 * dim * bits / 8 + (0 if bits == 16 else 1))

    return Representative(name, size, size, prepare, score, f"bounds of {part or 'block'}, {bits} bits")


def mean() -> Representative:
    """The mean key."""

    def size(_: int, dim: int) -> float:
        return STORED * dim

    return Representative("mean", size, size, lambda keys: (stored(keys.mean(2)),), lambda q, state: q @ state[0].mT)


def sub_means(part: int) -> Representative:
    """Means of parts, in 8 bits; the log-sum over a block."""

    def prepare(keys: Tensor) -> State:
        return (rounded(parts(keys, part).mean(2)),)

    def score(queries: Tensor, state: State) -> Tensor:
        return log_sum_of_parts(queries @ state[0].mT, state[0].shape[1] * part // 64)

    def size(block: int, dim: int) -> float:
        return block // part * (dim + 1)

    return Representative(f"means of {part} tokens, 8 bits", size, size, prepare, score)


def gaussian(factor: float) -> Representative:
    """The log-sum, were keys normally distributed in each channel by itself: q.mean + q^2.variance / 2."""

    def prepare(keys: Tensor) -> State:
        return stored(keys.mean(2)), stored(keys.var(2, correction=0))

    def score(queries: Tensor, state: State) -> Tensor:
        return queries @ state[0].mT + 0.5 * factor * (queries.square() @ state[1].mT)

    def size(_: int, dim: int) -> float:
        return 2 * STORED * dim

    name = "q.mean + q^2.variance / 2" if factor == 1 else f"q.mean + {factor:g} q^2.variance / 2"
    return Representative(name, size, size, prepare, score)


def farthest(keys: Tensor, count: int) -> Tensor:
    """Places of the keys of each block that lie farthest from its mean and from each other: [H, N, count] int64."""
    distance = (keys - keys.mean(2, keepdim=True)).square().sum(-1)
    places = []
    for _ in range(count):
        places.append(distance.argmax(-1, keepdim=True))
        distance = torch.minimum(distance, (keys - keys.take_along_dim(places[-1][..., None], 2)).square().sum(-1))
    return torch.cat(places, -1)


def outliers(count: int) -> Representative:
    """A block's farthest keys, and the mean of the others, in 8 bits; their log-sum, the mean as often as it stands
    for keys."""

    def prepare(keys: Tensor) -> State:
        places = farthest(keys, count)
        far = keys.take_along_dim(places[..., None], 2)
        rest = (keys.sum(2) - far.sum(2)) / (keys.shape[2] - count)
        weights = torch.zeros(count + 1, device=keys.device)
        weights[0] = math.log(keys.shape[2] - count)
        return rounded(torch.cat((rest[:, :, None], far), 2)), weights

    def size(_: int, dim: int) -> float:
        return (count + 1) * (dim + 1)

    return Representative(f"mean and {count} outliers, 8 bits", size, size, prepare, weighted_log_sum)


def outliers_and_box(count: int, factor: float) -> Representative:
    """A block's farthest keys, and the discounted box around the others, in 8 bits; their log-sum, the box as often as
    it stands for keys."""

    def prepare(keys: Tensor) -> State:
        places = farthest(keys, count)
        far = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device).scatter_(-1, places, True)[..., None]
        low, high = outward(keys.masked_fill(far, torch.inf).amin(2), keys.masked_fill(far, -torch.inf).amax(2))
        return low, high, rounded(keys.take_along_dim(places[..., None], 2)), keys.new_zeros(count)

    def score(queries: Tensor, state: State) -> Tensor:
        rest = discounted(queries, state[0], state[1], factor) + math.log(64 - count)
        return torch.logaddexp(rest, weighted_log_sum(queries, state[2:]))

    def size(_: int, dim: int) -> float:
        return 2 * dim + 1 + count * (dim + 1)

    name = f"centre + {factor:g} radius and {count} outliers, 8 bits"
    return Representative(name, size, size, prepare, score)


def weighted_log_sum(queries: Tensor, state: State) -> Tensor:
    """Log-sum over vectors [H, N, P, D], to which log weights (broadcast to [H, N, P]) are added: [H, M, N]."""
    vectors, weights = state
    scores = (queries @ vectors.flatten(1, 2).mT).reshape(*queries.shape[:2], *vectors.shape[1:3])
    return torch.logsumexp(scores + (weights if weights.dim() == 1 else weights[:, None]), -1)


def clusters(count: int, rounds: int = 4) -> Representative:
    """Centres of clusters of a block's keys (k-means from its farthest keys), in 8 bits; their log-sum, each as often
    as it has keys."""

    def prepare(keys: Tensor) -> State:
        centres = keys.take_along_dim(farthest(keys, count)[..., None], 2)
        for _ in range(rounds):
            nearest = torch.cdist(keys, centres).argmin(-1)
            member = torch.nn.functional.one_hot(nearest, count).to(keys.dtype)
            number = member.sum(2)
            means = (member.mT @ keys) / number.clamp(min=1)[..., None]
            centres = torch.where(number[..., None] > 0, means, centres)
        return rounded(centres), number.log()

    def size(_: int, dim: int) -> float:
        return count * (dim + 2)

    return Representative(f"{count} clusters, 8 bits", size, size, prepare, weighted_log_sum)


def low_rank(rank: int) -> Representative:
    """All keys as the mean plus so many principal directions of the block, in 8 bits; their log-sum."""

    def prepare(keys: Tensor) -> State:
        middle = keys.mean(2, keepdim=True)
        spread = keys - middle
        directions = spread.take_along_dim(farthest(keys, rank)[..., None], 2)  # [H, N, rank, D]
        for _ in range(6):
            directions = orthonormal((directions @ spread.mT) @ spread)
        places = spread @ directions.mT
        places = rounded(places.mT).mT  # a scale for each direction
        return rounded(middle[:, :, 0]), rounded(directions), places

    def score(queries: Tensor, state: State) -> Tensor:
        middle, directions, places = state
        along = (queries @ directions.flatten(1, 2).mT).reshape(*queries.shape[:2], *directions.shape[1:3])
        by_key = along.transpose(1, 2) @ places.transpose(2, 3)  # [H, N, M, B]
        return queries @ middle.mT + torch.logsumexp(by_key, -1).transpose(1, 2)

    def size(block: int, dim: int) -> float:
        return (dim + 1) + rank * (dim + block + 2)

    return Representative(f"mean and rank {rank}, 8 bits", size, size, prepare, score)


def orthonormal(vectors: Tensor) -> Tensor:
    """Gram and Schmidt's, over the last but one dimension."""
    done: list[Tensor] = []
    for vector in vectors.unbind(-2):
        for other in done:
            vector = vector - (vector * other).sum(-1, keepdim=True) * other
        done.append(vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return torch.stack(done, -2)


def by_channel(numbers: Tensor, bits: int) -> Tensor:
    """[..., B, D] in so many bits: each channel of a block between its smallest and its largest number."""
    low, high = stored(numbers.amin(-2, keepdim=True)), stored(numbers.amax(-2, keepdim=True))
    levels: int = 2**bits - 1
    step = ((high - low) / levels).clamp(min=1e-9)
    return ((numbers - low) / step).round().clamp(0, levels) * step + low


def few_bits(bits: int, *, log_sum: bool = True) -> Representative:
    """All keys in few bits, per channel between the block's bounds; their log-sum, or the largest score."""

    def prepare(keys: Tensor) -> State:
        return (by_channel(keys, bits),)

    def size(block: int, dim: int) -> float:
        return block * dim * bits / 8 + 2 * STORED * dim

    return Representative(
        f"keys in {bits} bits, {'log-sum' if log_sum else 'largest'}", size, size, prepare,
        log_sum_of_keys if log_sum else largest_of_keys, f"keys in {bits} bits", bounds=True,
    )


def principal(divisor: int, bits: int = 4) -> Representative:
    """All keys in the D / divisor directions in which the head's keys vary most, few bits per channel over the block;
    their log-sum. The directions are those of all keys given; a kernel would be handed them."""

    def prepare(keys: Tensor) -> State:
        heads, _, _, dim = keys.shape
        flat = keys.reshape(heads, -1, dim)
        middle = flat.mean(1, keepdim=True)
        _, vectors = torch.linalg.eigh((flat - middle).mT @ (flat - middle))
        basis = vectors[..., -max(1, dim // divisor) :]  # [H, D, rank]
        return by_channel((flat @ basis).reshape(*keys.shape[:3], -1), bits), basis

    def score(queries: Tensor, state: State) -> Tensor:
        return log_sum_of_keys(queries @ state[1], state[:1])

    def size(block: int, dim: int) -> float:
        rank = max(1, dim // divisor)
        return block * rank * bits / 8 + 2 * STORED * rank

    return Representative(f"keys in D/{divisor} channels of {bits} bits, log-sum", size, size, prepare, score)


def log_sum_of_keys(queries: Tensor, state: State) -> Tensor:
    """Log-sum over the keys [H, N, B, D] of each block."""
    keys = state[0]
    return log_sum_of_parts(queries @ keys.flatten(1, 2).mT, keys.shape[1])


def largest_of_keys(queries: Tensor, state: State) -> Tensor:
    """The largest score among the keys [H, N, B, D] of each block."""
    keys = state[0]
    return largest_of_parts(queries @ keys.flatten(1, 2).mT, keys.shape[1])


def some_keys(name: str, count: int, which: Callable[[Tensor], Tensor], *, log_sum: bool = True) -> Representative:
    """Some of a block's keys themselves: no state; they are read where they stand."""
    return Representative(
        name, lambda block, dim: 0, lambda block, dim: min(count, block) * dim * STORED,
        lambda keys: (which(keys),), log_sum_of_keys if log_sum else largest_of_keys,
    )


def strided(count: int) -> Representative:
    """So many keys of a block, evenly spread; their log-sum."""
    return some_keys(f"{count} strided keys, log-sum", count, lambda keys: keys[:, :, :: keys.shape[2] // count])


def middle(count: int = 16) -> Representative:
    """The keys in the middle of a block; the largest score."""

    def which(keys: Tensor) -> Tensor:
        first = (keys.shape[2] - count) // 2
        return keys[:, :, first : first + count]

    return some_keys(f"middle {count} keys, largest", count, which, log_sum=False)


def exact(*, log_sum: bool) -> Representative:
    """All keys."""
    return some_keys(f"all keys, {'log-sum' if log_sum else 'largest'}", 1 << 30, lambda keys: keys, log_sum=log_sum)
