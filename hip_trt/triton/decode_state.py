# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What a decode call's search reads of a key block in place of its keys: bounds, and codes of 2 bits between them."""

import triton
import triton.language as tl

from hip_trt.triton.cache import load_rows, pool_rows


@triton.jit
def key_bounds(keys):
    """Smallest and largest key by dimension, NaN where one is: [BLOCK, DIM] to two [DIM]."""
    broken = tl.max((keys != keys).to(tl.int32), axis=0) > 0  # what a reduction makes of NaN is not specified
    low = tl.where(broken, float("nan"), tl.min(keys, axis=0))
    return low, tl.where(broken, float("nan"), tl.max(keys, axis=0))


@triton.jit
def quantise(keys, low, high):
    """Codes of keys [BLOCK, DIM] between bounds [DIM]: 0 to 3, int32."""
    extent = high - low
    above = 6.0 * (keys - low[None, :])
    codes = (above >= extent[None, :]).to(tl.int32)
    codes += (above >= (3.0 * extent)[None, :]).to(tl.int32)
    codes += (above >= (5.0 * extent)[None, :]).to(tl.int32)
    return tl.where((extent == 0.0)[None, :], 0, codes)


@triton.jit
def load_codes(
    codes, rows, valid, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PER_WORD: tl.constexpr = 16
):  # fmt: skip
    """Codes of rows of a pool seen as [N, HEAD_DIM / 16], as float32 [len(rows), DIM]; 0 where not valid."""
    dims = tl.arange(0, DIM)
    mask = valid[:, None] & (dims[None, :] < HEAD_DIM)
    words = tl.load(codes + rows[:, None] * (HEAD_DIM // PER_WORD) + (dims // PER_WORD)[None, :], mask=mask, other=0)
    return ((words >> (2 * (dims % PER_WORD))[None, :]) & 3).to(tl.float32)


@triton.jit(do_not_specialize=["page_slots"])
def write_state(
    keys, bounds, codes, page_table, past_lengths, query_lengths, page_slots,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PER_WORD: tl.constexpr = 16,
):  # fmt: skip
    """Write bounds and codes of a block that the call fills, in place. Grid: (ceil(S / BLOCK), Hkv, B).

    Args:
        keys: the pool with the call's new rows.
    """
    kv_head, b = tl.program_id(1), tl.program_id(2)
    past = tl.load(past_lengths + b)
    block = past // BLOCK + tl.program_id(0)
    if block >= (past + tl.load(query_lengths + b)) // BLOCK:
        return
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    every = tokens >= 0
    rows = pool_rows(page_table + b * page_slots, tokens, every, kv_head, NUM_KV_HEADS, PAGE_SIZE)
    block_keys = load_rows(keys, rows, every, HEAD_DIM, DIM)
    low, high = key_bounds(block_keys)

    dims = tl.arange(0, DIM)
    to = bounds + tl.min(rows, axis=0) // BLOCK * 2 * HEAD_DIM + dims
    tl.store(to, low.to(bounds.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(to + HEAD_DIM, high.to(bounds.dtype.element_ty), mask=dims < HEAD_DIM)

    # An int32 has PER_WORD codes.
    WORDS: tl.constexpr = DIM // PER_WORD
    bits = quantise(block_keys, low, high) << (2 * (dims % PER_WORD))[None, :]
    packed = tl.sum(tl.reshape(bits, [BLOCK, WORDS, PER_WORD]), axis=2)  # each code has bits of its own
    word = tl.arange(0, WORDS)
    mask = every[:, None] & (word < HEAD_DIM // PER_WORD)[None, :]
    tl.store(codes + rows[:, None] * (HEAD_DIM // PER_WORD) + word[None, :], packed.to(tl.int32), mask=mask)
