"""The operator as PyTorch ops: ``torch.ops.hip_trt.attention`` and its in-place form ``torch.ops.hip_trt.attention_``.

Importing this module registers both. On CUDA they call the kernels behind the C ABI, on the CPU the reference; on fake
and meta tensors they give shapes and types, so they work under ``torch.export`` and ``torch.compile``. For inference:
they have no backward.

Arguments: the ten tensors of :func:`hip_trt.reference.hip_attention`, in the order of :data:`hip_trt.operator.INPUTS`,
and by keyword the attributes that :func:`hip_trt.operator.attributes` gives. Shapes, types and meaning are those of the
reference. Example::

    import hip_trt.ops
    attributes = hip_trt.operator.attributes(HipConfig(), scale=head_dim ** -0.5)
    output, present_key, present_value, present_nodes = torch.ops.hip_trt.attention(query, key, ..., **attributes)

``attention`` copies both page pools and returns output, present_key, present_value and present_nodes. ``attention_``
writes the new rows into past_key and past_value and the kept nodes into past_nodes, which must be contiguous, and
returns output; on CUDA it copies nothing else.

Raises:
    RuntimeInputError: if a tensor's shape, type or device does not fit the others; naming it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hip_trt import library, reference
from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError

_STATE = ("past_key", "past_value", "past_nodes")  # what attention_ writes
_ATTRIBUTES = ", ".join([f"int {name}" for name in names.INT_ATTRIBUTES] + ["str mask_heads", "float scale"])


def _schema(mutated: tuple[str, ...], results: int) -> str:
    tensors = ", ".join(
        f"Tensor({'abc'[mutated.index(name)]}!) {name}" if name in mutated else f"Tensor {name}"
        for name in names.INPUTS
    )
    return f"({tensors}, *, {_ATTRIBUTES}) -> ({', '.join(['Tensor'] * results)})"


@lru_cache
def _config(mask_heads: Any, **attributes: int) -> HipConfig:
    return HipConfig.create(mask_heads=mask_heads, **attributes)


def _split(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the op as the reference's keyword arguments."""
    fields = dict(attributes)
    dense, scale = bool(fields.pop("dense")), fields.pop("scale")
    return {"config": _config(**fields), "scale": scale, "dense": dense}


def _check(tensors: tuple[Tensor, ...], config: HipConfig) -> None:
    """Refuse tensors that do not fit each other. Their contents are not read."""
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    query, key, past_key, page_table = (inputs[name] for name in ("query", "key", "past_key", "page_table"))
    for name, rank in (("query", 4), ("key", 4), ("past_key", 4), ("page_table", 2)):
        if inputs[name].ndim != rank:
            raise _refusal(name, f"shape {list(inputs[name].shape)}", f"It must have {rank} dimensions.")
    batch, query_heads, new_tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    if query_heads % max(kv_heads, 1):
        raise _refusal("query", f"{query_heads} heads", f"It must be a multiple of key's {kv_heads}.")
    pool = (past_key.shape[0], kv_heads, config.page_size, head_dim)
    shapes = {
        "key": (batch, kv_heads, new_tokens, head_dim), "value": (batch, kv_heads, new_tokens, head_dim),
        "past_key": pool, "past_value": pool, "page_table": (batch, page_table.shape[1]),
        "past_lengths": (batch,), "query_lengths": (batch,), "refresh_mask": (1,),
        "past_nodes": (batch, config.num_masks(query_heads, kv_heads), config.decode_mask_blocks),
    }
    for name, shape in shapes.items():
        if inputs[name].shape != shape:
            raise _refusal(name, f"shape {list(inputs[name].shape)}", f"It must be {list(shape)}.")
    for name, tensor in inputs.items():
        dtype = query.dtype if name in names.INPUTS[:5] else torch.int32
        if tensor.dtype != dtype:
            raise _refusal(name, f"type {tensor.dtype}", f"It must be {dtype}.")
        if tensor.device != query.device:
            raise _refusal(name, f"device {tensor.device}", f"It must be query's, {query.device}.")


def _refusal(name: str, what: str, remedy: str) -> RuntimeInputError:
    return RuntimeInputError(f"{name}: {what} is not allowed.", remedy)


def _attention_cpu(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = _split(attributes)
    _check(tensors, arguments["config"])
    output, *present = reference.hip_attention(*tensors, **arguments)
    key, value, nodes = (tensor.contiguous() for tensor in present)
    return output.contiguous(), key, value, nodes  # the layout that the fake kernels promise, whatever query's is


def _attention_cpu_(*tensors: Tensor, **attributes: Any) -> Tensor:
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    output, *present = _attention_cpu(*tensors, **attributes)
    for name, tensor in zip(_STATE, present, strict=True):
        inputs[name].copy_(tensor)
    return output


attention = torch.library.custom_op(
    "hip_trt::attention", _attention_cpu, mutates_args=(), device_types="cpu", schema=_schema((), 4)
)
attention_ = torch.library.custom_op(
    "hip_trt::attention_", _attention_cpu_, mutates_args=_STATE, device_types="cpu", schema=_schema(_STATE, 1)
)


@attention.register_fake
def _attention_fake(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    output, *state = (inputs[name].new_empty(inputs[name].shape) for name in ("query", *_STATE))
    return output, state[0], state[1], state[2]


@attention_.register_fake
def _attention_fake_(*tensors: Tensor, **attributes: Any) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


@attention.register_kernel("cuda")
def _attention_cuda(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return library.load().attention(*(tensor.contiguous() for tensor in tensors), **_split(attributes))


@attention_.register_kernel("cuda")
def _attention_cuda_(*tensors: Tensor, **attributes: Any) -> Tensor:
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    past_key, past_value, past_nodes = (inputs[name] for name in _STATE)
    contiguous = (tensor if name in _STATE else tensor.contiguous() for name, tensor in inputs.items())
    return library.load().attention(
        *contiguous, present_key=past_key, present_value=past_value, present_nodes=past_nodes, **_split(attributes)
    )[0]
