"""How far the graph host, a patched model and the reference agree over one prompt: measured as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

import hip_trt
from graph_host.decoding import host_greedy, host_logits, model_greedy, model_logits, reference_kernels
from graph_host.executor import GraphExecutor
from hip_trt.offload import Offload, OffloadStats

REFERENCE, HOST, PATCHED = "reference", "graph host", "patched model"
OFFLOADED = ", offloaded"

Say = Callable[[str], None]
_Result = TypeVar("_Result")


def logit_errors(found: Tensor, expected: Tensor) -> dict[str, list[float]]:
    """How far logits are from expected ones, [N, V] float32 both: a number for each of the N steps.

    Returns:
        max_abs: largest absolute difference; max_rel: that by the largest absolute logit; kl: divergence of the
        distribution from the expected one, in nats; same_argmax: 1 or 0; margin: by how much the expected argmax leads.
    """
    difference = (found - expected).abs().amax(dim=1)
    expected_log, found_log = (logits.double().log_softmax(dim=1) for logits in (expected, found))
    kl = (expected_log.exp() * (expected_log - found_log)).sum(dim=1)
    best = expected.topk(2, dim=1).values
    columns = {
        "max_abs": difference, "max_rel": difference / expected.abs().amax(dim=1), "kl": kl.clamp(min=0),
        "same_argmax": (found.argmax(dim=1) == expected.argmax(dim=1)).int(), "margin": best[:, 0] - best[:, 1],
    }
    return {name: [float(f"{number:.4g}") for number in column.tolist()] for name, column in columns.items()}


def measure(
    executor: GraphExecutor, model: Any, prompt: Sequence[int], count: int, *, offload: Offload | None, say: Say = print
) -> dict[str, Any]:
    """Decode ``count`` tokens after a prompt in each way, with the pruning that the exported model has.

    The reference's greedy tokens are what all others are given for their logits; their own greedy tokens are drawn by
    the runtime's generator and by transformers' ``generate``.

    Args:
        executor: of the exported model.
        model: the checkpoint in transformers, on the same device in the same type; patched here, and left patched.
        offload: also with the KV cache in host memory, served by this; None: not.
        say: is told what was done.

    Returns:
        tokens: of each way; seconds: of each way; errors: :func:`logit_errors` against the reference; between:
        those of the graph host against the patched model; offload: whether the bits are the resident ones, and counts.
    """
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], _Result]) -> _Result:
        start = time.perf_counter()
        result = work()
        seconds[what] = round(time.perf_counter() - start, 2)
        say(f"{what}: {seconds[what]} s")
        return result

    hip = executor.spec.hip
    hip_trt.patch(model, hip)
    with reference_kernels():
        expected_tokens, expected = timed(REFERENCE, lambda: model_logits(model, prompt, count=count))
    tokens = {REFERENCE: expected_tokens}
    tokens[HOST], _ = timed(f"{HOST}: generator", lambda: host_greedy(executor, prompt, count))
    found = timed(f"{HOST}: logits", lambda: host_logits(executor, prompt, expected_tokens))
    tokens[PATCHED] = timed(f"{PATCHED}: generate", lambda: model_greedy(model, prompt, count))
    _, patched = timed(f"{PATCHED}: logits", lambda: model_logits(model, prompt, expected_tokens))
    result: dict[str, Any] = {
        "dtype": executor.spec.dtype, "hip": hip.model_dump(mode="json"), "prompt_tokens": len(prompt), "count": count,
        "tokens": tokens, "seconds": seconds,
        "errors": {HOST: logit_errors(found, expected), PATCHED: logit_errors(patched, expected)},
        "between": logit_errors(found, patched),
    }
    if offload is None:
        return result
    host, stats = timed(
        f"{HOST}{OFFLOADED}: generator", lambda: host_greedy(executor, prompt, count, offload=offload)
    )
    host_found = timed(
        f"{HOST}{OFFLOADED}: logits", lambda: host_logits(executor, prompt, expected_tokens, offload=offload)
    )
    hip_trt.patch(model, hip, offload=offload)
    patched_tokens = timed(f"{PATCHED}{OFFLOADED}: generate", lambda: model_greedy(model, prompt, count))
    hip_trt.patch(model, hip)
    tokens |= {f"{HOST}{OFFLOADED}": host, f"{PATCHED}{OFFLOADED}": patched_tokens}
    result["errors"][f"{HOST}{OFFLOADED}"] = logit_errors(host_found, expected)
    assert stats is not None
    result["offload"] = {
        "settings": offload.model_dump(), "largest_difference": float((host_found - found).abs().max()),
        "same_bits": torch.equal(host_found, found),
        "steps_with_other_bits": int((host_found != found).any(dim=1).sum()), **_counts(stats),
    }
    return result


def _counts(stats: OffloadStats) -> dict[str, Any]:
    return {
        "keys": asdict(stats.all_keys), "values": asdict(stats.all_values), "host_bytes": stats.host_bytes,
        "key_cache_bytes": stats.key_cache_bytes, "value_cache_bytes": stats.value_cache_bytes,
    }


def failures(result: dict[str, Any], *, logits: float) -> list[str]:
    """What of a measurement is not as it must be; nothing if all is.

    Greedy tokens are the reference's in float32. In 16 bits they may leave it where its first two tokens are so close
    that the rounding of this very step decides; offloaded ones never leave the resident ones.

    Args:
        logits: largest absolute error of a logit that rounding may make.
    """
    tokens, found = result["tokens"], []
    for way, other in tokens.items():
        step = first_difference(other, tokens[REFERENCE])
        if step is not None and not (result["dtype"] != "float32" and rounding_decides(result, way, step)):
            found.append(f"{way}: token {step} is not the reference's")
        if way.endswith(OFFLOADED) and other != tokens[way.removesuffix(OFFLOADED)]:
            found.append(f"{way}: the tokens are not those of the resident cache")
    for way, steps in result["errors"].items():
        wrong = [(step, error) for step, error in enumerate(steps["max_abs"]) if not error <= logits]  # NaN too
        if wrong:
            step, error = max(wrong, key=lambda item: item[1])
            found.append(f"{way}: {len(wrong)} steps, the worst {step}: a logit is off by {error:.2g}")
    offload = result.get("offload")
    if offload and not offload["same_bits"]:
        found.append(f"offloaded: {offload['steps_with_other_bits']} steps have other bits than resident")
    return found


def rounding_decides(result: dict[str, Any], way: str, step: int) -> bool:
    """Whether a way's error at a step, up to which its tokens are the reference's, may turn the first two tokens."""
    errors = result["errors"][way.removesuffix(OFFLOADED)]
    return bool(errors["margin"][step] <= 2 * errors["max_abs"][step])


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where they differ; None if they are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
