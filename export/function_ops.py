"""A small vocabulary over onnxscript's builder, in which the operator's ONNX function is written.

Values are int64 unless said. A dimension or a constant is a scalar, so that it broadcasts; :func:`shape` makes shapes.
While a graph is being traced, ``+``, ``-``, ``*`` and ``/`` on values add the ONNX node of that name to it; ``/`` on
integers truncates, so it is only used where nothing is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

Value = Any  # onnx_ir.Value; the package is not typed

INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64
FLOAT = ir.DataType.FLOAT
BOOL = ir.DataType.BOOL
DOUBLE = ir.DataType.DOUBLE


@contextmanager
def arithmetic(op: OpBuilder) -> Iterator[None]:
    """Let the arithmetic operators of values add nodes to ``op``'s graph."""
    outer = ir.set_value_magic_handler(op)
    try:
        yield
    finally:
        ir.set_value_magic_handler(outer)


def typed(value: Value, dtype: ir.DataType) -> Value:
    """Note a value's type where the builder cannot infer it, so that Python constants beside it take that type."""
    value.type = ir.TensorType(dtype)
    return value


def attribute(op: OpBuilder, name: str, kind: ir.AttributeType = ir.AttributeType.INT) -> Value:
    """The value that the calling node gives to an attribute of the function, as a scalar."""
    field = "value_int" if kind == ir.AttributeType.INT else "value_float"
    value = typed(op.Constant(**{field: ir.RefAttr(field, name, kind)}), INT64 if field == "value_int" else FLOAT)
    value.shape = ir.Shape([])
    return value


def dim(op: OpBuilder, value: Value, axis: int) -> Value:
    """One dimension of a value, a scalar."""
    return typed(op.Gather(typed(op.Shape(value), INT64), axis), INT64)


def shape(op: OpBuilder, *sizes: Value | int) -> Value:
    """A 1-d shape from scalars."""
    return op.Concat(*(op.Reshape(size, [1]) if isinstance(size, ir.Value) else [size] for size in sizes), axis=0)


def arange(op: OpBuilder, stop: Value) -> Value:
    """0, 1, ... stop - 1."""
    return op.Range(0, stop, 1)


def ceil_div(value: Value, divisor: Value) -> Value:
    return (value + divisor - 1) / divisor


def ascending(op: OpBuilder, nodes: Value, size: Value) -> Value:
    """``nodes`` sorted along the last axis, which has ``size`` entries; negative ones (none) become -1, and last."""
    none = 2**62
    keys = op.Where(op.Less(typed(nodes, INT64), 0), none, nodes)
    keys, _ = op.TopK(keys, op.Reshape(size, [1]), axis=-1, largest=0, sorted=1, _outputs=2)
    return typed(op.Where(op.Equal(typed(keys, INT64), none), -1, keys), INT64)


def tensor(name: str, dtype: ir.DataType, rank: int) -> Value:
    """Declares an input or output of a :func:`subgraph`."""
    return ir.val(name, dtype, [None] * rank)


def subgraph(
    op: OpBuilder, name: str, trace: Callable[..., Sequence[Value]], inputs: Sequence[Value], outputs: Sequence[Value]
) -> ir.Graph:
    """The body of an If, Loop or Scan, traced from ``trace(op, *inputs)``; it may use values of the graphs around it.

    Value names must be unique in a function, bodies included, so each body puts its name, unique too, before them.
    """
    builder = op.builder

    def traced(inner: OpBuilder, *values: Value) -> Sequence[Value]:
        with arithmetic(inner):
            # A body may not return a value from outside, or one value twice.
            return [inner.Identity(value) for value in trace(inner, *values)]

    builder.push_module(name)
    try:
        for value in (*inputs, *outputs):
            value.name = f"{name}.{value.name}"
        return builder.subgraph(traced, inputs, outputs, name=name)
    finally:
        builder.pop_module()
