"""The ONNX operators that the exporter emits (opset 20), each in PyTorch with ONNX's semantics. Others are refused.

An operator's Python function takes its ONNX inputs by position (None where an optional one is absent) and its
attributes by their names; an attribute that is not in the signature is refused. Inputs named in ``known`` must not
depend on data: they come as what ``tolist()`` gives, so that nothing waits for a GPU to learn a shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

TYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}
"""PyTorch's types by ONNX's numbers."""


@dataclass(frozen=True)
class Op:
    """An operator.

    Attributes:
        function: see the module.
        known: positions of the inputs that come as lists or numbers.
        scalars: whether inputs of one element may stay on the CPU while others are on a GPU.
        attributes: those that it has.
    """

    function: Callable[..., Any]
    known: frozenset[int]
    scalars: bool
    attributes: frozenset[str]


OPS: dict[str, Op] = {}


def _op(name: str, *, known: Sequence[int] = (), scalars: bool = False) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        attributes = frozenset(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)
        OPS[name] = Op(function, frozenset(known), scalars, attributes)
        return function

    return register


for _name, _function in {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "MatMul": torch.matmul, "Neg": torch.neg,
    "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Sigmoid": torch.sigmoid, "Cos": torch.cos, "Sin": torch.sin,
}.items():
    OPS[_name] = Op(_function, frozenset(), _name in ("Add", "Sub", "Mul"), frozenset())


@_op("Div", scalars=True)
def _div(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@_op("Pow", known=[1])
def _pow(base: Tensor, exponent: float) -> Tensor:
    """Of one exponent, which PyTorch computes as eager models do (x * x for 2)."""
    return torch.pow(base, exponent)


@_op("Cast")
def _cast(data: Tensor, *, to: int) -> Tensor:
    return data.to(TYPES[to])


@_op("Clip", known=[1, 2])
def _clip(data: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return data if low is None and high is None else torch.clamp(data, low, high)


@_op("Concat")
def _concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


@_op("Expand", known=[1])
def _expand(data: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast both ways: a size of the tensor stays where ``shape`` has 1."""
    return data.broadcast_to(torch.broadcast_shapes(data.shape, tuple(shape)))


@_op("Gather")
def _gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= data.dim()
    rows = data.index_select(axis, indices.flatten().remainder(data.shape[axis]))  # negative ones count from the end
    return rows.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


@_op("GatherElements")
def _gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, indices.remainder(data.shape[axis]))


@_op("Range", known=[0, 1, 2])
def _range(start: int | float, limit: int | float, delta: int | float) -> Tensor:
    """Of int64 or float32."""
    return torch.arange(start, limit, delta)


@_op("ReduceMean", known=[1])
def _reduce_mean(
    data: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    if not axes:
        return data if noop_with_empty_axes else data.mean(tuple(range(data.dim())), keepdim=bool(keepdims))
    return data.mean(tuple(axes), keepdim=bool(keepdims))


@_op("Reshape", known=[1])
def _reshape(data: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    """A 0 keeps the size that stands there, unless ``allowzero``."""
    return data.reshape([size if size or allowzero else data.shape[i] for i, size in enumerate(shape)])


@_op("Shape")
def _shape(data: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """On the CPU; tensors without data have one too."""
    return torch.tensor(data.shape[start:end], dtype=torch.int64)


@_op("Slice", known=[1, 2, 3, 4])
def _slice(
    data: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Steps are positive, as PyTorch's must be."""
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        if step < 1:
            raise NotImplementedError(f"Slice: step {step} is not supported")
        data = torch.ops.aten.slice(data, axis, start, end, step)
    return data


@_op("Split", known=[1])
def _split(
    data: Tensor, split: Sequence[int] | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> Sequence[Tensor]:
    if split is None:  # equal parts, the last of them smaller where they cannot be
        assert num_outputs is not None
        return data.split(-(-data.shape[axis] // num_outputs), axis)
    return data.split(list(split), axis)


@_op("Squeeze", known=[1])
def _squeeze(data: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return data.squeeze() if axes is None else data.squeeze(tuple(axes))


@_op("Transpose")
def _transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return data.permute(tuple(range(data.dim()))[::-1] if perm is None else tuple(perm))


@_op("Unsqueeze", known=[1])
def _unsqueeze(data: Tensor, axes: Sequence[int]) -> Tensor:
    rank = data.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data
