# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Mask search: which key blocks a query block attends to (HiP, arXiv 2406.09827, section 3.2 and algorithm 1).

Node i of a level whose nodes cover L blocks is blocks [i L, (i + 1) L), clipped to the candidates [first, last). Lists
of nodes are ascending, in scratch memory that only one program uses; a barrier separates writing from reading.
"""

import triton
import triton.language as tl

from hip_trt.triton.cache import load_rows, pool_rows


@triton.jit
def size_of(level, BRANCH: tl.constexpr, LEAF_BRANCH: tl.constexpr):
    """Blocks that a node of this level covers."""
    size = 1
    for depth in range(level):
        size *= tl.where(depth == 0, LEAF_BRANCH, BRANCH)
    return size


@triton.jit
def start_level(first, last, budget, BRANCH: tl.constexpr, LEAF_BRANCH: tl.constexpr):
    """Lowest level that holds all candidates' nodes; a level holds budget x BRANCH (LEAF_BRANCH at level 0)."""
    level = 0
    size = 1
    capacity = budget * LEAF_BRANCH
    while (last + size - 1) // size - first // size > capacity:
        size *= tl.where(level == 0, LEAF_BRANCH, BRANCH)
        capacity = budget * BRANCH
        level += 1
    return level


@triton.jit
def occupied(nodes, size, first, last):
    """Whether nodes hold a candidate."""
    return (nodes >= 0) & (tl.maximum(nodes * size, first) < tl.minimum(nodes * size + size, last))


@triton.jit
def append_kept(to, count, values, keep):
    """Append those of ``values`` to keep to a list of ``count`` entries; the new count."""
    position = count + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(to + position, values, mask=keep)
    return count + tl.sum(keep.to(tl.int32), 0)


@triton.jit
def all_nodes(nodes, size, first, last, TILE: tl.constexpr):
    """Write all nodes of a level that hold a candidate; their number."""
    lowest = first // size
    count = (last + size - 1) // size - lowest
    for start in range(0, count, TILE):
        n = start + tl.arange(0, TILE)
        tl.store(nodes + n, lowest + n, mask=n < count)
    tl.debug_barrier()
    return count


@triton.jit
def children(nodes, parents, num_parents, width, size, first, last, TILE: tl.constexpr):
    """Write the children of ``parents`` that hold a candidate; their number. ``size`` is a child's."""
    count = 0
    for start in range(0, num_parents * width, TILE):
        n = start + tl.arange(0, TILE)
        listed = n < num_parents * width
        child = tl.load(parents + n // width, mask=listed, other=-1) * width + n % width
        count = append_kept(nodes, count, child, listed & occupied(child, size, first, last))
    tl.debug_barrier()
    return count


@triton.jit
def block_scores(
    scores, nodes, count, size, first, last, query, keys, page_table_row, first_row, rows, first_head, kv_head,
    new_tokens,
    HEADS_PER_MASK: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Score the middle block of each node: the largest q.k over sampled rows of all heads and every STRIDE_K-th token.

    Args:
        query: pointer to the sequence's [Hq, S, D].
        rows: valid rows of the query block; last, last - STRIDE_Q, ... are sampled, at most SAMPLES.
        ROWS, NODES: sampled rows and nodes that are scored at a time.
    """
    TOKENS: tl.constexpr = BLOCK_K // STRIDE_K
    for start in range(0, count, NODES):
        n = start + tl.arange(0, NODES)
        node = tl.load(nodes + n, mask=n < count, other=0)
        left = tl.maximum(node * size, first)
        right = tl.minimum(node * size + size, last)
        representatives = left + (right - left) // 2
        tokens = representatives[:, None] * BLOCK_K + tl.arange(0, TOKENS)[None, :] * STRIDE_K
        valid = tl.broadcast_to((n < count)[:, None], [NODES, TOKENS])
        tokens, valid = tl.reshape(tokens, [NODES * TOKENS]), tl.reshape(valid, [NODES * TOKENS])
        at = pool_rows(page_table_row, tokens, valid, kv_head, NUM_KV_HEADS, PAGE_SIZE)
        node_keys = tl.trans(load_rows(keys, at, valid, HEAD_DIM, DIM))
        best = tl.full([NODES * TOKENS], float("-inf"), tl.float32)
        for sample in range(0, HEADS_PER_MASK * SAMPLES, ROWS):
            i = sample + tl.arange(0, ROWS)
            head, row = first_head + i // SAMPLES, rows - 1 - i % SAMPLES * STRIDE_Q
            sampled = (i < HEADS_PER_MASK * SAMPLES) & (row >= 0)
            queries = load_rows(query, head.to(tl.int64) * new_tokens + first_row + row, sampled, HEAD_DIM, DIM)
            products = tl.dot(queries, node_keys, input_precision="ieee")
            best = tl.maximum(best, tl.max(tl.where(sampled[:, None], products, float("-inf")), axis=0))
        score = tl.max(tl.reshape(best, [NODES, TOKENS]), axis=1)
        tl.store(scores + n, tl.where(score == score, score, float("inf")), mask=n < count)  # keep_best must order NaN
    tl.debug_barrier()


@triton.jit
def keep_best(best, nodes, scores, count, budget, TILE: tl.constexpr):
    """Write the ``budget`` nodes of highest score, the lower index where scores are equal; their number.

    A node is kept if fewer than ``budget`` others come before it: plain counting, and the order of nodes stays.
    """
    kept = 0
    for start in range(0, count, TILE):
        n = start + tl.arange(0, TILE)
        score = tl.load(scores + n, mask=n < count, other=0.0)
        before = tl.zeros([TILE], tl.int32)
        for other_start in range(0, count, TILE):
            m = other_start + tl.arange(0, TILE)
            other = tl.load(scores + m, mask=m < count, other=float("-inf"))
            higher = other[None, :] > score[:, None]
            earlier = (other[None, :] == score[:, None]) & (m[None, :] < n[:, None])
            before += tl.sum(((higher | earlier) & (m < count)[None, :]).to(tl.int32), axis=1)
        node = tl.load(nodes + n, mask=n < count, other=0)
        kept = append_kept(best, kept, node, (n < count) & (before < budget))
    tl.debug_barrier()
    return kept
