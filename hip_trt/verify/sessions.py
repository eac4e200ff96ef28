"""ONNX Runtime sessions over models in memory, whose weights stay in their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from hip_trt.errors import EngineError
from hip_trt.onnx_file import without_links
from hip_trt.spec import ModelSpec

_STORED = ".bfloat16"
"""Suffix of a weight as it is in its file, where what computes with it is float32."""


def make_session(model: onnx.ModelProto, path: Path, spec: ModelSpec) -> ort.InferenceSession:
    """A session on the CPU. A model in bfloat16, for which it has no kernels, computes in float32.

    Args:
        model: without weights.
        path: the file that it comes from; its weights are beside it.
        spec: facts about it.

    Raises:
        EngineError: if ONNX Runtime refuses the model.
    """
    if spec.dtype == "bfloat16":
        model = widened(model)
    model, folder = without_links(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # as OrtExecutor has it
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        cause = " ".join(str(error).split()).rstrip(".")[:300]
        raise EngineError(f"{path}: ONNX Runtime cannot load it: {cause}.", "Export it again.") from None


def widen(tensor: Tensor) -> Tensor:
    """What a widened model takes for a tensor of the model: bfloat16 as float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that computes in float32 wherever it says bfloat16; its weights stay bfloat16 in their file."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph, casts = wide.graph, []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.BFLOAT16:
            casts.append(helper.make_node("Cast", [weight.name + _STORED], [weight.name], to=TensorProto.FLOAT))
            weight.name += _STORED
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for part in (graph, *wide.functions):
        _widen_types(part)
    return wide


def _widen_types(part: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Rewrite the types of values and nodes, those of subgraphs included; initializers are the caller's."""
    values = [*part.value_info]
    if isinstance(part, onnx.GraphProto):
        values += [*part.input, *part.output]
    for value in values:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in part.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            for tensor in _tensors(attribute):
                values_32 = numpy_helper.to_array(tensor).astype("float32")
                tensor.CopyFrom(numpy_helper.from_array(values_32, tensor.name))
            for graph in (attribute.g, *attribute.graphs):
                _widen_types(graph)


def _tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    return (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.data_type == TensorProto.BFLOAT16)
