"""Mask search in the ONNX function: see :mod:`hip_trt.reference.tree`, whose terms it uses.

All sequences and mask heads descend together, from the highest start level of the batch to level 0; those that start
lower join at their level. A level's work is what its nodes need, so a decode step costs O(log T).
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxscript import OpBuilder

from hip_trt.export.function_cache import Pages
from hip_trt.export.function_ops import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT32,
    INT64,
    Value,
    arange,
    ascending,
    ceil_div,
    dim,
    subgraph,
    tensor,
    typed,
)

LEVELS = 33
"""Tree levels that the function provides for: with two children each they cover 2**32 blocks."""


@dataclass(frozen=True)
class Levels:
    """The tree's shape: [LEVELS] blocks per node, and children per node of the level above."""

    sizes: Value
    widths: Value


def tree_levels(op: OpBuilder, branch: Value, leaf_branch: Value) -> Levels:
    level = op.Range(0, LEVELS, 1)
    is_leaf = op.Equal(level, 0)
    # ONNX has no integer power; these are exact in double precision up to the bound, beyond which one node covers all.
    power = op.Pow(op.Cast(branch, to=DOUBLE), op.Cast(op.Max(level - 1, 0), to=DOUBLE))
    power = op.Cast(op.Round(op.Min(power, float(2**40))), to=INT64)
    return Levels(sizes=op.Where(is_leaf, 1, leaf_branch * power), widths=op.Where(is_leaf, leaf_branch, branch))


@dataclass(frozen=True)
class Candidates:
    """Candidate key blocks [first, last) of each sequence.

    Attributes:
        first, last: [B, 1, 1].
    """

    first: Value
    last: Value

    def interval(self, op: OpBuilder, nodes: Value, size: Value | int) -> tuple[Value, Value, Value]:
        """The candidates [left, right) that nodes of a size cover, and which nodes are there and cover any."""
        left = op.Max(nodes * size, self.first)
        right = op.Min(nodes * size + size, self.last)
        return left, right, op.And(op.GreaterOrEqual(nodes, 0), op.Less(left, right))


@dataclass(frozen=True)
class Search:
    """Everything that a search needs to know about one query block.

    Attributes:
        levels: the tree's shape.
        candidates: what it stands on.
        budget: scalar K.
        queries: [B, Hm, D, Q] float32, the sampled rows of the mask head's query heads, transposed.
        keys: [P * Hkv * page_size, D] T.
        pages: where blocks are.
        offsets: [block_k / stride_k], the tokens of a block that are scored.
        reuse_level: scalar.
    """

    levels: Levels
    candidates: Candidates
    budget: Value
    queries: Value
    keys: Value
    pages: Pages
    offsets: Value
    reuse_level: Value

    def block_scores(self, op: OpBuilder, blocks: Value) -> Value:
        """[B, Hm, N] float32, the largest q.k of each block."""
        keys = self.pages.gather(op, self.keys, blocks, self.offsets)
        products = op.MatMul(keys, self.queries)  # [B, Hm, N * n, Q]
        products = op.Reshape(products, op.Concat(op.Shape(blocks), [-1], axis=0))
        return typed(op.ReduceMax(products, [-1], keepdims=0), FLOAT)

    def keep_best(self, op: OpBuilder, nodes: Value, size: Value) -> Value:
        """The ``budget`` best of nodes in ascending order (-1 for none): [B, Hm, K], ascending, -1 last."""
        left, right, there = self.candidates.interval(op, nodes, size)
        blocks = op.Where(there, left + (right - left) / 2, 0)
        scores = op.Where(there, self.block_scores(op, blocks), float("-inf"))
        # TopK prefers the lower index where scores are equal.
        _, best = op.TopK(scores, op.Reshape(self.budget, [1]), axis=-1, _outputs=2)
        return ascending(op, op.GatherElements(op.Where(there, nodes, -1), best, axis=-1), self.budget)

    def reuse_sources(self, op: OpBuilder, past_nodes: Value) -> Value:
        """What a decode step starts from where it reuses nodes, ascending, -1 for none: [B, Hm, Kd + 2].

        At reuse_level 1 the two newest level-1 nodes join past_nodes; two entries stay empty at reuse_level 0.
        """
        size = op.Gather(self.levels.sizes, self.reuse_level)
        newest = ceil_div(self.candidates.last, size) - [2, 1]  # [B, 1, 2]
        newest = op.Where(op.Equal(self.reuse_level, 0), -1, newest)
        newest = op.Expand(newest, op.Concat(op.Shape(past_nodes, end=2), [2], axis=0))
        nodes = op.Concat(past_nodes, newest, axis=2)
        _, _, there = self.candidates.interval(op, nodes, size)
        nodes = ascending(op, op.Where(there, nodes, -1), dim(op, nodes, 2))
        before = op.Pad(op.Slice(nodes, [0], [-1], [2]), [1, 0], -1, [2])  # each entry's predecessor
        return op.Where(op.Equal(nodes, before), -1, nodes)

    def run(self, op: OpBuilder, wanted: Value, past_nodes: Value, may_reuse: Value) -> tuple[Value, Value]:
        """Search where wanted.

        Args:
            wanted: [B, 1] bool, sequences whose candidates exceed the budget.
            past_nodes: [B, Hm, Kd].
            may_reuse: scalar bool, in single-token calls only: start from past_nodes where there are any.

        Returns:
            The chosen blocks, [B, Hm, K] ascending, -1 last, of no meaning where no search was wanted; and for
            present_nodes, [B, Hm, K], the nodes kept at reuse_level, or past_nodes where they were reused, or -1.
        """
        descent, kept = self._descent(op, wanted, past_nodes, may_reuse)
        saved = op.Slice(op.Expand(-1, op.Shape(kept)), [0], [-2], [2])
        kept, saved = op.Loop(
            descent.trips, None, kept, saved, _outputs=2,
            body=subgraph(
                op, "level",
                lambda op, step, proceed, *nodes: (proceed, *self._level(op, descent, step, *nodes)),
                [tensor("step", INT64, 0), tensor("proceed", BOOL, 0), tensor("kept", INT64, 3),
                 tensor("saved", INT64, 3)],
                [tensor("proceeds", BOOL, 0), tensor("keeps", INT64, 3), tensor("saves", INT64, 3)],
            ),
        )
        kept, saved = typed(kept, INT64), typed(saved, INT64)
        nodes = op.If(
            may_reuse,  # else past_nodes is not of this budget
            then_branch=subgraph(
                op, "keep", lambda op: [op.Where(op.Unsqueeze(descent.reuse, [2]), past_nodes, saved)],
                [], [tensor("nodes", INT64, 3)],
            ),
            else_branch=subgraph(op, "renew", lambda op: [saved], [], [tensor("nodes", INT64, 3)]),
        )
        return op.Slice(kept, [0], op.Reshape(self.budget, [1]), [2]), typed(nodes, INT64)

    def _descent(
        self, op: OpBuilder, wanted: Value, past_nodes: Value, may_reuse: Value
    ) -> tuple[_Descent, Value]:
        """Where each search starts, and the nodes that it starts from, [B, Hm, K + 2], -1 where at the top."""
        first_nodes = op.Squeeze(self.candidates.first, [2]) / self.levels.sizes  # [B, LEVELS]
        counts = ceil_div(op.Squeeze(self.candidates.last, [2]), self.levels.sizes) - first_nodes
        fits = op.LessOrEqual(counts, self.levels.widths * self.budget)
        top = op.ArgMax(op.Cast(fits, to=INT32), axis=1)  # [B, 1], the lowest level that fits

        batch_heads = op.Shape(past_nodes, end=2)
        nowhere = op.Concat(batch_heads, op.Reshape(self.budget + 2, [1]), axis=0)
        reuse, sources = op.If(
            may_reuse,
            then_branch=subgraph(
                op, "reuse", lambda op: (
                    op.And(wanted, op.GreaterOrEqual(op.Gather(past_nodes, 0, axis=2), 0)),
                    self.reuse_sources(op, past_nodes),
                ), [], [tensor("reuse", BOOL, 2), tensor("sources", INT64, 3)],
            ),
            else_branch=subgraph(
                op, "anew", lambda op: (op.Expand(False, batch_heads), op.Expand(-1, nowhere)),
                [], [tensor("reuse", BOOL, 2), tensor("sources", INT64, 3)],
            ),
            _outputs=2,
        )
        reuse = typed(reuse, BOOL)
        start = op.Where(wanted, op.Where(reuse, self.reuse_level, top), -1)
        # Reused nodes have been scored, so the first level to do is the one below theirs.
        trips = op.ReduceMax(start - op.Cast(reuse, to=INT64), keepdims=0) + 1
        anew = op.And(wanted, op.Not(reuse))
        return _Descent(start, anew, reuse, trips, first_nodes, counts), typed(sources, INT64)

    def _level(self, op: OpBuilder, descent: _Descent, step: Value, kept: Value, saved: Value) -> tuple[Value, Value]:
        """One level of all searches: the best of what ``kept`` holds one level up, or of all nodes at the top.

        Args:
            step: scalar, 0 at the highest start level.
            kept: [B, Hm, K + 2], the nodes to replace by their children, -1 for none.
            saved: [B, Hm, K], what was kept at reuse_level.
        """
        level = descent.trips - 1 - step
        column = op.Reshape(level, [1])
        size, width = op.Gather(self.levels.sizes, level), op.Gather(self.levels.widths, level)
        expand = op.Less(level, descent.start)  # [B, Hm]
        enter = op.And(op.Equal(level, descent.start), descent.anew)
        expands, enters = op.Unsqueeze(expand, [2]), op.Unsqueeze(enter, [2])

        some = op.ReduceMax(op.Cast(expand, to=INT64), keepdims=0) * (self.budget + 2)  # 0 columns where none expands
        parents = op.Unsqueeze(op.Slice(op.Where(expands, kept, -1), [0], op.Reshape(some, [1]), [2]), [3])
        children = op.Where(op.Less(parents, 0), -1, parents * width + arange(op, width))
        columns = op.Concat(op.Shape(kept, end=2), op.Reshape(some * width, [1]), axis=0)
        children = op.Reshape(children, columns, allowzero=1)

        count = op.ReduceMax(op.Where(enter, op.Gather(descent.counts, column, axis=1), 0), keepdims=0)
        whole = op.Unsqueeze(op.Gather(descent.first_nodes, column, axis=1), [2]) + arange(op, count)
        whole = op.Where(enters, whole, -1)

        best = self.keep_best(op, op.Concat(children, whole, axis=2), size)
        takes_part = op.Or(expands, enters)
        kept = op.Where(takes_part, op.Pad(best, [0, 2], -1, [2]), kept)
        saved = op.Where(op.And(takes_part, op.Equal(level, self.reuse_level)), best, saved)
        return kept, saved


@dataclass(frozen=True)
class _Descent:
    """Where searches start.

    Attributes:
        start: [B, Hm], the level of the nodes that a search starts from, -1 where none is wanted.
        anew: [B, Hm] bool, whether it starts from all nodes of that level, which must then be scored.
        reuse: [B, Hm] bool, whether it starts from nodes that were kept.
        trips: scalar, levels to do.
        first_nodes, counts: [B, LEVELS], the first node of each level that holds a candidate, and how many do.
    """

    start: Value
    anew: Value
    reuse: Value
    trips: Value
    first_nodes: Value
    counts: Value


def sampled_queries(op: OpBuilder, queries: Value, last_row: Value, stride: Value) -> Value:
    """Every stride-th row counted back from the last valid one, transposed for :class:`Search`.

    Args:
        queries: [B, Hm, G, R, D] float32.
        last_row: [B].

    Returns:
        [B, Hm, D, G * ceil(R / stride)]; places beyond the first row repeat the last row, which changes no maximum.
    """
    rows = dim(op, queries, 3)
    last_row = op.Unsqueeze(last_row, [1])
    row = last_row - arange(op, ceil_div(rows, stride)) * stride
    row = op.Unsqueeze(op.Where(op.Less(row, 0), last_row, row), [2])  # [B, n, 1]
    sampled = op.GatherND(op.Transpose(queries, perm=[0, 3, 1, 2, 4]), row, batch_dims=1)  # [B, n, Hm, G, D]
    return op.Reshape(op.Transpose(sampled, perm=[0, 2, 4, 3, 1]), [0, 0, 0, -1])

