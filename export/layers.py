"""Repeat decoder layers in a traced graph, so that tracing a model takes the same time however deep it is.

Layers differ in the names of their weights and of their state only. Three are traced: the first may hold what all
share, the second and the third show how one follows from the one before. The rest are copies of the third.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import onnx_ir as ir

TRACED = 3
_LAYERS = "model.layers"
_NUMBERED = re.compile(rf"\b({re.escape(_LAYERS)}|past_key_values|past_nodes|present|present_nodes)\.(\d+)\b")

Position = tuple[int, int]
"""Of a value that a layer produces: which node of the layer, which output of the node."""


class Layer:
    """The nodes of one decoder layer, in the graph's order, and what they produce."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self.nodes = nodes
        self.values = {(i, j): value for i, node in enumerate(nodes) for j, value in enumerate(node.outputs)}
        self.positions = {value: position for position, value in self.values.items()}


def layer_of(name: str | None) -> int | None:
    """The layer that a node, weight, input or output belongs to, by its name."""
    found = _NUMBERED.search(name or "")
    return None if found is None else int(found[2])


def renumber(name: str, layer: int) -> str:
    """The name of the same thing in another layer."""
    return _NUMBERED.sub(rf"\g<1>.{layer}", name)


def repeat_layers(graph: ir.Graph, count: int, dense_layers: Collection[int]) -> bool:
    """Extend a graph of :data:`TRACED` layers to ``count``, by copies of the last.

    Args:
        graph: nodes, weights and state are named by layer.
        count: layers wanted.
        dense_layers: those whose ``HipAttention`` has ``dense`` set.

    Returns:
        Whether it could be done; False leaves the graph as it was: its last two layers are not alike.
    """
    before, last = (Layer([node for node in graph if layer_of(node.name) == TRACED - 2 + i]) for i in range(2))
    if not last.nodes or not _alike(before, last):
        return False
    leaving = [
        (use, value) for value in last.positions for use in value.uses() if use.node not in set(last.nodes)
    ]
    previous, anchor = last, last.nodes[-1]
    for number in range(TRACED, count):
        copy = Layer(list(_copy(graph, before, last, previous, number)))
        for node in copy.nodes:
            if "dense" in node.attributes:
                node.attributes["dense"] = ir.AttrInt64("dense", int(number in dense_layers))
        graph.insert_after(anchor, copy.nodes)
        graph.outputs.extend(copy.values[last.positions[value]] for value in _outputs(graph, last))
        previous, anchor = copy, copy.nodes[-1]
    for use, value in leaving:
        use.node.replace_input_with(use.idx, previous.values[last.positions[value]])
    return True


def _outputs(graph: ir.Graph, layer: Layer) -> list[ir.Value]:
    return [value for value in graph.outputs if value in layer.positions]


def _alike(before: Layer, last: Layer) -> bool:
    """Whether the last layer follows from the one before it as that one follows from its own predecessor."""
    taken = {value for node in last.nodes for value in node.inputs}
    if len(before.nodes) != len(last.nodes) or taken.isdisjoint(before.positions):
        return False
    for one, other in zip(before.nodes, last.nodes, strict=True):
        same_kind = (one.domain, one.op_type, len(one.inputs), len(one.outputs)) == (
            other.domain, other.op_type, len(other.inputs), len(other.outputs)
        )
        if not same_kind or _settings(one) != _settings(other):
            return False
        for first, second in zip(one.inputs, other.inputs, strict=True):
            if first is None or second is None:
                same = first is second
            elif second in last.positions:
                same = before.positions.get(first) == last.positions[second]
            else:  # shared by all; or, one layer back, from the layer's predecessor, its weight or its state
                number = layer_of(second.name)
                shared = first is second and second not in before.positions
                same = shared or (number is not None and first.name == renumber(second.name or "", number - 1))
            if not same:
                return False
    return True


def _settings(node: ir.Node) -> dict[str, object]:
    """A node's attributes, but for ``dense``, which each layer has its own."""
    return {name: attribute.value for name, attribute in node.attributes.items() if name != "dense"}


def _copy(graph: ir.Graph, before: Layer, last: Layer, previous: Layer, number: int) -> Iterator[ir.Node]:
    """The nodes of layer ``number``, which follows ``previous``; its weights and inputs are added to the graph."""
    own: dict[ir.Value, ir.Value] = {}

    def renamed(value: ir.Value) -> ir.Value:
        if value not in own:
            own[value] = ir.Value(name=renumber(value.name or "", number), shape=value.shape, type=value.type)
        return own[value]

    def counterpart(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in last.positions:
            return None if value is None else renamed(value)
        if value in before.positions:
            return previous.values[before.positions[value]]
        if layer_of(value.name) != TRACED - 1:
            return value
        if value not in own:
            if value.is_graph_input():
                graph.inputs.append(renamed(value))
            else:
                graph.initializers.add(renamed(value))
        return own[value]

    for node in last.nodes:
        yield ir.Node(
            node.domain, node.op_type, [counterpart(value) for value in node.inputs], node.attributes.values(),
            outputs=[renamed(value) for value in node.outputs], version=node.version,
            name=renumber(node.name or "", number),
        )
