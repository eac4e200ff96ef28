"""Trace a transformers model into an ONNX graph with one ``HipAttention`` node per layer.

The model is built and traced on fake tensors: no weight is in memory, and the graph's initializers have shapes but no
values. :mod:`hip_trt.export.onnx_export` gives them their values while it writes them.
"""

from __future__ import annotations

import ast
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import onnxscript.optimizer
import torch
from accelerate import init_empty_weights
from onnx_ir.passes.common import IdentityEliminationPass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hip_trt import operator
from hip_trt.config import HipConfig
from hip_trt.errors import ExportError, HipTrtError
from hip_trt.export.families import Family
from hip_trt.export.layers import LayerNames, find_pattern, layer_kinds, repeat_layers
from hip_trt.model_support import LIMITED_ROPE, check_call, heads
from hip_trt.spec import Logits

OPSET = 20
ATTENTION = "hip_trt_onnx"
"""Name of the attention function in transformers' registry. No mask function has this name, so transformers makes no
mask."""

_BATCH, _SEQUENCE, _PAGES, _SLOTS = "batch_size", "sequence_length", "num_pages", "pages_per_sequence"
_PREFIX = "causal_lm."


class PagedCausalLM(nn.Module):
    """A transformers causal LM with the inputs and outputs of the model graph.

    Args:
        causal_lm: a model whose attention implementation is :data:`ATTENTION`.
        config: pruning.
        logits: "last" or "all".
        max_context: longest context that the model will be given, in tokens.
    """

    def __init__(self, causal_lm: PreTrainedModel, config: HipConfig, logits: Logits, max_context: int) -> None:
        super().__init__()
        self.causal_lm, self.config, self.logits, self.max_context = causal_lm, config, logits, max_context

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, query_lengths: Tensor, page_table: Tensor, refresh_mask: Tensor,
        state: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits, and each layer's present state.

        Shapes are those of the model graph in docs/operator.md; ``state`` holds each layer's past tensors, in
        the order of :data:`hip_trt.operator.STATE`.
        """
        present: dict[int, tuple[Tensor, ...]] = {}

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
                      ) -> Tensor:
            check_call(module, key, value, max_context=self.max_context, **options)
            layer = cast(int, module.layer_idx)
            inputs = {
                "query": query, "key": key, "value": value, operator.PAGE_TABLE: page_table,
                operator.PAST_LENGTHS: past_lengths, operator.QUERY_LENGTHS: query_lengths,
                operator.REFRESH_MASK: refresh_mask,
                **{tensor.past_input: past for tensor, past in zip(operator.STATE, state[layer], strict=True)},
            }
            attributes: dict[str, Any] = {**operator.attributes(self.config, scale=scale, layer=layer)}
            output, *rest = torch.onnx.ops.symbolic_multi_out(
                f"{operator.DOMAIN}::{operator.OP_TYPE}",
                tuple(inputs[name] for name in operator.INPUTS),
                attributes,
                dtypes=(query.dtype, *(past.dtype for past in state[layer])),
                shapes=(query.shape, *(past.shape for past in state[layer])),
                version=operator.OP_VERSION,
            )
            present[layer] = tuple(rest)
            return output.transpose(1, 2)

        def keep_last(model: nn.Module, arguments: Any, result: Any) -> None:
            hidden = result.last_hidden_state
            last = (query_lengths.to(torch.int64) - 1).clamp(min=0)  # idle rows have no last token; any will do
            result.last_hidden_state = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))

        positions = past_lengths.to(torch.int64)[:, None] + torch.arange(input_ids.shape[1])
        # What follows the decoder is the model's own too: some scale their logits.
        hook = self.causal_lm.base_model.register_forward_hook(keep_last) if self.logits == "last" else None
        try:
            logits = self.causal_lm(
                input_ids=input_ids, position_ids=positions, use_cache=False, hip_attention=attention
            ).logits
        finally:
            if hook is not None:
                hook.remove()
        missing = set(range(len(state))) - set(present)
        if missing:
            raise ExportError(
                f"{type(self.causal_lm).__name__}: layer {min(missing)} did not call transformers' attention interface."
            )
        return logits.float(), [present[layer] for layer in range(len(state))]


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, *, hip_attention: Any, **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: queries [B, Hq, S, D] and keys [B, Hkv, S, D] to [B, S, Hq, D]."""
    return hip_attention(module, query, key, value, scaling, dropout=dropout, **kwargs), None


AttentionInterface.register(ATTENTION, _attention_forward)


@dataclass(frozen=True)
class Weight:
    """What an initializer of the traced graph must be filled with.

    Attributes:
        parameter: name of the transformers parameter.
        transposed: whether the graph wants it transposed (a linear layer's weight is, so that MatMul takes it as is).
    """

    parameter: str
    transposed: bool


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        model: the graph; initializers named in ``weights`` have no value yet.
        weights: by initializer name.
    """

    model: ir.Model
    weights: dict[str, Weight]


def parameter_shapes(family: Family, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the architecture has; tied ones are named once."""
    with init_empty_weights():
        model = family.model_class(config)
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def buffers(family: Family, config: PreTrainedConfig, max_context: int = 0) -> dict[str, Tensor]:
    """Name and value of the constants that the architecture computes from its configuration, such as inv_freq.

    Where these depend on the length of the sequence, they are those of ``max_context`` tokens.
    """
    with init_empty_weights(include_buffers=False):
        model: nn.Module = family.model_class(config)
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.inv_freq = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=max_context)[0]
    return dict(model.named_buffers())


def trace(family: Family, model_config: PreTrainedConfig, config: HipConfig, *, dtype: torch.dtype, logits: Logits,
          constants: Mapping[str, Tensor], max_context: int) -> Trace:
    """Make the model graph. As many layers are traced as show how the others follow, and these are copied; all are
    traced where no such rule is found.

    Args:
        family: the architecture.
        model_config: its sizes.
        config: pruning; ``dense_layers`` are below the number of layers.
        dtype: type of weights, activations and KV pools.
        logits: "last" or "all".
        constants: value of each buffer, see :func:`buffers`.
        max_context: longest context that the model will be given, in tokens.
    """
    with init_empty_weights():
        pattern = find_pattern(layer_kinds(family.model_class(model_config).get_submodule(family.layers)))
    request = _Request(family, model_config, config, dtype, logits, constants, max_context)
    layers = model_config.num_hidden_layers
    traced = _trace(request, min(layers, pattern.traced))
    if layers <= pattern.traced:
        return traced
    names = LayerNames(family.layers)
    if not repeat_layers(traced.model.graph, names, pattern, layers, config.dense_layers):
        return _trace(request, layers)
    for name, weight in list(traced.weights.items()):
        layer = names.layer_of(name)
        if layer is not None and layer >= pattern.traced - pattern.period:
            for shift in range(pattern.period, layers - layer, pattern.period):
                traced.weights[names.shift(name, shift)] = Weight(
                    names.shift(weight.parameter, shift), weight.transposed
                )
    return traced


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`trace`."""

    family: Family
    model_config: PreTrainedConfig
    config: HipConfig
    dtype: torch.dtype
    logits: Logits
    constants: Mapping[str, Tensor]
    max_context: int


def _trace(request: _Request, layers: int) -> Trace:
    """The graph of a model with this many layers."""
    config, constants = request.config, request.constants
    model_config = copy.deepcopy(request.model_config)
    model_config.num_hidden_layers = layers
    with _quiet():
        with FakeTensorMode():
            causal_lm = request.family.model_class._from_config(
                model_config, dtype=request.dtype, attn_implementation=ATTENTION
            ).eval()
            arguments, dynamic = _example(model_config, config, request.dtype)
        _hold_rope(causal_lm)
        try:
            onnx_program = torch.onnx.export(
                PagedCausalLM(causal_lm, config, request.logits, request.max_context), arguments,
                dynamic_shapes=dynamic, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                input_names=_input_names(layers), output_names=_output_names(layers),
            )
        except Exception as error:  # PyTorch wraps what the traced model raises
            if isinstance(error.__cause__, HipTrtError):
                raise error.__cause__ from None
            raise
        assert onnx_program is not None
        model = onnx_program.model
        first_name: dict[int, str] = {}
        tied = {
            _PREFIX + name: first_name.setdefault(id(parameter), name)
            for name, parameter in causal_lm.named_parameters(remove_duplicate=False)
        }
        _name_initializers(model.graph, tied, constants)
        onnxscript.optimizer.optimize_ir(model, num_iterations=1)  # a second round finds nothing and takes as long
        IdentityEliminationPass()(model)
    weights = _transpose_weights(model.graph, {name: Weight(name, False) for name in tied.values()})
    _name_nodes(model, constants)
    return Trace(model, weights)


def _hold_rope(model: nn.Module) -> None:
    """Keep RoPE's frequencies as they are, at every length."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in LIMITED_ROPE:
            module.rope_type = "default"  # type: ignore[assignment]


def _name_initializers(graph: ir.Graph, parameters: Mapping[str, str], constants: Mapping[str, Tensor]) -> None:
    """Give initializers the parameters' own names and no value, and constants theirs."""
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        value.name = parameters.get(name, name.removeprefix(_PREFIX))
        value.const_value = None
        if value.name in constants:
            value.const_value = ir.tensor(constants[value.name], name=value.name)
        graph.initializers.add(value)


def _transpose_weights(graph: ir.Graph, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Replace each Transpose of a weight that nothing else uses by a transposed initializer."""
    used: dict[str, Weight] = {}
    for node in list(graph):
        for value in node.inputs:
            if value is None or value.name not in weights:
                continue
            if node.op_type == "Transpose" and len(value.uses()) == 1:
                output = node.outputs[0]
                transposed = ir.Value(
                    name=f"{value.name}_transposed", shape=output.shape, type=ir.TensorType(value.dtype)
                )
                ir.convenience.replace_all_uses_with(output, transposed)
                graph.remove(node, safe=True)
                graph.initializers.pop(value.name)
                graph.initializers.add(transposed)
                used[transposed.name] = Weight(value.name, True)
            else:
                used[value.name] = weights[value.name]
    return used


def _name_nodes(model: ir.Model, constants: Container[str]) -> None:
    """Name nodes and their outputs by the module that they come from, and drop the exporter's notes on them.

    A node of which the exporter does not say it (a Split) comes from where its first input does. Other constants than
    those named get numbers.
    """
    graph, counts = model.graph, Counter[str]()
    outputs = set(graph.outputs)
    scope_of: dict[ir.Node | None, str] = {None: ""}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = next((name for name in reversed(scopes[:-1]) if name), "").removeprefix(_PREFIX)
        if not scopes and node.inputs and node.inputs[0] is not None:
            scope = scope_of[node.inputs[0].producer()]
        scope_of[node] = scope
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in outputs:
                value.name = f"{node.name}_output_{index}"
    for index, value in enumerate([value for value in graph.initializers.values() if value.const_value is not None]):
        if value.name not in constants:
            graph.initializers.pop(value.name)
            value.name = f"constant_{index}"
            graph.initializers.add(value)
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.name, graph.doc_string = "hip_trt", None


def _example(model_config: PreTrainedConfig, config: HipConfig, dtype: torch.dtype) -> tuple[tuple[Any, ...], Any]:
    """Example arguments of the traced forward, and which of their dimensions are dynamic."""
    batch, sequence, pages, slots = 2, 3, 7, 5  # all different and above 1, so that none is taken for another
    shape = heads(model_config)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    state = []
    for _ in range(model_config.num_hidden_layers):
        tensors = []
        for tensor in operator.STATE:
            sizes = tensor.sizes(config, query_heads=shape.query, kv_heads=shape.key_value, head_dim=shape.size)
            kind = torch.int32 if tensor.integers else dtype
            tensors.append(torch.zeros(pages if tensor.paged else batch, *sizes, dtype=kind))
        state.append(tuple(tensors))
    arguments = (
        torch.zeros(batch, sequence, dtype=torch.int64), integers(batch), integers(batch), integers(batch, slots),
        integers(1), state,
    )
    b, s, p, m = (torch.export.Dim(name) for name in (_BATCH, _SEQUENCE, _PAGES, _SLOTS))
    dynamic: Any = ({0: b, 1: s}, {0: b}, {0: b}, {0: b, 1: m}, {}, [
        tuple({0: p if tensor.paged else b} for tensor in operator.STATE) for _ in state
    ])
    return arguments, dynamic


def _input_names(layers: int) -> list[str]:
    names = [operator.INPUT_IDS, operator.PAST_LENGTHS, operator.QUERY_LENGTHS, operator.PAGE_TABLE,
             operator.REFRESH_MASK]
    return names + [tensor.past(layer) for layer in range(layers) for tensor in operator.STATE]


def _output_names(layers: int) -> list[str]:
    return [operator.LOGITS, *(tensor.present(layer) for layer in range(layers) for tensor in operator.STATE)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages, deprecations and missing values, which are not the user's concern."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
