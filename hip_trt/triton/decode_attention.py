# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention of a decode call, over a list of blocks: see :func:`hip_trt.reference.decode.attention`."""

import triton
import triton.language as tl

from hip_trt.triton.cache import load_rows, pool_rows


@triton.jit
def block_logits(
    queries, position, keys, blocks, num_blocks, start, page_table_row, kv_head, p_last, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Logits of the rows for BLOCKS blocks of the list.

    Returns:
        [ROWS, BLOCKS * BLOCK], -inf where a row does not see a token; and of each token: its block, whether it is
        there, and where in the pools.
    """
    n = start + tl.arange(0, BLOCKS)
    block = tl.load(blocks + n, mask=n < num_blocks, other=-1)
    tokens = tl.reshape(block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], [BLOCKS * BLOCK])
    # Tokens of no block are negative. Rows of the pool after p_last are undefined.
    valid = (tokens >= 0) & (tokens <= p_last)
    rows = pool_rows(page_table_row, tokens, valid, kv_head, NUM_KV_HEADS, PAGE_SIZE)
    token_keys = tl.trans(load_rows(keys, rows, valid, HEAD_DIM, DIM))
    logits = scale * tl.dot(queries, token_keys, input_precision="ieee")
    logits = tl.where(valid[None, :] & (tokens[None, :] <= position[:, None]), logits, float("-inf"))
    return logits, tokens // BLOCK, valid, rows


@triton.jit
def next_weights(highest, total, logits):
    """A step of a running softmax: weights, by how much what came before shrinks, and the new highest and total."""
    new_highest = tl.maximum(highest, tl.max(logits, axis=1))
    # A row may not have seen a token yet: all of its blocks so far may have been left out.
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp(logits - shift[:, None])
    decay = tl.exp(highest - shift)
    return weights, decay, new_highest, total * decay + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["new_tokens", "page_slots", "num_blocks"])
def attention(
    query, keys, values, page_table, past_lengths, query_lengths, first, last, prunes, blocks, output,
    scale, threshold, new_tokens, page_slots, num_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_MASKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """softmax(scale q.k) v over a list of blocks for all rows of a mask head. Grid: (Hm, B).

    With a threshold it goes over the list twice, for a probability is known after the last block only. What it leaves
    out may hold a row's highest logit, so the second softmax finds its own.

    Args:
        first, last: [B] int32, candidates; only tokens of these may be left out.
        prunes: [B] int32, 1 where the threshold counts.
        blocks: [B, Hm, num_blocks] int32, -1 for none.
        ROWS: G * S, filled up.
    """
    mask_head, b = tl.program_id(0), tl.program_id(1)
    rows = tl.load(query_lengths + b)
    if rows <= 0:
        return
    past = tl.load(past_lengths + b)
    GROUP: tl.constexpr = NUM_HEADS // NUM_MASKS
    first_head = mask_head * GROUP
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)
    page_table += b * page_slots
    blocks += (b * NUM_MASKS + mask_head).to(tl.int64) * num_blocks

    row = tl.arange(0, ROWS)
    valid_row = (row < GROUP * new_tokens) & (row % new_tokens < rows)
    position = past + row % new_tokens
    out_rows = (b * NUM_HEADS + first_head).to(tl.int64) * new_tokens + row  # the heads of a group are neighbours
    queries = load_rows(query, out_rows, valid_row, HEAD_DIM, DIM)
    p_last = past + rows - 1

    nothing = tl.full([ROWS], float("-inf"), tl.float32)
    highest_of_all, total_of_all = nothing, tl.zeros([ROWS], tl.float32)
    leaves_out = (threshold > 0.0) & (tl.load(prunes + b) != 0)
    if leaves_out:
        for start in range(0, num_blocks, BLOCKS):
            logits, _, _, _ = block_logits(
                queries, position, keys, blocks, num_blocks, start, page_table, kv_head, p_last, scale,
                NUM_KV_HEADS, HEAD_DIM, DIM, PAGE_SIZE, BLOCK, BLOCKS,
            )  # fmt: skip
            _, _, highest_of_all, total_of_all = next_weights(highest_of_all, total_of_all, logits)

    highest, total = nothing, tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        logits, block, valid, at = block_logits(
            queries, position, keys, blocks, num_blocks, start, page_table, kv_head, p_last, scale,
            NUM_KV_HEADS, HEAD_DIM, DIM, PAGE_SIZE, BLOCK, BLOCKS,
        )  # fmt: skip
        if leaves_out:
            probability = tl.exp(logits - highest_of_all[:, None]) / total_of_all[:, None]
            below = (probability < threshold) | (valid_row == 0)[:, None]  # NaN is not below
            small = tl.min(below.to(tl.int32), axis=0) > 0
            small = small & (block >= tl.load(first + b)) & (block < tl.load(last + b))
            logits = tl.where(small[None, :], float("-inf"), logits)
        weights, decay, highest, total = next_weights(highest, total, logits)
        attended *= decay[:, None]
        attended += tl.dot(weights, load_rows(values, at, valid, HEAD_DIM, DIM), input_precision="ieee")

    dims = tl.arange(0, DIM)
    result = (attended / total[:, None]).to(output.dtype.element_ty)
    tl.store(
        output + out_rows[:, None] * HEAD_DIM + dims[None, :], result,
        mask=valid_row[:, None] & (dims[None, :] < HEAD_DIM),
    )
