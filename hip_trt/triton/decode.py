# mypy: allow-untyped-calls
"""A decode call of the operator's next version: append, search in two stages, attend to what it keeps.

:mod:`hip_trt.reference.decode` in Triton, but for the selection, which is PyTorch over all sequences at once. Only
tests run it so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hip_trt.reference.decode import NEWEST, DecodeConfig
from hip_trt.triton import cache
from hip_trt.triton.decode_attention import attention
from hip_trt.triton.decode_search import first_scores, second_sums
from hip_trt.triton.decode_state import write_state
from hip_trt.triton.inputs import check_query

NONE = 2**31 - 1
"""Stands for no block while blocks are sorted."""


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
    """:func:`hip_trt.reference.decode.decode_attention` in Triton.

    Args, shapes and results are the reference's, but for: T is float16, bfloat16 or float32, and ``config.block`` is a
    power of two.

    Raises:
        EnvironmentProblem: if the tensors are on the CPU, and Triton was imported without its interpreter.
        RuntimeInputError: if T is not one of the three types.
    """
    check_query(query)
    batch, num_heads, new_tokens, head_dim = query.shape
    num_kv_heads, num_masks, page_slots = key.shape[1], past_blocks.shape[1], page_table.shape[1]
    present_key, present_value, bounds, codes = (
        pool.clone(memory_format=torch.contiguous_format) for pool in (past_key, past_value, past_bounds, past_codes)
    )
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    query, key, value, page_table = (tensor.contiguous() for tensor in (query, key, value, page_table))
    lengths = past_lengths, query_lengths
    sizes: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "DIM": max(16, triton.next_power_of_2(head_dim)),
        "PAGE_SIZE": past_key.shape[2],
    }
    heads: dict[str, Any] = {"NUM_HEADS": num_heads, "NUM_MASKS": num_masks}
    choice = Choice.of(config, past_lengths, query_lengths, past_blocks, refresh_mask)

    with torch.cuda.device_of(query):
        for pool, new in ((present_key, key), (present_value, value)):
            cache.append[1, num_kv_heads, batch](
                pool, new, page_table, *lengths, new_tokens, page_slots, **sizes,
                ROWS=triton.next_power_of_2(new_tokens),
            )
        if not config.dense:
            write_state[triton.cdiv(new_tokens, config.block), num_kv_heads, batch](
                present_key, bounds, codes, page_table, *lengths, page_slots, **sizes, BLOCK=config.block
            )

        max_blocks = page_slots * past_bounds.shape[2]
        scores = query.new_full((batch, num_masks, max_blocks), -torch.inf, dtype=torch.float32)
        first_scores[triton.cdiv(max_blocks, 16), num_masks, batch](
            query, bounds, page_table, choice.first, choice.last, choice.searches.int(), scores,
            new_tokens, page_slots, max_blocks, **heads, **sizes, BLOCK=config.block, BLOCKS=16,
        )  # fmt: skip
        every = torch.arange(max_blocks, dtype=torch.int32, device=query.device).expand_as(scores)
        left = best(every, scores, config.searched)
        sums = query.new_full(
            (batch, num_masks, num_heads // num_masks, left.shape[2]), -torch.inf, dtype=torch.float32
        )
        second_sums[left.shape[2], num_masks, batch](
            query, bounds, codes, page_table, left, sums, scale, new_tokens, page_slots, left.shape[2],
            **heads, **sizes, BLOCK=config.block,
        )  # fmt: skip
        found = best(left, shares(sums), config.chosen)

        attended = choice.attended(found, past_blocks)
        attention[num_masks, batch](
            query, present_key, present_value, page_table, *lengths, choice.first, choice.last,
            choice.prunes.int(), attended, output, scale, config.value_threshold, new_tokens, page_slots,
            attended.shape[2],
            **heads, **sizes, BLOCK=config.block, BLOCKS=max(1, 64 // config.block),
            ROWS=max(16, triton.next_power_of_2(num_heads // num_masks * new_tokens)),
        )  # fmt: skip
    return output, present_key, present_value, bounds, codes, choice.present(found, past_blocks)


def best(blocks: Tensor, scores: Tensor, count: int) -> Tensor:
    """The best, the lower index where scores are equal.

    Args:
        blocks: [..., N] int32 ascending, -1 last, for none.
        scores: [..., N] float32; -inf, and only then: no block.

    Returns:
        [..., min(count, N)] int32 ascending, -1 last.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    there = scores.gather(-1, order) > -torch.inf
    return ascending(blocks.gather(-1, order).masked_fill(~there, NONE))


def ascending(blocks: Tensor) -> Tensor:
    """Sorted along the last axis, NONE as -1."""
    blocks = blocks.sort(dim=-1).values
    return blocks.masked_fill(blocks == NONE, -1)


def shares(sums: Tensor) -> Tensor:
    """Each block's largest share of a query head's softmax over all blocks, as a logarithm.

    Args:
        sums: [B, Hm, G, N], the log-sums of blocks; +inf ranks first and takes no part, -inf: no block.

    Returns:
        [B, Hm, N], -inf where there is no block.
    """
    total = sums.masked_fill(sums == torch.inf, -torch.inf).logsumexp(dim=-1, keepdim=True)
    share = (sums - total).masked_fill(sums == torch.inf, torch.inf)
    return share.masked_fill(sums == -torch.inf, -torch.inf).amax(dim=2)


@dataclass(frozen=True)
class Choice:
    """What each sequence and mask head attends to between sink and window, and why.

    Attributes:
        config: what decides.
        first, last: [B] int32, candidates of the first row.
        end: [B] int32, one past the last block.
        active: [B] bool.
        prunes: [B] bool, whether there are more candidates than K.
        reuses, searches: [B, Hm] bool, whether past blocks are attended, or a search's; neither: all candidates.
    """

    config: DecodeConfig
    first: Tensor
    last: Tensor
    end: Tensor
    active: Tensor
    prunes: Tensor
    reuses: Tensor
    searches: Tensor

    @classmethod
    def of(
        cls, config: DecodeConfig, past_lengths: Tensor, query_lengths: Tensor, past_blocks: Tensor,
        refresh_mask: Tensor,
    ) -> Choice:
        """From the inputs of the call."""
        last = (past_lengths - config.window_tokens + 1).clamp(min=0) // config.block * (not config.dense)
        first = last.clamp(max=-(-config.sink_tokens // config.block))
        active = query_lengths > 0
        prunes = active & (last - first > config.chosen)
        reuses = (prunes & (refresh_mask == 0))[:, None] & (past_blocks[..., 0] >= 0)
        end = (past_lengths + query_lengths + config.block - 1) // config.block
        return cls(config, first, last, end, active, prunes, reuses, prunes[:, None] & ~reuses)

    def present(self, found: Tensor, past_blocks: Tensor) -> Tensor:
        """present_blocks: [B, Hm, K] int32.

        Args:
            found: [B, Hm, up to K], what searches found; fewer only where none is wanted.
        """
        blocks = torch.full_like(past_blocks, -1)
        blocks[..., : found.shape[2]] = found.masked_fill(~self.searches[..., None], -1)
        return torch.where((self.reuses | ~self.active[:, None])[..., None], past_blocks, blocks)

    def attended(self, found: Tensor, past_blocks: Tensor) -> Tensor:
        """Sink, what lies between, and window: [B, Hm, N] int32, -1 for none."""
        heads = past_blocks.shape[1]
        columns = self.config.chosen + NEWEST  # reuse has most
        chosen = torch.nn.functional.pad(found, (0, columns - found.shape[2]), value=-1)
        every = blocks_between(self.first, self.last, columns).expand(-1, heads, -1)
        between = torch.where(self.searches[..., None], chosen, every)
        between = torch.where(self.reuses[..., None], self.reused(past_blocks), between)
        sink = blocks_between(torch.zeros_like(self.first), self.first, int(self.first.max()))
        window = blocks_between(self.last, self.end, int((self.end - self.last).max()))
        return torch.cat([sink.expand(-1, heads, -1), between, window.expand(-1, heads, -1)], dim=2).contiguous()

    def reused(self, past_blocks: Tensor) -> Tensor:
        """Past blocks that are candidates, once each, and the newest: [B, Hm, K + 2] int32, -1 for none."""
        first, last = self.first[:, None, None], self.last[:, None, None]
        kept = past_blocks.masked_fill((past_blocks < first) | (past_blocks >= last), -1)
        newest = last - torch.arange(1, NEWEST + 1, dtype=torch.int32, device=last.device)
        blocks = torch.cat([kept, newest.expand(-1, kept.shape[1], -1)], dim=2).sort(dim=2).values
        repeated = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
        return blocks.masked_fill(repeated, -1)


def blocks_between(first: Tensor, last: Tensor, columns: int) -> Tensor:
    """Blocks [first, last) of each sequence, [B] int32 both: [B, 1, columns] int32, -1 after the last."""
    blocks = first[:, None] + torch.arange(columns, dtype=torch.int32, device=first.device)
    return blocks.masked_fill(blocks >= last[:, None], -1)[:, None]
