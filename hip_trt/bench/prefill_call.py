"""One prefill of one layer by hip-trt: cache update, search and attention."""

from __future__ import annotations

import torch

from hip_trt.bench import pages
from hip_trt.bench.checks import CheckError, Comparison, compare_block, sampled_blocks
from hip_trt.bench.geometry import Geometry
from hip_trt.bench.hip_trt_call import HipTrtCall
from hip_trt.bench.inputs import Tensors
from hip_trt.config import HipConfig
from hip_trt.library import Library


class PrefillCall(HipTrtCall):
    """One sequence, from an empty cache in scattered pages.

    Args:
        tensors: of batch 1, as many queries as keys.
    """

    def __init__(self, library: Library, geometry: Geometry, config: HipConfig, tensors: Tensors) -> None:
        query = tensors.query
        table = pages.scattered(1, -(-query.shape[2] // config.page_size), device=query.device)
        pools = pages.empty_pools(geometry, table, config.page_size)
        super().__init__(library, geometry, config, tensors, pools, table, 0)

    def check(self) -> Comparison:
        """Compare the cache, and a sample of query blocks of the first and the last mask head, with the reference.

        Raises:
            CheckError: something differs by more than rounding.
        """
        chosen = self.chosen_blocks()
        tokens, masks = self.inputs["query"].shape[2], chosen.shape[1]
        comparison = Comparison()
        for mask in (0, masks - 1):
            first = mask * self.geometry.query_heads // masks
            heads, kv = slice(first, first + self.geometry.query_heads // masks), first // self.geometry.group
            keys, values = (self._cached(name, kv) for name in ("key", "value"))
            for block in sampled_blocks(chosen.shape[2]):
                start = block * self.config.block_q
                rows = slice(start, min(start + self.config.block_q, tokens))
                compare_block(
                    comparison, self.output[0, heads, rows], self.inputs["query"][0, heads, rows], keys, values,
                    chosen[0, mask, block], start, config=self.config, geometry=self.geometry,
                )
        comparison.require(f"prefill of {tokens} tokens")
        return comparison

    def _cached(self, name: str, kv: int) -> torch.Tensor:
        """The rows of a head as the pool holds them, which must be the new ones."""
        new = self.inputs[name][0, kv].float()
        rows = pages.gather(self.inputs[f"past_{name}"], self.inputs["page_table"][0], kv, len(new))
        if not torch.equal(rows, new):
            raise CheckError(f"present_{name}: the pool does not hold the new rows of a prefill of {len(new)} tokens")
        return rows
