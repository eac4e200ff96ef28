"""Decode steps of one layer by hip-trt, on several sets of sequences in one pool of pages."""

from __future__ import annotations

import torch

from hip_trt.bench import pages
from hip_trt.bench.checks import Comparison, compare_block
from hip_trt.bench.geometry import Geometry
from hip_trt.bench.hip_trt_call import HipTrtCall
from hip_trt.bench.inputs import ROTATED_BYTES, Tensors, draw
from hip_trt.config import HipConfig
from hip_trt.library import Library

MOST_POOL_BYTES = 24 << 30
"""What the pools of all sets together may take."""


class DecodeStep(HipTrtCall):
    """One step of a batch of sequences."""

    def reuse(self) -> None:
        """From now on start from the nodes that the last call kept."""
        self.inputs["past_nodes"].copy_(self.nodes)
        self.inputs["refresh_mask"].zero_()

    def check(self) -> Comparison:
        """Compare the first and the last mask head, of the first and the last sequence, with the reference.

        Raises:
            CheckError: something differs by more than rounding.
        """
        chosen = self.chosen_blocks()
        past = int(self.inputs["past_lengths"][0])
        searched = bool(self.inputs["refresh_mask"][0])
        batch, masks = chosen.shape[:2]
        comparison = Comparison()
        for row in sorted({0, batch - 1}):
            for mask in (0, masks - 1):
                first = mask * self.geometry.query_heads // masks
                heads, kv = slice(first, first + self.geometry.query_heads // masks), first // self.geometry.group
                keys, values = (
                    pages.gather(self.inputs[f"past_{name}"], self.inputs["page_table"][row], kv, past + 1)
                    for name in ("key", "value")
                )
                compare_block(
                    comparison, self.output[row, heads], self.inputs["query"][row, heads], keys, values,
                    chosen[row, mask, 0], past, config=self.config, geometry=self.geometry, decode=True,
                    past_nodes=None if searched else self.inputs["past_nodes"][row, mask],
                )
        comparison.require(f"a decode step at {past} tokens")
        return comparison


def decode_steps(
    library: Library, geometry: Geometry, config: HipConfig, *, past: int, batch: int, step_bytes: int, seed: int,
    device: str = "cuda",
) -> list[DecodeStep]:
    """Steps over sets of sequences of ``past`` tokens, a multiple of the page size.

    Set i holds the keys and values of ``draw(..., seed=seed + i)``, and its query.

    Args:
        step_bytes: what one step reads; decides over how many sets steps rotate, within memory.
    """
    slots = past // config.page_size + 1
    set_bytes = 2 * batch * slots * config.page_size * geometry.kv_heads * geometry.row_bytes
    sets = max(1, min(max(2, min(16, -(-ROTATED_BYTES // step_bytes))), MOST_POOL_BYTES // set_bytes))
    tables = pages.scattered(sets, batch, slots, device=torch.device(device))
    pools = pages.empty_pools(geometry, tables, config.page_size)
    steps = []
    for index in range(sets):
        context = draw(geometry, batch=batch, queries=1, tokens=past, seed=seed + index, device=device)
        pages.fill(pools[0], tables[index], context.key)
        pages.fill(pools[1], tables[index], context.value)
        new = torch.randn(2, batch, geometry.kv_heads, 1, geometry.head_dim, dtype=geometry.dtype, device=device)
        table = tables[index].clone()  # a tensor of its own: aligned
        steps.append(DecodeStep(library, geometry, config, Tensors(context.query, new[0], new[1].clone()), pools, table,
                                past))
    return steps
