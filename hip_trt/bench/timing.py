"""Time on the GPU: replayed CUDA graphs for decode steps, CUDA events around single calls for prefill.

Needs PyTorch only, see :mod:`hip_trt.bench.inputs`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

FLUSH_BYTES = 1 << 30
"""Written before each timed call: several times the L2 cache, and long enough to hide the launch of the call."""


@dataclass(frozen=True)
class Timing:
    """Samples of one thing that was timed, in the unit of its table.

    Attributes:
        median, low, high: of the samples; low and high are the extremes.
        samples: how many.
        how: "graph replay" or "single calls".
    """

    median: float
    low: float
    high: float
    samples: int
    how: str

    @classmethod
    def of(cls, samples: Sequence[float], how: str) -> Timing:
        """Summarize samples, of which there is at least one."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples), how)

    def scaled(self, factor: float) -> Timing:
        """The same in another unit."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.samples, self.how)

    def as_json(self) -> dict[str, Any]:
        """The fields, for a report."""
        return asdict(self)


def replayed_steps(steps: Sequence[Callable[[], Any]], *, replays: int = 15, warm_up: int = 3) -> Timing:
    """Microseconds per step inside a replayed CUDA graph of at least 32 steps, which are called in turn.

    Args:
        steps: calls that can be captured; together they should read several times the L2 cache.

    Raises:
        RuntimeError: a step cannot be captured.
    """
    for step in steps:
        step()
    torch.cuda.synchronize()
    rounds = max(1, 32 // len(steps))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for step in steps:
                step()
    samples = [_elapsed_ms(graph.replay) for _ in range(warm_up + replays)][warm_up:]
    return Timing.of([sample * 1e3 / (rounds * len(steps)) for sample in samples], "graph replay")


def single_calls(call: Callable[[], Any], *, seconds: float = 1.0, least: int = 5, most: int = 30) -> Timing:
    """Milliseconds per call, each from a cold L2 cache.

    Args:
        seconds: about how long to sample for, within ``least`` and ``most`` samples.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        first = _elapsed_ms(call)
    count = max(least, min(most, int(seconds * 1e3 / max(first, 1e-3))))
    samples = []
    for _ in range(count + 1):
        flush.fill_(1)
        samples.append(_elapsed_ms(call))
    return Timing.of(samples[1:], "single calls")


def _elapsed_ms(call: Callable[[], Any]) -> float:
    event: Any = torch.cuda.Event  # has no types
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
