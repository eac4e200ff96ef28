"""Dense attention by PyTorch's scaled_dot_product_attention, with one backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hip_trt.bench.checks import MOST_ERROR, CheckError, compare_dense
from hip_trt.bench.geometry import Geometry
from hip_trt.bench.inputs import Tensors, dense_sets, draw
from hip_trt.bench.timing import Timing, replayed_steps, single_calls

BACKENDS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
"""What the dense columns are called, and what computes them."""


def time_prefill(geometry: Geometry, backend: str, tensors: Tensors, *, seconds: float) -> Timing:
    """Milliseconds of causal attention.

    Raises:
        RuntimeError: the backend refuses.
        CheckError: the output is wrong.
    """
    with sdpa_kernel(BACKENDS[backend]):
        call = _attention(geometry, tensors, causal=True)
        _check(geometry, backend, call(), tensors)
        return single_calls(call, seconds=seconds)


def time_decode(geometry: Geometry, backend: str, *, tokens: int, batch: int, seed: int) -> Timing:
    """Microseconds of one row over ``tokens`` keys, over the sequences that hip-trt's steps have.

    Raises:
        RuntimeError: the backend refuses.
        CheckError: the output is wrong.
    """
    sets = [draw(geometry, batch=batch, queries=1, tokens=tokens, seed=seed + index)
            for index in range(dense_sets(geometry, batch=batch, tokens=tokens))]
    with sdpa_kernel(BACKENDS[backend]):
        calls = [_attention(geometry, tensors, causal=False) for tensors in sets]
        _check(geometry, backend, calls[0](), sets[0])
        return replayed_steps(calls, replays=7)


def _attention(geometry: Geometry, tensors: Tensors, *, causal: bool) -> Callable[[], Tensor]:
    return lambda: scaled_dot_product_attention(
        tensors.query, tensors.key, tensors.value, is_causal=causal, scale=geometry.scale, enable_gqa=True
    )


def _check(geometry: Geometry, backend: str, output: Tensor, tensors: Tensors) -> None:
    torch.cuda.synchronize()
    error = compare_dense(output, tensors.query, tensors.key, tensors.value, geometry.scale)
    if not error < MOST_ERROR:
        raise CheckError(f"{backend}: relative error {error:.2e}, above {MOST_ERROR}")
