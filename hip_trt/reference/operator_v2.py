"""The whole operator of version 2: prefill as in version 1, decode as in :mod:`hip_trt.reference.decode`.

The contract is docs/decode_version_2.md. Models that are exported today run version 1
(:mod:`hip_trt.reference.operator`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hip_trt.config_v2 import HipConfigV2
from hip_trt.operator import DECODE
from hip_trt.reference.decode import DecodeConfig, decode_attention
from hip_trt.reference.decode_state import write_state
from hip_trt.reference.operator import hip_attention


def hip_attention_v2(
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
    call_kind: Tensor,
    *,
    config: HipConfigV2,
    scale: float,
    dense: bool = False,
    select: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hierarchically pruned attention with a paged KV cache, version 2.

    Args:
        query, key, value, past_key, past_value, page_table, past_lengths, query_lengths: see
            :func:`hip_trt.reference.hip_attention`; D is a multiple of 16, and S is 1 to 8 in a decode call.
        past_bounds: [P, Hkv, page_size / decode_block_k, 2, D] T, see
            :func:`hip_trt.reference.decode_state.write_state`.
        past_codes: [P, Hkv, page_size, D / 16] int32, likewise.
        past_blocks: [B, Hm, K] int32, K being config.decode_mask_blocks: what an earlier decode call chose; -1: none.
        refresh_mask: [B] int32; 1: the sequence searches in a decode call.
        call_kind: [1] int32 for prefill, [2] for decode; its values do not count.
        config: block sizes, budgets, tree shape.
        scale: factor on q.k.
        dense: attend to everything; bounds and codes stay as they are.
        select: see :func:`hip_trt.reference.hip_attention`; for prefill.

    Returns:
        output [B, Hq, S, D] T, padding rows 0; present_key, present_value, present_bounds and present_codes, copies of
        the past ones with what is new; and present_blocks [B, Hm, K] int32.
    """
    where = page_table, past_lengths, query_lengths
    if len(call_kind) == DECODE:
        return decode_attention(
            query, key, value, past_key, past_value, *where, past_bounds, past_codes, past_blocks, refresh_mask,
            config=decode_config(config, dense=dense), scale=scale,
        )
    output, present_key, present_value, present_blocks = hip_attention(
        query, key, value, past_key, past_value, *where, past_blocks, refresh_mask, config=config, scale=scale,
        dense=dense, decode=False, select=select,
    )
    bounds, codes = past_bounds.clone(), past_codes.clone()
    if not dense:
        bounds, codes = write_state(present_key, past_bounds, past_codes, *where)
    return output, present_key, present_value, bounds, codes, present_blocks


def decode_config(config: HipConfigV2, *, dense: bool = False) -> DecodeConfig:
    """What decides a decode call."""
    return DecodeConfig(
        mask_k=config.decode_mask_k, search_k=config.decode_search_k, block=config.decode_block_k,
        sink_tokens=config.sink_tokens, window_tokens=config.window_tokens, value_threshold=config.value_threshold,
        dense=dense,
    )
