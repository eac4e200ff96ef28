"""Repeat decoder layers in a traced graph, so that tracing a model takes the same time however deep it is.

Layers of a kind differ in the names of their weights and of their state only, and kinds follow each other in a period,
which is one layer for most models. Two periods are traced, to show how one follows from the other, after at least one
layer, which may hold what all share. The rest are copies of the second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

Position = tuple[int, int]
"""Of a value that a period produces: which of its nodes, which output of the node."""


@dataclass(frozen=True)
class Pattern:
    """How layers repeat.

    Attributes:
        first: layers before the first period, at least one.
        period: layers per period.
    """

    first: int
    period: int

    @property
    def traced(self) -> int:
        """Layers to trace."""
        return self.first + 2 * self.period


class LayerNames:
    """Names of nodes, weights and state that carry a layer's number.

    Args:
        layers: where the model keeps its decoder layers, such as "model.layers".
    """

    def __init__(self, layers: str) -> None:
        self._numbered = re.compile(
            rf"(?<![\w.])({re.escape(layers)}|past_key_values|past_nodes|present|present_nodes)\.(\d+)\b"
        )

    def layer_of(self, name: str | None) -> int | None:
        """The layer that a node, weight, input or output belongs to."""
        found = self._numbered.search(name or "")
        return None if found is None else int(found[2])

    def shift(self, name: str | None, by: int) -> str:
        """The name of the same thing so many layers later."""
        return self._numbered.sub(lambda found: f"{found[1]}.{int(found[2]) + by}", name or "")


def layer_kinds(layers: Iterable[nn.Module]) -> list[Hashable]:
    """What distinguishes each layer: classes, plain settings and the shapes of parameters of all its parts."""
    def part(name: str, module: nn.Module) -> Hashable:
        settings = {
            key: value for key, value in vars(module).items()
            if key != "layer_idx" and isinstance(value, bool | int | float | str | None)
        }
        shapes = [(key, tuple(parameter.shape)) for key, parameter in module.named_parameters(recurse=False)]
        return name, type(module), tuple(sorted(settings.items())), tuple(shapes)

    return [tuple(part(*named) for named in layer.named_modules()) for layer in layers]


def find_pattern(kinds: Sequence[Hashable]) -> Pattern:
    """How layers of these kinds repeat to the end, in whole periods; of several ways, the one with least to trace."""
    count = len(kinds)
    patterns = (Pattern(first, period) for first in range(1, count) for period in range(1, count - first + 1))
    return min(
        (
            pattern for pattern in patterns
            if (count - pattern.first) % pattern.period == 0
            and all(kinds[i] == kinds[i + pattern.period] for i in range(pattern.first, count - pattern.period))
        ),
        key=lambda pattern: pattern.traced, default=Pattern(1, 1),
    )


class Period:
    """The nodes of one period of decoder layers, in the graph's order, and what they produce."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self.nodes = nodes
        self.values = {(i, j): value for i, node in enumerate(nodes) for j, value in enumerate(node.outputs)}
        self.positions = {value: position for position, value in self.values.items()}


def repeat_layers(
    graph: ir.Graph, names: LayerNames, pattern: Pattern, count: int, dense_layers: Collection[int]
) -> bool:
    """Extend a graph of ``pattern.traced`` layers to ``count``, by copies of its last period.

    Args:
        graph: nodes, weights and state are named by layer.
        names: reads those names.
        pattern: how layers repeat.
        count: layers wanted; whole periods more than there are.
        dense_layers: those whose ``HipAttention`` has ``dense`` set.

    Returns:
        Whether it could be done; False leaves the graph as it was: its last two periods are not alike.
    """
    return _Repeater(graph, names, pattern).repeat(count, dense_layers)


class _Repeater:
    def __init__(self, graph: ir.Graph, names: LayerNames, pattern: Pattern) -> None:
        self.graph, self.names, self.pattern = graph, names, pattern
        self.before, self.last = (self._period(pattern.first + i * pattern.period) for i in range(2))

    def _period(self, start: int) -> Period:
        layers = range(start, start + self.pattern.period)
        return Period([node for node in self.graph if self.names.layer_of(node.name) in layers])

    def repeat(self, count: int, dense_layers: Collection[int]) -> bool:
        if not self.last.nodes or not self._alike():
            return False
        inside = set(self.last.nodes)
        leaving = [(use, value) for value in self.last.positions for use in value.uses() if use.node not in inside]
        outputs = [self.last.positions[value] for value in self.graph.outputs if value in self.last.positions]
        previous = self.last
        for shift in range(self.pattern.period, count - self.pattern.traced + 1, self.pattern.period):
            copy = Period(list(self._copy(previous, shift)))
            for node in copy.nodes:
                if "dense" in node.attributes:
                    dense = self.names.layer_of(node.name) in dense_layers
                    node.attributes["dense"] = ir.AttrInt64("dense", int(dense))
            self.graph.insert_after(previous.nodes[-1], copy.nodes)
            self.graph.outputs.extend(copy.values[position] for position in outputs)
            previous = copy
        for use, value in leaving:
            use.node.replace_input_with(use.idx, previous.values[self.last.positions[value]])
        return True

    def _alike(self) -> bool:
        """Whether the last period follows from the one before it as that one follows from its own predecessor."""
        before, last = self.before, self.last
        taken = {value for node in last.nodes for value in node.inputs}
        if len(before.nodes) != len(last.nodes) or taken.isdisjoint(before.positions):
            return False
        for one, other in zip(before.nodes, last.nodes, strict=True):
            same_kind = (one.domain, one.op_type, len(one.inputs), len(one.outputs)) == (
                other.domain, other.op_type, len(other.inputs), len(other.outputs)
            )
            if not same_kind or _settings(one) != _settings(other):
                return False
            if not all(self._same(*pair) for pair in zip(one.inputs, other.inputs, strict=True)):
                return False
        return True

    def _same(self, first: ir.Value | None, second: ir.Value | None) -> bool:
        """Whether a node's input in the last period is what that of its counterpart is in the one before."""
        if first is None or second is None:
            return first is second
        if second in self.last.positions:
            return self.before.positions.get(first) == self.last.positions[second]
        if first is second:  # shared by all
            return second not in self.before.positions
        # A period back: from the period's predecessor, or the same weight or state
        return self.names.layer_of(second.name) is not None and first.name == self.names.shift(
            second.name, -self.pattern.period
        )

    def _copy(self, previous: Period, shift: int) -> Iterator[ir.Node]:
        """The nodes of the period that follows ``previous``; its weights and inputs are added to the graph."""
        own: dict[ir.Value, ir.Value] = {}

        def renamed(value: ir.Value) -> ir.Value:
            if value not in own:
                own[value] = ir.Value(name=self.names.shift(value.name, shift), shape=value.shape, type=value.type)
            return own[value]

        def counterpart(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in self.last.positions:
                return None if value is None else renamed(value)
            if value in self.before.positions:
                return previous.values[self.before.positions[value]]
            layer = self.names.layer_of(value.name)
            if layer is None or layer < self.pattern.first + self.pattern.period:
                return value
            if value not in own:
                if value.is_graph_input():
                    self.graph.inputs.append(renamed(value))
                else:
                    self.graph.initializers.add(renamed(value))
            return own[value]

        for node in self.last.nodes:
            yield ir.Node(
                node.domain, node.op_type, [counterpart(value) for value in node.inputs], node.attributes.values(),
                outputs=[renamed(value) for value in node.outputs], version=node.version,
                name=self.names.shift(node.name, shift),
            )


def _settings(node: ir.Node) -> dict[str, object]:
    """A node's attributes, but for ``dense``, which each layer has its own."""
    return {name: attribute.value for name, attribute in node.attributes.items() if name != "dense"}
