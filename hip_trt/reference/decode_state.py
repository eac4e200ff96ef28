"""What a decode call's search reads of a key block in place of its keys: bounds, and codes of 2 bits between them.

Both belong to full blocks of ``block`` tokens, ``block`` a divisor of page_size, and lie beside the page pool. The call
that writes a block's last row, prefill or decode, writes them. They are undefined until then.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 16
"""Codes of an int32."""


def key_bounds(keys: Tensor) -> Tensor:
    """Smallest and largest value of each dimension in a block's keys: [..., block, D] to [..., 2, D]; NaN stays NaN."""
    return torch.stack([keys.amin(dim=-2), keys.amax(dim=-2)], dim=-2)


def quantise(keys: Tensor, bounds: Tensor) -> Tensor:
    """Which quarter of each key stands for it: [..., block, D] and its [..., 2, D] to [..., block, D] int64, 0 to 3.

    In float32 without division, so that every implementation finds the same. A dimension that holds NaN has code 0: its
    bounds are NaN, and so is whatever is made of them.
    """
    low, high = bounds.float().unsqueeze(-3).unbind(-2)
    extent, above = high - low, 6 * (keys.float() - low)
    codes = (above >= extent).long() + (above >= 3 * extent) + (above >= 5 * extent)
    return codes.masked_fill(extent == 0, 0)


def dequantise(codes: Tensor, bounds: Tensor) -> Tensor:
    """The keys that codes stand for: [..., block, D] int64 and [..., 2, D] to [..., block, D], the type of bounds."""
    low, high = bounds.unsqueeze(-3).unbind(-2)
    return low + codes * (high - low) / 3


def pack(codes: Tensor) -> Tensor:
    """[..., D] int64 to [..., D / 16] int32: dimension d is bits 2 (d % 16) and up of word d / 16."""
    by_word = codes.reshape(*codes.shape[:-1], codes.shape[-1] // PER_WORD, PER_WORD)
    words = (by_word << 2 * torch.arange(PER_WORD)).sum(dim=-1)
    return words.to(torch.int32)  # code 2 or 3 in the last dimension of a word makes it negative


def unpack(words: Tensor) -> Tensor:
    """[..., D / 16] int32 to [..., D] int64."""
    return (words[..., None].long() >> 2 * torch.arange(PER_WORD) & 3).flatten(-2)


def by_block(pool: Tensor, per_page: int) -> Tensor:
    """A view of a pool by blocks, so many a page: [P, Hkv, page_size, ...] to [P, Hkv, per_page, block, ...]."""
    return pool.view(*pool.shape[:2], per_page, pool.shape[2] // per_page, *pool.shape[3:])


def write_state(
    present_key: Tensor, past_bounds: Tensor, past_codes: Tensor, page_table: Tensor, past_lengths: Tensor,
    query_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Bounds and codes with those of each block that a call fills, from all keys of the block in the pool.

    Args:
        present_key: [P, Hkv, page_size, D] T, the pool with the call's new rows, as many as there are.
        past_bounds: [P, Hkv, page_size / block, 2, D] T; not changed.
        past_codes: [P, Hkv, page_size, D / 16] int32; not changed.
        page_table, past_lengths, query_lengths: see :func:`hip_trt.reference.hip_attention`.

    Returns:
        present_bounds and present_codes.
    """
    bounds, codes = past_bounds.clone(), past_codes.clone()
    per_page = bounds.shape[2]
    block = present_key.shape[2] // per_page
    keys_by_block, codes_by_block = by_block(present_key, per_page), by_block(codes, per_page)
    for row, (past, count) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        filled = torch.arange(past // block, (past + count) // block)
        at = page_table[row, filled // per_page].long(), slice(None), filled % per_page
        keys = keys_by_block[at]  # [N, Hkv, block, D]
        bounds[at] = key_bounds(keys)
        codes_by_block[at] = pack(quantise(keys, bounds[at]))
    return bounds, codes


def gather_blocks(pool: Tensor, page_table_row: Tensor, blocks: Tensor, kv_head: int) -> Tensor:
    """Blocks of one sequence and key/value head, from a pool by blocks: [P, Hkv, page_size / block, ...] to [N, ...].

    Args:
        page_table_row: [M] int32.
        blocks: [N] int64.
    """
    per_page = pool.shape[2]
    return pool[page_table_row[blocks // per_page].long(), kv_head, blocks % per_page]
