"""Speed of one layer's decode step: HiP, searched or from reused nodes, beside dense attention and hip-attn.

    python benchmarks/kernel_decode.py [--library libhip_trt_plugin.so] [--hip-attn-11 SITE] [--hip-attn-12 SITE]

Llama-3.1-8B geometry (32 query heads, 8 key/value heads, head size 128), bfloat16, random data, HipConfig's defaults.
Microseconds per step inside a replayed CUDA graph, medians over replays, over sequences that are rotated so that none
is in the L2 cache by the time it is used again. All peers get the same sequences. Outputs are checked before they are
timed. Writes kernel_decode.json, .md and .png; see benchmarks/README.md.
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
from hip_trt.bench.decode_step import decode_steps
from hip_trt.bench.geometry import LLAMA_8B
from hip_trt.bench.timing import replayed_steps
from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError
from hip_trt.library import Library

CASES = ((4096, 1), (8192, 1), (16384, 1), (32768, 1), (131072, 1), (1 << 20, 1), (32768, 16), (131072, 16))
"""Tokens and batch."""
QUICK = ((32768, 1), (131072, 1))
PEERS_FROM = 32768
"""hip-attn runs from this length on; the shorter ones are for the break-even length."""
MODES = {"searched": "hip-trt, searched", "reused": "hip-trt, reused nodes"}
PEER_MODES = {"searched": "mask searched", "reused": "mask reused"}


def measure(arguments: argparse.Namespace, library: Library) -> bool:
    """Measure all cases, first hip-trt and dense attention, then hip-attn.

    Returns:
        Whether every output of hip-trt was right.
    """
    config = HipConfig.create()
    peers = hip_attn.peers(arguments.hip_attn_11, arguments.hip_attn_12)
    columns = tuple(f"{peer.name}, {mode}" for peer in peers for mode in PEER_MODES.values())
    header = Header("kernel_decode", "decode", "µs", tuple(MODES.values()), tuple(dense.BACKENDS), columns)
    facts = {"environment": environment.describe(library.path), "config": config.model_dump(mode="json"),
             "seed": arguments.seed}
    report = Report(arguments.out, header, options.rates(arguments), facts)
    cases = chosen_cases(arguments)
    up_to = arguments.peers_up_to or max(tokens for tokens, _ in cases)
    right = True
    for tokens, batch in cases:
        right &= measure_ours(report, library, config, tokens, batch, arguments)
        torch.cuda.empty_cache()
        if tokens <= up_to:
            measure_dense(report, tokens, batch, arguments.seed)

    def record(peer: hip_attn.Peer, case: hip_attn.Case, answer: dict[str, Any]) -> None:
        for mode, name in PEER_MODES.items():
            column = f"{peer.name}, {name}"
            if "error" in answer and mode == "searched":
                report.check(column, case.tokens, case.batch, {name: answer[name] for name in ("error", "triton")})
            report.time(column, case.tokens, case.batch, answer.get("times", {}).get(mode, answer))
        print(f"{peer.name}, {case_name(case.tokens, case.batch)}: {answer}", flush=True)

    wanted = [hip_attn.Case("decode", tokens, batch, arguments.seed) for tokens, batch in cases
              if tokens <= up_to and (arguments.lengths or tokens >= PEERS_FROM)]
    hip_attn.time_peers(peers, wanted, arguments.out, compile_seconds=arguments.compile_seconds, record=record)
    report.write()
    plot(report.content, arguments.out / "kernel_decode.png")
    print(markdown(report.content))
    return right


def chosen_cases(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Tokens and batch, as the options say."""
    if not arguments.lengths:
        return list(QUICK if arguments.quick else CASES)
    known = {tokens for tokens, _ in CASES}
    return [*((tokens, 1) for tokens in arguments.lengths if tokens not in known),
            *(case for case in CASES if case[0] in arguments.lengths)]


def measure_ours(
    report: Report, library: Library, config: HipConfig, tokens: int, batch: int, arguments: argparse.Namespace
) -> bool:
    """Check and time hip-trt in both modes; whether it was right."""
    searched = roofline.decode(LLAMA_8B, config, tokens, batch, reused=False)
    mode = "searched"
    try:
        steps = decode_steps(library, LLAMA_8B, config, past=tokens, batch=batch, step_bytes=searched.device_bytes,
                             seed=arguments.seed)
        for mode, column in MODES.items():
            work = roofline.decode(LLAMA_8B, config, tokens, batch, reused=mode == "reused")
            report.work(column, tokens, batch, work)
            if not arguments.no_check:
                report.check(column, tokens, batch, steps[0].check().as_json())
            timing = replayed_steps(steps, replays=5 if arguments.quick else 15)
            report.time(column, tokens, batch, timing)
            print(f"{column}, {case_name(tokens, batch)}: {timing.median:.1f} µs", flush=True)
            for step in steps:
                step.reuse()
    except (CheckError, HipTrtError, RuntimeError) as error:
        report.time(MODES[mode], tokens, batch, {"failed": f"{type(error).__name__}: {error}"})
        print(f"{MODES[mode]}, {case_name(tokens, batch)}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def measure_dense(report: Report, tokens: int, batch: int, seed: int) -> None:
    """Time both dense backends, or say why not."""
    for name in dense.BACKENDS:
        report.work(name, tokens, batch, roofline.dense_decode(LLAMA_8B, tokens, batch))
        try:
            timing = dense.time_decode(LLAMA_8B, name, tokens=tokens, batch=batch, seed=seed)
        except (CheckError, RuntimeError) as error:
            report.time(name, tokens, batch, {"failed": f"{type(error).__name__}: {error}"})
        else:
            report.time(name, tokens, batch, timing)
            print(f"{name}, {case_name(tokens, batch)}: {timing.median:.1f} µs", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    options.run(options.parse(__doc__), measure)
