"""A decode call of the operator's next version: search in two stages, attend to what it keeps.

A decode call has 1 to 8 rows a sequence. Its first row searches, over bounds of each key block (Quest, arXiv
2406.10774) and over keys in 2 bits of the best of them, which are state beside the pages
(:mod:`hip_trt.reference.decode_state`). All rows attend to the blocks that it chose, to the sink and to the window.
The contract is docs/decode_version_2.md; :mod:`hip_trt.reference.operator_v2` is the whole operator.

Sizes as in :func:`hip_trt.reference.hip_attention`; a block is of ``decode_block_k`` tokens, which divides page_size, K
is decode_mask_k / decode_block_k and F is decode_search_k / decode_block_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt.reference import cache
from hip_trt.reference.decode_state import by_block, dequantise, gather_blocks, unpack, write_state
from hip_trt.reference.tree import keep_best

NEWEST = 2
"""Candidates that are attended whenever blocks are reused: those that have left the window since the search."""


@dataclass(frozen=True)
class DecodeConfig:
    """What decides a decode call, in tokens.

    Attributes:
        mask_k: chosen beyond sink and window; a multiple of ``block``.
        search_k: of the blocks whose codes are read, a multiple of ``block``, at least ``mask_k``.
        block: tokens of a key block.
        sink_tokens, window_tokens: attended always, rounded up to whole blocks; ``window_tokens`` is at least 1.
        value_threshold: tokens of less probability are left out, of the chosen blocks only; 0: none.
        dense: all is window; there is no state of blocks.
    """

    mask_k: int = 8192
    search_k: int = 32768
    block: int = 64
    sink_tokens: int = 64
    window_tokens: int = 512
    value_threshold: float = 0.0
    dense: bool = False

    @property
    def chosen(self) -> int:
        """K, blocks that are attended of more."""
        return self.mask_k // self.block

    @property
    def searched(self) -> int:
        """F, blocks that the first stage keeps of more."""
        return self.search_k // self.block

    def candidates(self, position: int) -> tuple[int, int]:
        """The blocks [first, last) between sink and window of a row at ``position``; empty where first is last."""
        last = 0 if self.dense else max(0, position - self.window_tokens + 1) // self.block
        return min(-(-self.sink_tokens // self.block), last), last

    def prunes(self, position: int) -> bool:
        """Whether a call whose first row is at ``position`` attends to fewer blocks than there are candidates."""
        first, last = self.candidates(position)
        return last - first > self.chosen


def first_scores(queries: Tensor, bounds: Tensor) -> Tensor:
    """The largest q.k that a key within the bounds can have, over the query heads: [G, D], [N, 2, D] to [N].

    Each dimension takes the bound that its query's sign favours. NaN counts as +inf: see :func:`ordered`.
    """
    low, high = bounds.unbind(dim=-2)
    return ordered(queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT).amax(dim=0)


def second_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Each block's largest share of a query head's softmax over all of the blocks, as a logarithm.

    A block of NaN or +inf takes no part in the softmax: it is chosen in any case, and would leave the others no share.

    Args:
        queries: [G, D].
        keys: [N, block, D], of their codes.

    Returns:
        [N].
    """
    sums = ordered((scale * (queries @ keys.mT)).logsumexp(dim=-1))  # [N, G]
    finite = sums.masked_fill(sums == torch.inf, -torch.inf)
    return ordered(sums - finite.logsumexp(dim=0)).amax(dim=1)


def ordered(scores: Tensor) -> Tensor:
    """Scores with NaN as +inf, so that a block that holds one is attended, and shows in the output."""
    return scores.masked_fill(scores.isnan(), torch.inf)


@dataclass(frozen=True)
class BlockState:
    """What a search reads of one sequence and key/value head.

    Attributes:
        bounds: [P, Hkv, page_size / block, 2, D].
        codes: [P, Hkv, page_size, D / 16] int32.
        page_table_row: [M] int32.
        kv_head: the head.
    """

    bounds: Tensor
    codes: Tensor
    page_table_row: Tensor
    kv_head: int

    def bounds_of(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[N] int64 to [N, 2, D]."""
        return gather_blocks(self.bounds, self.page_table_row, blocks, self.kv_head).to(dtype)

    def keys_of(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys that codes stand for: [N] int64 to [N, block, D]."""
        codes = by_block(self.codes, self.bounds.shape[2])
        words = gather_blocks(codes, self.page_table_row, blocks, self.kv_head)
        return dequantise(unpack(words), self.bounds_of(blocks, dtype))


def search(queries: Tensor, state: BlockState, candidates: Tensor, scale: float, config: DecodeConfig) -> Tensor:
    """The K of more candidates that are kept, int64 ascending.

    Args:
        queries: [G, D], the first row of the mask head's query heads.
        candidates: [N] int64 ascending.
    """
    scores = first_scores(queries, state.bounds_of(candidates, queries.dtype))
    blocks = keep_best(candidates, scores, config.searched)
    return keep_best(blocks, second_scores(queries, state.keys_of(blocks, queries.dtype), scale), config.chosen)


def attended_blocks(
    queries: Tensor, state: BlockState, past_blocks: Tensor, *, position: int, refresh: bool, scale: float,
    config: DecodeConfig,
) -> tuple[Tensor, Tensor]:
    """The blocks between sink and window that a sequence attends to, for one mask head, and what it keeps.

    Args:
        queries: [G, D], the first row of the mask head's query heads.
        past_blocks: [K] int64, what an earlier call kept; -1 first: nothing.
        position: of the call's first row.
        refresh: search, whatever was kept.

    Returns:
        Blocks, int64 ascending, and [K] int64 for present_blocks, all -1 where every candidate is attended.
    """
    first, last = config.candidates(position)
    candidates = torch.arange(first, last)
    if not config.prunes(position):
        return candidates, torch.full_like(past_blocks, -1)
    if refresh or int(past_blocks[0]) < 0:
        chosen = search(queries, state, candidates, scale, config)
        return chosen, chosen
    kept = past_blocks[(past_blocks >= first) & (past_blocks < last)]
    union: Tensor = torch.unique(torch.cat([kept, candidates[-NEWEST:]]))
    return union, past_blocks


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, positions: Tensor, *, scale: float,
    config: DecodeConfig,
) -> Tensor:
    """softmax(scale q.k) v over sink, blocks and window, each row causal.

    Where ``value_threshold`` is given and there are more candidates than K, a token of ``blocks`` is left out if its
    probability is below the threshold in every query head and row; what is left is normalised anew.

    Args:
        queries: [G, S, D], all valid rows of the mask head's query heads.
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
    if config.value_threshold > 0 and config.prunes(int(positions[0])):
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
    page_table: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
    past_bounds: Tensor,
    past_codes: Tensor,
    past_blocks: Tensor,
    refresh_mask: Tensor,
    *,
    config: DecodeConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A decode call.

    Args:
        query, key, value, past_key, past_value, page_table, past_lengths, query_lengths: see
            :func:`hip_trt.reference.hip_attention`; S is 1 to 8, D a multiple of 16.
        past_bounds: [P, Hkv, page_size / block, 2, D] T, see :func:`hip_trt.reference.decode_state.write_state`.
        past_codes: [P, Hkv, page_size, D / 16] int32, likewise.
        past_blocks: [B, Hm, K] int32, blocks that an earlier call kept, ascending; -1: none.
        refresh_mask: [B] int32; 1: the sequence searches. A mask head that kept nothing does so in any case.

    Returns:
        output [B, Hq, S, D] T, padding rows 0; present_key, present_value, present_bounds and present_codes, which are
        the past ones with what is new; and present_blocks [B, Hm, K] int32.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads_per_mask, group = query.shape[1] // past_blocks.shape[1], query.shape[1] // key.shape[1]
    present_key = cache.append(past_key, key, page_table, past_lengths, query_lengths)
    present_value = cache.append(past_value, value, page_table, past_lengths, query_lengths)
    bounds, codes = past_bounds, past_codes
    if not config.dense:
        bounds, codes = write_state(present_key, bounds, codes, page_table, past_lengths, query_lengths)
    output, present_blocks = torch.zeros_like(query), past_blocks.clone()
    for b, (past, count) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        if count == 0:
            continue
        keys, values = (
            cache.sequence(pool, page_table[b], past + count).to(compute) for pool in (present_key, present_value)
        )
        for mask in range(past_blocks.shape[1]):
            heads, kv = slice(mask * heads_per_mask, (mask + 1) * heads_per_mask), mask * heads_per_mask // group
            queries = query[b, heads, :count].to(compute)
            blocks, kept = attended_blocks(
                queries[:, 0], BlockState(bounds, codes, page_table[b], kv), past_blocks[b, mask].long(),
                position=past, refresh=bool(refresh_mask[b]), scale=scale, config=config,
            )
            attended = attention(
                queries, keys[kv], values[kv], blocks, past + torch.arange(count), scale=scale, config=config
            )
            output[b, heads, :count] = attended.to(query.dtype)
            present_blocks[b, mask] = kept.to(present_blocks.dtype)
    return output, present_key, present_value, bounds, codes, present_blocks
