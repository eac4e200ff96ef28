"""Queries and keys of a real model on a real text, layer by layer, as its attention sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.rope_scaling import scaled

CAPTURE = "hip_trt_capture"
"""The attention implementation's name in transformers."""

Visit = Callable[[int, Tensor, Tensor, float], None]
"""Called for each layer in order: its index, queries [Hq, T, D] and keys [Hkv, T, D] after RoPE, and the scale of
q.k."""


def visit_layers(
    model: Any, tokens: Sequence[int], visit: Visit, *, layers: int | None = None, scaling: str | None = None
) -> None:
    """Run a model over a text, densely, and show each layer's queries and keys while they are there.

    Nothing is kept from one layer to the next, so a visitor decides what a long text costs in memory.

    Args:
        model: a transformers causal language model; it is left as it was.
        tokens: one sequence of token ids.
        layers: run only so many, the first ones.
        scaling: of RoPE, one of :data:`hip_trt.evaluate.rope_scaling.SCALINGS`, for texts beyond the model's context.

    Raises:
        RuntimeInputError: the text is longer than the model's context and no scaling is given, or it is not known.
    """
    context = model.config.max_position_embeddings
    if len(tokens) > context:
        if scaling is None:
            raise RuntimeInputError(
                f"{len(tokens)} tokens are beyond the model's context of {context}.", "Give fewer, or a RoPE scaling."
            )
        with scaled(model, scaling, len(tokens) / context):
            _run(model, tokens, visit, layers)
    else:
        _run(model, tokens, visit, layers)


def _run(model: Any, tokens: Sequence[int], visit: Visit, layers: int | None) -> None:
    _register()
    implementation, decoder = model.config._attn_implementation, model.base_model
    every = decoder.layers
    model.set_attn_implementation(CAPTURE)
    decoder.layers = every[:layers]
    try:
        with torch.inference_mode():
            decoder(torch.tensor([list(tokens)], device=model.device), use_cache=False, hip_trt_visit=visit)
    finally:
        decoder.layers = every
        model.set_attn_implementation(implementation)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(CAPTURE, _attention)
    AttentionMaskInterface.register(CAPTURE, lambda **_: None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, hip_trt_visit: Visit, **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] each."""
    scale = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    hip_trt_visit(module.layer_idx, query[0], key[0], scale)
    # Keys and values are repeated: PyTorch's kernels that need no T x T matrix take float32 with equal heads only.
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2), None
