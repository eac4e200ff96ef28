"""How much of dense attention the chosen blocks hold, on real text in a real model, beside other ways to choose as many
tokens.

Shares are of the softmax weights of dense attention. ``outside``: of the weight outside sink and window, what the
chosen blocks hold. ``all``: of all weight, what sink, window and chosen blocks hold. ``top``: of the weight on a row's
heaviest tokens outside sink and window, as many as may be chosen, what those of them hold that lie in chosen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.attention_states import visit_layers
from hip_trt.evaluate.mass_recall_masks import Masks, ReferenceMasks, candidates, first_search
from hip_trt.evaluate.mass_recall_rows import Blocks, Masses, dense_rows
from hip_trt.evaluate.variations import variations_of
from hip_trt.reference import Tree

MODES = ("prefill", "decode")
SHARES = ("outside", "all", "top")
AGES = (7, 31)
"""Of the oldest nodes that are reused at refresh intervals 8 and 32, in decode steps."""

_ELEMENTS = 1 << 26
"""Scores that are held at once: 256 MB, of which there are a few copies."""


@dataclass(frozen=True)
class Variation:
    """One config, and how it is used.

    Attributes:
        name: says what differs from the base, such as "block_k 8".
        config: pruning.
        age: of the nodes that a decoded token starts from, in tokens; 0 where it searches from the top.
    """

    name: str
    config: HipConfig
    age: int = 0

    def budget(self, mode: str) -> int:
        """Blocks that may be chosen."""
        return self.config.decode_mask_blocks if mode == "decode" else self.config.mask_blocks

    def levels(self, mode: str, tokens: int) -> int:
        """Levels of the tree that a search at the end of a text scores; 1 where it scores every block."""
        sink, window = candidates(self.config, tokens - 1)
        return Tree(sink, window, self.config.branch, self.config.leaf_branch).start_level(self.budget(mode)) + 1


def variations(base: HipConfig, mode: str) -> list[Variation]:
    """The base config first, then those that differ from it in one thing; what is not allowed is left out."""
    budget = "decode_mask_k" if mode == "decode" else "mask_k"
    tokens: int = getattr(base, budget)
    changes: list[dict[str, Any]] = [
        {budget: tokens // 2}, {budget: tokens * 2}, {"block_k": base.block_k // 2}, {"block_k": base.block_k * 2},
        {"branch": 2, "leaf_branch": 2}, {"leaf_branch": 4}, {"leaf_branch": 16}, {"stride_k": 4},
        {"mask_heads": "query"},
    ]
    if mode == "prefill":
        changes += [{"stride_q": 1}, {"stride_q": base.block_q}]
    found = [Variation("base", base), *(Variation(name, config) for name, config in variations_of(base, changes))]
    if mode == "decode":
        # With few blocks to a node, so that there are nodes to keep at lengths that small models have.
        narrow = base.replace(reuse_level=1, leaf_branch=min(base.leaf_branch, 4))
        paper = base.replace(reuse_level=0)
        found += [Variation(f"leaf_branch {narrow.leaf_branch}, nodes {age} steps old", narrow, age) for age in AGES]
        found += [Variation(f"blocks {age} steps old", paper, age) for age in AGES]
    return found


@dataclass
class _Tally:
    """Masses of one variation, by text and layer."""

    layers: dict[tuple[str, int], Masses] = field(default_factory=dict)

    def add(self, text: str, layer: int, masses: Masses) -> None:
        if (text, layer) in self.layers:
            self.layers[text, layer].add(masses)
        else:
            self.layers[text, layer] = masses


def measure(
    model: Any, texts: Mapping[str, Sequence[int]], config: HipConfig, *, masks: Masks | None = None,
    query_blocks: int = 24, rows: int = 128, seed: int = 0, scaling: str | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure the base config and its variations, prefill and decode.

    Args:
        model: a transformers causal language model.
        texts: token ids, by name.
        config: the base.
        masks: where chosen blocks come from; the reference by default.
        query_blocks: how many are sampled of each text in prefill, spread over the part in which every config searches.
        rows: how many single queries are sampled for decode.
        seed: of random blocks.
        scaling: of RoPE, for texts beyond the model's context; see :func:`visit_layers`.
        progress: called with a line after each layer.

    Returns:
        By mode and variation name, as :func:`hip_trt.evaluate.mass_recall_study.study` reads it.

    Raises:
        RuntimeInputError: a text is too short for the base config to prune anything, or too long for the model.
    """
    masks = ReferenceMasks() if masks is None else masks
    shortest = min(map(len, texts.values()))
    wanted = {mode: _possible(variations(config, mode), mode, shortest) for mode in MODES}
    tallies = {mode: {variation.name: _Tally() for variation in wanted[mode]} for mode in MODES}
    random = torch.Generator(model.device).manual_seed(seed)
    for text, tokens in texts.items():
        def visit(layer: int, queries: Tensor, keys: Tensor, scale: float, *, text: str = text) -> None:
            for mode, count in (("prefill", query_blocks), ("decode", rows)):
                for masses, variation in _layer(queries, keys, scale, wanted[mode], mode, count, masks, random):
                    tallies[mode][variation.name].add(text, layer, masses)
            progress(f"{text}: layer {layer + 1} of {model.config.num_hidden_layers}")

        visit_layers(model, tokens, visit, scaling=scaling)
    return {
        mode: [
            _summary(variation, mode, tallies[mode][variation.name]) | {"levels": variation.levels(mode, shortest)}
            for variation in wanted[mode]
        ] for mode in MODES
    }


def _possible(found: list[Variation], mode: str, tokens: int) -> list[Variation]:
    """Those that search in the last half of the text at the latest.

    Raises:
        RuntimeInputError: the base does not.
    """
    first = [first_search(variation.config, decode=mode == "decode") + variation.age for variation in found]
    if first[0] + found[0].config.block_q > tokens:
        raise RuntimeInputError(
            f"A text of {tokens} tokens: in {mode} nothing is pruned before token {first[0]}.",
            "Give longer texts, or a smaller budget and window.",
        )
    return [variation for variation, start in zip(found, first, strict=True) if start <= max(first[0], tokens // 2)]


def _layer(
    queries: Tensor, keys: Tensor, scale: float, wanted: list[Variation], mode: str, count: int, masks: Masks,
    random: torch.Generator,
) -> Any:
    """Masses of each variation, part by part."""
    decode, tokens = mode == "decode", queries.shape[1]
    start = max(first_search(variation.config, decode=decode) + variation.age for variation in wanted)
    chosen: dict[str, Tensor] = {}
    for size in sorted({1 if decode else variation.config.block_q for variation in wanted}):
        units = spread(-(-start // size), tokens // size, count)
        same = [variation for variation in wanted if decode or variation.config.block_q == size]
        for variation in same:
            if decode:
                chosen[variation.name] = masks.decode(queries, keys, variation.config, units, age=variation.age)
            else:
                chosen[variation.name] = masks.prefill(queries, keys, variation.config, units)
        part = max(1, _ELEMENTS // (len(queries) * size * tokens))
        for begin in range(0, len(units), part):
            firsts = [unit * size for unit in units[begin : begin + part]]
            positions = torch.tensor(firsts, device=queries.device)[:, None] + torch.arange(size, device=queries.device)
            scores, weights = dense_rows(queries, keys, positions, scale)
            summed: dict[HipConfig, Blocks] = {}
            for variation in same:
                key = variation.config.replace(branch=2, leaf_branch=2, reuse_level=0)  # the tree makes no difference
                if key not in summed:
                    summed[key] = Blocks.of(
                        scores, weights, firsts, variation.config, kv_heads=len(keys), budget=variation.budget(mode)
                    )
                blocks = summed[key]
                mine = chosen[variation.name][begin : begin + part]
                yield Masses.of(blocks, blocks.choices(mine, random)), variation


def spread(first: int, last: int, count: int) -> list[int]:
    """At most ``count`` whole numbers, evenly spaced from ``first`` to ``last - 1``."""
    if count >= last - first:
        return list(range(first, last))
    if count == 1:
        return [last - 1]
    return [first + round(index * (last - 1 - first) / (count - 1)) for index in range(count)]


def _summary(variation: Variation, mode: str, tally: _Tally) -> dict[str, Any]:
    """Of one variation: mean shares by method, of all texts and of each; and by layer and head what is looked at so.

    Texts are pooled. The base config, which has the name "base", shows every share of every method by head, others only
    what HiP holds outside sink and window.
    """
    texts = list(dict.fromkeys(text for text, _ in tally.layers))
    layers = sorted({layer for _, layer in tally.layers})
    pooled: list[Masses] = []
    for layer in layers:
        first, *others = (tally.layers[text, layer] for text in texts)
        total = Masses(first.rows, first.always, first.outside, first.top, dict(first.held), dict(first.shared))
        for other in others:
            total.add(other)
        pooled.append(total)
    shares = {method: {share: torch.stack([_share(masses, method, share) for masses in pooled]) for share in SHARES}
              for method in pooled[0].held}
    return {
        "name": variation.name, "config": variation.config.model_dump(mode="json"), "age": variation.age,
        "tokens": variation.budget(mode) * variation.config.block_k, "rows": pooled[0].rows,
        "weight_outside": [(masses.outside / masses.rows).round(decimals=4).tolist() for masses in pooled],
        "means": {
            method: {share: round(float(values.mean()), 5) for share, values in by_share.items()}
            for method, by_share in shares.items()
        },
        "heads": {
            method: {share: values.tolist() for share, values in by_share.items()}
            for method, by_share in (
                shares.items() if variation.name == "base" else [("hip", {"outside": shares["hip"]["outside"]})]
            )
        },
        "texts": {
            text: {
                method: {
                    share: round(float(torch.stack([
                        _share(tally.layers[text, layer], method, share) for layer in layers
                    ]).mean()), 5) for share in SHARES
                } for method in pooled[0].held
            } for text in texts
        },
    }


def _share(masses: Masses, method: str, share: str) -> Tensor:
    """[Hq]; 1 where there is no weight to hold."""
    if share == "all":
        return ((masses.always + masses.held[method]) / masses.rows).round(decimals=4)
    above, below = (
        (masses.held[method], masses.outside) if share == "outside" else (masses.shared[method], masses.top)
    )
    return torch.where(below > 0, above / below.clamp(min=1e-300), 1.0).round(decimals=4)
