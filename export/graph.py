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
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from accelerate import init_empty_weights
from onnx_ir.passes.common import IdentityEliminationPass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hip_trt import operator
from hip_trt.config import HipConfig
from hip_trt.export.families import Family
from hip_trt.export.layers import TRACED, layer_of, renumber, repeat_layers
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
    """

    def __init__(self, causal_lm: PreTrainedModel, config: HipConfig, logits: Logits) -> None:
        super().__init__()
        self.causal_lm, self.config, self.logits = causal_lm, config, logits

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, query_lengths: Tensor, page_table: Tensor, refresh_mask: Tensor,
        state: list[tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits, and per layer present_key, present_value and present_nodes.

        Shapes are those of the model graph in docs/operator.md; ``state`` holds past_key, past_value and past_nodes of
        each layer.
        """
        present: list[tuple[Tensor, ...]] = []

        def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            past_key, past_value, past_nodes = state[layer]
            attributes: dict[str, Any] = {**operator.attributes(self.config, scale=scale, layer=layer)}
            output, *rest = torch.onnx.ops.symbolic_multi_out(
                f"{operator.DOMAIN}::{operator.OP_TYPE}",
                (query, key, value, past_key, past_value, page_table, past_lengths, query_lengths, past_nodes,
                 refresh_mask),
                attributes,
                dtypes=(query.dtype, past_key.dtype, past_value.dtype, past_nodes.dtype),
                shapes=(query.shape, past_key.shape, past_value.shape, past_nodes.shape),
                version=operator.OP_VERSION,
            )
            present.append(tuple(rest))
            return output.transpose(1, 2)

        positions = past_lengths.to(torch.int64)[:, None] + torch.arange(input_ids.shape[1])
        hidden = self.causal_lm.base_model(
            input_ids=input_ids, position_ids=positions, use_cache=False, hip_attention=attention
        ).last_hidden_state
        if self.logits == "last":
            last = (query_lengths.to(torch.int64) - 1).clamp(min=0)  # idle rows have no last token; any will do
            hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))
        return self.causal_lm.get_output_embeddings()(hidden).float(), present


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, *, hip_attention: Any, **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: queries [B, Hq, S, D] and keys [B, Hkv, S, D] to [B, S, Hq, D]."""
    return hip_attention(module.layer_idx, query, key, value, scaling), None


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


def buffers(family: Family, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Name and value of the constants that the architecture computes from its configuration, such as inv_freq."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = family.model_class(config)
    return dict(model.named_buffers())


def trace(model_config: PreTrainedConfig, config: HipConfig, *, dtype: torch.dtype, logits: Logits,
          constants: Mapping[str, Tensor]) -> Trace:
    """Make the model graph. Three layers are traced and the others copied, unless layers turn out to differ.

    Args:
        model_config: the architecture and its sizes.
        config: pruning; ``dense_layers`` are below the number of layers.
        dtype: type of weights, activations and KV pools.
        logits: "last" or "all".
        constants: value of each buffer, see :func:`buffers`.
    """
    layers = model_config.num_hidden_layers
    traced = _trace(model_config, config, dtype, logits, constants, min(layers, TRACED))
    if layers <= TRACED:
        return traced
    if not repeat_layers(traced.model.graph, layers, config.dense_layers):
        return _trace(model_config, config, dtype, logits, constants, layers)
    for name, weight in list(traced.weights.items()):
        if layer_of(name) == TRACED - 1:
            for layer in range(TRACED, layers):
                traced.weights[renumber(name, layer)] = Weight(renumber(weight.parameter, layer), weight.transposed)
    return traced


def _trace(
    model_config: PreTrainedConfig, config: HipConfig, dtype: torch.dtype, logits: Logits,
    constants: Mapping[str, Tensor], layers: int,
) -> Trace:
    """The graph of a model with this many layers."""
    model_config = copy.deepcopy(model_config)
    model_config.num_hidden_layers = layers
    with _quiet():
        with FakeTensorMode():
            causal_lm = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, attn_implementation=ATTENTION
            ).eval()
            arguments, dynamic = _example(model_config, config, dtype)
        onnx_program = torch.onnx.export(
            PagedCausalLM(causal_lm, config, logits), arguments, dynamic_shapes=dynamic, dynamo=True,
            opset_version=OPSET, optimize=False, verbose=False,
            input_names=_input_names(layers), output_names=_output_names(layers),
        )
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

    Other constants than those named get numbers.
    """
    graph, counts = model.graph, Counter[str]()
    outputs = set(graph.outputs)
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        scope = next((name for name in reversed(scopes[:-1]) if name), "").removeprefix(_PREFIX)
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
    kv_heads = model_config.num_key_value_heads
    masks = config.num_masks(model_config.num_attention_heads, kv_heads)
    pool = (pages, kv_heads, config.page_size, model_config.head_dim)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    state = [
        (torch.zeros(pool, dtype=dtype), torch.zeros(pool, dtype=dtype),
         integers(batch, masks, config.decode_mask_blocks))
        for _ in range(model_config.num_hidden_layers)
    ]
    arguments = (
        torch.zeros(batch, sequence, dtype=torch.int64), integers(batch), integers(batch), integers(batch, slots),
        integers(1), state,
    )
    b, s, p, m = (torch.export.Dim(name) for name in (_BATCH, _SEQUENCE, _PAGES, _SLOTS))
    dynamic: Any = ({0: b, 1: s}, {0: b}, {0: b}, {0: b, 1: m}, {}, [({0: p}, {0: p}, {0: b}) for _ in state])
    return arguments, dynamic


def _input_names(layers: int) -> list[str]:
    names = [operator.INPUT_IDS, operator.PAST_LENGTHS, operator.QUERY_LENGTHS, operator.PAGE_TABLE,
             operator.REFRESH_MASK]
    for layer in range(layers):
        names += [operator.past_key_name(layer), operator.past_value_name(layer), operator.past_nodes_name(layer)]
    return names


def _output_names(layers: int) -> list[str]:
    names = [operator.LOGITS]
    for layer in range(layers):
        names += [operator.present_key_name(layer), operator.present_value_name(layer),
                  operator.present_nodes_name(layer)]
    return names


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
