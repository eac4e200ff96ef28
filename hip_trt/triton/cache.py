# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The paged KV cache: token t of sequence b is row t % page_size of page page_table[b, t // page_size]."""

import triton
import triton.language as tl


@triton.jit
def pool_rows(page_table_row, tokens, valid, kv_head, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where the tokens of one sequence are in a pool seen as [P * Hkv * page_size, D].

    Args:
        page_table_row: pointer to the sequence's M pages.
        tokens, valid: [N]; no page is read for a token that is not valid.

    Returns:
        [N] int64, for a pool may hold more than 2^31 elements.
    """
    pages = tl.load(page_table_row + tokens // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    return (pages * NUM_KV_HEADS + kv_head) * PAGE_SIZE + tokens % PAGE_SIZE


@triton.jit
def load_rows(tensor, rows, valid, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Rows of a tensor seen as [N, HEAD_DIM], as float32, filled up to DIM columns with 0; rows not valid are 0."""
    dims = tl.arange(0, DIM)
    mask = valid[:, None] & (dims[None, :] < HEAD_DIM)
    return tl.load(tensor + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["new_tokens", "page_slots"])
def append(
    pool, new, page_table, past_lengths, query_lengths, new_tokens, page_slots,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write new rows after each sequence's committed ones, in place. Grid: (ceil(S / ROWS), Hkv, B)."""
    kv_head, b = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < tl.load(query_lengths + b)
    position = tl.load(past_lengths + b) + row
    to = pool_rows(page_table + b * page_slots, position, valid, kv_head, NUM_KV_HEADS, PAGE_SIZE)
    source = (b * NUM_KV_HEADS + kv_head).to(tl.int64) * new_tokens + row
    dims = tl.arange(0, DIM)
    mask = valid[:, None] & (dims[None, :] < HEAD_DIM)
    values = tl.load(new + source[:, None] * HEAD_DIM + dims[None, :], mask=mask)
    tl.store(pool + to[:, None] * HEAD_DIM + dims[None, :], values, mask=mask)
