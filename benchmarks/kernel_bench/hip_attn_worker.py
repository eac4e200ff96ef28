"""Times hip-attn in a process of its own, which has the Triton that it needs.

    python -m kernel_bench.hip_attn_worker --site SITE --entry 1.1 --options '{"mask_k": 512}'

Started by :mod:`kernel_bench.hip_attn`. Reads requests from standard input, one JSON object a line, and answers each
with one line: {"times": {mode: timing}, "error": relative error} or {"failed": reason}. The first answer, before any
request, is {"triton": version} or {"failed": reason}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hip_trt.bench.geometry import LLAMA_8B
from hip_trt.bench.inputs import Tensors, dense_sets, draw
from hip_trt.bench.timing import Timing, replayed_steps, single_calls
from kernel_bench.hip_attn_entries import ENTRIES, Entry

CHECKED_ROWS = 64
"""First rows of a prompt: within both entry points' windows, so their output is dense attention's."""


def prepare(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The same values as hip-attn wants them: [B, S, H, D], contiguous, queries scaled."""
    query = (tensors.query * LLAMA_8B.scale).to(LLAMA_8B.dtype)
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (query, tensors.key, tensors.value))
    return query, key, value


def prefill(entry: Entry, request: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one prompt."""
    tokens = request["tokens"]
    query, key, value = prepare(draw(LLAMA_8B, batch=1, queries=tokens, tokens=tokens, seed=request["seed"]))
    call = entry.bind(query, key, value)
    output, _ = call()
    error = _first_rows_error(output, query, key, value)
    del output
    if request["warm"]:
        return {"error": error}
    return {"times": {"": single_calls(call).as_json()}, "error": error}


def decode(entry: Entry, request: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of a step that searches its mask, and of one that reuses it."""
    tokens, batch = request["tokens"], request["batch"]
    count = 1 if request["warm"] else dense_sets(LLAMA_8B, batch=batch, tokens=tokens)
    sets = [prepare(draw(LLAMA_8B, batch=batch, queries=1, tokens=tokens, seed=request["seed"] + index))
            for index in range(count)]
    error = _last_token_error(entry, *sets[0])
    calls = [entry.bind(*tensors) for tensors in sets]
    masks = [call()[1] for call in calls]
    calls[0](masks[0])
    torch.cuda.synchronize()
    if request["warm"]:
        return {"error": error}
    reused = [partial(call, mask) for call, mask in zip(calls, masks, strict=True)]
    return {"times": {"searched": _step_time(calls).as_json(), "reused": _step_time(reused).as_json()},
            "error": error}


def _step_time(steps: Sequence[Callable[[], Any]]) -> Timing:
    """In a replayed graph, or in single calls where it cannot be captured."""
    try:
        return replayed_steps(steps, replays=7)
    except RuntimeError as error:
        print(f"cannot be captured: {error}", file=sys.stderr)
    torch.cuda.synchronize()
    milliseconds = single_calls(steps[0])
    return milliseconds.scaled(1e3)


def _relative_error(output: Tensor, expected: Tensor) -> float | None:
    """None where it is not finite, which JSON cannot say."""
    error = float((output.float() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else None


def _first_rows_error(output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Relative error of rows so early that everything before them is in the window."""
    if not bool(output.isfinite().all()):
        return None
    logits = query[0, :CHECKED_ROWS, 0].float() @ key[0, :CHECKED_ROWS, 0].float().mT
    causal = torch.ones_like(logits, dtype=torch.bool).tril()
    expected = logits.masked_fill(~causal, float("-inf")).softmax(-1) @ value[0, :CHECKED_ROWS, 0].float()
    return _relative_error(output[0, :CHECKED_ROWS, 0], expected)


def _last_token_error(entry: Entry, query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Relative error of a query that is all for the newest token, which every mask holds."""
    group = query.shape[2] // key.shape[2]
    pointed = key[:, -1:].repeat_interleave(group, dim=2)
    output, _ = entry.bind(pointed, key, value)()
    expected = value[:, -1:].repeat_interleave(group, dim=2).float()
    return _relative_error(output, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--entry", choices=sorted(ENTRIES), required=True)
    parser.add_argument("--options", type=json.loads, default={})
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what hip-attn prints is no answer

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        import triton

        entry: Entry = ENTRIES[options.entry](options.site, options.options)
        answer({"triton": triton.__version__})
    except Exception as error:
        traceback.print_exc()
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    kinds = {"prefill": prefill, "decode": decode}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.inference_mode():
                answer(kinds[request["kind"]](entry, request))
        except Exception as error:
            traceback.print_exc()
            answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
