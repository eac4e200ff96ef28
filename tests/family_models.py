"""Small random models in the proportions of published ones: one for each family, or more where checkpoints differ.

Kept from the published config.json: query heads per key/value head, head_dim, biases, norms, multipliers, RoPE and its
parameters, windows, tied embeddings. Made small: layers, heads, hidden and intermediate size, vocabulary; context
lengths where they are only a limit. Most have four layers, of which three are traced; SmolLM 3 seven, of which five
are, with every second and not every fourth layer without RoPE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

Change = Callable[[PreTrainedModel], None]

_SIZES = {
    "vocab_size": 97, "hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}


@dataclass(frozen=True)
class Case:
    """One published model, made small.

    Attributes:
        name: of the checkpoint whose proportions these are.
        architecture: its class in transformers.
        fields: of its configuration.
        special: what it has beside the others, and how to take that away from a model; tests check that this shows.
        max_context: longest context that it must be exported for, None for its own.
    """

    name: str
    architecture: str
    fields: dict[str, Any]
    special: dict[str, Change] = field(default_factory=dict)
    max_context: int | None = None

    def model(self, **overrides: Any) -> PreTrainedModel:
        """A random model in float32 whose norms, biases and multipliers all matter."""
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**copy.deepcopy({**_SIZES, **self.fields, **overrides}))
        torch.manual_seed(0)
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=1.0)
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.5)
            else:  # keeps the size of what passes through, so that no layer's part is lost in another's
                nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
        return model.eval()


def _no_bias(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            nn.init.zeros_(parameter)


def _no_query_key_norm(model: PreTrainedModel) -> None:
    for layer in model.base_model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()


def _plain_query_key_norm(model: PreTrainedModel) -> None:
    for layer in model.base_model.layers:
        nn.init.ones_(layer.self_attn.q_norm.weight)
        nn.init.ones_(layer.self_attn.k_norm.weight)


def _rope_everywhere(model: PreTrainedModel) -> None:
    for layer in model.base_model.layers:
        layer.self_attn.use_rope = True


def _unscaled_rope(model: PreTrainedModel) -> None:
    rotary: Any = model.base_model.rotary_emb
    rotary.rope_type, rotary.attention_scaling = "default", 1.0
    rotary.inv_freq.copy_(rotary.compute_default_rope_parameters(model.config)[0])


def _full_rotary(model: PreTrainedModel) -> None:
    rotary: Any = model.base_model.rotary_emb
    model.config.rope_parameters["partial_rotary_factor"] = 1.0
    rotary.rope_type, rotary.inv_freq = "default", rotary.compute_default_rope_parameters(model.config)[0]


def _no_factor(attribute: str) -> Change:
    """Sets one multiplier to 1 wherever the model keeps it."""
    def change(model: PreTrainedModel) -> None:
        for part in (model.config, *model.modules()):
            if hasattr(part, attribute):
                setattr(part, attribute, 1.0)

    return change


def _default_scaling(model: PreTrainedModel) -> None:
    for layer in model.base_model.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


CASES = (
    Case("Llama-2-7B", "LlamaForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
    Case("Llama-3.1-8B", "LlamaForCausalLM", {
        "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 64},
    }, {"RoPE scaling": _unscaled_rope}),
    Case("Llama-3.2-1B", "LlamaForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64},
    }, {"RoPE scaling": _unscaled_rope}),
    Case("SmolLM2-135M", "LlamaForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    }),
    Case("Mistral-7B-v0.1", "MistralForCausalLM", {
        "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "sliding_window": 80,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }, max_context=80),
    Case("Mistral-Nemo", "MistralForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 160, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }),
    Case("Qwen2-0.5B", "Qwen2ForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 448, "max_position_embeddings": 131072,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 24, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }, {"biases": _no_bias}),
    Case("Qwen2.5-7B", "Qwen2ForCausalLM", {
        "num_hidden_layers": 2,
        "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 896, "max_position_embeddings": 131072,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                            "original_max_position_embeddings": 32768},
    }, {"biases": _no_bias, "RoPE scaling": _unscaled_rope}),
    Case("Qwen3-0.6B", "Qwen3ForCausalLM", {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }, {"query and key norm": _no_query_key_norm, "its weights": _plain_query_key_norm}),
    Case("SmolLM3-3B", "SmolLM3ForCausalLM", {
        "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 512,
        "max_position_embeddings": 65536, "use_sliding_window": False, "sliding_window": None,
        "no_rope_layers": [1, 0, 1, 0, 1, 0, 1], "no_rope_layer_interval": 4, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    }, {"layer without RoPE": _rope_everywhere}),
    Case("Phi-3-mini-4k", "Phi3ForCausalLM", {
        "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": 80,
        "original_max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }, max_context=80),
    Case("Phi-4-mini", "Phi3ForCausalLM", {
        "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 384, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 96, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                            "short_factor": [1.0 + i / 16 for i in range(48)],
                            "long_factor": [1.0 + i for i in range(48)]},
    }, {"partial rotary": _full_rotary}, max_context=96),
    Case("Granite-3.3-2B", "GraniteForCausalLM", {
        "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    }, {"embedding multiplier": _no_factor("embedding_multiplier"),
        "residual multiplier": _no_factor("residual_multiplier"),
        "attention multiplier": _default_scaling, "logits scaling": _no_factor("logits_scaling")}),
    Case("OLMo-2-1B", "Olmo2ForCausalLM", {
        "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }, {"query and key norm": _no_query_key_norm, "its weights": _plain_query_key_norm}),
)
