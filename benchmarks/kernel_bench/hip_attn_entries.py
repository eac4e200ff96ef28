"""hip-attn's two entry points with one interface. Tensors are [B, S, H, D]; queries are scaled by the caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernel_bench.hip_attn_import import import_module


class Call(Protocol):
    """Attention over tensors that are bound to it."""

    def __call__(self, metadata: Any = None) -> tuple[Tensor, Any]:
        """Attend, with the mask of an earlier call's metadata if given: [B, S, Hq, D], and metadata."""


class Entry(Protocol):
    """An entry point of hip-attn."""

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """A call on these tensors, with all that does not change from call to call prepared.

        Args:
            query: [B, S, Hq, D], the last S positions.
            key, value: [B, T, Hkv, D].
        """


class Entry11:
    """``hip_attention`` of version 1.1, which needs Triton 3.1.

    Args:
        site: where hip-attn and Triton are unpacked.
        options: fields of its ``HiPAttentionArgs``.
    """

    def __init__(self, site: Path, options: dict[str, Any]) -> None:
        self._module = import_module(site, "hip_attn.v1_1.attention2_draft_prefetch")
        self._options = options

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """See :class:`Entry`."""
        arguments = self._module.HiPAttentionArgs(position_ids=_positions(query, key) + 1, **self._options)

        def call(metadata: Any = None) -> tuple[Tensor, Any]:
            output, kept = self._module.hip_attention(query, key, value, args=arguments, previous_metadata=metadata)
            return output, kept

        return call


class Entry12:
    """``dual_stage_quadratic_hip_attention`` of version 1.2, which needs Triton 3.4.

    It decodes from a paged cache only. Its pages hold one token, as where its authors use it; here they are in order.
    Its caller says whether it decodes: otherwise each step would clear a state that only prefill uses.
    """

    def __init__(self, site: Path, options: dict[str, Any]) -> None:
        self._module = import_module(site, "hip_attn.v1_2.attention_extend")
        self._options = options

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """See :class:`Entry`."""
        arguments = self._module.HiPAttentionArgs(position_ids=_positions(query, key), **self._options)
        keys: Tensor | None = key
        values: Tensor | None = value
        if query.shape[1] == 1:
            batch, tokens = key.shape[:2]
            arguments.is_decode = True
            arguments.k_cache, arguments.v_cache = (rows.flatten(0, 1).unsqueeze(1) for rows in (key, value))
            # As wide as the longest context that it is told to expect, as a server's table would be.
            arguments.extend_context_length = max(arguments.extend_context_length, tokens)
            table = torch.zeros(batch, arguments.extend_context_length, dtype=torch.int32, device=query.device)
            table[:, :tokens] = torch.arange(batch * tokens, device=query.device).view(batch, tokens)
            arguments.block_table = table
            arguments.cache_seq_lens = torch.full((batch,), tokens, dtype=torch.int32, device=query.device)
            arguments.update_flags()
            keys = values = None

        def call(metadata: Any = None) -> tuple[Tensor, Any]:
            attend = self._module.dual_stage_quadratic_hip_attention
            output, kept = attend(query, keys, values, arguments, metadata)
            return output, kept

        return call


def _positions(query: Tensor, key: Tensor) -> Tensor:
    """Of the queries, which are the last tokens: [B, S] int64."""
    (batch, rows), tokens = query.shape[:2], key.shape[1]
    return torch.arange(tokens - rows, tokens, device=query.device).expand(batch, rows)


ENTRIES: dict[str, type[Entry11] | type[Entry12]] = {"1.1": Entry11, "1.2": Entry12}
