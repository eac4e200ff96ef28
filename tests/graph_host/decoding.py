"""Greedy decoding of one prompt in three ways: the graph host under the runtime, a patched model, and the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hip_trt import ops, reference
from hip_trt.huggingface import cache_argument, output_cache
from hip_trt.offload import Offload, OffloadStats
from hip_trt.runtime import Generator, Session
from hip_trt.runtime.executor import Executor


def host_greedy(
    executor: Executor, prompt: Sequence[int], count: int, *, offload: Offload | None = None
) -> tuple[list[int], OffloadStats | None]:
    """Tokens by the runtime's own generator, and what the caches of an offloaded KV cache did."""
    generator = Generator(executor, max_seq_len=len(prompt) + count, offload=offload)
    stream = generator.stream([list(prompt)], max_new_tokens=count, do_sample=False)
    tokens = [step.tokens[0] for step in stream]
    interval = executor.spec.hip.refresh_interval
    assert (stream.stats.decode_steps, stream.stats.refreshed_steps) == (count - 1, -(-(count - 1) // interval))
    return tokens, stream.offload_stats  # type: ignore[return-value]


def host_logits(
    executor: Executor, prompt: Sequence[int], tokens: Sequence[int], *, offload: Offload | None = None
) -> Tensor:
    """Logits from which each of ``tokens`` is drawn, when those before it are given: [len(tokens), V] float32."""
    with Session(executor, max_seq_len=len(prompt) + len(tokens), offload=offload) as session:
        rows = [session.append([list(prompt)])[0].clone()]
        rows += [session.step([token])[0].clone() for token in tokens[:-1]]
    return torch.stack(rows)


def model_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Tokens by transformers' ``generate``, which no token ends."""
    ids = torch.tensor([prompt], device=model.device)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
    return [int(token) for token in made[0, len(prompt) :]]


def model_logits(
    model: Any, prompt: Sequence[int], tokens: Sequence[int] | None = None, count: int = 0
) -> tuple[list[int], Tensor]:
    """Logits as :func:`host_logits`, of a patched model.

    Args:
        tokens: what is given; None: ``count`` greedy ones.

    Returns:
        The tokens and the logits.
    """
    given = list(tokens or ())
    count = count or len(given)
    ids = torch.tensor([prompt], device=model.device)
    cache, rows = None, []
    with torch.inference_mode():
        while True:
            result = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
            cache = output_cache(model, result)
            rows.append(result.logits[0, -1].float())
            if tokens is None:
                given.append(int(rows[-1].argmax()))
            if len(rows) == count:
                break
            ids = torch.tensor([given[len(rows) - 1 : len(rows)]], device=model.device)
    if cache.in_host_memory:
        cache.close()
    return given, torch.stack(rows)


class _Reference:
    """Stands in for a :class:`hip_trt.library.Library`, and computes with :mod:`hip_trt.reference` on any device."""

    def attention(
        self, *tensors: Tensor, present_key: Tensor, present_value: Tensor, present_nodes: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        with torch.device(tensors[0].device):
            output, *present = reference.hip_attention(*tensors, **options)
        for target, made in zip((present_key, present_value, present_nodes), present, strict=True):
            target.copy_(made)
        return (output,)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Patched models on a GPU compute attention with the reference, and not with CUDA kernels. (On a CPU they do ever.)
    """
    kernels = ops.library
    ops.library = SimpleNamespace(load=_Reference)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ops.library = kernels  # type: ignore[attr-defined]
