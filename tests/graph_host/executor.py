"""An executor for the runtime (hip_trt/runtime) over :mod:`graph_host.graph` and :mod:`graph_host.plugin`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graph_host.graph import AttentionCall, AttentionNode, Graph, Program, Values
from graph_host.plugin import AttachedLayer, Plugin, TensorShape
from hip_trt import operator as names
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.executor import Limits
from hip_trt.runtime.pages import pages_for
from hip_trt.spec import ModelSpec

_KEPT_PROGRAMS = 8
_META = torch.device("meta")


class GraphExecutor:
    """An :class:`~hip_trt.runtime.executor.Executor` over an exported .onnx, as an engine would run it.

    Every HipAttention node is a layer of the plugin, built for two optimization profiles (prefill and decode) up to the
    limits, and attached to one execution context for each; calls of one new token use the decode context. The metadata
    of the file gives sizes of inputs only: what is computed is the graph's nodes, with their own attributes.

    Args:
        path: the model, with its weights beside it.
        plugin: the plugin.
        device: where to run: a GPU, or, with a plugin of emulated kernels, the CPU.
        limits: largest shapes; what is None is the model's context, one sequence, and pages for just that.
        poison: fill results and workspace with NaN before each HipAttention node, so that what it leaves out shows.

    Raises:
        EngineError: the file is damaged or not from hip-trt.
        UnsupportedGraph: it has a node that this host does not execute.
        PluginFailure: the plugin refuses a node.
    """

    def __init__(
        self, path: str | Path, plugin: Plugin, *, device: torch.device, limits: Limits | None = None,
        poison: bool = False,
    ) -> None:
        file = read_onnx(path)
        self.spec: ModelSpec = file.spec
        self.device = device
        self.limits = _resolve(self.spec, limits or Limits())
        self._poison = poison
        self._graph = Graph(file, device)
        self._programs: OrderedDict[tuple[tuple[str, torch.Size], ...], Program] = OrderedDict()
        self._layers = [plugin.layer(node.name, node.attributes) for node in self._graph.attention]
        batch, tokens, length, pages = (getattr(self.limits, name) for name in (
            "max_batch", "max_prefill", "max_seq_len", "max_pages"))
        slots = pages_for(length, self.spec.hip.page_size)
        self._contexts = tuple(
            _Context(self, self._shapes(1, 1, 1, 1), self._shapes(batch, new, pages, slots)) for new in (tokens, 1)
        )

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`.

        Raises:
            PluginFailure: the plugin fails.
        """
        with torch.inference_mode():
            program = self._program(inputs)
            context = self._contexts[inputs[names.INPUT_IDS].shape[1] == 1]
            values: Values = [None] * program.slots
            for name, slot in program.inputs.items():
                values[slot] = inputs[name]
            bound = {slot: outputs[name] for name, slot in program.outputs.items()}
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            for step, freed in zip(program.steps, program.frees, strict=True):
                if isinstance(step, AttentionCall):
                    context.attend(step, values, bound, stream)
                else:
                    step(values)
                for slot in freed:
                    values[slot] = None
            for slot, target in bound.items():
                value = values[slot]
                assert value is not None
                if value.data_ptr() != target.data_ptr():
                    target.copy_(value)

    def forget_calls(self) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`: nothing is kept that knows an address."""

    def _program(self, inputs: Mapping[str, Tensor]) -> Program:
        key = tuple((name, tensor.shape) for name, tensor in inputs.items())
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._graph.specialise(inputs, self._outputs)
            if len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return program

    def _outputs(self, node: AttentionNode, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of a HipAttention node as the plugin has them, without data."""
        shapes = self._layers[node.index].outputs([TensorShape.of(tensor) for tensor in inputs])
        return [torch.empty(shape.sizes, dtype=shape.dtype, device=_META) for shape in shapes]

    def _shapes(self, batch: int, tokens: int, pages: int, slots: int) -> list[list[TensorShape]]:
        """Inputs of every HipAttention node in a call of these sizes."""
        calls = self._graph.specialise(_inputs(self.spec, batch, tokens, pages, slots), self._outputs).steps
        return [[TensorShape.of(tensor) for tensor in step.like] for step in calls if isinstance(step, AttentionCall)]


class _Context:
    """An execution context: layers that are attached to it, and a workspace, which they use one after the other."""

    def __init__(
        self, executor: GraphExecutor, smallest: list[list[TensorShape]], largest: list[list[TensorShape]]
    ) -> None:
        layers = executor._layers
        size = max(
            layer.configure(least, most) for layer, least, most in zip(layers, smallest, largest, strict=True)
        )
        self._layers: list[AttachedLayer] = [layer.attach() for layer in layers]
        self._calls: list[AttentionCall | None] = [None] * len(layers)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=executor.device)
        self._poison = executor._poison

    def attend(self, call: AttentionCall, values: Values, bound: Mapping[int, Tensor], stream: int) -> None:
        index = call.node.index
        layer = self._layers[index]
        if self._calls[index] is not call:  # an engine says so too when shapes change
            layer.resize([TensorShape.of(tensor) for tensor in call.like])
            self._calls[index] = call
        inputs = [values[slot].contiguous() for slot in call.inputs]  # type: ignore[union-attr]
        outputs = []
        for slot, like in zip(call.outputs, call.made, strict=True):
            tensor = bound.get(slot)
            if tensor is None:
                tensor = torch.empty(like.shape, dtype=like.dtype, device=self._workspace.device)
                if self._poison:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -9)
            elif tensor.shape != like.shape or tensor.dtype != like.dtype or not tensor.is_contiguous():
                raise ValueError(f"{call.node.name}: an output of {list(tensor.shape)}, not {list(like.shape)}")
            values[slot] = tensor
            outputs.append(tensor.data_ptr())
        if self._poison:
            self._workspace.fill_(0xFF)
        layer.enqueue([tensor.data_ptr() for tensor in inputs], outputs, self._workspace.data_ptr(), stream)


def _resolve(spec: ModelSpec, limits: Limits) -> Limits:
    batch = limits.max_batch or 1
    length = limits.max_seq_len or spec.max_position_embeddings
    return Limits(
        batch, min(limits.max_prefill or 512, length), length,
        limits.max_pages or batch * pages_for(length, spec.hip.page_size),
    )


def _inputs(spec: ModelSpec, batch: int, tokens: int, pages: int, slots: int) -> dict[str, Tensor]:
    """The graph's inputs in a call of these sizes, without data."""
    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    inputs = {
        names.INPUT_IDS: empty((batch, tokens), torch.int64), names.PAST_LENGTHS: empty((batch,)),
        names.QUERY_LENGTHS: empty((batch,)), names.PAGE_TABLE: empty((batch, slots)),
        names.REFRESH_MASK: empty((1,)),
    }
    for layer in range(spec.num_layers):
        for tensor in names.STATE:
            shape = spec.state_shape(tensor, pages if tensor.paged else batch)
            inputs[tensor.past(layer)] = empty(shape, spec.state_dtype(tensor))
    return inputs
