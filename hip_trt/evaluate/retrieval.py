"""Does a model find a fact wherever it stands in a long context? Dense against HiP, over lengths, depths and configs.

A context is prefilled once, with HiP's prefill masks, then its cache is copied for each of its questions. By default a
question is one more chunk of prompt, as the next turn of a conversation is; or it is decoded token by token. The answer
is decoded in either case, with the config's schedule of searches.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, HipTrtError, RuntimeInputError
from hip_trt.evaluate.perplexity_grid import METHODS, Method
from hip_trt.evaluate.retrieval_probes import Fact, Probe
from hip_trt.evaluate.variations import in_words

Asked = Literal["prefill", "decode"]
"""How a question is read: as a chunk of prompt, or token by token."""

DENSE, DEFAULT = "dense", "default"
WINDOW_ONLY = METHODS["none"]

GRID: tuple[Mapping[str, Any], ...] = (
    {},
    {"refresh_interval": 1},
    {"reuse_level": 0},
    {"mask_k": 2048, "decode_mask_k": 1024},
    {"mask_k": 4096, "decode_mask_k": 4096},
    {"mask_k": 8192, "decode_mask_k": 8192},
    {"mask_k": 4096},
    {"decode_mask_k": 2048},
    {"decode_mask_k": 4096},
    {"leaf_branch": 4},
    {"branch": 2},
    {"branch": 16},
    {"block_k": 32},
    {"mask_heads": "query"},
    {"method": "exact"},
    {"method": "none"},
)
"""What differs from the defaults; ``method`` as in :mod:`hip_trt.evaluate.baselines`. The last one must fail, or the
probe proves nothing."""


@dataclass(frozen=True)
class Choice:
    """A row of the study.

    Attributes:
        label: what differs from the default config, for tables.
        config: None: dense attention, transformers' own.
        method: how blocks are chosen when a question is read and answered; the context is prefilled with HiP.
    """

    label: str
    config: HipConfig | None
    method: Method = "hip"


def choices(grid: Sequence[Mapping[str, Any]] = GRID, base: HipConfig | None = None) -> list[Choice]:
    """Dense attention, then one config for each entry.

    Args:
        grid: fields that an entry changes, and ``method`` where it is not HiP.
        base: config that they change; the defaults if None.

    Raises:
        ConfigError: a field or the method is unknown, or has a value that is not allowed.
    """
    base = base or HipConfig.create()
    found = [Choice(DENSE, None)]
    for entry in grid:
        changes = dict(entry)
        method = changes.pop("method", "hip")
        if method not in METHODS:
            raise ConfigError(f"method: {method!r} is not allowed; it must be one of {', '.join(METHODS)}.")
        words = [*([] if method == "hip" else [METHODS[method]]), *([in_words(changes)] if changes else [])]
        config = base.replace(**changes) if changes else base
        found.append(Choice(", ".join(words) or DEFAULT, config, method))
    return found


def read_grid(path: str | Path) -> list[dict[str, Any]]:
    """A grid from a YAML file: a list of fields of HipConfig, such as ``- {mask_k: 4096, decode_mask_k: 4096}``.

    Raises:
        ConfigError: the file cannot be read, or is not such a list.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--grid {path}: cannot be read: {error.strerror}.", "Give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--grid {path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--grid {path}: must be a list of configs.", "Write lines such as - {mask_k: 4096}")
    return [{str(name): value for name, value in entry.items()} for entry in entries]


def ask(model: Any, probe: Probe, choice: Choice, *, asked: Asked = "prefill", at_once: int = 16) -> list[int]:
    """Prefill a context, then ask for its facts.

    Args:
        model: of transformers, not patched; it is left so.
        probe: the context and the facts.
        choice: how attention is pruned.
        asked: how the questions are read; baselines choose blocks for every token by itself in either case.
        at_once: questions in a batch: each has a copy of the cache.

    Returns:
        For each fact, how many tokens of its answer are right before the first wrong one. Right tokens are fed in
        either case, so an answer that is right as a whole is what greedy decoding (among the candidates) gives.
    """
    from hip_trt.huggingface import cache_argument, output_cache, patch, unpatch

    if choice.config is not None:
        patch(model, choice.config)
    try:
        with torch.inference_mode():
            context = probe.context[None].to(model.device)
            given = cache_argument(model, _cache(model, probe, choice))
            cache = output_cache(model, model(context, use_cache=True, logits_to_keep=1, **given))
            if choice.method != "hip":
                return [_answer_at_once(model, copy.deepcopy(cache), probe, fact) for fact in probe.facts]
            found: list[int] = []
            for first in range(0, len(probe.facts), at_once):
                facts = probe.facts[first : first + at_once]
                question, answer = (
                    torch.tensor([getattr(fact, part) for fact in facts], device=model.device)
                    for part in ("question", "answer")
                )
                found += _answers(model, _fork(cache, len(facts)), probe, question, answer, asked)
            return found
    finally:
        unpatch(model)


def _cache(model: Any, probe: Probe, choice: Choice) -> Any:
    """An empty cache with room for all; None for the model's own."""
    from hip_trt.evaluate.baselines import BaselineCache
    from hip_trt.huggingface import HipCache

    if choice.config is None:
        return None
    if choice.method == "hip":
        return HipCache(model.config, choice.config, max_tokens=probe.tokens)
    return BaselineCache(
        model.config, choice.config, choice.method, prompt=len(probe.context), max_tokens=probe.tokens
    )


def _fork(cache: Any, number: int) -> Any:
    """A copy of a cache of one sequence, with that sequence so many times."""
    fork = copy.deepcopy(cache)
    fork.batch_repeat_interleave(number)
    return fork


def _answers(
    model: Any, cache: Any, probe: Probe, question: Tensor, answer: Tensor, asked: Asked
) -> list[int]:
    """Leading tokens of each answer that are right, decoded. question: [N, Q], answer: [N, A]."""
    from hip_trt.huggingface import cache_argument

    given = cache_argument(model, cache)
    calls = [question] if asked == "prefill" else [*torch.split(question, 1, dim=1)]
    calls += torch.split(answer[:, :-1], 1, dim=1)
    logits = [model(tokens, use_cache=True, logits_to_keep=1, **given).logits for tokens in calls]
    return _leading(_right(torch.cat(logits[-answer.shape[1] :], dim=1), answer, probe.candidates))


def _answer_at_once(model: Any, cache: Any, probe: Probe, fact: Fact) -> int:
    """The same for one fact, in one call: for caches in which every token chooses blocks by itself."""
    from hip_trt.huggingface import cache_argument

    tokens = torch.tensor([[*fact.question, *fact.answer]], device=model.device)
    count = len(fact.answer)
    given = cache_argument(model, cache)
    logits = model(tokens[:, :-1], use_cache=True, logits_to_keep=count, **given).logits
    return _leading(_right(logits, tokens[:, -count:], probe.candidates))[0]


def _right(logits: Tensor, answer: Tensor, candidates: Tensor | None) -> Tensor:
    """Which tokens of answers are the likeliest of all candidates: [N, A] bool. logits: [N, A, V]."""
    if candidates is None:
        return logits.argmax(-1) == answer
    candidates = candidates.to(logits.device)
    best = candidates[logits[..., candidates].argmax(-1)]
    return (best == answer) | ~torch.isin(answer, candidates)


def _leading(right: Tensor) -> list[int]:
    """True values of each row before the first that is not: right is [N, A] bool."""
    counts: list[int] = right.int().cumprod(1).sum(1).tolist()
    return counts


@dataclass(frozen=True)
class Setting:
    """A kind of context.

    Attributes:
        tokens: of context, question and answer.
        kind: what stands in it, for tables: a text's name, or how far its facts are repeated.
        probes: contexts of that kind.
    """

    tokens: int
    kind: str
    probes: Sequence[Probe]


@dataclass
class Results:
    """What was measured so far.

    Attributes:
        depths: of the facts of a context.
        answer_tokens: of an answer.
        rows: for each kind of context, length and config, ``right``: a string for each context, with a digit for each
            fact: how many tokens of the answer were right before the first wrong one; or ``failed``, why there is
            nothing.
        missing: what was left out, for want of time.
    """

    depths: list[float]
    answer_tokens: int
    asked: Asked
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"depths": self.depths, "answer_tokens": self.answer_tokens, "asked": self.asked, "rows": self.rows,
                "missing": self.missing}


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Refuse contexts that the model was not made for.

    Raises:
        RuntimeInputError: naming the length and the model's context.
    """
    context = int(model.config.max_position_embeddings)
    for length in lengths:
        if length > context:
            raise RuntimeInputError(
                f"--lengths: {length} tokens are beyond the model's context of {context}.",
                "Give shorter ones, or another model.",
            )


def run(
    model: Any, settings: Iterator[Setting], configs: Sequence[Choice], *, asked: Asked = "prefill", at_once: int = 16,
    time_limit: float | None = None, say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """Ask for all facts of all contexts, dense and pruned.

    Args:
        model: of transformers, not patched.
        settings: kinds of contexts.
        configs: from :func:`choices`.
        asked, at_once: see :func:`ask`.
        time_limit: seconds after which no row is begun.
        say: is told of each row.
        save: gets the data so far after each setting.

    Returns:
        :meth:`Results.as_json`.
    """
    began = time.monotonic()
    results: Results | None = None
    for setting in settings:
        facts = setting.probes[0].facts
        if results is None:
            results = Results([fact.depth for fact in facts], len(facts[0].answer), asked)
            assert results.answer_tokens < 10, "a digit"
        for choice in configs:
            row: dict[str, Any] = {"tokens": setting.tokens, "kind": setting.kind, "config": choice.label}
            if time_limit is not None and time.monotonic() - began > time_limit:
                results.missing.append(f"{setting.kind}, {setting.tokens} tokens, {choice.label}")
                continue
            since = time.monotonic()
            try:
                row["right"] = [
                    "".join(map(str, ask(model, probe, choice, asked=asked, at_once=at_once)))
                    for probe in setting.probes
                ]
            except (HipTrtError, torch.OutOfMemoryError) as error:
                row["failed"] = " ".join(str(error).split())[:200]
            row["seconds"] = round(time.monotonic() - since, 2)
            results.rows.append(row)
            whole = sum(int(count) == results.answer_tokens for probe in row.get("right", []) for count in probe)
            asked_for = sum(map(len, row.get("right", [])))
            say(f"{setting.kind:>16}  {setting.tokens:7d} tokens  {whole:4d} of {asked_for:4d}  {row['seconds']:6.1f} s"
                f"  {choice.label}{'  ' + row['failed'] if 'failed' in row else ''}")
        save(results.as_json())
    if results is None:
        raise RuntimeInputError("--lengths: none was given.", "Give some, such as --lengths 4096,8192.")
    return results.as_json()


def interval(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's score interval): its lower and upper end."""
    z, share = 1.96, right / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    total = 1 + z * z / of
    return max(0.0, (middle - half) / total), min(1.0, (middle + half) / total)
