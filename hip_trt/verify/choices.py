"""Which blocks are attended, judged apart from what attention then computes.

Rounding turns close scores around, so two right implementations choose different blocks now and then, and everything
after that differs. So a reference chooses for itself, which is compared, and then attends to what the model under test
has chosen, where that shows it: attention is compared over the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt import reference
from hip_trt.config import HipConfig
from hip_trt.runtime.pages import NO_PAGE
from hip_trt.verify.observed import chosen_name

Shown = Callable[[int], Tensor | None]
"""The blocks that the model under test chose in the last call, by layer: [query blocks, B, Hm, K]; None if unknown."""


def candidates(config: HipConfig, first: int) -> tuple[int, int]:
    """The blocks that a query block whose first row is at this position can choose from: first, one past the last."""
    window = max(0, first - config.window_tokens + 1) // config.block_k
    return min(-(-config.sink_tokens // config.block_k), window), window


def searches(
    config: HipConfig, num_masks: int, past: list[int], counts: list[int], *, decode: bool, dense: bool
) -> Iterator[tuple[int, int, int]]:
    """Row, query block and mask head of every search of a call, in the reference's order."""
    budget = config.decode_mask_blocks if decode else config.mask_blocks
    for b, (length, count) in enumerate(zip(past, counts, strict=True)):
        for block in range(-(-count // config.block_q)):
            sink, window = candidates(config, length + block * config.block_q)
            if window - sink > budget and not dense:
                yield from ((b, block, mask) for mask in range(num_masks))


class Chooser:
    """Chooses as the reference does, and attends to what was shown.

    Attributes:
        own: the reference's choice of each search: [K] int64 each, -1 where there are fewer.
    """

    def __init__(self, shown: list[Tensor] | None) -> None:
        self._shown = shown
        self.own: list[Tensor] = []

    def __call__(
        self, queries: Tensor, keys: Tensor, positions: Tensor, *, config: HipConfig, decode: bool, dense: bool,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`hip_trt.reference.select_blocks`."""
        blocks, kept = reference.select_blocks(
            queries, keys, positions, config=config, decode=decode, dense=dense, **options
        )
        budget = config.decode_mask_blocks if decode else config.mask_blocks
        sink, window = candidates(config, int(positions[0]))
        if dense or window - sink <= budget:
            return blocks, kept
        inside = blocks[(blocks >= sink) & (blocks < window)]
        self.own.append(torch.cat([inside, torch.full((budget - len(inside),), NO_PAGE)]))
        if self._shown is not None:
            shown = self._shown[len(self.own) - 1].long()
            # What lies outside, or is there twice, is wrong, and is compared.
            shown = torch.unique(shown[(shown >= sink) & (shown < window)])
            blocks = torch.cat([blocks[blocks < sink], shown, blocks[blocks >= window]])
        return blocks, kept


def attend(
    tensors: list[Tensor], layer: int, *, config: HipConfig, scale: float, shown: Shown
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """The reference operator over the blocks that the model under test chose.

    Args:
        tensors: inputs, in the order of :data:`hip_trt.operator.INPUTS`.
        layer: index of the decoder layer.

    Returns:
        The operator's outputs, and the reference's own choices, [N, K], by name; empty where nothing was searched.
    """
    inputs = dict(zip(names.INPUTS, tensors, strict=True))
    dense, blocks = layer in config.dense_layers, shown(layer)
    rows = None
    if blocks is not None:
        rows = [
            blocks[block, b, mask] for b, block, mask in searches(
                config, inputs["past_nodes"].shape[1], inputs["past_lengths"].tolist(),
                inputs["query_lengths"].tolist(), decode=inputs["query"].shape[2] == 1, dense=dense,
            )
        ]
    chooser = Chooser(rows)
    results = reference.hip_attention(*tensors, config=config, scale=scale, dense=dense, select=chooser)
    return results, {chosen_name(layer): torch.stack(chooser.own)} if chooser.own else {}
