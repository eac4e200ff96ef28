"""Bounds and codes of key blocks in the ONNX function: see :mod:`hip_trt.reference.decode_state`."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from hip_trt.export.function_ops import BOOL, FLOAT, INT32, INT64, Value, arange, ceil_div, dim, shape, typed
from hip_trt.reference.decode_state import PER_WORD

BYTE_CODES = ir.tensor([[byte >> 2 * code & 3 for code in range(4)] for byte in range(256)], dtype=FLOAT)
"""The four codes that each byte of a word holds, lowest bits first: [256, 4]."""


def write_state(
    op: OpBuilder, present_key: Value, past_bounds: Value, past_codes: Value, page_table: Value, past_lengths: Value,
    query_lengths: Value, *, new_tokens: Value, page_size: Value, block: Value, dense: Value,
) -> tuple[Value, Value]:
    """Bounds and codes with those of each block that the call fills, from all keys of the block in the pool.

    ScatterND reads the pools themselves, as in :func:`hip_trt.export.function_cache.append`.

    Args:
        present_key: [P, Hkv, page_size, D] T, the pool with the call's new rows.
        past_bounds: [P, Hkv, page_size / block, 2, D] T.
        past_codes: [P, Hkv, page_size, D / 16] int32.
        page_table: [B, M].
        past_lengths, query_lengths: [B].
        new_tokens: scalar S.
        page_size, block: scalars.
        dense: scalar; 1: write nothing.
    """
    first, end = past_lengths / block, (past_lengths + query_lengths) / block
    end = op.Where(op.Equal(dense, 0), end, first)
    # S tokens fill one block more than they make, if the first has begun.
    filled = op.Unsqueeze(first, [1]) + op.Unsqueeze(arange(op, ceil_div(new_tokens, block)), [0])
    which = op.Transpose(op.NonZero(op.Less(filled, op.Unsqueeze(end, [1]))), perm=[1, 0])  # [n, 2]
    sequence, step = op.Split(which, num_outputs=2, axis=1, _outputs=2)  # [n, 1]
    token = (op.Gather(first, sequence) + step) * block
    page = op.Unsqueeze(op.GatherND(page_table, op.Concat(sequence, token / page_size, axis=1)), [1])
    row = op.Mod(token, page_size)

    count, kv_heads = dim(op, which, 0), dim(op, present_key, 1)
    head = arange(op, kv_heads)

    def index(*parts: Value, sizes: Value) -> Value:
        return op.Concat(*(op.Unsqueeze(op.Expand(part, sizes), [-1]) for part in parts), axis=-1)

    by_block = index(page, head, row / block, sizes=shape(op, count, kv_heads))  # [n, Hkv, 3]
    tokens = op.Unsqueeze(row + arange(op, block), [2])  # [n, block, 1]
    by_token = index(op.Unsqueeze(page, [2]), head, tokens, sizes=shape(op, count, block, kv_heads))

    keys = typed(op.Cast(op.GatherND(present_key, by_token), to=FLOAT), FLOAT)  # [n, block, Hkv, D]
    low, high = key_bounds(op, keys)
    bounds = op.CastLike(op.Concat(op.Unsqueeze(low, [2]), op.Unsqueeze(high, [2]), axis=2), past_bounds)
    words = pack(op, quantise(op, keys, op.Unsqueeze(low, [1]), op.Unsqueeze(high, [1])))
    return op.ScatterND(past_bounds, by_block, bounds), op.ScatterND(past_codes, by_token, words)


def key_bounds(op: OpBuilder, keys: Value) -> tuple[Value, Value]:
    """Smallest and largest key by dimension, NaN where one is: [n, block, Hkv, D] float32 to two [n, Hkv, D]."""
    # What a reduction makes of NaN is not specified.
    broken = op.Cast(op.ReduceMax(op.Cast(op.IsNaN(keys), to=INT32), [1], keepdims=0), to=BOOL)
    low, high = (typed(reduce(keys, [1], keepdims=0), FLOAT) for reduce in (op.ReduceMin, op.ReduceMax))
    nan = op.Constant(value_float=float("nan"))
    return typed(op.Where(broken, nan, low), FLOAT), typed(op.Where(broken, nan, high), FLOAT)


def quantise(op: OpBuilder, keys: Value, low: Value, high: Value) -> Value:
    """Codes of keys between bounds that broadcast to them, all float32: 0 to 3."""
    extent = typed(high - low, FLOAT)
    above = typed(typed(keys - low, FLOAT) * 6.0, FLOAT)
    first, second, third = (op.Cast(op.GreaterOrEqual(above, extent * part), to=INT64) for part in (1.0, 3.0, 5.0))
    return typed(op.Where(op.Equal(extent, 0.0), 0, first + second + third), INT64)


def pack(op: OpBuilder, codes: Value) -> Value:
    """[n, block, Hkv, D] to [n, block, Hkv, D / 16] int32: dimension d is bits 2 (d % 16) and up of word d / 16."""
    words = op.Reshape(dim(op, codes, 3) / PER_WORD, [1])
    by_word = op.Concat(op.Shape(codes, end=3), words, [PER_WORD], axis=0)
    # allowzero, for without it ONNX Runtime puts -1 for the number of words, which fits any where no block is filled.
    by_word = typed(op.Reshape(codes, by_word, allowzero=1), INT64)
    # Each code has bits of its own, so that a sum joins them; Cast drops what is above 32 bits of the sum.
    return op.Cast(op.ReduceSum(by_word * [4**code for code in range(PER_WORD)], [-1], keepdims=0), to=INT32)


def unpack(op: OpBuilder, words: Value) -> Value:
    """[..., D / 16] int32 to [..., D] float32, by a table of bytes: few steps, and nothing large but the result."""
    unsigned = typed(op.Mod(typed(op.Cast(words, to=INT64), INT64), 2**32), INT64)
    parts = op.Mod(typed(op.Unsqueeze(unsigned, [-1]) / [256**byte for byte in range(4)], INT64), 256)
    codes = op.Gather(op.Constant(value=BYTE_CODES), parts)  # [..., D / 16, 4, 4]
    return typed(op.Reshape(codes, op.Concat(op.Shape(words, end=-1), [-1], axis=0)), FLOAT)
