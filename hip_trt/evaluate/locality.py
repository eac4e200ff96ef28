"""Attention locality, the assumption that the search relies on: neighbouring keys get like scores, so that one of them
can speak for all. Measured for every layer and head of a real model on real text.

Counted are the keys that pruning chooses from: those between sink and window. A search keeps one node in ``branch`` at
each level of its tree, so that share of the nodes is kept here too, for each width: once by their largest scores, once
by their representatives', and the attention lost by that is what locality, or its absence, costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.attention_states import visit_layers
from hip_trt.evaluate.locality_scores import Nodes, correlation, random_correlation
from hip_trt.evaluate.mass_recall import spread
from hip_trt.evaluate.mass_recall_masks import candidates
from hip_trt.evaluate.mass_recall_rows import dense_rows

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (16, 32, 64, 128, 256, 512)
"""Of nodes, in tokens."""

LEAST_NODES = 8
"""Nodes that a row needs of a width, for figures about them to mean anything."""

_ELEMENTS = 1 << 25
"""Scores that are held at once: 128 MB, of which there are some copies."""


def measure(
    model: Any, texts: Mapping[str, Sequence[int]], config: HipConfig, *, rows: int = 128, seed: int = 0,
    scaling: str | None = None, progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure scores of sampled queries in the second half of each text.

    Args:
        model: a transformers causal language model.
        texts: token ids, by name.
        config: block_k, branch, sink and window count.
        rows: how many queries are sampled of each text.
        seed: of random pairs.
        scaling: of RoPE, for texts beyond the model's context; see :func:`visit_layers`.
        progress: called with a line after each layer.

    Returns:
        Means over rows by layer and head, pooled over texts and for each text, as
        :func:`hip_trt.evaluate.locality_study.study` reads it.

    Raises:
        RuntimeInputError: a text is too short to have nodes between sink and window, or too long for the model.
    """
    shortest = min(map(len, texts.values()))
    sink, window = candidates(config, shortest // 2)
    room = (window - sink) * config.block_k
    widths = [width for width in WIDTHS if width % config.block_k == 0 and width * (LEAST_NODES + 1) <= room]
    if not widths:
        raise RuntimeInputError(
            f"A text of {shortest} tokens has {max(room, 0)} between sink and window in its middle: too few.",
            "Give longer texts, or a smaller sink and window.",
        )
    distances = [distance for distance in DISTANCES if 2 * distance <= room]
    random = torch.Generator(model.device).manual_seed(seed)
    figures = partial(_figures, config=config, distances=distances, widths=widths, random=random)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for text, tokens in texts.items():
        found[text] = []

        def visit(layer: int, queries: Tensor, keys: Tensor, scale: float, *, text: str = text) -> None:
            length = queries.shape[1]
            positions = spread(length // 2, length, rows)
            part = max(1, _ELEMENTS // (len(queries) * length))
            parts = [
                figures(queries, keys, scale, positions[begin : begin + part])
                for begin in range(0, len(positions), part)
            ]
            found[text].append({name: torch.cat([some[name] for some in parts]).mean(0).cpu() for name in parts[0]})
            progress(f"{text}: layer {layer + 1} of {model.config.num_hidden_layers}")

        visit_layers(model, tokens, visit, scaling=scaling)
    names = found[next(iter(found))][0]
    by_text = {
        text: {name: torch.stack([layer[name] for layer in layers]) for name in names} for text, layers in found.items()
    }
    return {
        "distances": distances, "widths": widths, "keep": 1 / config.branch, "block_k": config.block_k,
        "heads": {
            name: torch.stack([figures[name] for figures in by_text.values()]).mean(0).round(decimals=5).tolist()
            for name in names
        },
        "texts": {
            text: {name: round(float(values.mean()), 5) for name, values in figures.items()}
            for text, figures in by_text.items()
        },
    }


def _figures(
    queries: Tensor, keys: Tensor, scale: float, positions: list[int], *, config: HipConfig, distances: list[int],
    widths: list[int], random: torch.Generator,
) -> dict[str, Tensor]:
    """Figures of some rows, by name: [rows, Hq] each."""
    rows = torch.tensor(positions, device=queries.device)
    scores = dense_rows(queries, keys, rows[:, None], scale)[0][:, :, 0]
    ranges = torch.tensor([candidates(config, position) for position in positions], device=queries.device)
    token = torch.arange(scores.shape[-1], device=queries.device)
    valid = (token >= ranges[:, :1] * config.block_k) & (token < ranges[:, 1:] * config.block_k)
    found = {"random": random_correlation(scores, valid, random)}
    for distance in distances:
        found[f"correlation {distance}"] = correlation(scores, valid, distance)
    keep = 1 / config.branch
    for width in widths:
        nodes = Nodes.of(scores, valid, width)
        largest, representatives = nodes.largest(), {
            "token": nodes.middle_token(), "block": nodes.middle_block(config.block_k),
        }
        found[f"between {width}"] = nodes.between()
        found[f"held {width}"] = best = nodes.held(largest, keep)
        for name, values in representatives.items():
            found[f"rank {name} {width}"] = nodes.rank_correlation(values)
            found[f"lost {name} {width}"] = best - nodes.held(values, keep)
    return found
