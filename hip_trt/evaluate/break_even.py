"""The length from which HiP is faster than dense attention, by config: one layer on a GPU, prefill and decode.

Dense attention is PyTorch's, by each of its fast kernels. What hip-trt computes is compared with the reference once for
each config, before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hip_trt.bench import dense
from hip_trt.bench.checks import CheckError
from hip_trt.bench.decode_step import decode_steps
from hip_trt.bench.geometry import Geometry
from hip_trt.bench.inputs import draw
from hip_trt.bench.prefill_call import PrefillCall
from hip_trt.bench.timing import replayed_steps, single_calls
from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError
from hip_trt.evaluate.variations import variations_of
from hip_trt.library import Library

PREFILL_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DECODE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
BATCHES = (1, 4, 16)
"""Of decode steps; prefill has one sequence."""

STEP_BYTES = 32 << 20
"""What a decode step reads, roughly: decides over how many sets of sequences steps rotate."""


@dataclass(frozen=True)
class Case:
    """One curve over the length.

    Attributes:
        mode: "prefill", "decode" (searched from the top) or "decode, reused" (from the nodes of the step before).
        name: what is timed: what differs from the base config, or one of dense attention's kernels.
        config: pruning; None for dense attention.
        batch: sequences.
    """

    mode: str
    name: str
    config: HipConfig | None
    batch: int


def cases(base: HipConfig, batches: Sequence[int] = BATCHES) -> list[Case]:
    """All curves, dense attention and the base config first."""
    shapes = [("prefill", 1), *(("decode", batch) for batch in batches)]
    found = [Case(mode, name, None, batch) for mode, batch in shapes for name in dense.BACKENDS]
    for mode, batch in shapes:
        found.append(Case(mode, "base", base, batch))
        if mode == "decode":
            found.append(Case("decode, reused", "base", base, batch))
    for mode in ("prefill", "decode"):
        budget = "decode_mask_k" if mode == "decode" else "mask_k"
        tokens: int = getattr(base, budget)
        changes: list[dict[str, Any]] = [
            {budget: tokens // 2}, {budget: tokens * 2}, {"block_k": base.block_k // 2}, {"block_k": base.block_k * 2},
            {"leaf_branch": 4}, {"leaf_branch": 8}, {"branch": 2}, {"branch": 8}, {"branch": 2, "leaf_branch": 2},
        ]
        if mode == "prefill":
            changes += [{"stride_q": 1}, {"stride_q": 16}]
        found += [Case(mode, name, config, 1) for name, config in variations_of(base, changes)]
    return found


def measure(
    library: Library, geometry: Geometry, wanted: Sequence[Case], *, lengths: Sequence[int] = (), seed: int = 0,
    limit: float | None = None, progress: Callable[[str], object] = lambda line: None,
    save: Callable[[dict[str, Any]], object] = lambda data: None,
) -> dict[str, Any]:
    """Time each case at each length.

    Args:
        library: the plugin library.
        geometry: of the layer.
        wanted: see :func:`cases`.
        lengths: tokens, multiples of the page size; by default :data:`PREFILL_LENGTHS` and :data:`DECODE_LENGTHS`.
        seed: of the tensors.
        limit: seconds, after which no further case begins; those left out say so.
        progress: called with a line after each case.
        save: called with the data so far after each case.

    Returns:
        The curves, as :func:`hip_trt.evaluate.break_even_study.study` reads them: medians, milliseconds for prefill and
        microseconds for a decode step.
    """
    curves: list[dict[str, Any]] = []
    data = {"curves": curves}
    end = None if limit is None else time.monotonic() + limit
    for case in wanted:
        prefill = case.mode == "prefill"
        curve: dict[str, Any] = {
            "mode": case.mode, "name": case.name, "batch": case.batch, "unit": "ms" if prefill else "µs",
            "config": None if case.config is None else case.config.model_dump(mode="json"), "times": {}, "failed": {},
            "checked": None,
        }
        curves.append(curve)
        every = sorted(lengths or (PREFILL_LENGTHS if prefill else DECODE_LENGTHS))
        for tokens in reversed(every):  # the longest first: there it is checked, and nothing wrong is timed
            if end is not None and time.monotonic() > end:
                curve["failed"][str(tokens)] = "no time was left"
                continue
            try:
                if case.config is None:
                    median = _dense(geometry, case, tokens, seed)
                else:
                    longest = tokens == every[-1]
                    median = _hip(library, geometry, case.config, case, tokens, seed, curve if longest else None)
            except CheckError as error:
                curve["failed"] = {str(length): str(error) for length in every}
                break
            except (HipTrtError, RuntimeError) as error:
                curve["failed"][str(tokens)] = f"{type(error).__name__}: {error}"[:300]
            else:
                curve["times"][str(tokens)] = round(median, 4)
            torch.cuda.empty_cache()
        curve["times"] = dict(reversed(curve["times"].items()))
        progress(f"{case.mode}, batch {case.batch}, {case.name}: {_line(curve)}")
        save(data)
    return data


def _line(curve: dict[str, Any]) -> str:
    times = ", ".join(f"{tokens} {value:.4g}" for tokens, value in curve["times"].items())
    failed = "".join(f"; {tokens} {reason}" for tokens, reason in curve["failed"].items())
    return f"{times} {curve['unit']}{failed}"


def _dense(geometry: Geometry, case: Case, tokens: int, seed: int) -> float:
    if case.mode == "prefill":
        tensors = draw(geometry, batch=1, queries=tokens, tokens=tokens, seed=seed)
        return dense.time_prefill(geometry, case.name, tensors, seconds=0.2).median
    return dense.time_decode(geometry, case.name, tokens=tokens, batch=case.batch, seed=seed).median


def _hip(
    library: Library, geometry: Geometry, config: HipConfig, case: Case, tokens: int, seed: int,
    checked: dict[str, Any] | None,
) -> float:
    """Time hip-trt; where ``checked`` is given, compare with the reference first, and write there what came of it."""
    if case.mode == "prefill":
        tensors = draw(geometry, batch=1, queries=tokens, tokens=tokens, seed=seed)
        call = PrefillCall(library, geometry, config, tensors)
        if checked is not None:
            checked["checked"] = call.check().as_json()
        return single_calls(call, seconds=0.2).median
    steps = decode_steps(
        library, geometry, config, past=tokens, batch=case.batch, step_bytes=case.batch * STEP_BYTES, seed=seed
    )
    if case.mode == "decode, reused":
        for step in steps:
            step()
            step.reuse()
    if checked is not None:
        checked["checked"] = steps[0].check().as_json()
    return replayed_steps(steps, replays=7).median
