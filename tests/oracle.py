"""An executor that runs a Hugging Face Llama with the reference operator: the oracle for everything above executors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.reference import hip_attention
from hip_trt.runtime.executor import Limits
from hip_trt.spec import Logits, ModelSpec

_ATTENTION = "hip_trt_oracle"


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of two layers and 61 tokens, in float32."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))
    return model.eval()


class OracleExecutor:
    """Executes a model with :func:`hip_trt.reference.hip_attention`, on the CPU.

    Attributes:
        calls: the inputs of every call but pools and nodes, as copies.
    """

    def __init__(
        self, model: LlamaForCausalLM, hip: HipConfig, *, logits: Logits = "last", limits: Limits | None = None
    ) -> None:
        config = model.config
        self.spec = ModelSpec(
            model_type="llama", source="tiny", num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim, vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings, dtype="float32", logits=logits, hip=hip,
            hip_trt_version="0",
        )
        self.limits = limits or Limits()
        self.device = torch.device("cpu")
        self.calls: list[dict[str, Tensor]] = []
        self._model = model
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.calls.append({name: tensor.clone() for name, tensor in inputs.items() if "." not in name})
        width = inputs[names.INPUT_IDS].shape[1]
        positions = inputs[names.PAST_LENGTHS][:, None] + torch.arange(width)
        implementation = self._model.config._attn_implementation
        self._model.config._attn_implementation = _ATTENTION
        try:
            with torch.inference_mode():
                logits = self._model(
                    inputs[names.INPUT_IDS], position_ids=positions.long(), use_cache=False,
                    hip=self.spec.hip, graph=(inputs, outputs),
                ).logits
        finally:
            self._model.config._attn_implementation = implementation
        if self.spec.logits == "last":
            last = (inputs[names.QUERY_LENGTHS].long() - 1).clamp(min=0)
            logits = logits[torch.arange(len(last)), last][:, None]
        outputs[names.LOGITS].copy_(logits)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, hip: HipConfig,
    graph: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], **_: Any,
) -> tuple[Tensor, None]:
    inputs, outputs = graph
    layer = module.layer_idx
    past = {tensor.past_input: tensor.past(layer) for tensor in names.STATE}
    tensors = [inputs[past.get(name, name)] for name in names.INPUTS[3:]]
    output, *present = hip_attention(
        query, key, value, *tensors, config=hip, scale=scaling, dense=layer in hip.dense_layers,
    )
    for tensor, new in zip(names.STATE, present, strict=True):
        outputs[tensor.present(layer)].copy_(new)
    return output.transpose(1, 2), None
