# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The whole operator: append to the cache, select blocks, attend to them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.triton import cache
from hip_trt.triton.attention import sparse_attention
from hip_trt.triton.inputs import check_query
from hip_trt.triton.query_block import candidates, query_block
from hip_trt.triton.tree import all_nodes, block_scores, children, keep_best, size_of, start_level


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
    chosen_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hierarchically pruned attention with a paged KV cache: :func:`hip_trt.reference.hip_attention` in Triton.

    Args, shapes and results are the reference's, but for: T is float16, bfloat16 or float32 (arithmetic is float32),
    and past_nodes are ascending, as every implementation leaves them.

    Args:
        chosen_blocks: [B, Hm, ceil(S / block_q), K] int32, contiguous, or None. Receives the chosen blocks of each
            query block, ascending, -1 after the last; all -1 where there are no valid rows or attention is dense.
            K is config.decode_mask_blocks where S is 1, else config.mask_blocks.

    Raises:
        EnvironmentProblem: if the tensors are on the CPU, and Triton was imported without its interpreter.
        RuntimeInputError: if T is not one of the three types, or chosen_blocks has another shape.
    """
    check_query(query)
    batch, num_heads, new_tokens, head_dim = query.shape
    num_kv_heads, num_masks, page_slots = key.shape[1], past_nodes.shape[1], page_table.shape[1]
    query_blocks = triton.cdiv(new_tokens, config.block_q)
    decode = new_tokens == 1
    budget = config.decode_mask_blocks if decode else config.mask_blocks
    max_blocks = page_slots * config.page_size // config.block_k  # of a sequence
    slots = min(budget, max_blocks)
    nodes_shape = (batch, num_masks, query_blocks, slots)
    if chosen_blocks is None:
        chosen_blocks = torch.empty(nodes_shape, dtype=torch.int32, device=query.device)
    elif chosen_blocks.shape != (*nodes_shape[:-1], budget):
        raise RuntimeInputError(
            f"chosen_blocks: shape {list(chosen_blocks.shape)} is not allowed.",
            f"It must be {[*nodes_shape[:-1], budget]}.",
        )
    chosen_blocks.fill_(-1)
    chosen_counts = torch.zeros(nodes_shape[:-1], dtype=torch.int32, device=query.device)
    # A level holds at most this many nodes; search_from expands two more.
    max_nodes = min((slots + 2) * max(config.branch, config.leaf_branch), max_blocks)
    nodes = torch.empty((*nodes_shape[:-1], max_nodes), dtype=torch.int32, device=query.device)
    scores = torch.empty(nodes.shape, dtype=torch.float32, device=query.device)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    present_key, present_value = (pool.clone(memory_format=torch.contiguous_format) for pool in (past_key, past_value))
    present_nodes = torch.where(query_lengths[:, None, None] == 0, past_nodes, -1).contiguous()
    query, key, value, page_table, past_nodes = (
        tensor.contiguous() for tensor in (query, key, value, page_table, past_nodes)
    )
    lengths = past_lengths, query_lengths
    heads: dict[str, Any] = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "NUM_MASKS": num_masks}
    sizes: dict[str, Any] = {
        "HEAD_DIM": head_dim, "DIM": max(16, triton.next_power_of_2(head_dim)), "PAGE_SIZE": config.page_size,
    }
    blocks: dict[str, Any] = {
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "SINK_TOKENS": config.sink_tokens,
        "WINDOW_TOKENS": config.window_tokens,
    }
    rows_per_block = min(config.block_q, new_tokens)
    samples = triton.cdiv(rows_per_block, config.stride_q)
    with torch.cuda.device_of(query):
        for pool, new in ((present_key, key), (present_value, value)):
            cache.append[triton.cdiv(new_tokens, 32), num_kv_heads, batch](
                pool, new, page_table, *lengths, new_tokens, page_slots, NUM_KV_HEADS=num_kv_heads, **sizes, ROWS=32
            )
        if not dense:
            select_blocks[query_blocks, num_masks, batch](
                query, present_key, page_table, *lengths, past_nodes, refresh_mask,
                chosen_blocks, chosen_counts, present_nodes, nodes, scores,
                new_tokens, page_slots, past_nodes.shape[2], chosen_blocks.shape[3], max_nodes, budget,
                **heads, **sizes, **blocks, STRIDE_Q=config.stride_q, STRIDE_K=config.stride_k, BRANCH=config.branch,
                LEAF_BRANCH=config.leaf_branch, REUSE_LEVEL=config.reuse_level, DECODE=decode, SAMPLES=samples,
                ROWS=_tile(num_heads // num_masks * samples), NODES=max(1, 64 * config.stride_k // config.block_k),
            )  # fmt: skip
        sparse_attention[query_blocks, num_heads, batch](
            query, present_key, present_value, page_table, *lengths, chosen_blocks, chosen_counts, output,
            scale, new_tokens, page_slots, chosen_blocks.shape[3],
            **heads, **sizes, **blocks, DENSE=dense, ROWS=max(16, triton.next_power_of_2(rows_per_block)),
            BLOCKS=max(1, 64 // config.block_k),
        )  # fmt: skip
    return output, present_key, present_value, present_nodes


def _tile(rows: int) -> int:
    """Rows of a matrix product: a power of two from 16 (the least that tl.dot takes) to 64."""
    return int(min(64, max(16, triton.next_power_of_2(rows))))


@triton.jit(do_not_specialize=["new_tokens", "page_slots", "kept_slots", "chosen_slots", "max_nodes", "budget"])
def select_blocks(
    query, keys, page_table, past_lengths, query_lengths, past_nodes, refresh_mask,
    chosen, chosen_counts, present_nodes, nodes, scores,
    new_tokens, page_slots, kept_slots, chosen_slots, max_nodes, budget,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_MASKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SINK_TOKENS: tl.constexpr, WINDOW_TOKENS: tl.constexpr,
    STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, BRANCH: tl.constexpr, LEAF_BRANCH: tl.constexpr,
    REUSE_LEVEL: tl.constexpr, DECODE: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, NODES: tl.constexpr,
    TILE: tl.constexpr = 64,
):  # fmt: skip
    """The blocks that one query block chooses, for one mask head. Grid: (ceil(S / BLOCK_Q), Hm, B).

    ``nodes`` and ``scores`` are scratch, max_nodes per program; the best nodes of a level go to ``chosen``, where those
    of level 0 stay.
    """
    block, mask_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, rows, p_first = query_block(past_lengths, query_lengths, b, block, BLOCK_Q)
    if rows <= 0:
        return
    first, last = candidates(p_first, BLOCK_K, SINK_TOKENS, WINDOW_TOKENS)
    plan = (b * NUM_MASKS + mask_head).to(tl.int64) * tl.num_programs(0) + block
    chosen += plan * chosen_slots
    nodes += plan * max_nodes
    scores += plan * max_nodes
    past_nodes += (b * NUM_MASKS + mask_head) * kept_slots
    present_nodes += (b * NUM_MASKS + mask_head) * kept_slots
    query += b.to(tl.int64) * NUM_HEADS * new_tokens * HEAD_DIM
    page_table += b * page_slots
    HEADS_PER_MASK: tl.constexpr = NUM_HEADS // NUM_MASKS
    first_head = mask_head * HEADS_PER_MASK
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)

    if last - first <= budget:  # all of them: equal to dense attention
        tl.store(chosen_counts + plan, all_nodes(chosen, 1, first, last, TILE))
        return
    reused = False
    if DECODE:
        reused = (tl.load(refresh_mask) == 0) & (tl.load(past_nodes) >= 0)
    if reused:  # search_from: the nodes that an earlier step kept
        for start in range(0, kept_slots, TILE):
            n = start + tl.arange(0, TILE)
            tl.store(present_nodes + n, tl.load(past_nodes + n, mask=n < kept_slots), mask=n < kept_slots)
        if REUSE_LEVEL == 0:
            count = children(chosen, past_nodes, kept_slots, 1, 1, first, last, TILE)
            level = -1
        else:  # and the two newest: all blocks from theirs on
            newest = tl.maximum((tl.cdiv(last, LEAF_BRANCH) - 2) * LEAF_BRANCH, first)
            count = children(nodes, past_nodes, kept_slots, LEAF_BRANCH, 1, first, newest, TILE)
            count += all_nodes(nodes + count, 1, newest, last, TILE)
            level = 0
    else:  # search: from the top
        level = start_level(first, last, budget, BRANCH, LEAF_BRANCH)
        count = all_nodes(nodes, size_of(level, BRANCH, LEAF_BRANCH), first, last, TILE)
    while level >= 0:
        block_scores(
            scores, nodes, count, size_of(level, BRANCH, LEAF_BRANCH), first, last,
            query, keys, page_table, first_row, rows, first_head, kv_head, new_tokens,
            HEADS_PER_MASK, NUM_KV_HEADS, HEAD_DIM, DIM, PAGE_SIZE, BLOCK_K, STRIDE_Q, STRIDE_K, SAMPLES, ROWS, NODES,
        )  # fmt: skip
        count = keep_best(chosen, nodes, scores, count, budget, TILE)
        if DECODE and level == REUSE_LEVEL and not reused:
            for start in range(0, kept_slots, TILE):
                n = start + tl.arange(0, TILE)
                tl.store(present_nodes + n, tl.load(chosen + n, mask=n < kept_slots), mask=n < kept_slots)
        if level > 0:
            width = tl.where(level == 1, LEAF_BRANCH, BRANCH)
            size = size_of(level - 1, BRANCH, LEAF_BRANCH)
            count = children(nodes, chosen, count, width, size, first, last, TILE)
        level -= 1
    tl.store(chosen_counts + plan, count)
