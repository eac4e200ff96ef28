"""Perplexity of real texts, dense against HiP and against simpler ways to prune.

Dense is transformers' own SDPA attention; HiP is :func:`hip_trt.patch` on the same model, in the same type. Texts are
read in calls of some thousand tokens. Changes are paired: the same predictions with one and the other attention, so
that what a text is like cancels out.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hip_trt.errors import ConfigError, HipTrtError, RuntimeInputError
from hip_trt.evaluate.likelihood import LogLikelihood
from hip_trt.evaluate.perplexity_grid import Case
from hip_trt.evaluate.rope_scaling import scaled

CHUNK = 2048
"""Tokens in a call: what logits take in memory follows from it."""
BATCH = 64
"""Predictions in one of the batches whose means give the error of a change; neighbouring ones are not independent."""


@dataclass(frozen=True)
class Setting:
    """What is read, and what of it counts.

    Attributes:
        tokens: of each text.
        skip: predictions that do not count: those with fewer tokens before them.
        prompt: tokens that are prefilled before decode steps begin; only those count in rows of decode.
        scaling: of RoPE, see :mod:`hip_trt.evaluate.rope_scaling`.
        factor: of the scaling.
        dtype: of weights and activations, for the record.
    """

    tokens: int
    skip: int
    prompt: int
    scaling: str = "none"
    factor: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.skip <= self.prompt <= self.tokens - 2:
            raise RuntimeInputError(
                f"--skip {self.skip} with {self.tokens} tokens leaves nothing to predict.",
                "Give a smaller --skip, or a larger --max-tokens.",
            )


@dataclass
class Section:
    """All rows of one setting.

    Attributes:
        setting: what was read.
        dense: losses of each text, from ``skip`` on.
        dense_within: the same predictions where the model never sees more than the context it was trained for; only
            where the setting goes beyond it.
        rows: what was measured so far, as JSON has it.
    """

    setting: Setting
    dense: dict[str, Tensor]
    dense_within: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        setting = self.setting
        return {
            **{name: getattr(setting, name) for name in ("tokens", "skip", "prompt", "scaling", "factor", "dtype")},
            "dense": {
                name: {
                    "perplexity": _perplexity(losses),
                    "by_position": _by_position(losses, setting),
                    **({"within_context_by_position": _by_position(self.dense_within[name], setting)}
                       if name in self.dense_within else {}),
                } for name, losses in self.dense.items()
            },
            "rows": self.rows,
        }


def read(model: Any, tokens: Sequence[int], *, skip: int = 0, prompt: int = 0, chunk: int = CHUNK,
         cache: Any = None) -> Tensor:
    """Losses of a text under a model.

    Args:
        model: of transformers, patched or not.
        tokens: the text.
        skip: see :class:`LogLikelihood`.
        prompt: no call crosses the end of so many tokens.
        chunk: tokens in a call.
        cache: an empty one for the model to fill; None for the model's own.

    Returns:
        [N] float64, in nats.

    Raises:
        RuntimeInputError: the text is too short, or a loss is not finite.
    """
    from hip_trt.evaluate.teacher_forced import stretches
    from hip_trt.huggingface import cache_argument, output_cache

    likelihood = LogLikelihood(tokens, skip=skip)
    with torch.inference_mode():
        for start, end in stretches(len(tokens), prompt, chunk):
            counts = end > skip
            output = model(
                torch.tensor([list(tokens[start:end])], device=model.device), use_cache=True,
                logits_to_keep=0 if counts else 1, **cache_argument(model, cache),
            )
            cache = output_cache(model, output)
            if counts:
                likelihood.add(output.logits[0], start)
    losses = likelihood.losses
    if not bool(losses.isfinite().all()):
        raise RuntimeInputError(
            f"The model's predictions are not finite in {str(model.dtype).removeprefix('torch.')}.",
            "Give --dtype bfloat16 or float32.",
        )
    return losses


def read_within(model: Any, tokens: Sequence[int], *, skip: int, context: int) -> Tensor:
    """Losses of the same predictions as :func:`read`, with at most ``context`` tokens before any of them, and at least
    half as many from there on where the text is longer."""
    end, half = min(context, len(tokens)), context // 2
    parts = [read(model, tokens[:end], skip=skip)]
    while end < len(tokens):
        start, last = end - half, min(end + half, len(tokens))
        parts.append(read(model, tokens[start:last], skip=half - 1))
        end = last
    return torch.cat(parts)


def begin(model: Any, texts: Mapping[str, Sequence[int]], setting: Setting) -> Section:
    """Read all texts densely.

    Args:
        model: not patched.
        texts: tokens by the text's name, at least ``setting.tokens`` of each.
    """
    cut = {name: tokens[: setting.tokens] for name, tokens in texts.items()}
    context = model.config.max_position_embeddings
    with scaled(model, setting.scaling, setting.factor):
        dense = {name: read(model, tokens, skip=setting.skip) for name, tokens in cut.items()}
    within = {}
    if setting.tokens > context:
        within = {name: read_within(model, tokens, skip=setting.skip, context=context) for name, tokens in cut.items()}
    return Section(setting, dense, within)


def measure(model: Any, texts: Mapping[str, Sequence[int]], section: Section, case: Case, *, seed: int = 0) -> None:
    """Add one row to a section: a case on all texts. What fails is entered with the reason."""
    from hip_trt.huggingface import patch, unpatch

    setting = section.setting
    start = time.perf_counter()
    row: dict[str, Any] = {"mode": case.mode, "method": case.method, "label": case.label, "changes": dict(case.changes)}
    decode = case.mode == "decode"
    try:
        patch(model, case.config)
        results = {}
        with scaled(model, setting.scaling, setting.factor):
            for name in section.dense:
                cut = texts[name][: setting.tokens]
                losses = read(
                    model, cut, skip=setting.prompt if decode else setting.skip,
                    prompt=setting.prompt if decode else 0, chunk=_chunk(case),
                    cache=_cache(model, case, setting, len(cut), seed),
                )
                dense = section.dense[name][setting.prompt - setting.skip if decode else 0 :]
                results[name] = compared(losses, dense, setting, setting.prompt if decode else setting.skip)
        worst = max(results, key=lambda name: float(results[name]["change"]))
        row |= {"texts": results, "worst": results[worst]["change"], "worst_text": worst}
    except HipTrtError as error:
        row["failed"] = error.cause
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    finally:
        unpatch(model)
    section.rows.append(row | {"seconds": round(time.perf_counter() - start, 3)})


def _chunk(case: Case) -> int:
    """Tokens in a call: whole query blocks, and whole intervals between searches from the top."""
    if case.mode == "prefill":
        return CHUNK
    interval = case.config.refresh_interval
    return max(interval, CHUNK // interval * interval)


def _cache(model: Any, case: Case, setting: Setting, tokens: int, seed: int) -> Any:
    from hip_trt.evaluate.baselines import BaselineCache
    from hip_trt.evaluate.teacher_forced import TeacherForcedCache
    from hip_trt.huggingface import HipCache

    decode = case.mode == "decode"
    if case.method != "hip":
        return BaselineCache(
            model.config, case.config, case.method, prompt=setting.prompt if decode else None, max_tokens=tokens,
            seed=seed,
        )
    if decode:
        return TeacherForcedCache(model.config, case.config, prompt=setting.prompt, max_tokens=tokens)
    return HipCache(model.config, case.config, max_tokens=tokens)


def compared(losses: Tensor, dense: Tensor, setting: Setting, first: int) -> dict[str, Any]:
    """A text's perplexity beside the dense one's.

    Args:
        losses, dense: [N], of the same predictions.
        setting: what was read.
        first: position of the first prediction.

    Returns:
        perplexity; dense; change, in percent of dense; error, the standard error of the change, from means over
        :data:`BATCH` predictions; by_position, the change between powers of two.
    """
    difference = losses - dense
    change = float(difference.mean())
    batches = difference[: len(difference) // BATCH * BATCH].reshape(-1, BATCH).mean(1)
    error = float(batches.std() / math.sqrt(len(batches))) if len(batches) > 1 else None
    edges = _edges(first, len(losses))
    return {
        "perplexity": _perplexity(losses), "dense": _perplexity(dense), "change": _percent(change),
        "error": None if error is None else 100 * error,
        "by_position": {
            f"{left}-{right}": _percent(float(difference[left - first : right - first].mean()))
            for left, right in itertools.pairwise(edges)
        },
    }


def _percent(loss: float) -> float:
    return 100 * math.expm1(min(loss, 50.0))


def _perplexity(losses: Tensor) -> float:
    return math.exp(min(float(losses.mean()), 50.0))


def _by_position(losses: Tensor, setting: Setting) -> dict[str, float]:
    first = setting.skip
    edges = _edges(first, len(losses))
    return {
        f"{left}-{right}": _perplexity(losses[left - first : right - first])
        for left, right in itertools.pairwise(edges)
    }


def _edges(first: int, count: int) -> list[int]:
    """The powers of two that divide ``count`` predictions from position ``first`` on, with both ends; stretches too
    short to say anything go with their neighbours."""
    end = first + count + 1  # the text's: its last token predicts nothing
    return [first, *(1 << bit for bit in range(10, 24) if first + BATCH <= 1 << bit <= end - BATCH), end]


def line(row: Mapping[str, Any]) -> str:
    """A row on one line."""
    what = f"{row['mode']:8}{row['label'][:60]:60}"
    if "failed" in row:
        return f"{what}  failed: {row['failed']}"
    changes = "  ".join(f"{name} {result['change']:+.2f}" for name, result in row["texts"].items())
    return f"{what}  {changes} %   {row['seconds']:.1f} s"


def best_scaling(sections: Sequence[Section]) -> Section:
    """Of sections that differ in how RoPE is scaled, the one in which the dense model predicts best."""
    if not sections:
        raise ConfigError("--scalings: none given.", "Give one or more.")
    return min(sections, key=lambda section: sum(float(losses.mean()) for losses in section.dense.values()))
