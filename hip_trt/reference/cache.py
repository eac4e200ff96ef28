"""The paged KV cache: token t of sequence b is row t % page_size of page page_table[b, t // page_size]."""

from __future__ import annotations

import torch
from torch import Tensor


def append(pool: Tensor, new: Tensor, page_table: Tensor, past_lengths: Tensor, query_lengths: Tensor) -> Tensor:
    """The pool with each sequence's new rows written after its committed ones; ``pool`` itself is not changed.

    Args:
        pool: [P, Hkv, page_size, D].
        new: [B, Hkv, S, D]; rows from query_lengths on are padding and are not written.
        page_table: [B, M] int32.
        past_lengths, query_lengths: [B] int32.
    """
    pool, page_size = pool.clone(), pool.shape[2]
    for row, (past, count) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        position = torch.arange(past, past + count)
        pages = page_table[row, position // page_size].long()
        pool[pages, :, position % page_size] = new[row, :, :count].transpose(0, 1)
    return pool


def sequence(pool: Tensor, page_table_row: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens of one sequence, gathered from its pages: [Hkv, length, D]."""
    pages = page_table_row[: -(-length // pool.shape[2])].long()
    return pool[pages].transpose(0, 1).flatten(1, 2)[:, :length]
