"""Pages of a KV pool, scattered as a server's would be."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_trt.bench.geometry import Geometry


def scattered(*shape: int, device: torch.device) -> Tensor:
    """Page tables whose pages are the pool's in random order, each used once: int32 of this shape."""
    return torch.randperm(torch.Size(shape).numel(), device=device).int().view(shape)


def empty_pools(geometry: Geometry, tables: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [P, Hkv, page_size, D], as many pages as ``tables`` have.

    Not a number everywhere: rows that nobody wrote must not count.
    """
    shape = (tables.numel(), geometry.kv_heads, page_size, geometry.head_dim)
    empty = torch.full(shape, torch.nan, dtype=geometry.dtype, device=tables.device)
    return empty, empty.clone()


def fill(pool: Tensor, tables: Tensor, rows: Tensor) -> None:
    """Write sequences into their pages.

    Args:
        pool: [P, Hkv, page_size, D].
        tables: [B, M] int32, M at least T / page_size.
        rows: [B, Hkv, T, D], T a multiple of page_size.
    """
    page_size = pool.shape[2]
    for table, sequence in zip(tables, rows, strict=True):
        paged = sequence.unflatten(1, (-1, page_size)).transpose(0, 1)
        pool[table[: len(paged)].long()] = paged


def gather(pool: Tensor, table: Tensor, head: int, length: int) -> Tensor:
    """The first ``length`` rows of one head of one sequence, float32: [length, D]."""
    return pool[table.long(), head].flatten(0, 1)[:length].float()
