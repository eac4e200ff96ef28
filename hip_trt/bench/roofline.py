"""Operations and bytes of a call, counted from the operator's definition, and the time the machine needs for them.

Counted is what the function asks for, not what a kernel does: q.k of every key that the search scores with every
sampled row, q.k and p.v of every pair that attention admits. A level of the tree counts as full wherever it can be:
nodes at the edges of the candidates may have fewer children, so a search may score up to 2 (branch - 1) blocks less a
level.
"""

from __future__ import annotations

from dataclasses import dataclass

from hip_trt.bench.geometry import Geometry
from hip_trt.config import HipConfig


@dataclass(frozen=True)
class Rates:
    """What the machine can do at the most: a device copy (bytes read plus written) and a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Work:
    """What a call has to do.

    Attributes:
        search_flops, attention_flops: two for each multiply and add.
        device_bytes: that must pass through device memory: each input read once and each output written once in
            prefill; each key that is scored and each key and value that is attended in a decode step.
        gathered_bytes: keys scored and keys and values attended, each once per query block: what passes through L2.
    """

    search_flops: int
    attention_flops: int
    device_bytes: int
    gathered_bytes: int

    @property
    def flops(self) -> int:
        """Of search and attention."""
        return self.search_flops + self.attention_flops

    def least_seconds(self, rates: Rates) -> float:
        """The larger of the time for the arithmetic and the time for device memory."""
        return max(self.flops / rates.flops_per_second, self.device_bytes / rates.bytes_per_second)


@dataclass(frozen=True)
class _Block:
    """One query block: candidates [sink, window) in key blocks, and its last key block."""

    sink: int
    window: int
    last: int

    @classmethod
    def of(cls, config: HipConfig, first: int, last: int) -> _Block:
        window = max(0, first - config.window_tokens + 1) // config.block_k
        return cls(min(-(-config.sink_tokens // config.block_k), window), window, last // config.block_k)

    def chosen(self, budget: int) -> int:
        """Key blocks between sink and window that are attended."""
        return min(budget, self.window - self.sink)


def scored_blocks(config: HipConfig, sink: int, window: int, budget: int) -> int:
    """Key blocks that a search from the top scores among candidates [sink, window)."""
    if window - sink <= budget:
        return 0

    def nodes(level: int) -> int:
        size = 1 if level == 0 else config.leaf_branch * config.branch ** (level - 1)
        return -(-window // size) - sink // size

    def capacity(level: int) -> int:
        return budget * (config.branch if level else config.leaf_branch)

    level = 0
    while nodes(level) > capacity(level):
        level += 1
    return sum(min(nodes(below), capacity(below)) for below in range(level + 1))


def reused_blocks(config: HipConfig, sink: int, window: int, budget: int) -> int:
    """Key blocks that a decode step scores that starts from nodes kept by an earlier one."""
    if window - sink <= budget or config.reuse_level == 0:
        return 0
    # Where a search begins at the leaves it keeps no nodes, and the next step scores all candidates again.
    return min(window - sink, (budget + 2) * config.leaf_branch)


def prefill(geometry: Geometry, config: HipConfig, tokens: int) -> Work:
    """One sequence of ``tokens`` from an empty cache."""
    masks = config.num_masks(geometry.query_heads, geometry.kv_heads)
    scored = sampled_products = attended = pairs = 0
    for first in range(0, tokens, config.block_q):
        rows = min(config.block_q, tokens - first)
        block = _Block.of(config, first, first + rows - 1)
        before = block.sink + block.chosen(config.mask_blocks)
        search = scored_blocks(config, block.sink, block.window, config.mask_blocks)
        scored += search
        sampled_products += search * -(-rows // config.stride_q)
        attended += before * config.block_k + first + rows - block.window * config.block_k
        in_window = rows * (first - block.window * config.block_k) + rows * (rows + 1) // 2
        pairs += rows * before * config.block_k + in_window
    scored_tokens = config.block_k // config.stride_k
    return Work(
        search_flops=2 * geometry.head_dim * geometry.query_heads * sampled_products * scored_tokens,
        attention_flops=4 * geometry.head_dim * geometry.query_heads * pairs,
        device_bytes=geometry.row_bytes * tokens * (2 * geometry.query_heads + 4 * geometry.kv_heads),
        gathered_bytes=geometry.row_bytes * masks * (scored * scored_tokens + 2 * attended),
    )


def decode(geometry: Geometry, config: HipConfig, past: int, batch: int, *, reused: bool) -> Work:
    """One step of ``batch`` sequences that have ``past`` tokens each."""
    masks = config.num_masks(geometry.query_heads, geometry.kv_heads)
    budget, block = config.decode_mask_blocks, _Block.of(config, past, past)
    count = reused_blocks if reused else scored_blocks
    scored = count(config, block.sink, block.window, budget) * (config.block_k // config.stride_k)
    attended = (block.sink + block.chosen(budget) + block.last - block.window + 1) * config.block_k
    read = batch * geometry.row_bytes * masks * (scored + 2 * attended)
    return Work(
        search_flops=2 * geometry.head_dim * geometry.query_heads * batch * scored,
        attention_flops=4 * geometry.head_dim * geometry.query_heads * batch * attended,
        device_bytes=read,
        gathered_bytes=read,
    )


def dense_prefill(geometry: Geometry, tokens: int) -> Work:
    """Causal attention of ``tokens`` rows over themselves."""
    moved = geometry.row_bytes * tokens * (2 * geometry.query_heads + 2 * geometry.kv_heads)
    return Work(0, 2 * geometry.head_dim * geometry.query_heads * tokens * (tokens + 1), moved, moved)


def dense_decode(geometry: Geometry, tokens: int, batch: int) -> Work:
    """One row of each of ``batch`` sequences over ``tokens`` keys and values."""
    read = 2 * batch * geometry.kv_heads * tokens * geometry.row_bytes
    return Work(0, 4 * geometry.head_dim * geometry.query_heads * batch * tokens, read, read)
