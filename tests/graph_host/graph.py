"""An exported graph, prepared once for a device, and specialised to the shapes of its inputs.

Values are of two kinds. *Known* ones follow from constants and shapes alone; they are computed on the CPU when the
graph is specialised, and never again. All others live on the device. So a call is a list of PyTorch functions with all
of their shape arguments bound, and no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from graph_host.torch_ops import OPS, Op
from hip_trt import operator as names
from hip_trt.onnx_file import OnnxFile, map_weights

_META = torch.device("meta")

Values = list[Tensor | None]
"""By slot, while a call runs."""

Step = Callable[[Values], None]
"""One node on the device: reads and writes slots."""

Attend = Callable[["AttentionNode", Sequence[Tensor]], Sequence[Tensor]]
"""Shapes and types of a HipAttention node's outputs, given those of its inputs, as tensors without data."""


class UnsupportedGraph(Exception):
    """The graph has something that this host does not execute."""


@dataclass(frozen=True)
class AttentionNode:
    """A HipAttention node.

    Attributes:
        index: among them, in the graph's order.
        name: the node's.
        attributes: all of them.
        inputs, outputs: names of values, in the operator's order.
    """

    index: int
    name: str
    attributes: Mapping[str, int | float | str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Node:
    """An ordinary node."""

    name: str
    op_type: str
    op: Op
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class AttentionCall:
    """A HipAttention node within a program.

    Attributes:
        node: the node.
        inputs, outputs: slots.
        like: its inputs, as tensors without data.
        made: its outputs likewise.
    """

    node: AttentionNode
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    like: tuple[Tensor, ...]
    made: tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """The graph for inputs of certain shapes.

    Attributes:
        steps: what to do, in order: a step, or a call of attention.
        frees: slots whose values nobody needs after each.
        slots: how many.
        inputs, outputs: slots of the graph's.
    """

    steps: tuple[Step | AttentionCall, ...]
    frees: tuple[tuple[int, ...], ...]
    slots: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


class Graph:
    """An exported graph on a device.

    Args:
        file: the model.
        device: where its weights go.

    Attributes:
        attention: its HipAttention nodes.

    Raises:
        UnsupportedGraph: naming the operator or attribute that is not known, or a state that ordinary nodes use.
    """

    def __init__(self, file: OnnxFile, device: torch.device) -> None:
        self.device = device
        graph = file.model.graph
        self._inputs = [value.name for value in graph.input]
        self._outputs = [value.name for value in graph.output]
        self._constants = dict(map_weights(file, tuple(
            tensor.name for tensor in graph.initializer if uses_external_data(tensor)
        )))
        for tensor in graph.initializer:
            if not uses_external_data(tensor):
                self._constants[tensor.name] = _tensor(tensor)
        self._on_device: dict[str, Tensor] = {}
        self._nodes: list[_Node | AttentionNode] = []  # less those of constants
        self.attention: list[AttentionNode] = []
        for node in graph.node:
            if (node.domain, node.op_type) == (names.DOMAIN, names.OP_TYPE):
                attention = AttentionNode(
                    len(self.attention), node.name, _attributes(node), tuple(node.input), tuple(node.output)
                )
                self.attention.append(attention)
                self._nodes.append(attention)
            else:
                plain = ordinary(node)
                if all(name in self._constants for name in plain.inputs if name):
                    self._constants.update(compute(plain, self._constants))
                else:
                    self._nodes.append(plain)
        self._check_state()

    def _check_state(self) -> None:
        """State may be written in place: only its own HipAttention node may read it. (Its shape may be asked for.)"""
        state = {name for node in self.attention for name in (*node.inputs[3:5], node.inputs[8])}
        for node in self._nodes:
            if isinstance(node, _Node) and node.op_type != "Shape":
                for name in state.intersection(node.inputs):
                    raise UnsupportedGraph(f"{node.name}: {node.op_type} reads {name}, which is written in place")
        readers = [name for node in self.attention for name in (*node.inputs[3:5], node.inputs[8])]
        for name in readers:
            if readers.count(name) > 1:
                raise UnsupportedGraph(f"{name}: several HipAttention nodes read it, and it is written in place")

    def specialise(self, inputs: Mapping[str, Tensor], attend: Attend) -> Program:
        """The program for inputs of these shapes and types.

        Args:
            inputs: tensors of which nothing else is used.
            attend: asked for the outputs of each HipAttention node.

        Raises:
            UnsupportedGraph: a shape depends on data, or an operator refuses what it is given.
        """
        return _Specialiser(self, inputs, attend).program()

    def device_constant(self, name: str) -> Tensor:
        """A constant of the file on the device, put there once."""
        if name not in self._on_device:
            self._on_device[name] = self._constants[name].to(self.device)
        return self._on_device[name]


class _Specialiser:
    """Walks the graph once, without data."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Tensor], attend: Attend) -> None:
        self.graph, self.attend = graph, attend
        self.known: dict[str, Tensor] = dict(graph._constants)
        self.likes: dict[str, Tensor] = {}  # values on the device, without data
        self.slots: dict[str, int] = {}
        for name in graph._inputs:
            self._add(name, torch.empty_like(inputs[name], device=_META))
        self.steps: list[Step | AttentionCall] = []
        self.uses: list[tuple[str, ...]] = []

    def program(self) -> Program:
        for node in self.graph._nodes:
            try:
                if isinstance(node, AttentionNode):
                    self._attention(node)
                elif node.op_type == "Shape":
                    self._shape(node)
                elif all(name in self.known for name in node.inputs if name):
                    self.known.update(compute(node, self.known))
                else:
                    self._step(node)
            except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
                raise UnsupportedGraph(f"{node.name}: {' '.join(str(error).split())}") from error
        outputs = {}
        for name in self.graph._outputs:
            if name not in self.slots:
                raise UnsupportedGraph(f"{name}: the graph's output does not depend on data")
            outputs[name] = self.slots[name]
        last_use = {name: step for step, used in enumerate(self.uses) for name in used}
        kept = {*self.graph._inputs, *self.graph._outputs}
        frees: list[list[int]] = [[] for _ in self.steps]
        for name, step in last_use.items():
            if name not in kept:
                frees[step].append(self.slots[name])
        return Program(
            tuple(self.steps), tuple(map(tuple, frees)), len(self.slots),
            {name: self.slots[name] for name in self.graph._inputs}, outputs,
        )

    def _on_device(self, name: str) -> Tensor:
        """A known value; constants of the file are put there once for all programs."""
        graph = self.graph
        return graph.device_constant(name) if name in graph._constants else self.known[name].to(graph.device)

    def _add(self, name: str, like: Tensor) -> int:
        self.likes[name] = like
        self.slots[name] = len(self.slots)
        return self.slots[name]

    def _shape(self, node: _Node) -> None:
        source = node.inputs[0]
        data = self.known[source] if source in self.known else self.likes[source]
        self.known[node.outputs[0]] = node.op.function(data, **node.attributes)

    def _attention(self, node: AttentionNode) -> None:
        for name in node.inputs:
            if name not in self.likes:
                raise UnsupportedGraph(f"{node.name}: its input {name} does not depend on data")
        like = tuple(self.likes[name].contiguous() for name in node.inputs)
        made = tuple(self.attend(node, like))
        outputs = tuple(self._add(name, tensor) for name, tensor in zip(node.outputs, made, strict=True))
        self.steps.append(AttentionCall(node, tuple(self.slots[name] for name in node.inputs), outputs, like, made))
        self.uses.append((*node.inputs, *node.outputs))

    def _step(self, node: _Node) -> None:
        """A node on the device. What is known of its inputs is bound, on the device too."""
        tensors = [self.known.get(name) if name else None for name in node.inputs]
        for position, name in enumerate(node.inputs):
            if position in node.op.known and name and name not in self.known:
                raise UnsupportedGraph(f"{node.name}: {node.op_type}'s input {name} depends on data")
        function = _bind(node, tensors)
        arguments: list[Tensor | int] = []  # a constant, or a slot
        likes: list[Tensor] = []
        for position, name in enumerate(node.inputs):
            if position in node.op.known:
                continue
            if name in self.known:
                value = self.known[name]
                if not (node.op.scalars and value.dim() == 0):
                    value = self._on_device(name)
                arguments.append(value)
                likes.append(value.to(_META))
            else:
                arguments.append(self.slots[name])
                likes.append(self.likes[name])
        results = _results(function(*likes))
        outputs = tuple(self._add(name, like) for name, like in zip(node.outputs, results, strict=True))
        self.steps.append(_device_step(function, arguments, outputs))
        self.uses.append((*(name for name in node.inputs if name in self.slots), *node.outputs))


def _device_step(function: Callable[..., Any], arguments: Sequence[Tensor | int], outputs: tuple[int, ...]) -> Step:
    """A closure for each common number of inputs: hundreds run for every token."""
    slots = [argument for argument in arguments if isinstance(argument, int)]
    if len(outputs) == 1 and len(slots) == len(arguments) <= 2:
        (output,) = outputs
        if len(slots) == 1:
            (only,) = slots

            def one(values: Values) -> None:
                values[output] = function(values[only])

            return one
        first, second = slots

        def two(values: Values) -> None:
            values[output] = function(values[first], values[second])

        return two

    def run(values: Values) -> None:
        given = [values[one] if isinstance(one, int) else one for one in arguments]
        for slot, result in zip(outputs, _results(function(*given)), strict=True):
            values[slot] = result

    return run


def _bind(node: _Node, tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
    """The operator's function, of its data inputs only."""
    op = node.op
    function = partial(op.function, **node.attributes) if node.attributes else op.function
    if not op.known:
        return function
    known = [tensor if tensor is None else tensor.tolist() for i, tensor in enumerate(tensors) if i in op.known]
    if 0 in op.known:  # no data at all
        return partial(function, *known)
    return lambda data: function(data, *known)


def compute(node: _Node, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A node all of whose inputs are known."""
    tensors = [known[name] if name else None for name in node.inputs]
    data = [tensor for position, tensor in enumerate(tensors) if position not in node.op.known]
    return dict(zip(node.outputs, _results(_bind(node, tensors)(*data)), strict=True))


def _results(made: Any) -> Sequence[Tensor]:
    return [made] if isinstance(made, Tensor) else made


def ordinary(node: onnx.NodeProto) -> _Node:
    what = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    name = node.name or what
    if node.domain or node.op_type not in OPS:
        raise UnsupportedGraph(f"{name}: the operator {what} is not in graph_host/torch_ops.py")
    op, attributes = OPS[node.op_type], _attributes(node)
    for attribute in attributes:
        if attribute not in op.attributes:
            raise UnsupportedGraph(f"{name}: {what}'s attribute {attribute} is not in graph_host/torch_ops.py")
    return _Node(name, node.op_type, op, attributes, tuple(node.input), tuple(node.output))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _tensor(stored: onnx.TensorProto) -> Tensor:
    if stored.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(numpy_helper.to_array(stored).astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(numpy_helper.to_array(stored).copy())
