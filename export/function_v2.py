"""Version 2 of ``HipAttention`` as an ONNX function: see :mod:`hip_trt.reference.operator_v2`.

One function for both kinds of call. Which one it is follows from a shape, so that a runtime that knows the shapes keeps
one branch only. Only tests run it so far: exported models hold version 1 (:mod:`hip_trt.export.function`).
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir as ir
from onnxscript import OpBuilder

from hip_trt.export.function import traced
from hip_trt.export.function_attention import Attention, all_query_blocks
from hip_trt.export.function_decode import FLOAT_ATTRIBUTES, StartedCall, attend_call, begin_call, flat
from hip_trt.export.function_ops import (
    BOOL,
    INT64,
    Value,
    arithmetic,
    attribute,
    dim,
    subgraph,
    tensor,
    typed,
)
from hip_trt.export.function_search import tree_levels
from hip_trt.operator import DECODE, INPUTS_V2, INT_ATTRIBUTES_V2, OUTPUTS_V2


@cache
def _function_bytes(opset_version: int) -> bytes:
    kinds = dict.fromkeys(INT_ATTRIBUTES_V2, ir.AttributeType.INT)
    kinds |= {"mask_heads": ir.AttributeType.STRING, **dict.fromkeys(FLOAT_ATTRIBUTES, ir.AttributeType.FLOAT)}
    return traced(
        _trace, INPUTS_V2, OUTPUTS_V2, kinds, opset_version,
        integers={
            "page_table", "past_lengths", "query_lengths", "past_codes", "past_blocks", "refresh_mask", "call_kind",
        },
    )


def function_v2_proto(opset_version: int = 20) -> onnx.FunctionProto:
    """The operator's function body; see :func:`hip_trt.export.function.function_proto`."""
    proto = onnx.FunctionProto()
    proto.ParseFromString(_function_bytes(opset_version))
    return proto


def _trace(
    op: OpBuilder, query: Value, key: Value, value: Value, past_key: Value, past_value: Value, page_table: Value,
    past_lengths: Value, query_lengths: Value, past_bounds: Value, past_codes: Value, past_blocks: Value,
    refresh_mask: Value, call_kind: Value,
) -> tuple[Value, Value, Value, Value, Value, Value]:
    """The function body; arguments and results are the operator's."""
    with arithmetic(op):
        attributes = {name: attribute(op, name) for name in INT_ATTRIBUTES_V2}
        scale, threshold = (attribute(op, name, ir.AttributeType.FLOAT) for name in FLOAT_ATTRIBUTES)
        call = begin_call(
            op, key, value, past_key, past_value, page_table, past_lengths, query_lengths, past_bounds, past_codes,
            past_blocks, attributes,
        )
        output, kept = op.If(
            op.Equal(dim(op, call_kind, 0), DECODE), _outputs=2,
            then_branch=subgraph(
                op, "decode", lambda op: attend_call(op, query, call, refresh_mask, attributes, scale, threshold), [],
                [ir.val("output", None), tensor("kept", INT64, 3)],
            ),
            else_branch=subgraph(
                op, "prefill", lambda op: _prefill(op, query, call, attributes, scale), [],
                [ir.val("output", None), tensor("kept", INT64, 3)],
            ),
        )
        return output, *call.present, op.CastLike(kept, past_blocks)


def _prefill(
    op: OpBuilder, query: Value, call: StartedCall, attributes: dict[str, Value], scale: Value
) -> tuple[Value, Value]:
    """A prefill's output, [B, Hq, S, D] T, and present_blocks, [B, Hm, K]."""
    head_dim, block_k = dim(op, query, 3), attributes["block_k"]
    attention = Attention(
        attributes={**attributes, "reuse_level": typed(op.Constant(value_int=0), INT64)}, scale=scale,
        budget=attributes["mask_k"] / block_k, past_lengths=call.past_lengths, query_lengths=call.query_lengths,
        past_nodes=call.past_blocks, may_reuse=typed(op.Cast(op.Constant(value_int=0), to=BOOL), BOOL),
        keys=flat(op, call.present[0], head_dim), values=flat(op, call.present[1], head_dim),
        pages=call.pages(op, query, attributes["page_size"], block_k),
        levels=tree_levels(op, attributes["branch"], attributes["leaf_branch"]),
    )
    output, _ = all_query_blocks(op, query, attention, call.mask_heads)
    idle = op.Reshape(op.Equal(call.query_lengths, 0), [-1, 1, 1])
    return output, op.Where(idle, call.past_blocks, -1)
