"""``HipAttention`` as an ONNX function: the whole operator in standard ONNX, so that any runtime can run it.

The function travels in the model as a model-local function. It computes what :mod:`hip_trt.reference` computes, with
float32 arithmetic inside. TensorRT prefers such a function to a plugin of the same name: see :func:`strip_function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from hip_trt.errors import ExportError
from hip_trt.export.function_attention import Attention, all_query_blocks
from hip_trt.export.function_cache import Pages, append, new_rows
from hip_trt.export.function_ops import (
    INT64,
    Value,
    arange,
    arithmetic,
    attribute,
    dim,
    subgraph,
    tensor,
)
from hip_trt.export.function_search import tree_levels
from hip_trt.operator import DOMAIN, INPUTS, INT_ATTRIBUTES, OP_TYPE, OP_VERSION, OUTPUTS

OPSET_VERSIONS = range(18, 24)
"""Versions of the standard operators that the function can be written in; none of those it uses changed its meaning."""


@cache
def _function_bytes(opset_version: int) -> bytes:
    kinds = dict.fromkeys(INT_ATTRIBUTES, ir.AttributeType.INT)
    kinds |= {"mask_heads": ir.AttributeType.STRING, "scale": ir.AttributeType.FLOAT}
    return traced(
        _trace, INPUTS, OUTPUTS, kinds, opset_version,
        integers={"page_table", "past_lengths", "query_lengths", "past_nodes", "refresh_mask"},
    )


def traced(
    trace: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, ir.AttributeType],
    opset_version: int, *, integers: set[str],
) -> bytes:
    """The operator's function body, serialized, from the function that traces it.

    Args:
        integers: inputs that are int32.
    """
    function = build_function(
        trace, [ir.val(name, ir.DataType.INT32 if name in integers else None) for name in inputs],
        domain=DOMAIN, name=OP_TYPE, attributes=[ir.Attr(name, kind, None) for name, kind in attributes.items()],
        opset_imports={"": opset_version},
    )
    for value, name in zip(function.outputs, outputs, strict=True):
        value.name = name
    proto = ir.serde.serialize_function(function)
    proto.doc_string = "Hierarchically pruned attention (arXiv 2406.09827) with a paged KV cache."
    _drop_notes(proto)
    return bytes(proto.SerializeToString())


def _drop_notes(graph: onnx.FunctionProto | onnx.GraphProto) -> None:
    """Remove what the builder notes for its own use: types of inner values, and scopes of nodes."""
    del graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        for field in node.attribute:
            if field.type == onnx.AttributeProto.GRAPH:
                _drop_notes(field.g)


def function_proto(opset_version: int = 20) -> onnx.FunctionProto:
    """The operator's function body.

    Args:
        opset_version: version of the standard operators that the model imports, one of :data:`OPSET_VERSIONS`; a
            function must import the version of the model that holds it.

    Raises:
        ExportError: the version is not supported.
    """
    if opset_version not in OPSET_VERSIONS:
        raise ExportError(
            f"opset_version: {opset_version} is not supported.",
            f"Export with opset {OPSET_VERSIONS[0]} to {OPSET_VERSIONS[-1]}.",
        )
    proto = onnx.FunctionProto()
    proto.ParseFromString(_function_bytes(opset_version))
    return proto


def add_function(model: onnx.ModelProto) -> None:
    """Give a model that has ``HipAttention`` nodes the function body, in place of one that it may already have.

    Raises:
        ExportError: the model imports a version of the standard operators that the function cannot be written in.
    """
    imports = {item.domain: item.version for item in model.opset_import}
    function = function_proto(imports.get("", imports.get("ai.onnx", 0)))
    _remove_function(model)
    model.functions.append(function)
    if DOMAIN not in imports:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OP_VERSION))
    model.ir_version = max(model.ir_version, 8)  # the first with functions


def strip_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model without the function body, so that a runtime must bring its own ``HipAttention``."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    _remove_function(stripped)
    return stripped


def _remove_function(model: onnx.ModelProto) -> None:
    others = [function for function in model.functions if (function.domain, function.name) != (DOMAIN, OP_TYPE)]
    del model.functions[:]
    model.functions.extend(others)


def _trace(
    op: OpBuilder, query: Value, key: Value, value: Value, past_key: Value, past_value: Value, page_table: Value,
    past_lengths: Value, query_lengths: Value, past_nodes: Value, refresh_mask: Value,
) -> tuple[Value, Value, Value, Value]:
    """The function body; arguments and results are those of :func:`hip_trt.reference.hip_attention`."""
    with arithmetic(op):
        attributes = {name: attribute(op, name) for name in INT_ATTRIBUTES}
        scale = attribute(op, "scale", ir.AttributeType.FLOAT)
        block_k, page_size = attributes["block_k"], attributes["page_size"]
        past_lengths, query_lengths = op.Cast(past_lengths, to=INT64), op.Cast(query_lengths, to=INT64)
        nodes, table = op.Cast(past_nodes, to=INT64), op.Cast(page_table, to=INT64)

        query_heads, new_tokens, head_dim = (dim(op, query, axis) for axis in (1, 2, 3))
        kv_heads, mask_heads, slots = dim(op, key, 1), dim(op, past_nodes, 1), dim(op, page_table, 1)
        heads_per_mask = query_heads / mask_heads

        rows = new_rows(op, table, past_lengths, query_lengths, new_tokens=new_tokens, kv_heads=kv_heads,
                        page_size=page_size)
        present_key, present_value = append(op, past_key, key, rows), append(op, past_value, value, rows)
        flat = op.Concat([-1], op.Reshape(head_dim, [1]), axis=0)
        keys, values = op.Reshape(present_key, flat), op.Reshape(present_value, flat)
        kv_head = arange(op, mask_heads) * heads_per_mask / (query_heads / kv_heads)
        pages = Pages(table, slots, op.Unsqueeze(kv_head, [0, 2]), kv_heads, page_size, block_k)

        decode = op.Equal(new_tokens, 1)
        may_reuse = op.And(decode, op.Equal(op.Squeeze(refresh_mask, [0]), 0))
        mask_k = op.Where(decode, attributes["decode_mask_k"], attributes["mask_k"])
        attention = Attention(
            attributes=attributes, scale=scale, budget=mask_k / block_k, past_lengths=past_lengths,
            query_lengths=query_lengths, past_nodes=nodes, may_reuse=may_reuse, keys=keys, values=values, pages=pages,
            levels=tree_levels(op, attributes["branch"], attributes["leaf_branch"]),
        )

        output, kept = all_query_blocks(op, query, attention, mask_heads)
        kept = op.If(
            decode,
            then_branch=subgraph(
                op, "decode", lambda op: [op.Squeeze(kept, [0])], [], [tensor("nodes", INT64, 3)]
            ),
            else_branch=subgraph(
                op, "prefill", lambda op: [op.Expand(-1, op.Shape(nodes))], [], [tensor("nodes", INT64, 3)]
            ),
        )
        idle = op.Reshape(op.Equal(query_lengths, 0), [-1, 1, 1])
        present_nodes = op.CastLike(op.Where(idle, nodes, kept), past_nodes)
    return output, present_key, present_value, present_nodes
