"""The exported graph with every HipAttention node computed by the reference, and all other nodes by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from hip_trt import operator as names
from hip_trt.errors import EngineError
from hip_trt.onnx_file import OnnxFile
from hip_trt.spec import DType
from hip_trt.verify.choices import Shown, attend
from hip_trt.verify.observed import attended_name, layer_of, query_name
from hip_trt.verify.runners import Feed, GraphRunner
from hip_trt.verify.sessions import make_session, widen

_ELEMENT_TYPES: dict[DType, int] = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class _Piece:
    """The nodes between two HipAttention nodes.

    Attributes:
        model: a graph of these.
        attention: the HipAttention node that comes after; None after the last.
    """

    model: onnx.ModelProto
    attention: onnx.NodeProto | None


class ReferenceRunner(GraphRunner):
    """The oracle. Attention follows the model's facts (its metadata), not the attributes of the nodes.

    Args:
        file: the model.
        constants: values to use in place of the file's, by initializer: RoPE's frequencies as config.json has them.
        shown: the blocks that the model under test chose.
        name: as reports have it.

    Raises:
        EngineError: if the file lacks the types of its inner values, as files of other tools may.
    """

    def __init__(
        self, file: OnnxFile, constants: Mapping[str, np.ndarray[Any, Any]], shown: Shown, name: str = "reference"
    ) -> None:
        super().__init__(file.spec, name)
        self._file, self._shown = file, shown
        self._pieces = _cut(file, constants)

    def activate_impl(self) -> None:
        """Load the pieces; see Polygraphy's BaseRunner."""
        self._sessions: list[ort.InferenceSession] = [
            make_session(piece.model, self._file.path, self.spec) for piece in self._pieces
        ]

    def deactivate_impl(self) -> None:
        """See Polygraphy's BaseRunner."""
        del self._sessions

    def call(self, feed: Feed) -> Feed:
        known: dict[str, np.ndarray[Any, Any]] = {name: widen(tensor).numpy() for name, tensor in feed.items()}
        shown: Feed = {}
        for piece, session in zip(self._pieces, self._sessions, strict=True):
            wanted = [output.name for output in session.get_outputs()]
            results = session.run(wanted, {value.name: known[value.name] for value in session.get_inputs()})
            known.update(zip(wanted, results, strict=True))
            if piece.attention is not None:
                layer, tensors = layer_of(piece.attention), [torch.from_numpy(known[n]) for n in piece.attention.input]
                scale = next(item.f for item in piece.attention.attribute if item.name == "scale")
                results, chosen = attend(tensors, layer, config=self.spec.hip, scale=scale, shown=self._shown)
                shown.update(chosen)
                known.update((n, tensor.numpy()) for n, tensor in zip(piece.attention.output, results, strict=True))
                shown[query_name(layer)], shown[attended_name(layer)] = tensors[0], results[0]
        graph_outputs = {value.name: torch.from_numpy(known[value.name]) for value in self._file.model.graph.output}
        return {**graph_outputs, **shown}


def _cut(file: OnnxFile, constants: Mapping[str, np.ndarray[Any, Any]]) -> list[_Piece]:
    """Cut the graph at its HipAttention nodes; what crosses a cut is an output of one piece, an input of the others."""
    graph = file.model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for name, value in constants.items():
        initializers[name] = numpy_helper.from_array(value, name)
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    groups: list[list[onnx.NodeProto]] = [[]]
    cuts: list[onnx.NodeProto | None] = []
    for node in graph.node:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
            cuts.append(node)
            groups.append([])
            types[node.output[0]] = _ELEMENT_TYPES[file.spec.dtype]
        else:
            groups[-1].append(node)
    cuts.append(None)

    needed_after = {value.name for value in graph.output}
    pieces: list[_Piece] = []
    for nodes, cut in zip(reversed(groups), reversed(cuts), strict=True):
        needed_after |= set(cut.input) if cut is not None else set()
        used, made = _used(nodes), {name for node in nodes for name in node.output}
        inputs = sorted(name for name in used - made if name and name not in initializers)
        outputs = sorted(needed_after & made)
        unknown = [name for name in (*inputs, *outputs) if not types.get(name)]
        if unknown:
            raise EngineError(
                f"{file.path}: it does not say of which type {unknown[0]} is.", "Export it again with `hip-trt export`."
            )
        model = helper.make_model(
            helper.make_graph(
                nodes, "piece", *([helper.make_tensor_value_info(name, types[name], None) for name in values]
                                  for values in (inputs, outputs)),
                [tensor for name, tensor in initializers.items() if name in used],
            ),
            opset_imports=[item for item in file.model.opset_import if item.domain != names.DOMAIN],
            ir_version=file.model.ir_version,
        )
        pieces.append(_Piece(model, cut))
        needed_after |= used
    return pieces[::-1]


def _used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """What nodes read, subgraphs included."""
    used: set[str] = set()
    for node in nodes:
        used.update(node.input)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                used |= _used(attribute.g.node)
    return used
