"""The checkpoint as a Hugging Face model patched with HiP, behind the inputs and outputs of the model graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from hip_trt import operator as names
from hip_trt.errors import CheckpointError
from hip_trt.huggingface import HipCache, cache_argument, patch
from hip_trt.huggingface.cache import HipLayer
from hip_trt.spec import ModelSpec
from hip_trt.verify.choices import Shown, attend
from hip_trt.verify.observed import attended_name, query_name
from hip_trt.verify.runners import Feed, GraphRunner


class PyTorchRunner(GraphRunner):
    """Runs :func:`hip_trt.patch` on the checkpoint, in eager mode, float32, on the CPU.

    Weights and state are rounded to the model's type and then computed with in float32, so what differs is the model's
    own rounding. Nothing of the exported file is used but its facts.

    Args:
        checkpoint: a Hugging Face folder, a .gguf file or a cached hub id.
        spec: facts about the exported model.
        shown: the blocks that the model under test chose.
        name: as reports have it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of other sizes than the model.
    """

    def __init__(self, checkpoint: str | Path, spec: ModelSpec, shown: Shown, name: str = "pytorch") -> None:
        super().__init__(spec, name)
        self._shown = shown
        self._model = patch(load_model(checkpoint, spec), spec.hip, max_context=None)

    def call(self, feed: Feed) -> Feed:
        spec = self.spec
        past, counts = feed[names.PAST_LENGTHS], feed[names.QUERY_LENGTHS]
        tokens, seen = feed[names.INPUT_IDS].shape[1], int(past.max())
        new = torch.arange(tokens)
        valid = new < counts[:, None]
        cache = HipCache(self._model.config, spec.hip)
        layers = [_GivenLayer(feed, spec, layer, self._shown) for layer in range(spec.num_layers)]
        cache.layers = layers
        hook = self._model.base_model.register_forward_hook(_keep_last(counts)) if spec.logits == "last" else None
        try:
            logits = self._model(
                input_ids=feed[names.INPUT_IDS], position_ids=past[:, None].long() + new, use_cache=True,
                attention_mask=torch.cat([torch.ones(len(past), seen, dtype=torch.bool), valid], dim=1),
                **cache_argument(self._model, cache),
            ).logits
        finally:
            if hook is not None:
                hook.remove()
        outputs: Feed = {names.LOGITS: logits.float()}
        for index, layer in enumerate(layers):
            outputs[query_name(index)], outputs[attended_name(index)] = layer.query, layer.attended
            outputs[names.KEY.present(index)] = layer.keys
            outputs[names.VALUE.present(index)] = layer.values
            outputs[names.NODES.present(index)] = layer.nodes
            outputs.update(layer.chosen)
        return outputs


class _GivenLayer(HipLayer):
    """A layer whose state comes from a feed, and which shows what it computes."""

    query: Tensor
    attended: Tensor
    chosen: Feed

    def __init__(self, feed: Feed, spec: ModelSpec, layer: int, shown: Shown) -> None:
        super().__init__(spec.hip, layer)
        self.keys, self.values = (
            feed[name(layer)].float() for name in (names.KEY.past, names.VALUE.past)
        )
        self.nodes = feed[names.NODES.past(layer)]
        self._feed, self._index, self._shown = feed, layer, shown
        self._columns = int(feed[names.PAST_LENGTHS].max())
        self.is_initialized = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """The reference, as torch.ops.hip_trt.attention_ computes on the CPU; feeds are padded on the right already."""
        shared = [self._feed[name] for name in (names.PAGE_TABLE, names.PAST_LENGTHS, names.QUERY_LENGTHS)]
        tensors = [query, key, value, self.keys, self.values, *shared, self.nodes, self._feed[names.REFRESH_MASK]]
        (output, self.keys, self.values, self.nodes), self.chosen = attend(
            tensors, self._index, config=self.config, scale=scale, shown=self._shown
        )
        self.query, self.attended = query, output
        return output


def _keep_last(counts: Tensor) -> Any:
    def hook(model: nn.Module, arguments: Any, result: Any) -> None:
        hidden = result.last_hidden_state
        last = (counts.long() - 1).clamp(min=0)
        result.last_hidden_state = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))

    return hook


def load_model(source: str | Path, spec: ModelSpec) -> Any:
    """The checkpoint as a transformers model in float32, its weights rounded to the exported model's type.

    Raises:
        CheckpointError: see :class:`PyTorchRunner`.
    """
    from hip_trt.export.checkpoint import open_checkpoint
    from hip_trt.export.graph import buffers

    checkpoint = open_checkpoint(source, max_context=spec.max_position_embeddings)
    config = checkpoint.config
    if (config.num_hidden_layers, config.vocab_size) != (spec.num_layers, spec.vocab_size):
        raise CheckpointError(
            f"{source}: {config.num_hidden_layers} layers and a vocabulary of {config.vocab_size}, and the exported "
            f"model has {spec.num_layers} and {spec.vocab_size}.",
            "Name the checkpoint that it was exported from (--checkpoint).",
        )
    with init_empty_weights(include_buffers=False):
        model = checkpoint.family.model_class(config)
    model.tie_weights()
    weights = {}
    for name, _ in model.named_parameters():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{source}: the weight {name} is missing.", "Name a complete checkpoint.")
        weights[name] = checkpoint.tensors[name].load().to(spec.torch_dtype).float()
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    constants = buffers(checkpoint.family, config, checkpoint.max_context)
    for name, value in constants.items():
        divisors = checkpoint.frequency_factors if name.endswith("inv_freq") else None
        model.get_buffer(name).copy_(value if divisors is None else value / divisors)
    return model.eval()
