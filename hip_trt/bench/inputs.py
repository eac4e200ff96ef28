"""Random tensors from a seed, so that every peer, in whatever process, gets the same ones.

Needs PyTorch only: a peer's process has another Triton and none of hip-trt's dependencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt.bench.geometry import Geometry

ROTATED_BYTES = 400 << 20
"""Inputs are rotated over at least this much of what is read, several times the L2 cache of any GPU so far."""


@dataclass(frozen=True)
class Tensors:
    """Queries, keys and values of one layer: [B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def draw(geometry: Geometry, *, batch: int, queries: int, tokens: int, seed: int, device: str = "cuda") -> Tensors:
    """Normally distributed tensors; the same for the same arguments, PyTorch version and kind of device.

    Args:
        batch: B.
        queries: S; 1 for a decode step.
        tokens: T, keys and values per sequence.
        seed: of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        shape = (batch, heads, rows, geometry.head_dim)
        return torch.randn(shape, dtype=geometry.dtype, device=device, generator=generator)

    return Tensors(normal(geometry.query_heads, queries), normal(geometry.kv_heads, tokens),
                   normal(geometry.kv_heads, tokens))


def dense_sets(geometry: Geometry, *, batch: int, tokens: int) -> int:
    """Sets of keys and values over which a decode step that reads all of them is rotated."""
    bytes_each = 2 * batch * geometry.kv_heads * tokens * geometry.row_bytes
    return max(1, min(8, ROTATED_BYTES // bytes_each))
