"""hip-attn's two entry points with one signature. Tensors are [B, S, H, D]; queries are scaled by the caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernel_bench.hip_attn_import import import_module


class Entry(Protocol):
    """An entry point of hip-attn."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any = None) -> tuple[Tensor, Any]:
        """Attend; ``metadata`` of an earlier call reuses its mask.

        Args:
            query: [B, S, Hq, D], the last S positions.
            key, value: [B, T, Hkv, D].

        Returns:
            [B, S, Hq, D], and metadata.
        """


class Entry11:
    """``hip_attn.v1_1...hip_attention``, which needs Triton 3.1.

    Args:
        site: where hip-attn and Triton are unpacked.
        options: fields of its ``HiPAttentionArgs``.
    """

    def __init__(self, site: Path, options: dict[str, Any]) -> None:
        self._module = import_module(site, "hip_attn.v1_1.attention2_draft_prefetch")
        self._options = options

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any = None) -> tuple[Tensor, Any]:
        arguments = self._module.HiPAttentionArgs(**self._options)
        output, metadata = self._module.hip_attention(query, key, value, args=arguments, previous_metadata=metadata)
        return output, metadata


class Entry12:
    """``hip_attn.v1_2...dual_stage_quadratic_hip_attention``, which needs Triton 3.4."""

    def __init__(self, site: Path, options: dict[str, Any]) -> None:
        self._module = import_module(site, "hip_attn.v1_2.attention_extend")
        self._options = options

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any = None) -> tuple[Tensor, Any]:
        (batch, rows), tokens = query.shape[:2], key.shape[1]
        positions = torch.arange(tokens - rows, tokens, device=query.device).expand(batch, rows)
        # Its caller says whether it decodes; otherwise each step would clear the state that only prefill uses.
        arguments = self._module.HiPAttentionArgs(position_ids=positions, is_decode=rows == 1, **self._options)
        output, metadata = self._module.dual_stage_quadratic_hip_attention(query, key, value, arguments, metadata)
        return output, metadata


ENTRIES: dict[str, type[Entry11] | type[Entry12]] = {"1.1": Entry11, "1.2": Entry12}
