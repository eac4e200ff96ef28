# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Scores of both stages of a decode call's search: see :mod:`hip_trt.reference.decode`.

Scores are never NaN: it counts as +inf, so that a block that holds one is attended, and shows in the output.
"""

import triton
import triton.language as tl

from hip_trt.triton.cache import load_rows, pool_rows
from hip_trt.triton.decode_state import load_codes


@triton.jit
def load_query(query, b, head, new_tokens, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The first row of a query head, float32 [DIM]."""
    dims = tl.arange(0, DIM)
    row = (b * NUM_HEADS + head).to(tl.int64) * new_tokens
    return tl.load(query + row * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["new_tokens", "page_slots", "max_blocks"])
def first_scores(
    query, bounds, page_table, first, last, searches, scores, new_tokens, page_slots, max_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_MASKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest q.k that a key within a block's bounds can have, over the query heads.

    Grid: (ceil(max_blocks / BLOCKS), Hm, B).

    Args:
        first, last: [B] int32, candidates.
        searches: [B, Hm] int32, 1 where it does.
        scores: [B, Hm, max_blocks] float32; only candidates are written, never -inf.
    """
    mask_head, b = tl.program_id(1), tl.program_id(2)
    plan = b * NUM_MASKS + mask_head
    if tl.load(searches + plan) == 0:
        return
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = (blocks >= tl.load(first + b)) & (blocks < tl.load(last + b))
    first_head = mask_head * (NUM_HEADS // NUM_MASKS)
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)
    rows = pool_rows(page_table + b * page_slots, blocks * BLOCK, valid, kv_head, NUM_KV_HEADS, PAGE_SIZE) // BLOCK
    low = load_rows(bounds, 2 * rows, valid, HEAD_DIM, DIM)
    high = load_rows(bounds, 2 * rows + 1, valid, HEAD_DIM, DIM)
    best = tl.full([BLOCKS], -3.4028234663852886e38, tl.float32)  # the lowest float32
    for head in range(first_head, first_head + NUM_HEADS // NUM_MASKS):
        q = load_query(query, b, head, new_tokens, NUM_HEADS, HEAD_DIM, DIM)[None, :]
        score = tl.sum(tl.maximum(q * low, q * high), axis=1)
        best = tl.maximum(best, tl.where(score == score, score, float("inf")))
    tl.store(scores + plan.to(tl.int64) * max_blocks + blocks, best, mask=valid)


@triton.jit(do_not_specialize=["new_tokens", "page_slots", "num_blocks"])
def second_sums(
    query, bounds, codes, page_table, blocks, sums, scale, new_tokens, page_slots, num_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_MASKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log of the sum over a block's tokens of exp(scale q.k), keys by their codes. Grid: (num_blocks, Hm, B).

    Args:
        blocks: [B, Hm, num_blocks] int32, -1 for none.
        sums: [B, Hm, G, num_blocks] float32; written where there is a block.
    """
    i, mask_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    plan = (b * NUM_MASKS + mask_head).to(tl.int64)
    block = tl.load(blocks + plan * num_blocks + i)
    if block < 0:
        return
    first_head = mask_head * (NUM_HEADS // NUM_MASKS)
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    every = tokens >= 0
    rows = pool_rows(page_table + b * page_slots, tokens, every, kv_head, NUM_KV_HEADS, PAGE_SIZE)
    dims = tl.arange(0, DIM)
    of_block = bounds + tl.min(rows, axis=0) // BLOCK * 2 * HEAD_DIM + dims
    low = tl.load(of_block, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    high = tl.load(of_block + HEAD_DIM, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    keys = low[None, :] + load_codes(codes, rows, every, HEAD_DIM, DIM) * ((high - low) / 3.0)[None, :]
    for g in range(NUM_HEADS // NUM_MASKS):
        q = load_query(query, b, first_head + g, new_tokens, NUM_HEADS, HEAD_DIM, DIM)
        logits = scale * tl.sum(q[None, :] * keys, axis=1)
        highest = tl.max(logits, axis=0)
        total = highest + tl.log(tl.sum(tl.exp(logits - highest), axis=0))
        total = tl.where(total == total, total, float("inf"))
        tl.store(sums + (plan * (NUM_HEADS // NUM_MASKS) + g) * num_blocks + i, total)
