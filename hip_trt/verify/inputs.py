"""The calls that a verification makes, as a Polygraphy data loader whose feeds continue from earlier outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # a real text that every Python has: its language reference
from typing import Any

import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt.errors import EnvironmentProblem
from hip_trt.runtime.loading import load_tokenizer
from hip_trt.runtime.pages import pages_for
from hip_trt.spec import ModelSpec
from hip_trt.verify.runners import Feed

_SEED = 20240609
_VARIATION = 0.25
"""What is added to copied keys and values, in standard deviations of theirs, so that no two tokens score the same."""


@dataclass(frozen=True)
class Case:
    """A batch of sequences that grows call by call.

    Attributes:
        name: as reports have it.
        past: tokens that each sequence has committed before the first call, with keys and values that vary those of an
            earlier case: a long context for the price of a short one.
        new: tokens of each sequence in the first call; 0: an idle row.
        steps: decode steps after it.
        tokens: token ids of the first call, by sequence; the script's own where None.
    """

    name: str
    past: tuple[int, ...]
    new: tuple[int, ...]
    steps: int = 0
    tokens: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a case, as it was made.

    Attributes:
        case: name of the case.
        label: such as "prefill 5" or "decode, reused".
        past, new: tokens of each sequence before and in this call.
        decode: whether it is a single-token call.
    """

    case: str
    label: str
    past: tuple[int, ...]
    new: tuple[int, ...]
    decode: bool


def real_text(folder: Path, vocab_size: int) -> list[int]:
    """Token ids of an English text, by the tokenizer in a model's folder; none where it has no usable one.

    Random tokens are like no text: a model may make ten times as much of rounding there.
    """
    try:
        tokenizer = load_tokenizer(folder, required=False)
    except EnvironmentProblem:  # whoever runs the model is told; it can be verified without
        return []
    ids = [] if tokenizer is None else list(tokenizer(topics["specialnames"])["input_ids"])
    return ids if all(0 <= token < vocab_size for token in ids) else []


def searching_context(spec: ModelSpec) -> int:
    """Tokens of a context in which every call searches: a quarter more than what prefill attends to, and a few."""
    hip = spec.hip
    attended = hip.sink_tokens + hip.window_tokens + max(hip.mask_k, hip.decode_mask_k)
    return min(spec.max_position_embeddings, attended * 5 // 4 + hip.block_q + hip.block_k)


def plan_cases(
    spec: ModelSpec, *, steps: int, max_tokens: int, thorough: bool = False,
    prompts: Sequence[Sequence[int]] | None = None, max_prefill: int | None = None, max_batch: int | None = None,
) -> tuple[Case, ...]:
    """Inputs that reach every branch of the operator that the model's sizes allow.

    Args:
        spec: the model.
        steps: decode steps of a case that decodes.
        max_tokens: longest context.
        thorough: longer prompts, and every block edge.
        prompts: token ids to begin "prefill, decode" with, one case each.
        max_prefill: most new tokens of a call; None: any.
        max_batch: most sequences of a call; None: any.
    """
    hip, limit = spec.hip, min(max_tokens, spec.max_position_embeddings)
    fit = max(2, min(limit - steps - 1, max_prefill or limit))
    block, page = hip.block_q, hip.page_size

    def cut(*lengths: int) -> tuple[int, ...]:
        return tuple(min(length, fit) for length in lengths)

    cases = [Case("short", (0,), cut(5))]  # cases without a past come first: the others take theirs from them
    if prompts is not None:
        for number, ids in enumerate(prompts):
            kept = tuple(ids[:fit])
            name = "prefill, decode" if len(prompts) == 1 else f"prompt {number + 1}"
            cases.append(Case(name, (0,), (len(kept),), steps, (kept,)))
    else:
        cases.append(Case("prefill, decode", (0,), cut(2 * block + 1), steps=steps))
    cases.append(Case("block edge", (min(page - 1, limit - fit),), cut(block + 1)))
    past, new_tokens = (0, min(page, limit - fit), 0, 0), (*cut(3, block), 0, *cut(block // 2 + 1))
    cases.append(Case("ragged batch", past[:max_batch], new_tokens[:max_batch], steps=2))
    new = cut(block // 2 + 3)[0]
    long = max(0, limit - new - steps)
    cases.append(Case("long context", (long,), (new,), steps=steps))
    if thorough:
        cases += [
            Case(f"edge {length} after {past}", (past,), cut(length))
            for length in sorted({block - 1, block, page, page + 1})
            for past in (0, min(hip.block_k - 1, limit - fit))
        ]
        cases.append(Case("long prompt", (0,), cut(limit // 2), steps=steps))
    return tuple(cases)


class Script:
    """A Polygraphy data loader. Each feed's state is what the runner under test gave in the call before: both sides get
    the same, so that a call is judged by itself, and errors do not add up over calls.

    Feed it the outputs of every call (:meth:`observe`) before asking for the next feed; Comparator's streaming run
    leaves room for that.

    Args:
        spec: the model.
        cases: what to do.
        announce: told of each call before it is made.
        text: token ids of which prompts are pieces, where it is long enough for one; random ids elsewhere.

    Attributes:
        calls: the calls made so far.
        feed: that of the last call.
    """

    def __init__(
        self, spec: ModelSpec, cases: Sequence[Case], announce: Callable[[Call], object] = lambda _: None,
        text: Sequence[int] = (),
    ) -> None:
        self.spec, self._cases, self._announce, self._text = spec, cases, announce, text
        self._random = torch.Generator().manual_seed(_SEED)
        self.calls: list[Call] = []
        self.feed: Feed = {}
        self._outputs: Mapping[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Feed]:
        for case in self._cases:
            yield from self._play(case)

    def observe(self, outputs: Mapping[str, Any]) -> None:
        """Take the graph outputs of the last call of the runner under test."""
        self._outputs = {name: torch.as_tensor(value) for name, value in outputs.items()}

    def _play(self, case: Case) -> Iterator[Feed]:
        spec, lengths = self.spec, torch.tensor(case.past, dtype=torch.int32)
        state, table = self._state(case)
        rows = case.tokens or tuple(self._tokens(count) for count in case.new)
        interval = min(2, spec.hip.refresh_interval)
        for step in range(1 + case.steps):
            refresh = step == 0 or (step - 1) % interval == 0
            counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
            # A call of one column is a decode step; prompts of one token are padded, as sessions do it.
            width = 1 if step else max(2, int(counts.max()))
            padded = [[*row, *[0] * (width - len(row))] for row in rows]
            self.feed = {
                names.INPUT_IDS: torch.tensor(padded), names.PAST_LENGTHS: lengths,
                names.QUERY_LENGTHS: counts, names.PAGE_TABLE: table,
                names.REFRESH_MASK: torch.tensor([refresh], dtype=torch.int32), **state,
            }
            label = f"prefill {'/'.join(str(len(row)) for row in rows)}"
            if step:
                label = f"decode {step}, {'searched' if refresh else 'reused'}"
            self.calls.append(Call(case.name, label, tuple(lengths.tolist()), tuple(counts.tolist()), width == 1))
            self._announce(self.calls[-1])
            yield self.feed
            if step == 0 and case.past == (0,):
                self._keep_rows(table[0], case.new[0])
            lengths = lengths + counts
            best = self._last_logits(counts).argmax(dim=-1).tolist()
            rows = tuple((token,) if count else () for token, count in zip(best, counts.tolist(), strict=True))
            for layer in range(spec.num_layers):
                for tensor in names.STATE:
                    present = self._outputs[tensor.present(layer)]
                    state[tensor.past(layer)] = present.to(spec.state_dtype(tensor))

    def _tokens(self, count: int) -> tuple[int, ...]:
        spare = len(self._text) - count
        if spare < 0:
            return tuple(torch.randint(self.spec.vocab_size, (count,), generator=self._random).tolist())
        start = int(torch.randint(spare + 1, (), generator=self._random))
        return tuple(self._text[start : start + count])

    def _last_logits(self, counts: Tensor) -> Tensor:
        logits = self._outputs[names.LOGITS]
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[torch.arange(len(counts)), (counts.long() - 1).clamp(min=0)]

    def _keep_rows(self, pages: Tensor, count: int) -> None:
        """Keep a sequence's keys and values, [tokens, Hkv, D] of each pool, for cases that begin with a cache."""
        tokens, size = torch.arange(count), self.spec.hip.page_size
        for layer in range(self.spec.num_layers):
            for tensor in (names.KEY, names.VALUE):
                if len(self._rows.get(tensor.past(layer), ())) < count:
                    pool = self._outputs[tensor.present(layer)]
                    self._rows[tensor.past(layer)] = pool[pages[tokens // size].long(), :, tokens % size].float()

    def _state(self, case: Case) -> tuple[Feed, Tensor]:
        """Pools with keys and values where tokens are committed, and 0 elsewhere; pages in no order."""
        spec, size, batch = self.spec, self.spec.hip.page_size, len(case.past)
        needs = [
            pages_for(past + new + case.steps, size) if past + new else 1
            for past, new in zip(case.past, case.new, strict=True)
        ]
        order = torch.randperm(sum(needs), generator=self._random).to(torch.int32)
        table = torch.full((batch, max(needs)), -1, dtype=torch.int32)
        committed: list[tuple[Tensor, Tensor, Tensor]] = []  # page, row in it, and token
        first = 0
        for row, (need, past) in enumerate(zip(needs, case.past, strict=True)):
            table[row, :need] = order[first : first + need]
            tokens = torch.arange(past)
            committed.append((table[row, tokens // size].long(), tokens % size, tokens))
            first += need
        page, offset, token = (torch.cat(parts) for parts in zip(*committed, strict=True))
        state: Feed = {}
        for layer in range(spec.num_layers):
            for name in (names.KEY.past(layer), names.VALUE.past(layer)):
                pool = torch.zeros(spec.pool_shape(sum(needs)))
                if len(token):
                    pool[page, :, offset] = self._varied(self._rows[name], token)
                state[name] = pool.to(spec.torch_dtype)
            for tensor in names.STATE:
                if not tensor.paged:
                    shape, dtype = spec.state_shape(tensor, batch), spec.state_dtype(tensor)
                    state[tensor.past(layer)] = torch.full(shape, names.NOTHING, dtype=dtype)
        return state, table

    def _varied(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[N, Hkv, D] for tokens [N], as a text of these rows [n, Hkv, D] over and over would nearly have them."""
        noise = torch.randn(len(tokens), *rows.shape[1:], generator=self._random)
        return rows[tokens % len(rows)] + _VARIATION * rows.std() * noise
