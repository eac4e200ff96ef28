"""The paged KV cache in the ONNX function: see :mod:`hip_trt.reference.cache`."""

from __future__ import annotations

from dataclasses import dataclass

from onnxscript import OpBuilder

from hip_trt.export.function_ops import FLOAT, Value, arange, dim, shape


@dataclass(frozen=True)
class NewRows:
    """Where a call's valid new tokens come from and go to.

    Attributes:
        source: [n, 2], the sequence and row of each valid token.
        target: [n, Hkv, 3], its page, head and row in the page.
    """

    source: Value
    target: Value


def new_rows(
    op: OpBuilder, page_table: Value, past_lengths: Value, query_lengths: Value, *, new_tokens: Value, kv_heads: Value,
    page_size: Value,
) -> NewRows:
    """Rows of the valid new tokens. Padding has no row, so it is never written.

    Args:
        page_table: [B, M].
        past_lengths, query_lengths: [B].
    """
    valid = op.Less(op.Unsqueeze(arange(op, new_tokens), [0]), op.Unsqueeze(query_lengths, [1]))  # [B, S]
    source = op.Transpose(op.NonZero(valid), perm=[1, 0])  # [n, 2]
    sequence, row = op.Split(source, num_outputs=2, axis=1, _outputs=2)  # [n, 1]
    position = op.Gather(past_lengths, sequence) + row
    page = op.Unsqueeze(op.GatherND(page_table, op.Concat(sequence, position / page_size, axis=1)), [1])
    place = op.Unsqueeze(op.Concat(page, op.Mod(position, page_size), axis=1), [1])  # [n, 1, 2]
    count = dim(op, source, 0)
    page, row = op.Split(op.Expand(place, shape(op, count, kv_heads, 2)), num_outputs=2, axis=2, _outputs=2)
    head = op.Expand(op.Unsqueeze(arange(op, kv_heads), [0, 2]), shape(op, count, kv_heads, 1))
    return NewRows(source, op.Concat(page, head, row, axis=2))


def append(op: OpBuilder, pool: Value, new: Value, rows: NewRows) -> Value:
    """The pool with the new rows written.

    ScatterND reads the pool itself, not a view of it: a runtime that binds both to one buffer copies nothing else.

    Args:
        pool: [P, Hkv, page_size, D].
        new: [B, Hkv, S, D].
    """
    return op.ScatterND(pool, rows.target, op.GatherND(op.Transpose(new, perm=[0, 2, 1, 3]), rows.source))


@dataclass(frozen=True)
class Pages:
    """Finds a sequence's key blocks in the pool.

    Attributes:
        table: [B, M], pages of each sequence.
        slots: scalar M.
        kv_head: [1, Hm, 1], the key/value head of each mask head.
        kv_heads, page_size, block_k: scalars.
    """

    table: Value
    slots: Value
    kv_head: Value
    kv_heads: Value
    page_size: Value
    block_k: Value

    def gather(self, op: OpBuilder, pool: Value, blocks: Value, offsets: Value) -> Value:
        """Tokens of key blocks, read straight from the pool, as float32.

        Args:
            pool: [P * Hkv * page_size, D] T.
            blocks, offsets: see :meth:`rows`.

        Returns:
            [B, Hm, N * n, D] float32.
        """
        return op.Cast(op.Gather(pool, self.rows(op, blocks, offsets)), to=FLOAT)

    def rows(self, op: OpBuilder, blocks: Value, offsets: Value | list[int]) -> Value:
        """Rows of a pool of P * Hkv * page_size that hold tokens of key blocks.

        They are forced into range rather than checked: where an idle sequence has no page, some row is read, and the
        caller drops it.

        Args:
            blocks: [B, Hm, N], 0 or more.
            offsets: [..., N or 1, n], the tokens to take of each block.

        Returns:
            [B, Hm, N * n].
        """
        token = blocks * self.block_k
        slot = op.Min(token / self.page_size, self.slots - 1)
        batch = dim(op, self.table, 0)
        first_slot = op.Reshape(arange(op, batch) * self.slots, [-1, 1, 1])
        page = op.Gather(op.Reshape(self.table, [-1]), first_slot + slot)
        row = (page * self.kv_heads + self.kv_head) * self.page_size + op.Mod(token, self.page_size)
        rows = op.Max(op.Unsqueeze(row, [-1]) + offsets, 0)
        return op.Reshape(rows, [0, 0, -1])
