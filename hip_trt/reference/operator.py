"""The whole operator, row by row: the oracle that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.reference import cache
from hip_trt.reference.attention import sparse_attention
from hip_trt.reference.tree import Tree, search, search_from


def hip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
    past_nodes: Tensor,
    refresh_mask: Tensor,
    *,
    config: HipConfig,
    scale: float,
    dense: bool = False,
    decode: bool | None = None,
    select: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hierarchically pruned attention with a paged KV cache.

    Sizes: B sequences, S new tokens (padded), Hq query heads, Hkv key/value heads, D head size, P pages in the pool,
    M page slots per sequence, Hm mask heads (Hkv, or Hq where config.mask_heads is "query"), Kd nodes
    (config.decode_mask_blocks). T is float16, bfloat16, float32 or float64; arithmetic is float32, or float64 for
    float64 inputs.

    Args:
        query: [B, Hq, S, D] T, after RoPE.
        key, value: [B, Hkv, S, D] T, the new tokens, keys after RoPE.
        past_key, past_value: [P, Hkv, page_size, D] T, the page pool; rows that no sequence has committed are
            undefined.
        page_table: [B, M] int32, pages of each sequence in order; -1 where none. Sequences may share full pages.
        past_lengths: [B] int32, committed tokens before this call.
        query_lengths: [B] int32, valid new tokens; 0 marks an idle row, which keeps its past_nodes.
        past_nodes: [B, Hm, Kd] int32, tree nodes kept by an earlier decode step; -1 for none.
        refresh_mask: [1] int32; 1 searches from the top, 0 from past_nodes, in single-token calls (S = 1) only.
        config: block sizes, budgets, tree shape.
        scale: factor on q.k.
        dense: attend to everything.
        decode: whether S = 1 is a single-token call, and not a chunk of a prompt; None: it is.
        select: in place of :func:`select_blocks`, called for each row, query block and mask head, in this order; to
            watch or replay choices.

    Returns:
        output [B, Hq, S, D] T, padding rows 0; present_key and present_value [P, Hkv, page_size, D] T, copies of the
        pool with the new rows; present_nodes [B, Hm, Kd] int32.
    """
    batch, query_heads, new_tokens, _ = query.shape
    decode = new_tokens == 1 if decode is None else decode
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads_per_mask = query_heads // past_nodes.shape[1]
    group = query_heads // key.shape[1]
    present_key = cache.append(past_key, key, page_table, past_lengths, query_lengths)
    present_value = cache.append(past_value, value, page_table, past_lengths, query_lengths)
    output = torch.zeros_like(query)
    present_nodes = torch.full_like(past_nodes, -1)
    for b in range(batch):
        past, count = int(past_lengths[b]), int(query_lengths[b])
        if count == 0:
            present_nodes[b] = past_nodes[b]
            continue
        keys = cache.sequence(present_key, page_table[b], past + count).to(compute)
        values = cache.sequence(present_value, page_table[b], past + count).to(compute)
        for first_row in range(0, count, config.block_q):
            rows = torch.arange(first_row, min(first_row + config.block_q, count))
            for mask in range(past_nodes.shape[1]):
                heads = slice(mask * heads_per_mask, (mask + 1) * heads_per_mask)
                kv = mask * heads_per_mask // group
                queries = query[b, heads, rows].to(compute)
                reused = past_nodes[b, mask].long() if decode and int(refresh_mask[0]) == 0 else None
                blocks, kept = (select or select_blocks)(
                    queries, keys[kv], past + rows, config=config, decode=decode, dense=dense,
                    past_nodes=reused,
                )
                attended = sparse_attention(
                    queries, keys[kv], values[kv], blocks, past + rows, block_k=config.block_k, scale=scale
                )
                output[b, heads, rows] = attended.to(query.dtype)
                if decode and kept is not None:
                    present_nodes[b, mask] = kept.to(present_nodes.dtype)
    return output, present_key, present_value, present_nodes


def select_blocks(
    queries: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    config: HipConfig,
    decode: bool,
    dense: bool = False,
    past_nodes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The key blocks that one query block attends to, for one mask head: sink, chosen, window.

    Args:
        queries: [G, R, D], the valid rows of the mask head's query heads.
        keys: [T, D], one key head of the sequence, new tokens included.
        positions: [R] int64, position of each row.
        decode: whether this is a single-token call, with decode_mask_k.
        past_nodes: [Kd] int64 to search from, or None to search from the top.

    Returns:
        Attended blocks, int64 ascending, and the nodes for present_nodes ([Kd] int64), or None if there are none.
    """
    p_first, p_last = int(positions[0]), int(positions[-1])
    window = max(0, p_first - config.window_tokens + 1) // config.block_k
    sink = min(-(-config.sink_tokens // config.block_k), window)
    budget = config.decode_mask_blocks if decode else config.mask_blocks
    kept: Tensor | None = None
    if dense or window - sink <= budget:
        chosen = torch.arange(sink, window)
    else:
        tree = Tree(sink, window, config.branch, config.leaf_branch)
        last = queries.shape[1] - 1
        sampled = queries[:, torch.arange(last % config.stride_q, last + 1, config.stride_q)].flatten(0, 1)
        budgets = {"budget": budget, "block_k": config.block_k, "stride_k": config.stride_k,
                   "reuse_level": config.reuse_level}
        if past_nodes is not None and int(past_nodes[0]) >= 0:
            chosen, kept = search_from(past_nodes, sampled, keys, tree, **budgets), past_nodes
        else:
            chosen, kept = search(sampled, keys, tree, **budgets)
    blocks = torch.cat([torch.arange(sink), chosen, torch.arange(window, p_last // config.block_k + 1)])
    return blocks, kept
