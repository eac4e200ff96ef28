# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What a query block is, and which key blocks it may choose from: shared by the search and the attention."""

import triton
import triton.language as tl


@triton.jit
def query_block(past_lengths, query_lengths, b, block, BLOCK_Q: tl.constexpr):
    """First row, number of valid rows (0 or less: nothing to do) and position of the first row."""
    first_row = block * BLOCK_Q
    rows = tl.minimum(tl.load(query_lengths + b) - first_row, BLOCK_Q)
    return first_row, rows, tl.load(past_lengths + b) + first_row


@triton.jit
def candidates(p_first, BLOCK_K: tl.constexpr, SINK_TOKENS: tl.constexpr, WINDOW_TOKENS: tl.constexpr):
    """First candidate block (after the sink), and the first block of the window, where candidates end."""
    window = tl.maximum(p_first - WINDOW_TOKENS + 1, 0) // BLOCK_K
    return tl.minimum((SINK_TOKENS + BLOCK_K - 1) // BLOCK_K, window), window
