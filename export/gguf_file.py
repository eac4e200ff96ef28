"""A model in a GGUF file: its configuration, and its weights, dequantized as they are read.

Names and meanings of the fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hip_trt.errors import CheckpointError
from hip_trt.export.families import FAMILIES
from hip_trt.export.stored import StoredTensor


@dataclass(frozen=True)
class _Architecture:
    """What a GGUF architecture is in transformers.

    Attributes:
        name: of the class.
        interleaved: whether RoPE turns neighbouring rows of a head, and not rows that stand half a head apart.
        options: fields of the configuration for which there is a choice.
    """

    name: str
    interleaved: bool = False
    options: tuple[str, ...] = ()


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", True, ("head_dim", "attention_bias", "mlp_bias")),  # Mistral's too
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM", options=("head_dim", "attention_bias")),
}
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_ALL_F32, _MOSTLY_BF16 = 0, 32  # general.file_type
_ROWS_SIZE = 1 << 25  # bytes of float32 that are dequantized at a time


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds.

    Attributes:
        name: the model's own name, or the file's.
        config: as transformers would have it.
        dtype: bfloat16 or float32 if the file says that it holds those; else float16, also for quantized weights.
        tensors: weights by transformers' names.
        frequency_factors: [head_dim / 2], what Llama 3's RoPE divides its frequencies by; None for 1. (GGUF carries
            these numbers in place of the rope_scaling parameters that they come from.)
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    tensors: dict[str, StoredTensor]
    frequency_factors: Tensor | None


def read_gguf(path: Path) -> GgufModel:
    """Read a GGUF file's header; weights stay on disk.

    Raises:
        CheckpointError: not a GGUF file, truncated, damaged, of another architecture, or quantized in a way that the
            gguf package cannot undo.
    """
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = fields.get("general.architecture")
    fields = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    if kind not in _ARCHITECTURES or fields.get("expert_count", 0):
        what = "a mixture of experts" if kind in _ARCHITECTURES else kind
        raise CheckpointError(
            f"{path}: the architecture is {what}, which cannot be exported.",
            f"Supported in GGUF files: {', '.join(_ARCHITECTURES)}. Others may be in Hugging Face format.",
        )
    architecture = _ARCHITECTURES[kind]
    if fields.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path}: one of {fields['split.count']} parts of a model.",
            "Join them with `llama-gguf-split --merge`.",
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    _check_types(path, reader.tensors)
    try:
        config = _config(architecture, reader, fields, stored)
    except KeyError as error:
        raise CheckpointError(f"{path}: it lacks {error}.", "The file is damaged, or of an older format.") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its fields describe no {kind}: {error}.") from None
    factors = stored.pop(_ROPE_FREQUENCIES, None)
    file_types: dict[Any, torch.dtype] = {_ALL_F32: torch.float32, _MOSTLY_BF16: torch.bfloat16}
    return GgufModel(
        name=fields.get("general.name", path.stem),
        config=config,
        dtype=file_types.get(fields.get("general.file_type"), torch.float16),
        tensors={_hugging_face_name(name): _stored(tensor, config, architecture) for name, tensor in stored.items()},
        frequency_factors=None if factors is None else _dequantize(factors, None),
    )


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file.", "Give a .gguf file or a Hugging Face folder.")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        if "is not a valid GGMLQuantizationType" in str(error):
            raise CheckpointError(
                f"{path}: a weight is quantized in a way that the gguf package here does not know ({error}).",
                "Install a newer gguf package, or use a file in another quantization, such as Q8_0 or F16.",
            ) from None
        raise CheckpointError(
            f"{path}: truncated or damaged: reading its {path.stat().st_size} bytes failed "
            f"({type(error).__name__}: {error}).",
            "Download it again.",
        ) from None


def _check_types(path: Path, tensors: list[gguf.ReaderTensor]) -> None:
    """Dequantize one row of each kind now rather than fail after minutes of work."""
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: the weight {tensor.name} is quantized as {kind.name}, which cannot be undone here.",
                "Use a file in another quantization, such as Q8_0 or F16.",
            ) from None


def _config(
    architecture: _Architecture, reader: gguf.GGUFReader, fields: dict[str, Any], stored: dict[str, Any]
) -> PreTrainedConfig:
    heads = fields["attention.head_count"]
    hidden_size = fields["embedding_length"]
    head_dim = fields.get("attention.key_length", hidden_size // heads)
    if fields.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"RoPE turns {fields['rope.dimension_count']} of {head_dim} head dimensions")
    special = {
        f"{name}_token_id": reader.fields[key].contents() if (key := f"tokenizer.ggml.{full}_token_id") in reader.fields
        else None
        for name, full in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    options = {
        "head_dim": head_dim, "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_gate.bias" in stored,
    }
    return FAMILIES[architecture.name].config_class(
        architectures=[architecture.name],
        vocab_size=int(stored["token_embd.weight"].shape[1]),
        hidden_size=hidden_size,
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("attention.head_count_kv", heads),
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=fields["context_length"],
        rope_parameters=_rope(fields),
        tie_word_embeddings="output.weight" not in stored,
        **{name: options[name] for name in architecture.options},
        **special,
    )


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": fields.get("rope.freq_base", 10000.0), "rope_type": "default"}
    kind = fields.get("rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": fields["rope.scaling.factor"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = fields["rope.scaling.original_context_length"]
    return rope


def _hugging_face_name(name: str) -> str:
    """transformers' name of a GGUF tensor; a name that Llama does not have stays as it is."""
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    match module.split("."):
        case ["blk", layer, part] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    return name


def _stored(tensor: gguf.ReaderTensor, config: PreTrainedConfig, architecture: _Architecture) -> StoredTensor:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rotated = architecture.interleaved and tensor.name.startswith("blk.")
    interleaved = heads.get(tensor.name.split(".")[-2]) if rotated else None
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return StoredTensor(shape, partial(_dequantize, tensor, interleaved))


def _dequantize(tensor: gguf.ReaderTensor, interleaved_heads: int | None) -> Tensor:
    """The tensor in its own floating type, or float32 if it was quantized.

    GGUF's Llama rotates neighbouring rows of a head; transformers rotates rows that stand half a head apart. Queries
    and keys are put back in that order: ``interleaved_heads`` is how many heads they have.
    """
    raw = tensor.tensor_type in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32)
    values = np.array(tensor.data) if raw else _dequantize_rows(tensor)
    if interleaved_heads is not None:
        rows = values.shape[0]
        values = values.reshape(interleaved_heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
        values = np.ascontiguousarray(values.reshape(rows, *values.shape[3:]))
    return torch.from_numpy(values)


def _dequantize_rows(tensor: gguf.ReaderTensor) -> np.ndarray[Any, Any]:
    """In float32, a few rows at a time: gguf takes memory for several copies of what it is given."""
    data = tensor.data
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if len(shape) < 2:
        return np.ascontiguousarray(gguf.dequantize(data, tensor.tensor_type))
    values = np.empty(shape, np.float32)
    step = max(1, _ROWS_SIZE // (values.nbytes // shape[0]))
    for start in range(0, shape[0], step):
        values[start : start + step] = gguf.dequantize(data[start : start + step], tensor.tensor_type)
    return values
