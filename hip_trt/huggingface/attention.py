"""HiP in a Hugging Face model, through transformers' attention interface; no model code is copied.

A hook on the model's decoder stack gives each call a :class:`HipCache`; its layers travel to the attention function as
a keyword argument, and the function calls ``torch.ops.hip_trt.attention_``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from hip_trt.config import HipConfig
from hip_trt.errors import CheckpointError, ConfigError, RuntimeInputError
from hip_trt.huggingface.cache import HipCache
from hip_trt.huggingface.cache_name import CacheName, cache_name, take_cache
from hip_trt.model_support import check_call, check_model, limits, resolve_context
from hip_trt.offload import Offload

ATTENTION = "hip_trt"
"""The attention implementation's name in transformers."""

Model = TypeVar("Model", bound=nn.Module)

_patched: WeakKeyDictionary[nn.Module, tuple[str, RemovableHandle, WeakSet[HipCache]]] = WeakKeyDictionary()
"""The implementation that each model had, the hook, and the caches in host memory that it has used."""


def patch(
    model: Model, config: HipConfig | None = None, *, max_context: int | None = None, offload: Offload | None = None
) -> Model:
    """Run a model's attention with HiP: through the reference on the CPU, the CUDA kernels on a GPU.

    ``model(...)`` and ``model.generate(...)`` work as before: greedy, sampling and beam search, batches padded on
    either side, chunked prefill, use_cache or not, ``torch.compile`` and ``torch.export``. Calls with one new token are
    decode steps. Padding is left out of attention and cache; in later calls, only the mask's columns for the new tokens
    are read.

    Args:
        model: a decoder-only model of transformers whose layers call its attention interface: Llama, Mistral, Qwen,
            SmolLM, Phi, Granite, OLMo and others. Changed in place.
        config: pruning; the defaults if None. A model that is patched already takes the new one.
        max_context: longest context that the model will be given, in tokens; by default its own. A model that attends
            in another way beyond some length (a sliding window) can be patched up to it.
        offload: keep KV caches in host memory, served by so much of the GPU's; None: on the GPU. Results are the same
            bits. A cache's memory is given back when the cache goes, or at :func:`unpatch`. Of a cache that is kept,
            ``cache.offloaded.stats()`` says what happened.

    Returns:
        The model.

    Raises:
        CheckpointError: naming what the model has that HiP does not do: sliding windows shorter than the context,
            chunked attention, soft-capping, attention that is not causal, an encoder.
        ConfigError: if a dense layer is beyond the model's last, or ``max_context`` beyond its context.
        RuntimeInputError: later, from a call that asks for attention weights, dropout, a 4-D mask, packed sequences,
            brings another kind of cache, or exceeds ``max_context``; with ``offload``, on a model that is not on a GPU,
            or where host memory does not suffice.
    """
    config = config or HipConfig.create()
    _check_model(model)
    assert isinstance(model, PreTrainedModel)
    # Beyond its own context a model is the user's affair, unless it changes there.
    context = None
    if max_context is not None or any(limits(model.config)):
        context, _ = resolve_context(
            model.config, type(model).__name__, max_context, option="max_context={}", static=False
        )
    layers = model.config.num_hidden_layers
    if config.dense_layers and config.dense_layers[-1] >= layers:
        raise ConfigError(
            f"dense_layers: {config.dense_layers[-1]} is not allowed; it must be below {layers}, the model's layers"
        )
    unpatch(model)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _new_rows_mask)
    implementation = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    offloaded: WeakSet[HipCache] = WeakSet()
    handle = model.base_model.register_forward_pre_hook(
        _give_cache(config, context, offload, offloaded, cache_name(type(model.base_model))), with_kwargs=True
    )
    _patched[model] = implementation, handle, offloaded
    return model


def unpatch(model: Model) -> Model:
    """Give a model its own attention back, and host memory that its caches hold; nothing happens to one that is not
    patched."""
    if model in _patched:
        implementation, handle, offloaded = _patched.pop(model)
        handle.remove()
        for cache in list(offloaded):
            cache.close()
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise CheckpointError(
            f"{name} does not use transformers' attention interface.",
            "Give a transformers model, such as LlamaForCausalLM.",
        )
    check_model(model.config, name, traced=False)
    if not all(getattr(part, "is_causal", True) for part in model.modules()):
        raise CheckpointError(f"{name}: the model does not attend causally (is_causal false).")


def _give_cache(
    config: HipConfig, max_context: int | None, offload: Offload | None, offloaded: WeakSet[HipCache], name: CacheName
) -> Callable[..., Any]:
    """The hook: calls get a HipCache, in place of the empty DynamicCache that generate() brings.

    Args:
        name: what the model calls its cache. A caller may use the other name; the model would rename it after the hook.
    """

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("input_ids", "attention_mask", "position_ids", name)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        model_config: Any = model.config
        if kwargs.get("output_attentions") or (
            kwargs.get("output_attentions") is None and getattr(model_config, "output_attentions", False)
        ):
            raise RuntimeInputError("output_attentions: HiP has no attention weights to give.", "Leave it out.")
        cache, keep = take_cache(kwargs), True
        if not isinstance(cache, HipCache):
            if cache is not None and not (type(cache) is DynamicCache and cache.get_seq_length() == 0):
                raise RuntimeInputError(
                    f"{name}: a {type(cache).__name__} is not allowed.",
                    "Leave it out, or give a hip_trt.huggingface.HipCache.",
                )
            use_cache = kwargs.get("use_cache")
            keep = cache is not None or (model_config.use_cache if use_cache is None else use_cache)
            cache = HipCache(model_config, config, offload=offload)
        if keep:
            kwargs[name] = cache
        if cache.in_host_memory:
            offloaded.add(cache)
        if max_context is not None:
            tokens = kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"].shape[1]
            if cache.get_seq_length() + tokens > max_context:
                raise RuntimeInputError(
                    f"input_ids: {cache.get_seq_length() + tokens} tokens are beyond max_context {max_context}.",
                    "Patch the model with a larger max_context, if it allows one, or give it less.",
                )
        kwargs["hip_cache"], kwargs["hip_max_context"] = cache, max_context
        return args[len(names):], kwargs

    return hook


def _new_rows_mask(
    *, q_length: int, mask_function: Callable[..., Any], attention_mask: Tensor | None, local_size: int | None = None,
    allow_is_causal_skip: bool = True, **_: Any,
) -> Tensor | None:
    """transformers' mask interface: which new tokens are valid, [B, S] bool; None if all are.

    A sliding window (local_size) that is wider than the context makes no difference; transformers forbids skipping its
    mask where the call adds something else. While tracing, contents are unknown: transformers allows for packed
    sequences always, and a mask is always used.
    """
    tracing = torch.compiler.is_compiling()
    plain = mask_function is causal_mask_function or (local_size is not None and allow_is_causal_skip)
    if not plain and not tracing:
        raise RuntimeInputError(
            "attention_mask: HiP attends causally to all earlier tokens; this call asks for another pattern.",
            "Leave out packed sequences and mask functions.",
        )
    if attention_mask is None:
        return None
    valid = attention_mask[:, -q_length:]
    return None if not tracing and bool(valid.all()) else valid


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, hip_cache: HipCache | None = None, hip_max_context: int | None = None, **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, S, Hq, D]; there are no weights."""
    if hip_cache is None:
        raise RuntimeInputError("attn_implementation: hip_trt was set by hand.", "Call hip_trt.patch(model).")
    check_call(module, key, value, max_context=hip_max_context, **options)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise RuntimeInputError("HiP does not support a 4-D attention_mask.", "Leave it out, or unpatch the model.")
    layer = hip_cache.layers[module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, attention_mask, scale).transpose(1, 2), None
