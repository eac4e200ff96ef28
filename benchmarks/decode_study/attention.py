"""Attention of decode rows to sink, window and the blocks that each row chooses, and a model that decodes so.

As in hip_trt.evaluate.teacher_forced, the steps of a known text are taken together, layer by layer: once a layer has
the keys and values of all of them, steps differ in nothing but how much they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .selection import NOTHING, Method

SINK, WINDOW = 64, 512
"""Tokens that every row attends to: the first, and the newest."""
ELEMENTS = 1 << 29
"""Scores that are held at once."""
IMPLEMENTATION = "hip_trt_decode_study"
"""The attention implementation's name in transformers."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Called for each layer: its index, queries [Hq, R, D], keys and values [H, R, D], and the scale of q.k; gives the
output [Hq, R, D]."""


@dataclass(frozen=True)
class Rows:
    """Decode steps that are taken together.

    Attributes:
        positions: [R] int64.
        visible: [R, T] bool, which keys each row may see: those of the prompt, and of the rows' own those before it.
        searching: [R] int64, the row whose choice each row uses: itself, or an earlier one that is reused.
    """

    positions: Tensor
    visible: Tensor
    searching: Tensor

    @classmethod
    def of_text(cls, prompt: int, rows: int, *, interval: int = 1, device: Any = "cpu") -> Rows:
        """The steps after a prompt, one after the other, a search every ``interval`` steps; 0: at every step, for the
        step after it."""
        index = torch.arange(rows, device=device)
        visible = torch.arange(prompt + rows, device=device) <= (prompt + index)[:, None]
        return cls(prompt + index, visible, searched(index, interval))

    def window(self, block: int) -> Tensor:
        """The first block of each row's window: [R]."""
        return (self.positions - WINDOW + 1).clamp(min=0) // block

    def candidates(self, block: int) -> Tensor:
        """Whole blocks between sink and window: [R, N] bool, N blocks up to the last window."""
        window = self.window(block)
        blocks = torch.arange(int(window.max()), device=window.device)
        return (blocks >= -(-SINK // block)) & (blocks < window[:, None])


def searched(step: Tensor, interval: int, phase: Tensor | int = 0) -> Tensor:
    """The step whose choice each step uses: of searches at phase, phase + interval and so on, and at step 0; with
    interval 0, of the step before."""
    if interval == 0:
        return (step - 1).clamp(min=0)
    since = (step - phase).div(interval, rounding_mode="floor") * interval + phase
    return torch.where(step < phase, torch.zeros_like(step), since)


@dataclass
class Decoding:
    """How rows choose.

    Attributes:
        method: of choosing.
        budget: tokens chosen.
        threshold: values of chosen tokens whose probability is below it for all query heads of a KV head are left out;
            0: none. The others keep their probabilities.
        renormalised: or their probabilities are made to add up to 1 anew.
        seed: of random blocks.
        values: of chosen tokens, seen and read, summed over rows and heads.
    """

    method: Method
    budget: int
    threshold: float = 0.0
    renormalised: bool = False
    seed: int = 0
    values: list[int] = field(default_factory=lambda: [0, 0])

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """Queries [H, G, R, D], scaled; keys and values [H, T, D]. Gives [H, G, R, D]."""
        size = max(1, ELEMENTS // (queries[:, :, 0, 0].numel() * keys.shape[1]))
        pieces = torch.split(torch.arange(queries.shape[2], device=keys.device), size)
        chosen = self.choose(queries, keys, rows, pieces)
        return torch.cat([
            self._attend(queries[:, :, piece], keys, values, rows.visible[piece], rows.window(self.method.block)[piece],
                         chosen[:, piece]) for piece in pieces
        ], 2)

    def choose(self, queries: Tensor, keys: Tensor, rows: Rows, pieces: Sequence[Tensor]) -> Tensor:
        """Blocks that each row attends to between sink and window: [H, R, N] bool."""
        method = self.method
        candidates, window = rows.candidates(method.block), rows.window(method.block)
        blocks = candidates.shape[1]
        chooser = method.chooser(keys[:, : blocks * method.block].reshape(len(keys), blocks, method.block, -1))
        generator = torch.Generator(keys.device).manual_seed(self.seed)
        chosen = torch.cat([
            chooser.choose(
                queries[:, :, piece], candidates[piece], self.budget // method.block,
                self._near(queries[:, :, piece], keys, rows.visible[piece], window[piece]), generator,
            ) for piece in pieces
        ], 1)
        reused = rows.searching != torch.arange(len(rows.searching), device=keys.device)
        if not bool(reused.any()):
            return chosen
        newest = torch.arange(blocks, device=keys.device) >= (window - 2 * 64 // method.block)[:, None]
        return (chosen[:, rows.searching] | (newest & reused[:, None])) & candidates

    def _near(self, queries: Tensor, keys: Tensor, visible: Tensor, window: Tensor) -> Tensor:
        """Log-sum of each row's sink and window [H, G, R], where the method asks for it."""
        if not self.method.needs_near:
            return queries.new_zeros(queries.shape[:3])
        scores = queries @ keys[:, None].mT
        near = _always(keys.shape[1], window, self.method.block) & visible
        return torch.logsumexp(scores.masked_fill_(~near, NOTHING), -1)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, window: Tensor, chosen: Tensor
    ) -> Tensor:
        far = chosen.repeat_interleave(self.method.block, -1)
        far = torch.nn.functional.pad(far, (0, keys.shape[1] - far.shape[-1]))
        always = _always(keys.shape[1], window, self.method.block) & visible
        scores = (queries @ keys[:, None].mT).masked_fill_(~(far | always)[:, None], NOTHING)
        probabilities = torch.softmax(scores, -1)
        if self.threshold:
            read = far & (probabilities >= self.threshold).any(1)
            self.values[0] += int(far.sum())
            self.values[1] += int(read.sum())
            probabilities.masked_fill_(~(read | always)[:, None], 0.0)
            if self.renormalised:
                probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities @ values[:, None]


def _always(tokens: int, window: Tensor, block: int) -> Tensor:
    """Sink and window of rows: [R, tokens] bool."""
    token = torch.arange(tokens, device=window.device)
    return (token < SINK) | (token >= window[:, None] * block)


class Prompt:
    """Keys and values of a prompt that was read densely, by layer: [H, T, D] each."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def read(self, model: Any, tokens: Sequence[int]) -> Prompt:
        """Read it; the model's implementation of attention is left as it was."""
        def attend(_: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            self.keys.append(key)
            self.values.append(value)
            group = len(query) // len(key)
            # Repeated: PyTorch's kernels that need no T x T matrix take float32 with equal heads only.
            key, value = (tensor.repeat_interleave(group, 0)[None] for tensor in (key, value))
            return scaled_dot_product_attention(query[None], key, value, is_causal=True, scale=scale)[0]

        run(model, tokens, torch.arange(len(tokens)), attend, logits=1)
        return self

    def cut(self, tokens: int) -> Prompt:
        """Its beginning."""
        beginning = Prompt()
        beginning.keys = [keys[:, :tokens] for keys in self.keys]
        beginning.values = [values[:, :tokens] for values in self.values]
        return beginning

    def decode(self, model: Any, tokens: Sequence[int], rows: Rows, decoding: Decoding) -> Tensor:
        """The logits after each of the rows' tokens: [R, V]."""
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            keys, values = torch.cat((self.keys[layer], key), 1), torch.cat((self.values[layer], value), 1)
            queries = query.reshape(len(keys), -1, *query.shape[1:]) * scale
            return decoding.attend(queries, keys, values, rows).flatten(0, 1)

        return run(model, tokens, rows.positions, attend)


def run(model: Any, tokens: Sequence[int], positions: Tensor, attend: Attend, *, logits: int = 0) -> Tensor:
    """Logits [R, V] of a model whose attention is ``attend``; the last ones only, if ``logits`` says how many."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        with torch.inference_mode():
            result: Tensor = model(
                torch.tensor([list(tokens)], device=model.device), position_ids=positions[None].to(model.device),
                use_cache=False, logits_to_keep=logits, hip_trt_attend=attend,
            ).logits[0]
            return result
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    hip_trt_attend: Attend, **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, R, D] each."""
    return hip_trt_attend(module.layer_idx, query[0], key[0], value[0], scaling).transpose(0, 1)[None], None
