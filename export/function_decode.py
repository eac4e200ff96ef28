"""The decode call of the operator's next version in the ONNX function: see :mod:`hip_trt.reference.decode`.

All sequences and mask heads search together. A search reads the bounds of all candidates and the codes of F blocks.
:mod:`hip_trt.export.function_v2` is the whole operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from hip_trt.export.function_attention import attend
from hip_trt.export.function_cache import Pages, append, new_rows
from hip_trt.export.function_ops import (
    BOOL,
    FLOAT,
    INT32,
    INT64,
    Value,
    arange,
    arithmetic,
    ascending,
    attribute,
    ceil_div,
    dim,
    shape,
    subgraph,
    tensor,
    typed,
)
from hip_trt.export.function_search import Candidates
from hip_trt.export.function_state import unpack, write_state
from hip_trt.reference.decode import NEWEST

INT_ATTRIBUTES = (
    "decode_mask_k", "decode_search_k", "decode_block_k", "page_size", "sink_tokens", "window_tokens", "dense",
)
FLOAT_ATTRIBUTES = ("scale", "value_threshold")


def decode_call(
    op: OpBuilder, query: Value, key: Value, value: Value, past_key: Value, past_value: Value, page_table: Value,
    past_lengths: Value, query_lengths: Value, past_bounds: Value, past_codes: Value, past_blocks: Value,
    refresh_mask: Value,
) -> tuple[Value, Value, Value, Value, Value, Value]:
    """A function body; arguments and results are those of :func:`hip_trt.reference.decode.decode_attention`."""
    with arithmetic(op):
        attributes = {name: attribute(op, name) for name in INT_ATTRIBUTES}
        scale, threshold = (attribute(op, name, ir.AttributeType.FLOAT) for name in FLOAT_ATTRIBUTES)
        call = begin_call(
            op, key, value, past_key, past_value, page_table, past_lengths, query_lengths, past_bounds, past_codes,
            past_blocks, attributes,
        )
        output, kept = attend_call(op, query, call, refresh_mask, attributes, scale, threshold)
        return output, *call.present, op.CastLike(kept, past_blocks)


@dataclass(frozen=True)
class StartedCall:
    """A call of version 2 whose new rows, bounds and codes are written.

    Attributes:
        table: [B, M].
        past_lengths, query_lengths: [B].
        past_blocks: [B, Hm, K].
        present: present_key, present_value, present_bounds and present_codes.
        mask_heads, kv_heads: scalars.
    """

    table: Value
    past_lengths: Value
    query_lengths: Value
    past_blocks: Value
    present: tuple[Value, Value, Value, Value]
    mask_heads: Value
    kv_heads: Value

    def pages(self, op: OpBuilder, query: Value, page_size: Value, block: Value) -> Pages:
        """Where blocks of this size are in the pools."""
        heads_per_mask, group = dim(op, query, 1) / self.mask_heads, dim(op, query, 1) / self.kv_heads
        kv_head = arange(op, self.mask_heads) * heads_per_mask / group
        return Pages(self.table, dim(op, self.table, 1), op.Unsqueeze(kv_head, [0, 2]), self.kv_heads, page_size, block)


def begin_call(
    op: OpBuilder, key: Value, value: Value, past_key: Value, past_value: Value, page_table: Value,
    past_lengths: Value, query_lengths: Value, past_bounds: Value, past_codes: Value, past_blocks: Value,
    attributes: dict[str, Value],
) -> StartedCall:
    """What both kinds of call begin with; arguments are inputs of the operator, and all of its attributes."""
    past_lengths, query_lengths = op.Cast(past_lengths, to=INT64), op.Cast(query_lengths, to=INT64)
    blocks, table = typed(op.Cast(past_blocks, to=INT64), INT64), op.Cast(page_table, to=INT64)
    kv_heads, new_tokens, page_size = dim(op, key, 1), dim(op, key, 2), attributes["page_size"]
    rows = new_rows(op, table, past_lengths, query_lengths, new_tokens=new_tokens, kv_heads=kv_heads,
                    page_size=page_size)
    present_key, present_value = append(op, past_key, key, rows), append(op, past_value, value, rows)
    bounds, codes = write_state(
        op, present_key, past_bounds, past_codes, table, past_lengths, query_lengths, new_tokens=new_tokens,
        page_size=page_size, block=attributes["decode_block_k"], dense=attributes["dense"],
    )
    return StartedCall(table, past_lengths, query_lengths, blocks, (present_key, present_value, bounds, codes),
                       dim(op, past_blocks, 1), kv_heads)


def attend_call(
    op: OpBuilder, query: Value, call: StartedCall, refresh_mask: Value, attributes: dict[str, Value], scale: Value,
    threshold: Value,
) -> tuple[Value, Value]:
    """A decode call's output, [B, Hq, S, D] T, and present_blocks, [B, Hm, K]."""
    block, (key, value, bounds, codes) = attributes["decode_block_k"], call.present
    query_heads, new_tokens, head_dim = (dim(op, query, axis) for axis in (1, 2, 3))
    decode = Decode(
        sink_tokens=attributes["sink_tokens"], window_tokens=attributes["window_tokens"],
        chosen=attributes["decode_mask_k"] / block, searched=attributes["decode_search_k"] / block,
        dense=attributes["dense"], scale=scale, threshold=threshold,
        past_lengths=call.past_lengths, query_lengths=call.query_lengths,
        keys=flat(op, key, head_dim), values=flat(op, value, head_dim),
        bounds=flat(op, bounds, head_dim * 2), codes=flat(op, codes, dim(op, codes, 3)),
        pages=call.pages(op, query, attributes["page_size"], block),
    )
    split = shape(op, 0, call.mask_heads, query_heads / call.mask_heads, new_tokens, head_dim)
    queries = typed(op.Reshape(op.Cast(query, to=FLOAT), split), FLOAT)
    output, kept = decode.run(op, queries, call.past_blocks, op.Cast(refresh_mask, to=INT64))
    return op.CastLike(op.Reshape(output, op.Shape(query)), query), kept


def flat(op: OpBuilder, pool: Value, width: Value) -> Value:
    """A pool as rows of this width."""
    return op.Reshape(pool, op.Concat([-1], op.Reshape(width, [1]), axis=0))


@dataclass(frozen=True)
class Decode:
    """What a decode call's sequences and mask heads share.

    Attributes:
        sink_tokens, window_tokens: scalars.
        chosen, searched: scalars K and F.
        dense: scalar.
        scale, threshold: scalars float32.
        past_lengths, query_lengths: [B].
        keys, values: [P * Hkv * page_size, D] T, the pools with the new rows.
        bounds: [P * Hkv * page_size / block, 2 D] T.
        codes: [P * Hkv * page_size, D / 16] int32.
        pages: where blocks are in them.
    """

    sink_tokens: Value
    window_tokens: Value
    chosen: Value
    searched: Value
    dense: Value
    scale: Value
    threshold: Value
    past_lengths: Value
    query_lengths: Value
    keys: Value
    values: Value
    bounds: Value
    codes: Value
    pages: Pages

    def run(self, op: OpBuilder, queries: Value, past_blocks: Value, refresh: Value) -> tuple[Value, Value]:
        """Choose and attend.

        Args:
            queries: [B, Hm, G, S, D] float32.
            past_blocks: [B, Hm, K].
            refresh: [B].

        Returns:
            [B, Hm, G, S, D] float32, 0 where a row is not valid, and present_blocks, [B, Hm, K].
        """
        candidates, active = self.candidates(op), op.Unsqueeze(op.Greater(self.query_lengths, 0), [1, 2])
        count = typed(candidates.last - candidates.first, INT64)
        prunes = op.And(op.Greater(count, self.chosen), active)  # [B, 1, 1]
        keeps = op.GreaterOrEqual(op.Slice(past_blocks, [0], [1], [2]), 0)
        reuses = op.And(op.And(prunes, op.Equal(op.Unsqueeze(refresh, [1, 2]), 0)), keeps)  # [B, Hm, 1]
        searches = op.And(prunes, op.Not(reuses))
        found = self.searched_blocks(op, queries, candidates, searches)

        present = op.Where(reuses, past_blocks, op.Where(searches, found, -1))
        present = op.Where(active, present, past_blocks)
        inside = op.Where(reuses, self.reused(op, past_blocks, candidates), op.Where(
            searches, op.Pad(found, [0, NEWEST], -1, [2]), self.all_of(op, candidates)))
        # As many columns as the batch needs: a short sequence has few candidates.
        columns = op.Where(prunes, self.chosen + NEWEST, op.Where(active, count, 0))
        inside = op.Slice(inside, [0], op.Reshape(op.ReduceMax(columns, keepdims=0), [1]), [2])
        return self.attend(op, queries, typed(inside, INT64), candidates, prunes), typed(present, INT64)

    def candidates(self, op: OpBuilder) -> Candidates:
        """Those of the first row; where attention is dense, all is window."""
        last = op.Max(self.past_lengths - self.window_tokens + 1, 0) / self.pages.block_k
        last = op.Where(op.Equal(self.dense, 0), last, 0)
        first = op.Min(ceil_div(self.sink_tokens, self.pages.block_k), last)
        return Candidates(typed(op.Unsqueeze(first, [1, 2]), INT64), typed(op.Unsqueeze(last, [1, 2]), INT64))

    def all_of(self, op: OpBuilder, candidates: Candidates) -> Value:
        """The candidates where there are no more than K, ascending, then -1: [B, 1, K + 2]."""
        blocks = candidates.first + arange(op, self.chosen + NEWEST)
        return op.Where(op.Less(blocks, candidates.last), blocks, -1)

    def reused(self, op: OpBuilder, past_blocks: Value, candidates: Candidates) -> Value:
        """Those of past_blocks that are candidates, once each, and the newest: [B, Hm, K + 2], -1 for none."""
        newest = candidates.last - list(range(NEWEST, 0, -1))  # [B, 1, 2]
        newest = op.Expand(newest, op.Concat(op.Shape(past_blocks, end=2), [NEWEST], axis=0))
        _, _, there = candidates.interval(op, past_blocks, 1)
        blocks = op.Concat(op.Where(there, past_blocks, -1), newest, axis=2)
        blocks = ascending(op, blocks, dim(op, blocks, 2))
        before = op.Pad(op.Slice(blocks, [0], [-1], [2]), [1, 0], -1, [2])  # each entry's predecessor
        return op.Where(op.Equal(blocks, before), -1, blocks)

    def searched_blocks(self, op: OpBuilder, queries: Value, candidates: Candidates, searches: Value) -> Value:
        """What a search finds, [B, Hm, K] ascending, of no meaning where none is wanted.

        Args:
            queries: [B, Hm, G, S, D] float32.
            searches: [B, Hm, 1] bool.
        """
        some = op.Greater(op.ReduceMax(op.Cast(searches, to=INT64), keepdims=0), 0)
        none = op.Concat(op.Shape(searches, end=2), op.Reshape(self.chosen, [1]), axis=0)
        first_row = op.Squeeze(op.Slice(queries, [0], [1], [3]), [3])
        return typed(op.If(
            some,
            then_branch=subgraph(
                op, "search", lambda op: [self.search(op, typed(first_row, FLOAT), candidates, searches)], [],
                [tensor("blocks", INT64, 3)],
            ),
            else_branch=subgraph(op, "no_search", lambda op: [op.Expand(-1, none)], [], [tensor("blocks", INT64, 3)]),
        ), INT64)

    def search(self, op: OpBuilder, queries: Value, candidates: Candidates, searches: Value) -> Value:
        """Two stages. Some mask head searches, so neither has fewer than K columns.

        Args:
            queries: [B, Hm, G, D] float32, the first row.
            searches: [B, Hm, 1] bool.

        Returns:
            [B, Hm, K] ascending.
        """
        count = op.Where(searches, candidates.last - candidates.first, 0)
        count = typed(op.ReduceMax(count, keepdims=0), INT64)
        blocks = candidates.first + arange(op, count)
        blocks = op.Where(op.And(searches, op.Less(blocks, candidates.last)), blocks, -1)  # [B, Hm, N]
        blocks = self.best(op, typed(blocks, INT64), self.first_scores(op, queries, blocks),
                           op.Min(self.searched, count))
        return self.best(op, blocks, self.second_scores(op, queries, blocks), self.chosen)

    def best(self, op: OpBuilder, blocks: Value, scores: Value, count: Value) -> Value:
        """The best of blocks in ascending order (-1 for none): [B, Hm, count], ascending, -1 last.

        Args:
            scores: [B, Hm, N] float32 without NaN.
        """
        scores = op.Where(op.Less(blocks, 0), float("-inf"), scores)
        # TopK prefers the lower index where scores are equal.
        _, best = op.TopK(scores, op.Reshape(count, [1]), axis=-1, _outputs=2)
        return ascending(op, op.GatherElements(blocks, best, axis=-1), count)

    def bounds_of(self, op: OpBuilder, blocks: Value) -> tuple[Value, Value]:
        """Smallest and largest keys of blocks [B, Hm, N], any where -1: two [B, Hm, N, D] float32."""
        rows = self.pages.rows(op, op.Max(blocks, 0), [0]) / self.pages.block_k
        low, high = op.Split(op.Cast(op.Gather(self.bounds, rows), to=FLOAT), num_outputs=2, axis=-1, _outputs=2)
        return typed(low, FLOAT), typed(high, FLOAT)

    def first_scores(self, op: OpBuilder, queries: Value, blocks: Value) -> Value:
        """The largest q.k that a key within the bounds can have, over the query heads: [B, Hm, N]."""
        low, high = (op.Transpose(bound, perm=[0, 1, 3, 2]) for bound in self.bounds_of(op, blocks))
        negative = op.Less(queries, 0.0)  # NaN is among the others
        scores = op.MatMul(op.Where(negative, 0.0, queries), high) + op.MatMul(op.Where(negative, queries, 0.0), low)
        return op.ReduceMax(ordered(op, scores), [2], keepdims=0)

    def second_scores(self, op: OpBuilder, queries: Value, blocks: Value) -> Value:
        """Each block's largest share of a query head's softmax over all of the blocks, as a logarithm: [B, Hm, N].

        A key is low + code extent / 3, so q.k is q.low and, with the query scaled by the extents, that query on codes.
        """
        rows = self.pages.rows(op, op.Max(blocks, 0), arange(op, self.pages.block_k))
        codes = unpack(op, op.Gather(self.codes, rows))
        by_block = op.Concat(op.Shape(blocks), op.Reshape(self.pages.block_k, [1]), [-1], axis=0)
        codes = op.Reshape(codes, by_block)  # [B, Hm, N, block, D]
        low, high = self.bounds_of(op, blocks)
        queries = queries * self.scale
        scaled = op.Unsqueeze(queries, [2]) * op.Unsqueeze(typed((high - low) / 3.0, FLOAT), [3])  # [B, Hm, N, G, D]
        logits = op.MatMul(codes, op.Transpose(scaled, perm=[0, 1, 2, 4, 3]))  # [B, Hm, N, block, G]
        logits = logits + op.Unsqueeze(op.MatMul(low, op.Transpose(queries, perm=[0, 1, 3, 2])), [3])

        sums = ordered(op, op.ReduceLogSumExp(logits, [3], keepdims=0))  # [B, Hm, N, G]
        there = op.Unsqueeze(op.GreaterOrEqual(blocks, 0), [3])
        counted = op.And(there, op.Less(sums, float("inf")))
        total = op.ReduceLogSumExp(op.Where(counted, sums, float("-inf")), [2], keepdims=1)
        return op.ReduceMax(ordered(op, sums - total), [3], keepdims=0)

    def attend(self, op: OpBuilder, queries: Value, inside: Value, candidates: Candidates, prunes: Value) -> Value:
        """Attention over sink, blocks between and window.

        Args:
            queries: [B, Hm, G, S, D] float32.
            inside: [B, Hm, N], -1 for none.
            prunes: [B, 1, 1] bool, whether a threshold counts.

        Returns:
            [B, Hm, G, S, D] float32, 0 where a row is not valid.
        """
        p_last = self.past_lengths + op.Max(self.query_lengths, 1) - 1
        end = op.Unsqueeze(p_last / self.pages.block_k, [1, 2]) + 1
        sink = arange(op, op.ReduceMax(candidates.first, keepdims=0))
        window = candidates.last + arange(op, op.ReduceMax(end - candidates.last, keepdims=0))
        parts = (
            op.Where(op.Less(sink, candidates.first), sink, -1), inside, op.Where(op.Less(window, end), window, -1),
        )
        heads = op.Concat(op.Shape(inside, end=2), [1], axis=0)
        blocks = op.Concat(*(op.Expand(part, heads) for part in parts), axis=2)

        width = dim(op, queries, 3)
        valid = op.Unsqueeze(op.Less(arange(op, width), op.Unsqueeze(self.query_lengths, [1])), [1, 2, 4])
        token = arange(op, dim(op, blocks, 2) * self.pages.block_k)
        begin = dim(op, sink, 0) * self.pages.block_k
        between = op.And(op.GreaterOrEqual(token, begin),
                         op.Less(token, begin + dim(op, inside, 2) * self.pages.block_k))
        may_leave = op.Unsqueeze(op.And(prunes, between), [2, 3])  # [B, 1, 1, 1, T]

        def leave_out(op: OpBuilder, logits: Value) -> Value:
            """Tokens between sink and window that are below the threshold in all heads and valid rows."""
            # NaN is not below.
            below = op.Or(op.Less(op.Softmax(logits, axis=-1), self.threshold), op.Not(valid))
            small = op.ReduceMin(op.Cast(below, to=INT32), [2, 3])
            return op.Where(op.And(op.Cast(small, to=BOOL), may_leave), float("-inf"), logits)

        output = attend(
            op, queries, typed(blocks, INT64), self.past_lengths, p_last, scale=self.scale, keys=self.keys,
            values=self.values, pages=self.pages, leave_out=leave_out,
        )
        return op.Where(valid, output, 0.0)


def ordered(op: OpBuilder, scores: Value) -> Value:
    """Scores with NaN as +inf, for comparisons with NaN are not specified."""
    return typed(op.Where(op.IsNaN(scores), float("inf"), scores), FLOAT)
