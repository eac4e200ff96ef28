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

``attention_v2`` and ``attention_v2_`` are version 2 (:func:`hip_trt.reference.operator_v2.hip_attention_v2`): thirteen
tensors in the order of :data:`hip_trt.operator.INPUTS_V2`, attributes of :func:`hip_trt.operator.attributes_v2`, and
six results, of which ``attention_v2_`` writes the last five onto their past tensors.

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
from hip_trt.config_v2 import HipConfigV2
from hip_trt.errors import RuntimeInputError
from hip_trt.reference.operator_v2 import hip_attention_v2

_STATE = ("past_key", "past_value", "past_nodes")  # what attention_ writes
_STATE_V2 = tuple(names.STATE_V2.values())
_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _schema(
    inputs: tuple[str, ...], integers: tuple[str, ...], floats: tuple[str, ...], mutated: tuple[str, ...], results: int
) -> str:
    tensors = ", ".join(
        f"Tensor({'abcde'[mutated.index(name)]}!) {name}" if name in mutated else f"Tensor {name}" for name in inputs
    )
    attributes = [*(f"int {name}" for name in integers), "str mask_heads", *(f"float {name}" for name in floats)]
    return f"({tensors}, *, {', '.join(attributes)}) -> ({', '.join(['Tensor'] * results)})"


@lru_cache
def _config(mask_heads: Any, **attributes: int) -> HipConfig:
    return HipConfig.create(mask_heads=mask_heads, **attributes)


@lru_cache
def _config_v2(mask_heads: Any, value_threshold: float, **attributes: int) -> HipConfigV2:
    return HipConfigV2.create(mask_heads=mask_heads, value_threshold=value_threshold, **attributes)


def _split(attributes: dict[str, Any], make: Any = _config) -> dict[str, Any]:
    """Attributes of the op as the reference's keyword arguments; ``make`` makes the configuration."""
    fields = dict(attributes)
    dense, scale = bool(fields.pop("dense")), fields.pop("scale")
    return {"config": make(**fields), "scale": scale, "dense": dense}


def _check(tensors: tuple[Tensor, ...], config: HipConfig) -> None:
    """Refuse tensors that do not fit each other. Their contents are not read."""
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    shapes = _common_shapes(inputs, config)
    batch, query_heads, kv_heads = inputs["query"].shape[0], inputs["query"].shape[1], inputs["key"].shape[1]
    shapes |= {
        "refresh_mask": (1,),
        "past_nodes": (batch, config.num_masks(query_heads, kv_heads), config.decode_mask_blocks),
    }
    _check_layout(inputs, shapes, names.INPUTS[:5])


def _check_v2(tensors: tuple[Tensor, ...], config: HipConfigV2) -> None:
    """As :func:`_check`."""
    inputs = dict(zip(names.INPUTS_V2, tensors, strict=True))
    shapes = _common_shapes(inputs, config)
    (batch, query_heads, new_tokens, head_dim), (pages, kv_heads, page_size, _) = (
        inputs["query"].shape, shapes["past_key"])
    if head_dim % 16:
        raise _refusal("query", f"head size {head_dim}", "It must be a multiple of 16.")
    kind = inputs["call_kind"].shape
    if kind not in ((names.PREFILL,), (names.DECODE,)):
        raise _refusal("call_kind", f"shape {list(kind)}", "It must be [1] for prefill or [2] for decode.")
    if kind == (names.DECODE,) and not 1 <= new_tokens <= 8:
        raise _refusal("query", f"{new_tokens} new tokens", "A decode call has 1 to 8.")
    shapes |= {
        "past_bounds": (pages, kv_heads, page_size // config.decode_block_k, 2, head_dim),
        "past_codes": (pages, kv_heads, page_size, head_dim // 16),
        "past_blocks": (batch, config.num_masks(query_heads, kv_heads), config.decode_mask_blocks),
        "refresh_mask": (batch,), "call_kind": tuple(kind),
    }
    _check_layout(inputs, shapes, (*names.INPUTS_V2[:5], "past_bounds"))


def _common_shapes(inputs: dict[str, Tensor], config: HipConfig) -> dict[str, tuple[int, ...]]:
    """Of what both versions have, by the shapes of four tensors."""
    query, key, past_key, page_table = (inputs[name] for name in ("query", "key", "past_key", "page_table"))
    for name, rank in (("query", 4), ("key", 4), ("past_key", 4), ("page_table", 2)):
        if inputs[name].ndim != rank:
            raise _refusal(name, f"shape {list(inputs[name].shape)}", f"It must have {rank} dimensions.")
    batch, query_heads, new_tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    if query_heads % max(kv_heads, 1):
        raise _refusal("query", f"{query_heads} heads", f"It must be a multiple of key's {kv_heads}.")
    pool = (past_key.shape[0], kv_heads, config.page_size, head_dim)
    new = (batch, kv_heads, new_tokens, head_dim)
    return {
        "key": new, "value": new, "past_key": pool, "past_value": pool, "page_table": (batch, page_table.shape[1]),
        "past_lengths": (batch,), "query_lengths": (batch,),
    }


def _check_layout(
    inputs: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], float_tensors: tuple[str, ...]
) -> None:
    query = inputs["query"]
    for name, shape in shapes.items():
        if inputs[name].shape != shape:
            raise _refusal(name, f"shape {list(inputs[name].shape)}", f"It must be {list(shape)}.")
    for name, tensor in inputs.items():
        dtype = query.dtype if name in float_tensors else torch.int32
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
    "hip_trt::attention", _attention_cpu, mutates_args=(), device_types="cpu",
    schema=_schema(names.INPUTS, names.INT_ATTRIBUTES, ("scale",), (), 4),
)
attention_ = torch.library.custom_op(
    "hip_trt::attention_", _attention_cpu_, mutates_args=_STATE, device_types="cpu",
    schema=_schema(names.INPUTS, names.INT_ATTRIBUTES, ("scale",), _STATE, 1),
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


def _attention_v2_cpu(*tensors: Tensor, **attributes: Any) -> _Six:
    arguments = _split(attributes, _config_v2)
    _check_v2(tensors, arguments["config"])
    output, *present = hip_attention_v2(*tensors, **arguments)
    inputs = dict(zip(names.INPUTS_V2, tensors, strict=True))
    # New tensors in every case, as the schema promises; where a layer is dense, the reference returns its past ones.
    state = (
        tensor.clone() if tensor.data_ptr() == inputs[name].data_ptr() else tensor.contiguous()
        for name, tensor in zip(_STATE_V2, present, strict=True)
    )
    key, value, bounds, codes, blocks = state
    return output.contiguous(), key, value, bounds, codes, blocks


def _attention_v2_cpu_(*tensors: Tensor, **attributes: Any) -> Tensor:
    inputs = dict(zip(names.INPUTS_V2, tensors, strict=True))
    output, *present = _attention_v2_cpu(*tensors, **attributes)
    for name, tensor in zip(_STATE_V2, present, strict=True):
        inputs[name].copy_(tensor)
    return output


_FLOATS_V2 = ("value_threshold", "scale")
attention_v2 = torch.library.custom_op(
    "hip_trt::attention_v2", _attention_v2_cpu, mutates_args=(), device_types="cpu",
    schema=_schema(names.INPUTS_V2, names.INT_ATTRIBUTES_V2, _FLOATS_V2, (), 6),
)
attention_v2_ = torch.library.custom_op(
    "hip_trt::attention_v2_", _attention_v2_cpu_, mutates_args=_STATE_V2, device_types="cpu",
    schema=_schema(names.INPUTS_V2, names.INT_ATTRIBUTES_V2, _FLOATS_V2, _STATE_V2, 1),
)


@attention_v2.register_fake
def _attention_v2_fake(*tensors: Tensor, **attributes: Any) -> _Six:
    inputs = dict(zip(names.INPUTS_V2, tensors, strict=True))
    output, *state = (inputs[name].new_empty(inputs[name].shape) for name in ("query", *_STATE_V2))
    key, value, bounds, codes, blocks = state
    return output, key, value, bounds, codes, blocks


@attention_v2_.register_fake
def _attention_v2_fake_(*tensors: Tensor, **attributes: Any) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


@attention_v2.register_kernel("cuda")
def _attention_v2_cuda(*tensors: Tensor, **attributes: Any) -> _Six:
    return library.load().attention_v2(
        *(tensor.contiguous() for tensor in tensors), **_split(attributes, _config_v2)
    )


@attention_v2_.register_kernel("cuda")
def _attention_v2_cuda_(*tensors: Tensor, **attributes: Any) -> Tensor:
    inputs = dict(zip(names.INPUTS_V2, tensors, strict=True))
    contiguous = (tensor if name in _STATE_V2 else tensor.contiguous() for name, tensor in inputs.items())
    present = [inputs[past] for past in _STATE_V2]
    return library.load().attention_v2(
        *contiguous, present_key=present[0], present_value=present[1], present_bounds=present[2],
        present_codes=present[3], present_blocks=present[4], **_split(attributes, _config_v2),
    )[0]
