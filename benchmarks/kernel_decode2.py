"""Speed of one layer's decode call of version 2, beside dense attention.

    PYTHONPATH=. python benchmarks/kernel_decode2.py --library LIBRARY [--cases 128k 32k/16] [--profile]

Llama-3.1-8B geometry (32 query heads, 8 key/value heads, head size 128), bfloat16, random normal data, the contract's
defaults (docs/decode_version_2.md). Microseconds per call inside a replayed CUDA graph, medians over replays, over the
caches of several layers in turn, so that none is in the L2 cache by the time it is used again. Results are checked in
float64 before anything is timed. "Of the limit": the bytes that the contract makes a call read at what a device copy
reaches, over the time measured. Prints a table last and writes kernel_decode2.json.

LIBRARY is the plugin library of an installed hip-trt, or, without TensorRT's headers, what one command makes:

    nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC -Iplugins/cuda \\
        -DHIP_TRT_VERSION='"none"' $(ls plugins/cuda/*.cu | grep -v 'sm90\\|tensor_map') -o libhip_trt_kernels.so
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from decode_bench import check, work
from decode_bench.layer import Layer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hip_trt.bench.geometry import LLAMA_8B
from hip_trt.bench.inputs import dense_sets, draw
from hip_trt.bench.timing import Timing, replayed_steps
from hip_trt.decode_library import DecodeLibrary, DecodeSettings

CASES = ("8k", "32k", "128k", "1M", "8k/16", "32k/16", "128k/16", "1M/16")
LAYERS = 8
DENSE = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PAGE = 64


def main() -> int:
    arguments = parse()
    library = DecodeLibrary(arguments.library)
    settings = DecodeSettings(page_size=arguments.page_size, scale=LLAMA_8B.scale, mask_k=arguments.mask_k,
                              search_k=arguments.search_k)
    deadline = time.monotonic() + arguments.seconds
    results: list[dict[str, Any]] = []
    for case in arguments.cases:
        if time.monotonic() > deadline:
            print(f"{case}: no time left", flush=True)
            continue
        result: dict[str, Any] = {"case": case}
        results.append(result)
        try:
            measure(result, library, settings, case, arguments, deadline)
        except (RuntimeError, ValueError) as error:
            result["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(f"{case}: {result['failed']}", flush=True)
        torch.cuda.empty_cache()
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "kernel_decode2.json").write_text(json.dumps(results, indent=1))
    print(table(results, arguments.copy_rate))
    return int(any(result.get("problems") or "failed" in result for result in results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--library", required=True, help="file with the entry points of hip_attention_v2.h")
    parser.add_argument("--cases", nargs="+", default=CASES, help="tokens, and batch after a slash: 128k/16")
    parser.add_argument("--seconds", type=float, default=300, help="after so many no new case is begun")
    parser.add_argument("--rows", type=int, default=1, help="new rows of a sequence")
    parser.add_argument("--mask-k", type=int, default=8192)
    parser.add_argument("--search-k", type=int, default=32768)
    parser.add_argument("--page-size", type=int, default=PAGE)
    parser.add_argument("--no-dense", action="store_true", help="without dense attention")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel, called one by one")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--copy-rate", type=float, default=4.3e12, help="bytes/s of a device copy, read plus written")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**16)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    return parser.parse_args()


def tokens_of(case: str) -> tuple[int, int]:
    """Tokens and batch."""
    length, _, batch = case.partition("/")
    scale = {"k": 1 << 10, "M": 1 << 20}.get(length[-1])
    return (int(length[:-1]) * scale if scale else int(length)), int(batch or 1)


def measure(
    result: dict[str, Any], library: DecodeLibrary, settings: DecodeSettings, case: str, arguments: argparse.Namespace,
    deadline: float,
) -> None:
    tokens, batch = tokens_of(case)
    past = tokens - 33  # no block is filled: 63 steps of 64
    free = torch.cuda.mem_get_info()[0]
    each = int(1.3 * 2 * batch * tokens * LLAMA_8B.kv_heads * LLAMA_8B.row_bytes)
    layers = [
        Layer(library, LLAMA_8B, settings, past=past, batch=batch, rows=arguments.rows, seed=arguments.seed + index)
        for index in range(max(1, min(LAYERS, int(0.85 * free) // each)))
    ]
    result |= {"tokens": tokens, "batch": batch, "layers": len(layers), "append_ms": layers[0].append_ms}
    for mode in ("searched", "reused"):
        for layer in layers:
            layer()
        torch.cuda.synchronize()
        found = check.check(layers[0])
        result.setdefault("checks", {})[mode] = asdict(found)
        result.setdefault("problems", []).extend(f"{mode}: {problem}" for problem in found.problems)
        if found.problems:
            print(f"{case}, {mode}: {found}", flush=True)
        counted = work.count(LLAMA_8B, settings, past, batch, searched=mode == "searched")
        timing = replayed_steps(layers, replays=arguments.replays)
        result[mode] = {"us": asdict(timing), "bytes": asdict(counted), "total_bytes": counted.total}
        print(f"{case}, {mode}: {timing.median:.2f} µs ({timing.low:.2f} to {timing.high:.2f}), "
              f"{counted.total / 1e6:.1f} MB, error {found.error:.1e}, {found.other} of {found.chosen} blocks differ",
              flush=True)
        if arguments.profile:
            result[mode]["kernels"] = kernel_times(layers)
            print(f"  kernels: {result[mode]['kernels']}", flush=True)
        for layer in layers:
            layer.reuse()
    del layers
    torch.cuda.empty_cache()
    if not arguments.no_dense and time.monotonic() < deadline:
        for name in DENSE:
            result[name] = dense(name, tokens, batch, arguments)
            print(f"{case}, {name}: {result[name]}", flush=True)
            torch.cuda.empty_cache()


def kernel_times(layers: list[Layer]) -> dict[str, float]:
    """Microseconds of each kernel, median over calls of all layers; one that waits for another counts that."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            for layer in layers:
                layer()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        for name in ("scanKernel", "codesKernel", "attendKernel"):
            if name in event.name:
                times.setdefault(name, []).append(event.device_time)
    return {name: round(sorted(of)[len(of) // 2], 2) for name, of in times.items()}


def dense(name: str, tokens: int, batch: int, arguments: argparse.Namespace) -> float | str:
    """Microseconds of one row over all tokens, or why there are none."""
    def call_on(seed: int) -> Callable[[], torch.Tensor]:
        tensors = draw(LLAMA_8B, batch=batch, queries=arguments.rows, tokens=tokens, seed=seed)
        return lambda: scaled_dot_product_attention(
            tensors.query, tensors.key, tensors.value, scale=LLAMA_8B.scale, enable_gqa=True)

    try:
        with sdpa_kernel(DENSE[name]):
            sets = dense_sets(LLAMA_8B, batch=batch, tokens=tokens)
            calls = [call_on(arguments.seed + index) for index in range(sets)]
            timing: Timing = replayed_steps(calls, replays=7)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"[:120]
    return timing.median


def table(results: list[dict[str, Any]], copy_rate: float) -> str:
    lines = ["| tokens / batch | searched, µs | of the limit | TB/s | reused, µs | FlashAttention-2 | cuDNN | checks |",
             "|---|---|---|---|---|---|---|---|"]
    for result in results:
        if "searched" not in result:
            lines.append(f"| {result['case']} | {result.get('failed', '')} | | | | | | |")
            continue
        searched, reused = result["searched"], result.get("reused", {"us": {"median": float("nan")}})
        time_us, moved = searched["us"]["median"], searched["total_bytes"]
        verdict = "; ".join(result["problems"]) or "right"
        peers = [f"{result[name]:.0f}" if isinstance(result.get(name), float) else "" for name in DENSE]
        lines.append(
            f"| {result['case']} | {time_us:.1f} | {moved / copy_rate * 1e8 / time_us:.0f}% "
            f"| {moved / time_us / 1e6:.2f} | {reused['us']['median']:.1f} | {' | '.join(peers)} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
