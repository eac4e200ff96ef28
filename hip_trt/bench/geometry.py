"""The attention layer that the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """Head counts, head size and type of one attention layer.

    Attributes:
        query_heads: Hq.
        kv_heads: Hkv, a divisor of Hq.
        head_dim: D.
        dtype: of queries, keys and values.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        return float(self.head_dim**-0.5)

    @property
    def row_bytes(self) -> int:
        """Bytes of one key, or one value, of one head."""
        return self.head_dim * self.dtype.itemsize


LLAMA_8B = Geometry(query_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
"""Llama-3.1-8B."""
