"""Tiny random Llamas, and the files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hip_trt.model_support import heads

VOCABULARY = 258
_ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama with byte tokens; large enough weights that logits depend on every token."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=_TEMPLATE
    )


def save_checkpoint(folder: Path, model: LlamaForCausalLM | None = None, **options: Any) -> Path:
    """Save a model, by default :func:`tiny_llama`, with a tokenizer; options are those of save_pretrained."""
    (model or tiny_llama()).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(
    path: Path, model: PreTrainedModel, *, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama", extra: dict[str, np.ndarray[Any, Any]] | None = None,
    fields: dict[str, Any] | None = None,
) -> Path:
    """Save a model as llama.cpp's converter does: matrices in ``kind``, a Llama's queries and keys interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(heads(config).size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    for key, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32 if isinstance(value, int)
         else writer.add_float32)(key, value)
    names = gguf.get_tensor_name_map(_ARCHITECTURES.get(architecture, gguf.MODEL_ARCH.LLAMA), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        for part, count in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and architecture == "llama":
                values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        module, _, suffix = name.rpartition(".")
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", gguf.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
