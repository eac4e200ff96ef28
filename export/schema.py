"""``HipAttention`` as an ONNX operator schema, so that onnx's checker and shape inference know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import onnx
from onnx import defs
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext, InferenceError

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError
from hip_trt.operator import DOMAIN, INPUTS, INT_ATTRIBUTES, OP_TYPE, OP_VERSION, OUTPUTS

_TYPES = ("tensor(float16)", "tensor(bfloat16)", "tensor(float)")

_SHAPES: dict[str, tuple[str, ...]] = {
    "query": ("B", "Hq", "S", "D"),
    "key": ("B", "Hkv", "S", "D"),
    "value": ("B", "Hkv", "S", "D"),
    "past_key": ("P", "Hkv", "page_size", "D"),
    "past_value": ("P", "Hkv", "page_size", "D"),
    "page_table": ("B", "M"),
    "past_lengths": ("B",),
    "query_lengths": ("B",),
    "past_nodes": ("B", "Hm", "Kd"),
    "refresh_mask": ("one",),
    "output": ("B", "Hq", "S", "D"),
    "present_key": ("P", "Hkv", "page_size", "D"),
    "present_value": ("P", "Hkv", "page_size", "D"),
    "present_nodes": ("B", "Hm", "Kd"),
}
"""The dimensions of every input and output: equal names are equal sizes."""

_INTEGERS = {"page_table", "past_lengths", "query_lengths", "past_nodes", "refresh_mask", "present_nodes"}

_MEANINGS = {
    "query": "Queries of the new tokens, after RoPE.",
    "key": "Keys of the new tokens, after RoPE.",
    "value": "Values of the new tokens.",
    "past_key": "This layer's key pool. Token t of sequence b is row t % page_size of page page_table[b, t / page_size]"
    "; rows that no sequence has committed are undefined.",
    "past_value": "This layer's value pool, laid out as past_key.",
    "page_table": "Pages of each sequence in order, -1 where none. Sequences may share full pages.",
    "past_lengths": "Committed tokens of each sequence before this call.",
    "query_lengths": "Valid new tokens of each sequence; the rest of S is padding on the right. 0 marks an idle row.",
    "past_nodes": "Tree nodes kept by the last decode search, -1 for none.",
    "refresh_mask": "1: search from the top. 0: start from past_nodes, in single-token calls (S = 1).",
    "output": "Attention output; padding rows are 0.",
    "present_key": "past_key with the new rows written from past_lengths on. May share its buffer with past_key.",
    "present_value": "past_value with the new rows written. May share its buffer with past_value.",
    "present_nodes": "Nodes that this call's search kept at reuse_level; past_nodes where they were reused or the row "
    "is idle; -1 where there are none.",
}

_DOC = """
Hierarchically pruned attention (HiP, arXiv 2406.09827) with a paged KV cache.

Each block of block_q query rows attends to sink blocks, to window blocks, and to the K key blocks that a search over a
fixed tree chooses between them (K = mask_k / block_k; decode_mask_k / block_k in single-token calls, S = 1). Where no
more than K blocks lie between, all are attended to, and the result is dense causal attention.

T is the type of query, key, value and pool. Sizes: B sequences, S new tokens (padded), Hq query heads, Hkv key/value
heads, D head size, P pages, M page slots per sequence, Hm mask heads (Hkv where mask_heads is "kv", Hq where "query"),
Kd = decode_mask_k / block_k. Every attribute is required: a default that differed between two implementations would
change results without a word.
"""


def _describe(name: str) -> str:
    return f"[{', '.join('1' if size == 'one' else size for size in _SHAPES[name])}]. {_MEANINGS[name]}"


def _parameter(name: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, "tensor(int32)" if name in _INTEGERS else "T", _describe(name))


def _attributes() -> list[OpSchema.Attribute]:
    meanings = {name: str(field.description) for name, field in HipConfig.model_fields.items()}
    meanings["dense"] = "1: attend to everything; 0: prune."
    return [
        *(OpSchema.Attribute(name, OpSchema.AttrType.INT, meanings[name]) for name in INT_ATTRIBUTES),
        OpSchema.Attribute("mask_heads", OpSchema.AttrType.STRING, meanings["mask_heads"]),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "Factor on q.k, usually D ** -0.5."),
    ]


def register() -> None:
    """Make onnx know the operator, in this process; more than one call is one."""
    if defs.has(OP_TYPE, DOMAIN):
        return
    schema = OpSchema(
        OP_TYPE, DOMAIN, OP_VERSION, _DOC,
        inputs=[_parameter(name) for name in INPUTS],
        outputs=[_parameter(name) for name in OUTPUTS],
        type_constraints=[("T", list(_TYPES), "Type of activations and KV cache.")],
        attributes=_attributes(), node_determinism=OpSchema.NodeDeterminism.Deterministic,
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)


Dim: TypeAlias = onnx.TensorShapeProto.Dimension


def _infer(context: InferenceContext) -> None:
    """Types and shapes of the outputs; refuses inputs whose sizes contradict each other or the attributes."""
    config = _config(context)
    sizes = {"page_size": Dim(dim_value=config.page_size), "Kd": Dim(dim_value=config.decode_mask_blocks),
             "one": Dim(dim_value=1)}
    for index, name in enumerate(INPUTS):
        kind = context.get_input_type(index)
        if kind is not None and kind.tensor_type.HasField("shape"):
            _unify(sizes, name, _SHAPES[name], kind.tensor_type.shape.dim)
    heads = "Hkv" if config.mask_heads == "kv" else "Hq"
    for name, other in (("Hm", heads), (heads, "Hm")):
        if other in sizes:
            _unify(sizes, f'mask_heads "{config.mask_heads}"', (name,), [sizes[other]])
    query_heads, kv_heads = (_known(sizes.get(name)) for name in ("Hq", "Hkv"))
    if query_heads and kv_heads and query_heads % kv_heads:
        raise InferenceError(f"{OP_TYPE}: query has {query_heads} heads, not a multiple of key's {kv_heads}")

    element = context.get_input_type(0).tensor_type.elem_type
    for index, name in enumerate(OUTPUTS):
        output = onnx.TypeProto()
        output.tensor_type.elem_type = onnx.TensorProto.INT32 if name in _INTEGERS else element
        output.tensor_type.shape.dim.extend(sizes.get(size, Dim()) for size in _SHAPES[name])
        context.set_output_type(index, output)


def _config(context: InferenceContext) -> HipConfig:
    """The node's attributes, validated."""
    fields: dict[str, Any] = {}
    for name in (*INT_ATTRIBUTES, "mask_heads"):
        attribute = context.get_attribute(name)
        if attribute is None:
            raise InferenceError(f"{OP_TYPE}: attribute {name} is missing")
        fields[name] = attribute.s.decode() if name == "mask_heads" else attribute.i
    del fields["dense"]
    try:
        return HipConfig.create(**fields)
    except ConfigError as error:
        raise InferenceError(f"{OP_TYPE}: {error.cause}") from None


def _known(size: Dim | None) -> int | None:
    return size.dim_value if size is not None and size.HasField("dim_value") else None


def _unify(sizes: dict[str, Dim], source: str, names: Sequence[str], shape: Sequence[Dim]) -> None:
    """Enter a shape's dimensions under their names; a number is worth more than a symbol, a symbol than nothing."""
    if len(names) != len(shape):
        raise InferenceError(f"{OP_TYPE}: {source} must have {len(names)} dimensions, [{', '.join(names)}], "
                             f"and has {len(shape)}")
    for name, size in zip(names, shape, strict=True):
        before, now = _known(sizes.get(name)), _known(size)
        if before is not None and now is not None and before != now:
            raise InferenceError(f"{OP_TYPE}: {name} is {before}, but {now} in {source}")
        if before is None and (now is not None or name not in sizes or not sizes[name].HasField("dim_param")):
            sizes[name] = size
