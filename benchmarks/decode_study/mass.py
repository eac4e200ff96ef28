"""How much of the attention outside sink and window chosen blocks hold, in long contexts of stretches side by side.

The model reads stretches of its own context's length, each by itself; their keys side by side are the context, and the
last stretch's newest queries ask. What is far is so more often looked at than in one long text: read the figures beside
each other, not by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hip_trt.evaluate.attention_states import visit_layers

from .attention import Decoding, Rows
from .selection import Method

ASKED, EVERY = 512, 16
"""The last stretch's newest positions, of which every so manieth asks."""


def measure(
    model: Any, stretches: Sequence[Sequence[int]], lengths: Sequence[int], methods: Sequence[Method],
    budgets: Sequence[int], *, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Shares of the far attention, by length, budget and method.

    Args:
        model: of transformers, in float32.
        stretches: token ids; the last ones are used for shorter contexts.
        lengths: of contexts, in tokens: multiples of a stretch.
        methods: to compare.
        budgets: tokens chosen.
    """
    layers, keys = record(model, stretches)
    rows = []
    for length in lengths:
        asked = torch.arange(length - ASKED, length, EVERY, device=model.device)
        steps = Rows(
            asked, torch.arange(length, device=model.device) <= asked[:, None], torch.arange(len(asked)).to(asked)
        )
        shares: dict[tuple[Method, int], list[Tensor]] = {}
        for queries, every in zip(layers, keys, strict=True):
            context = every[:, -length:]
            for case, share in of_layer(queries, context, steps, methods, budgets).items():
                shares.setdefault(case, []).append(share)
        for (method, budget), found in shares.items():
            by_head = torch.cat(found).mean(1)  # of each KV head of each layer
            row = {"length": length, "budget": budget, "method": method.name, "found": float(by_head.mean()),
                   "worst_head": float(by_head.min()), "error": float(by_head.std() / len(by_head) ** 0.5)}
            rows.append(row)
            say(f"{length} {budget // 64:4d} {row['found']:.4f} worst head {row['worst_head']:.3f} {method.name}")
    return rows


def record(model: Any, stretches: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's newest queries [H, G, R, D], scaled, of the last stretch; its keys [H, T, D] of all side by side."""
    queries: list[Tensor] = []
    keys: list[list[Tensor]] = []
    for stretch in stretches:
        queries.clear()

        def visit(layer: int, query: Tensor, key: Tensor, scale: float) -> None:
            queries.append((query[:, -ASKED::EVERY] * scale).reshape(len(key), -1, ASKED // EVERY, key.shape[-1]))
            if layer == len(keys):
                keys.append([])
            keys[layer].append(key)

        visit_layers(model, stretch, visit)
    return queries, [torch.cat(layer, 1) for layer in keys]


def of_layer(
    queries: Tensor, keys: Tensor, steps: Rows, methods: Sequence[Method], budgets: Sequence[int]
) -> dict[tuple[Method, int], Tensor]:
    """Shares of one layer, by method and budget: [H, R]."""
    scores = (queries @ keys[:, None].mT).masked_fill(~steps.visible, float("-inf"))
    probabilities = torch.softmax(scores, -1).sum(1)  # [H, R, T], of all query heads
    everything = [torch.arange(queries.shape[2], device=keys.device)]
    shares = {}
    for method in methods:
        candidates = steps.candidates(method.block)
        mass = probabilities[..., : candidates.shape[1] * method.block]
        mass = mass.reshape(*mass.shape[:2], -1, method.block).sum(-1) * candidates
        for budget in budgets:
            chosen = Decoding(method, budget).choose(queries, keys, steps, everything)
            shares[method, budget] = (mass * chosen).sum(-1) / mass.sum(-1)
    return shares
