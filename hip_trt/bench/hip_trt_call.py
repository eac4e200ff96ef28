"""A call of the HipAttention operator through the plugin library's C ABI, on tensors made once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hip_trt.bench.geometry import Geometry
from hip_trt.bench.inputs import Tensors
from hip_trt.config import HipConfig
from hip_trt.library import Library, Shape


class HipTrtCall:
    """The operator on the same tensors at each call; present shares its buffers with past.

    Args:
        tensors: new tokens; query [B, Hq, S, D], key and value [B, Hkv, S, D].
        pools: keys and values, [P, Hkv, page_size, D] each.
        page_table: [B, M] int32.
        past: committed tokens of every sequence.
    """

    def __init__(
        self, library: Library, geometry: Geometry, config: HipConfig, tensors: Tensors, pools: tuple[Tensor, Tensor],
        page_table: Tensor, past: int,
    ) -> None:
        self.geometry, self.config = geometry, config
        batch, _, rows, _ = tensors.query.shape
        device = tensors.query.device
        masks = config.num_masks(geometry.query_heads, geometry.kv_heads)

        def integers(*shape: int, value: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.inputs: dict[str, Tensor] = {
            "query": tensors.query, "key": tensors.key, "value": tensors.value, "past_key": pools[0],
            "past_value": pools[1], "page_table": page_table, "past_lengths": integers(batch, value=past),
            "query_lengths": integers(batch, value=rows),
            "past_nodes": integers(batch, masks, config.decode_mask_blocks, value=-1),
            "refresh_mask": integers(1, value=1),
        }
        self.output = torch.full_like(tensors.query, torch.nan)
        self.nodes = torch.empty_like(self.inputs["past_nodes"])
        shape = Shape(geometry.dtype, geometry.query_heads, geometry.kv_heads, geometry.head_dim, batch, rows,
                      len(pools[0]), page_table.shape[1])
        self._library = library
        self._workspace = torch.empty(library.workspace_size(config, shape), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._run(None)

    def chosen_blocks(self) -> Tensor:
        """Call once more, and report the chosen blocks too: [B, Hm, ceil(S / block_q), K] int32, then -1."""
        batch, masks, _ = self.nodes.shape
        rows = self.inputs["query"].shape[2]
        budget = self.config.decode_mask_blocks if rows == 1 else self.config.mask_blocks
        chosen = torch.full((batch, masks, -(-rows // self.config.block_q), budget), -1, dtype=torch.int32,
                            device=self.output.device)
        self._run(chosen)
        return chosen

    def _run(self, chosen: Tensor | None) -> None:
        inputs: dict[str, Any] = self.inputs
        self._library.attention(
            **inputs, config=self.config, scale=self.geometry.scale, output=self.output,
            present_key=self.inputs["past_key"], present_value=self.inputs["past_value"], present_nodes=self.nodes,
            chosen_blocks=chosen, workspace=self._workspace,
        )
