# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block-sparse attention over sink, chosen and window blocks (HiP, arXiv 2406.09827, section 3.3)."""

import triton
import triton.language as tl

from hip_trt.triton.cache import load_rows, pool_rows
from hip_trt.triton.query_block import candidates, query_block


@triton.jit(do_not_specialize=["new_tokens", "page_slots", "chosen_slots"])
def sparse_attention(
    query, keys, values, page_table, past_lengths, query_lengths, chosen, chosen_counts, output,
    scale, new_tokens, page_slots, chosen_slots,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_MASKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SINK_TOKENS: tl.constexpr, WINDOW_TOKENS: tl.constexpr,
    DENSE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """softmax(scale q.k) v for one query block of one query head. Grid: (ceil(S / BLOCK_Q), Hq, B).

    The blocks are taken in order, BLOCKS at a time, with a running softmax in float32.
    """
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, rows, p_first = query_block(past_lengths, query_lengths, b, block, BLOCK_Q)
    if rows <= 0:
        return
    p_last = p_first + rows - 1
    sink, window = candidates(p_first, BLOCK_K, SINK_TOKENS, WINDOW_TOKENS)
    mask_head = head // (NUM_HEADS // NUM_MASKS)
    plan = (b * NUM_MASKS + mask_head).to(tl.int64) * tl.num_programs(0) + block
    chosen += plan * chosen_slots
    num_chosen = window - sink if DENSE else tl.load(chosen_counts + plan)
    num_blocks = sink + num_chosen + p_last // BLOCK_K + 1 - window

    row = tl.arange(0, ROWS)
    position = p_first + row
    out_rows = (b * NUM_HEADS + head).to(tl.int64) * new_tokens + first_row + row
    queries = load_rows(query, out_rows, row < rows, HEAD_DIM, DIM)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        n = start + tl.arange(0, BLOCKS)
        if DENSE:
            blocks = n
        else:
            is_chosen = (n >= sink) & (n < sink + num_chosen)
            blocks = tl.load(chosen + n - sink, mask=is_chosen, other=0)
            blocks = tl.where(n < sink, n, tl.where(is_chosen, blocks, window + n - sink - num_chosen))
        tokens = tl.reshape(blocks[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], [BLOCKS * BLOCK_K])
        # Rows after p_last are undefined, in the last block too. Blocks after the window's last begin after p_last.
        valid = tokens <= p_last
        at = pool_rows(page_table + b * page_slots, tokens, valid, head // (NUM_HEADS // NUM_KV_HEADS),
                       NUM_KV_HEADS, PAGE_SIZE)  # fmt: skip
        logits = scale * tl.dot(queries, tl.trans(load_rows(keys, at, valid, HEAD_DIM, DIM)), input_precision="ieee")
        # The first token attended is before every row, so no row's highest stays -inf.
        logits = tl.where(tokens[None, :] <= tl.minimum(position, p_last)[:, None], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp(logits - new_highest[:, None])
        decay = tl.exp(highest - new_highest)
        total = total * decay + tl.sum(weights, axis=1)
        attended *= decay[:, None]
        attended += tl.dot(weights, load_rows(values, at, valid, HEAD_DIM, DIM), input_precision="ieee")
        highest = new_highest

    dims = tl.arange(0, DIM)
    result = (attended / total[:, None]).to(output.dtype.element_ty)
    mask = (row < rows)[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(output + out_rows[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
