"""Attention of one query block in the ONNX function: see :mod:`hip_trt.reference.operator` and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxscript import OpBuilder

from hip_trt.export.function_cache import Pages
from hip_trt.export.function_ops import (
    FLOAT,
    INT64,
    Value,
    arange,
    ceil_div,
    dim,
    shape,
    subgraph,
    tensor,
    typed,
)
from hip_trt.export.function_search import Candidates, Levels, Search, sampled_queries


@dataclass(frozen=True)
class Attention:
    """What the query blocks of a call share.

    Attributes:
        attributes: the operator's integers by name, scalars.
        scale: scalar float32.
        budget: scalar K.
        past_lengths, query_lengths: [B].
        past_nodes: [B, Hm, Kd].
        may_reuse: scalar bool, whether to search from past_nodes.
        keys, values: [P * Hkv * page_size, D] T, the pools with the new rows.
        pages: where blocks are in them.
        levels: the tree's shape.
    """

    attributes: dict[str, Value]
    scale: Value
    budget: Value
    past_lengths: Value
    query_lengths: Value
    past_nodes: Value
    may_reuse: Value
    keys: Value
    values: Value
    pages: Pages
    levels: Levels

    def query_block(self, op: OpBuilder, index: Value, queries: Value) -> tuple[Value, Value]:
        """The query blocks with one index, of all sequences.

        Args:
            index: scalar.
            queries: [B, Hm, G, R, D] float32.

        Returns:
            [B, Hm, G, R, D] float32, 0 where a row is not valid, and the nodes of :meth:`Search.run`.
        """
        attributes = self.attributes
        width = dim(op, queries, 3)
        p_first = self.past_lengths + index * width  # [B]
        valid_rows = op.Min(self.query_lengths - index * width, width)
        active = op.Greater(valid_rows, 0)
        last_row = op.Max(valid_rows, 1) - 1
        p_last = p_first + last_row

        window = op.Max(p_first - attributes["window_tokens"] + 1, 0) / self.pages.block_k
        sink = op.Min(ceil_div(attributes["sink_tokens"], self.pages.block_k), window)
        sparse = op.And(op.Greater(window - sink, self.budget), op.Equal(attributes["dense"], 0))
        sparse = op.And(active, sparse)
        search = Search(
            levels=self.levels, candidates=Candidates(_column(op, sink), _column(op, window)), budget=self.budget,
            queries=sampled_queries(op, queries, last_row, attributes["stride_q"]), keys=self.keys, pages=self.pages,
            offsets=op.Range(0, self.pages.block_k, attributes["stride_k"]), reuse_level=attributes["reuse_level"],
        )
        chosen, kept = search.run(op, op.Unsqueeze(sparse, [1]), self.past_nodes, self.may_reuse)

        last_block = p_last / self.pages.block_k
        count = last_block + 1 - op.Where(sparse, window - sink - self.budget, 0)
        blocks = self.attended_blocks(op, chosen, sink, window, sparse, op.Where(active, count, 0))
        output = attend(
            op, queries, blocks, p_first, p_last, scale=self.scale, keys=self.keys, values=self.values, pages=self.pages
        )
        valid = op.Less(arange(op, width), op.Unsqueeze(valid_rows, [1]))  # [B, R]
        return op.Where(op.Unsqueeze(valid, [1, 2, 4]), output, 0.0), kept

    def attended_blocks(
        self, op: OpBuilder, chosen: Value, sink: Value, window: Value, sparse: Value, count: Value
    ) -> Value:
        """Sink, chosen and window blocks, one after another; every block where the sequence is not sparse.

        Args:
            chosen: [B, Hm, K], -1 for none.
            sink, window: [B], one past the last sink block, and the first window block.
            sparse: [B] bool.
            count: [B], attended blocks, those missing from chosen counted.

        Returns:
            [B, Hm, N], as long as the batch needs; -1 for none.
        """
        sink, window, sparse, count = (_column(op, value) for value in (sink, window, sparse, count))
        j = op.Unsqueeze(arange(op, op.Max(op.ReduceMax(count, keepdims=0), 1)), [0, 1])
        place = op.Min(op.Max(j - sink, 0), self.budget - 1)
        place = op.Expand(place, op.Concat(op.Shape(chosen, end=2), [1], axis=0))
        after = j - sink - self.budget
        blocks = op.Where(op.Less(after, 0), op.GatherElements(chosen, place, axis=2), window + after)
        blocks = op.Where(op.Or(op.Less(j, sink), op.Not(sparse)), j, blocks)
        return op.Where(op.Less(j, count), blocks, -1)


def all_query_blocks(op: OpBuilder, query: Value, attention: Attention, mask_heads: Value) -> tuple[Value, Value]:
    """Attention of every query block, one after another.

    Args:
        query: [B, Hq, S, D] T.
        mask_heads: scalar.

    Returns:
        [B, Hq, S, D] T, and what the search of each query block kept, [count, B, Hm, K].
    """
    batch, query_heads, new_tokens, head_dim = (dim(op, query, axis) for axis in range(4))
    width = op.Min(attention.attributes["block_q"], new_tokens)
    count = ceil_div(new_tokens, width)
    padding = op.Reshape(count * width - new_tokens, [1])
    padded = op.Pad(op.Cast(query, to=FLOAT), op.Concat([0], padding, axis=0), None, [2])
    split = shape(op, batch, mask_heads, query_heads / mask_heads, count, width, head_dim)
    query_blocks = op.Transpose(op.Reshape(padded, split), perm=[3, 0, 1, 2, 4, 5])
    outputs, kept = op.Scan(
        arange(op, count), query_blocks, num_scan_inputs=2, _outputs=2,
        body=subgraph(
            op, "query_block", attention.query_block,
            [tensor("index", INT64, 0), tensor("queries", FLOAT, 5)],
            [tensor("attended", FLOAT, 5), tensor("kept", INT64, 3)],
        ),
    )  # [count, B, Hm, G, width, D], [count, B, Hm, K]
    outputs = op.Transpose(outputs, perm=[1, 2, 3, 0, 4, 5])
    outputs = op.Reshape(outputs, shape(op, batch, query_heads, -1, head_dim))
    return op.CastLike(op.Slice(outputs, [0], op.Reshape(new_tokens, [1]), [2]), query), kept


def attend(
    op: OpBuilder, queries: Value, blocks: Value, p_first: Value, p_last: Value, *, scale: Value, keys: Value,
    values: Value, pages: Pages, leave_out: Callable[[OpBuilder, Value], Value] | None = None,
) -> Value:
    """softmax(scale q.k) v over the tokens of the blocks that are not after the row.

    Args:
        queries: [B, Hm, G, R, D] float32.
        blocks: [B, Hm, N], -1 for none.
        p_first, p_last: [B], position of the first row and of the last valid one.
        scale: scalar float32.
        keys, values: [P * Hkv * page_size, D] T, the pools with the new rows.
        pages: where blocks are in them.
        leave_out: makes of logits [B, Hm, G, R, N * block_k] others in which more are -inf.

    Returns:
        [B, Hm, G, R, D] float32; undefined where a row is not valid.
    """
    there = op.Unsqueeze(op.GreaterOrEqual(blocks, 0), [3])
    blocks = op.Max(blocks, 0)
    start, inside = op.Unsqueeze(blocks * pages.block_k, [3]), arange(op, pages.block_k)
    # Rows of the pool after the last token are undefined, perhaps NaN: read that token instead, and hide it below.
    offsets = op.Min(inside, op.Reshape(p_last, [-1, 1, 1, 1]) - start)
    keys = pages.gather(op, keys, blocks, offsets)  # [B, Hm, N * block_k, D]
    values = pages.gather(op, values, blocks, offsets)

    positions = op.Reshape(op.Where(there, start + inside, 2**62), [0, 0, 1, -1])  # [B, Hm, 1, N * block_k]
    row = op.Unsqueeze(p_first, [1]) + arange(op, dim(op, queries, 3))
    visible = op.LessOrEqual(positions, op.Unsqueeze(row, [1, 3]))  # [B, Hm, R, N * block_k]

    # The query heads of a mask head are rows of one product; only the mask tells them apart.
    grouped = typed(op.Shape(queries), INT64)
    queries = op.Reshape(queries * scale, op.Concat([0, 0, -1], op.Slice(grouped, [4], [5]), axis=0))
    logits = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 3, 2]))
    logits = op.Reshape(logits, op.Concat(op.Slice(grouped, [0], [4]), [-1], axis=0))
    # Not by adding -inf, which a NaN key after the row would outlast.
    logits = typed(op.Where(op.Unsqueeze(visible, [2]), typed(logits, FLOAT), float("-inf")), FLOAT)
    weights = op.Softmax(leave_out(op, logits) if leave_out else logits, axis=-1)
    weights = op.Reshape(weights, op.Concat([0, 0, -1], typed(op.Shape(weights, start=4), INT64), axis=0))
    return typed(op.Reshape(op.MatMul(weights, values), grouped), FLOAT)


def _column(op: OpBuilder, values: Value) -> Value:
    """[B] as [B, 1, 1]."""
    return op.Unsqueeze(values, [1, 2])
