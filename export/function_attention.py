"""Attention of one query block in the ONNX function: see :mod:`hip_trt.reference.operator` and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxscript import OpBuilder

from hip_trt.export.function_cache import Pages
from hip_trt.export.function_ops import FLOAT, INT64, Value, arange, ceil_div, dim, typed
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
    visible = op.LessOrEqual(positions, op.Unsqueeze(row, [1, 3]))
    bias = op.Where(visible, 0.0, float("-inf"))  # [B, Hm, R, N * block_k]

    # The query heads of a mask head are rows of one product; only the bias tells them apart.
    grouped = typed(op.Shape(queries), INT64)
    queries = op.Reshape(queries * scale, op.Concat([0, 0, -1], op.Slice(grouped, [4], [5]), axis=0))
    logits = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 3, 2]))
    logits = op.Reshape(logits, op.Concat(op.Slice(grouped, [0], [4]), [-1], axis=0))
    logits = logits + op.Unsqueeze(bias, [2])
    weights = op.Softmax(leave_out(op, logits) if leave_out else logits, axis=-1)
    weights = op.Reshape(weights, op.Concat([0, 0, -1], typed(op.Shape(weights, start=4), INT64), axis=0))
    return typed(op.Reshape(op.MatMul(weights, values), grouped), FLOAT)


def _column(op: OpBuilder, values: Value) -> Value:
    """[B] as [B, 1, 1]."""
    return op.Unsqueeze(values, [1, 2])
