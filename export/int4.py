"""Weights in four bits, through NVIDIA Model Optimizer's functions for ONNX: integers, and a scale for each block.

Only weights are quantized, by rounding to nearest, which needs no calibration: activations, embeddings, logits and the
KV cache keep their type. The graph has a ``DequantizeLinear`` in front of each matrix product, which TensorRT and ONNX
Runtime fuse with it. Model Optimizer's own entry point reads the whole model into memory and drops its metadata, so its
functions are called here for one weight at a time.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hip_trt.errors import EnvironmentProblem, ExportError

OPSET = 21
"""The first with blocks and four bits in DequantizeLinear."""
_BLOCKS = (128, 64, 32)
"""Values that share a scale; the first that divides a weight's inputs, as runtimes ask for whole blocks."""
_NOT_QUANTIZED = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Int4Weight:
    """A linear layer's weight as MatMul takes it, [inputs, outputs].

    Attributes:
        packed: [inputs * outputs / 2] uint8, two values a byte, the first in the low half.
        scale: [inputs / block, outputs], in the model's type; a value is its integer times the scale of its block.
        block: inputs that share a scale.
    """

    packed: Tensor
    scale: Tensor
    block: int


def block_size(name: str, shape: tuple[int, ...]) -> int | None:
    """Block of a parameter of this name and shape, [outputs, inputs]; None where it keeps its type."""
    if len(shape) != 2 or name.endswith(_NOT_QUANTIZED):
        return None
    return next((block for block in _BLOCKS if shape[1] % block == 0), None)


def quantized_size(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> int:
    """Bytes of a quantized weight and its scales."""
    values = math.prod(shape)
    return values // 2 + values // block * dtype.itemsize


def quantized_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The parameters that are quantized, and their blocks."""
    blocks = {name: block_size(name, shape) for name, shape in shapes.items()}
    found = {name: block for name, block in blocks.items() if block is not None}
    if not found:
        raise ExportError(f"quantize: no linear layer of the model has inputs in blocks of {_BLOCKS[-1]}.")
    return found


def quantizer() -> Callable[[Tensor, int, torch.dtype], Int4Weight]:
    """The function that quantizes a weight [outputs, inputs] in blocks, with scales of a type.

    Raises:
        EnvironmentProblem: Model Optimizer is not installed.
    """
    try:
        functions = importlib.import_module("modelopt.onnx.quantization.quant_utils")
    except ImportError as error:
        raise EnvironmentProblem(
            f"quantize: NVIDIA Model Optimizer cannot be imported: {error}.",
            "Install it: pip install nvidia-modelopt onnx-graphsurgeon onnxslim lief",
        ) from None
    def quantize(weight: Tensor, block: int, dtype: torch.dtype) -> Int4Weight:
        values: np.ndarray[Any, Any] = weight.float().numpy().T
        scale, _ = functions.find_scales(values, block)
        scale = torch.from_numpy(np.ascontiguousarray(scale)).to(dtype)
        integers = functions.rtn(values, scale.float().numpy(), block)  # with the scales as they are rounded
        packed = functions.pack_float32_to_4bit_optimized(integers, True)
        return Int4Weight(torch.from_numpy(packed.view(np.uint8)), scale, block)

    return quantize
