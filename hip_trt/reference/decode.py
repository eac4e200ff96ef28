"""A decode call of the operator's next version: attend to every token of the blocks that a search over bounds keeps.

A decode call has 1 to 8 rows a sequence. Its first row searches, over bounds of each key block (Quest, arXiv
2406.10774) that are state beside the pages, and all rows attend to the blocks that it chose, to the sink and to the
window. Only its tests run it so far: the operator (:mod:`hip_trt.reference.operator`) still decodes as version 1 does.

Sizes as in :func:`hip_trt.reference.hip_attention`; a block is of ``decode_block_k`` tokens, which divides page_size,
and K is decode_mask_k / decode_block_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt.reference import cache
from hip_trt.reference.tree import Tree, keep_best

NEWEST = 2
"""Candidates that are attended whenever blocks are reused: those that have left the window since the search."""


@dataclass(frozen=True)
class DecodeConfig:
    """What decides a decode call, in tokens.

    Attributes:
        mask_k: chosen beyond sink and window; a multiple of ``block``.
        block: tokens of a key block.
        branch: children of a node of the search tree.
        sink_tokens, window_tokens: attended always, rounded up to whole blocks.
        value_threshold: tokens of less probability are left out, of the chosen blocks only; 0: none.
    """

    mask_k: int = 8192
    block: int = 64
    branch: int = 16
    sink_tokens: int = 64
    window_tokens: int = 512
    value_threshold: float = 0.0

    @property
    def blocks(self) -> int:
        """K."""
        return self.mask_k // self.block

    def candidates(self, position: int) -> tuple[int, int]:
        """The blocks [first, last) between sink and window of a row at ``position``; empty where first is last."""
        last = max(0, position - self.window_tokens + 1) // self.block
        return min(-(-self.sink_tokens // self.block), last), last


def key_bounds(keys: Tensor) -> Tensor:
    """Smallest and largest value of each dimension in a block's keys: [..., block, D] to [..., 2, D]; NaN stays NaN."""
    return torch.stack([keys.amin(dim=-2), keys.amax(dim=-2)], dim=-2)


def write_bounds(
    present_key: Tensor, past_bounds: Tensor, page_table: Tensor, past_lengths: Tensor, query_lengths: Tensor
) -> Tensor:
    """The bounds with those of each block that this call fills, from all keys of the block in the pool.

    Args:
        present_key: [P, Hkv, page_size, D], the pool with the call's new rows.
        past_bounds: [P, Hkv, page_size / block, 2, D]; not changed. Those of blocks that are not full are undefined.
        page_table, past_lengths, query_lengths: see :func:`hip_trt.reference.hip_attention`.
    """
    bounds, page_size = past_bounds.clone(), present_key.shape[2]
    block = page_size // past_bounds.shape[2]
    for row, (past, count) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        for first in range(past // block * block, (past + count) // block * block, block):
            page, offset = int(page_table[row, first // page_size]), first % page_size
            bounds[page, :, offset // block] = key_bounds(present_key[page, :, offset : offset + block])
    return bounds


def bound_scores(queries: Tensor, bounds: Tensor) -> Tensor:
    """The largest q.k that a key within the bounds can have, over the query heads: [G, D], [N, 2, D] to [N].

    Each dimension takes the bound that its query's sign favours. NaN counts as +inf, so that a block that holds one is
    attended, and shows.
    """
    per_head = queries.clamp(min=0) @ bounds[:, 1].mT + queries.clamp(max=0) @ bounds[:, 0].mT
    return per_head.amax(dim=0).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


Scores = Callable[[Tensor, Tensor], Tensor]


def search(queries: Tensor, bounds: Tensor, tree: Tree, budget: int, scores: Scores = bound_scores) -> Tensor:
    """The ``budget`` blocks that are kept, int64 ascending.

    Args:
        queries: [G, D], the first row of the mask head's query heads.
        bounds: [N, 2, D], of every block of the sequence that is full.
        tree: over more than ``budget`` candidates; its levels are all of one branch.
        scores: of blocks, from queries and bounds.
    """
    level = tree.start_level(budget)
    nodes = tree.nodes(level)
    while True:
        nodes = keep_best(nodes, scores(queries, bounds[tree.representatives(nodes, level)]), budget)
        if level == 0:
            return nodes
        nodes, level = tree.children(nodes, level), level - 1


def attended_blocks(
    queries: Tensor, bounds: Tensor, past_blocks: Tensor, *, position: int, refresh: bool, config: DecodeConfig,
    scores: Scores = bound_scores,
) -> tuple[Tensor, Tensor]:
    """The blocks between sink and window that a sequence attends to, for one mask head, and what it keeps.

    Args:
        queries, bounds: as in :func:`search`.
        past_blocks: [K] int64, what an earlier call kept; -1 first: nothing.
        position: of the call's first row.
        refresh: search, whatever was kept.

    Returns:
        Blocks, int64 ascending, and [K] int64 for present_blocks, all -1 where every candidate is attended.
    """
    first, last = config.candidates(position)
    candidates, nothing = torch.arange(first, last), torch.full_like(past_blocks, -1)
    if last - first <= config.blocks:
        return candidates, nothing
    if refresh or int(past_blocks[0]) < 0:
        chosen = search(queries, bounds, Tree(first, last, config.branch, config.branch), config.blocks, scores)
        return chosen, chosen
    kept = past_blocks[(past_blocks >= first) & (past_blocks < last)]
    union: Tensor = torch.unique(torch.cat([kept, candidates[-NEWEST:]]))
    return union, past_blocks


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, positions: Tensor, *, scale: float,
    config: DecodeConfig,
) -> Tensor:
    """softmax(scale q.k) v over sink, blocks and window, each row causal.

    Where ``value_threshold`` is given and blocks were left out, a token of ``blocks`` is left out too if its
    probability is below the threshold in every query head and row that sees it; what is left is normalised anew.

    Args:
        queries: [G, S, D], all rows of the mask head's query heads.
        keys, values: [T, D], one key/value head of the sequence, new rows included.
        blocks: [N] int64 ascending, of the candidates of the first row.
        positions: [S] int64.

    Returns:
        [G, S, D].
    """
    first, last = config.candidates(int(positions[0]))
    chosen = (blocks[:, None] * config.block + torch.arange(config.block)).flatten()
    sink, window = torch.arange(first * config.block), torch.arange(last * config.block, int(positions[-1]) + 1)
    tokens = torch.cat([sink, chosen, window])
    logits = scale * (queries @ keys[tokens].mT)
    logits = logits.masked_fill(tokens > positions[:, None], float("-inf"))
    if config.value_threshold > 0 and len(blocks) < last - first:
        small = (logits.softmax(dim=-1) < config.value_threshold).flatten(0, 1).all(dim=0)
        small[: len(sink)] = small[len(sink) + len(chosen) :] = False
        logits = logits.masked_fill(small, float("-inf"))
    return logits.softmax(dim=-1) @ values[tokens]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_bounds: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
    past_blocks: Tensor,
    refresh_mask: Tensor,
    *,
    config: DecodeConfig,
    scale: float,
    scores: Scores = bound_scores,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A decode call.

    Args:
        query, key, value, past_key, past_value, page_table, past_lengths, query_lengths: see
            :func:`hip_trt.reference.hip_attention`; S is 1 to 8.
        past_bounds: [P, Hkv, page_size / block, 2, D] T, see :func:`write_bounds`.
        past_blocks: [B, Hm, K] int32, blocks that an earlier call kept, ascending; -1: none.
        refresh_mask: [B] int32; 1: the sequence searches. One that kept nothing does so in any case.
        scores: see :func:`search`.

    Returns:
        output [B, Hq, S, D], present_key, present_value, present_bounds, and present_blocks [B, Hm, K] int32.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads_per_mask, group = query.shape[1] // past_blocks.shape[1], query.shape[1] // key.shape[1]
    present_key = cache.append(past_key, key, page_table, past_lengths, query_lengths)
    present_value = cache.append(past_value, value, page_table, past_lengths, query_lengths)
    present_bounds = write_bounds(present_key, past_bounds, page_table, past_lengths, query_lengths)
    output, present_blocks = torch.zeros_like(query), past_blocks.clone()
    for b, (past, count) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        if count == 0:
            continue
        keys, values = (
            cache.sequence(pool, page_table[b], past + count).to(compute) for pool in (present_key, present_value)
        )
        full = (past + count) // config.block
        bounds = cache.sequence(past_bounds.flatten(-2), page_table[b], full).to(compute)
        bounds = bounds.reshape(*bounds.shape[:2], 2, -1)
        for mask in range(past_blocks.shape[1]):
            heads, kv = slice(mask * heads_per_mask, (mask + 1) * heads_per_mask), mask * heads_per_mask // group
            queries = query[b, heads, :count].to(compute)
            blocks, kept = attended_blocks(
                queries[:, 0], bounds[kv], past_blocks[b, mask].long(), position=past,
                refresh=bool(refresh_mask[b]), config=config, scores=scores,
            )
            attended = attention(
                queries, keys[kv], values[kv], blocks, past + torch.arange(count), scale=scale, config=config
            )
            output[b, heads, :count] = attended.to(query.dtype)
            present_blocks[b, mask] = kept.to(present_blocks.dtype)
    return output, present_key, present_value, present_bounds, present_blocks
