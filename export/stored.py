"""Weights that stay on disk until they are asked for, so that an export never holds more than one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hip_trt.errors import CheckpointError


@dataclass(frozen=True)
class Extent:
    """Where a weight lies as a plain array, row by row, that others can read in place.

    Attributes:
        path: the file.
        offset, length: bytes. The offset may be any number: safetensors does not align.
        dtype: type of its elements.
    """

    path: Path
    offset: int
    length: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """One weight of a checkpoint.

    Attributes:
        shape: its shape, as transformers has it.
        load: reads it, in the type that it is stored in, or float32 if it is quantized.
        extent: None where it is stored in another form, such as quantized.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    extent: Extent | None = None


def check_shapes(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], where: str) -> list[str]:
    """Compare a checkpoint's weights with the architecture's parameters.

    Args:
        stored: the checkpoint's weights by transformers' names.
        expected: shapes of the architecture's parameters.
        where: the checkpoint, for messages.

    Returns:
        Names of weights that the architecture has no use for.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    missing = [name for name in expected if name not in stored]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: the weight {missing[0]}{others} is missing.",
            "The download may be incomplete, or the configuration of another model.",
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{where}: the weight {name} has shape {list(stored[name].shape)}, and its configuration asks for "
                f"{list(shape)}.",
                _shape_remedy(name),
            )
    return [name for name in stored if name not in expected]


def _shape_remedy(name: str) -> str:
    if "embed_tokens" in name or "lm_head" in name:
        return "The first number is vocab_size: check it in config.json."
    if any(part in name for part in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")):
        return "It follows from num_attention_heads, num_key_value_heads and head_dim: check them in config.json."
    return "Configuration and weights are of different models."


def convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another type; CheckpointError where a finite value would become infinite."""
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        least, greatest = tensor.aminmax()
        if max(-least, greatest) > torch.finfo(dtype).max:  # rounding or infinity may have made it so: look closer
            lost = tensor[converted.isinf() & tensor.isfinite()]
            if lost.numel():
                raise CheckpointError(
                    f"The weight {name} holds {lost[0].item():.3g}, beyond float16.",
                    "Export with --dtype bfloat16 or float32.",
                )
    return converted
