"""Speed of one layer's prefill: HiP (cache update, search and attention) beside dense attention and hip-attn.

    python benchmarks/kernel_prefill.py [--library libhip_trt_plugin.so] [--hip-attn-11 SITE] [--hip-attn-12 SITE]

Llama-3.1-8B geometry (32 query heads, 8 key/value heads, head size 128), bfloat16, random data, batch 1, HipConfig's
defaults. Milliseconds between CUDA events, medians, each call from a cold L2 cache. All peers get the same tensors.
Outputs are checked before they are timed. Writes kernel_prefill.json, .md and .png; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from kernel_bench import environment, hip_attn, options
from kernel_bench.plot import plot
from kernel_bench.report import Header, Report, case_name, markdown

from hip_trt.bench import dense, roofline
from hip_trt.bench.checks import CheckError
from hip_trt.bench.geometry import LLAMA_8B
from hip_trt.bench.inputs import Tensors, draw
from hip_trt.bench.prefill_call import PrefillCall
from hip_trt.bench.timing import single_calls
from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError
from hip_trt.library import Library

TABLE = (8192, 32768, 65536, 131072)
BREAK_EVEN = (1024, 2048, 4096, 16384)
"""Lengths for dense attention and hip-trt only, around where they are level."""
QUICK = (8192, 32768)
OURS = "hip-trt"


def measure(arguments: argparse.Namespace, library: Library) -> bool:
    """Measure all lengths, first hip-trt and dense attention, then hip-attn.

    Returns:
        Whether every output of hip-trt was right.
    """
    config, up_to = HipConfig.create(), arguments.peers_up_to or TABLE[-1]
    peers = hip_attn.peers(arguments.hip_attn_11, arguments.hip_attn_12)
    header = Header("kernel_prefill", "prefill", "ms", (OURS,), tuple(dense.BACKENDS), tuple(p.name for p in peers))
    facts = {"environment": environment.describe(library.path), "config": config.model_dump(mode="json"),
             "seed": arguments.seed}
    report = Report(arguments.out, header, options.rates(arguments), facts)
    lengths = sorted(arguments.lengths or (QUICK if arguments.quick else TABLE + BREAK_EVEN))
    right = True
    for tokens in lengths:
        tensors = draw(LLAMA_8B, batch=1, queries=tokens, tokens=tokens, seed=arguments.seed)
        right &= measure_ours(report, library, config, tensors, arguments)
        if tokens <= up_to:
            measure_dense(report, tensors, seconds=0.2 if arguments.quick else 1.0)
        del tensors
        torch.cuda.empty_cache()

    def record(peer: hip_attn.Peer, case: hip_attn.Case, answer: dict[str, Any]) -> None:
        if "error" in answer:
            report.check(peer.name, case.tokens, case.batch, {name: answer[name] for name in ("error", "triton")})
        report.time(peer.name, case.tokens, case.batch, answer.get("times", {}).get("", answer))
        print(f"{peer.name}, {case_name(case.tokens, 1)}: {answer}", flush=True)

    cases = [hip_attn.Case("prefill", tokens, 1, arguments.seed) for tokens in lengths
             if tokens <= up_to and (arguments.lengths or tokens in TABLE)]
    hip_attn.time_peers(peers, cases, arguments.out, compile_seconds=arguments.compile_seconds, record=record)
    report.write()
    plot(report.content, arguments.out / "kernel_prefill.png")
    print(markdown(report.content))
    return right


def measure_ours(
    report: Report, library: Library, config: HipConfig, tensors: Tensors, arguments: argparse.Namespace
) -> bool:
    """Check and time hip-trt; whether it was right."""
    tokens = tensors.query.shape[2]
    report.work(OURS, tokens, 1, roofline.prefill(LLAMA_8B, config, tokens))
    try:
        call = PrefillCall(library, LLAMA_8B, config, tensors)
        if not arguments.no_check:
            report.check(OURS, tokens, 1, call.check().as_json())
        timing = single_calls(call, seconds=0.2 if arguments.quick else 1.0)
    except (CheckError, HipTrtError, RuntimeError) as error:
        report.time(OURS, tokens, 1, {"failed": f"{type(error).__name__}: {error}"})
        print(f"{OURS}, {case_name(tokens, 1)}: {error}", file=sys.stderr, flush=True)
        return False
    report.time(OURS, tokens, 1, timing)
    print(f"{OURS}, {case_name(tokens, 1)}: {timing.median:.3f} ms", flush=True)
    return True


def measure_dense(report: Report, tensors: Tensors, *, seconds: float) -> None:
    """Time both dense backends, or say why not."""
    tokens = tensors.query.shape[2]
    for name in dense.BACKENDS:
        report.work(name, tokens, 1, roofline.dense_prefill(LLAMA_8B, tokens))
        try:
            timing = dense.time_prefill(LLAMA_8B, name, tensors, seconds=seconds)
        except (CheckError, RuntimeError) as error:
            report.time(name, tokens, 1, {"failed": f"{type(error).__name__}: {error}"})
        else:
            report.time(name, tokens, 1, timing)
            print(f"{name}, {case_name(tokens, 1)}: {timing.median:.3f} ms", flush=True)


if __name__ == "__main__":
    options.run(options.parse(__doc__), measure)
