"""What a call shows of each layer beyond the graph's own outputs, and how an ONNX model is made to show it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import AttributeProto, TensorProto, helper

from hip_trt import operator as names
from hip_trt.onnx_file import OnnxFile


def query_name(layer: int) -> str:
    """A layer's queries after RoPE, [B, Hq, S, D]."""
    return f"query.{layer}"


def attended_name(layer: int) -> str:
    """A layer's HipAttention output, [B, Hq, S, D]."""
    return f"attended.{layer}"


def chosen_name(layer: int) -> str:
    """The blocks that a layer's search chose, [query blocks, B, Hm, K] int64; no meaning where all are attended."""
    return f"chosen_blocks.{layer}"


def layer_of(node: onnx.NodeProto) -> int:
    """The decoder layer of a HipAttention node, which its present_nodes names."""
    return int(node.output[names.OUTPUTS.index("present_nodes")].rpartition(".")[2])


def show_layers(file: OnnxFile) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model whose layers' queries, attention and chosen blocks have names of their own.

    Returns:
        The model, and the names of its outputs and of what can be outputs besides. Blocks are among these if its
        function body is one that :func:`show_chosen` knows.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    renamed: dict[str, str] = {}
    body = show_chosen(model)
    wanted = [output.name for output in model.graph.output]
    for node in _attention(model):
        layer = layer_of(node)
        renamed[node.input[0]], renamed[node.output[0]] = query_name(layer), attended_name(layer)
        wanted += [query_name(layer), attended_name(layer)]
        if body:
            node.output.append(chosen_name(layer))
            wanted.append(chosen_name(layer))
    for node in model.graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = renamed.get(name, name)
    for info in model.graph.value_info:
        info.name = renamed.get(info.name, info.name)
    return model, wanted


def show_chosen(model: onnx.ModelProto) -> bool:
    """Give the function body one more output, the chosen blocks; False if it is not built as the export builds it.

    The body runs query blocks in a Scan, whose search is a Loop over tree levels; the blocks are the first of its
    results, cut to the budget.
    """
    for function in model.functions:
        if (function.domain, function.name) != (names.DOMAIN, names.OP_TYPE):
            continue
        for scan in function.node:
            if scan.op_type != "Scan":
                continue
            body = next(attribute.g for attribute in scan.attribute if attribute.type == AttributeProto.GRAPH)
            descended = [node.output[0] for node in body.node if node.op_type == "Loop"]
            chosen = [node.output[0] for node in body.node if node.op_type == "Slice" and node.input[0] in descended]
            if len(descended) == len(chosen) == 1:
                body.output.append(helper.make_tensor_value_info(chosen[0], TensorProto.INT64, [None] * 3))
                scan.output.append("chosen_blocks")
                function.output.append("chosen_blocks")
                return True
    return False


def _attention(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE))
