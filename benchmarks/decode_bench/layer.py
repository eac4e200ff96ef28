"""One layer's caches and a decode call on them."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_trt.bench.geometry import Geometry
from hip_trt.decode_library import DecodeLibrary, DecodeSettings

CHUNK = 8192
"""Rows that are appended at once."""


class Layer:
    """Random keys and values in scattered pages, their bounds and codes written by the library's own append.

    Attributes:
        tensors: of the call, by name; results on the past tensors.
        append_ms: how long the appends took.
    """

    def __init__(
        self, library: DecodeLibrary, geometry: Geometry, settings: DecodeSettings, *, past: int, batch: int, rows: int,
        seed: int,
    ) -> None:
        self.library, self.geometry, self.settings = library, geometry, settings
        random = torch.Generator("cuda").manual_seed(seed)
        slots = -(-(past + 8) // settings.page_size)
        pages = batch * slots

        def normal(heads: int, count: int) -> Tensor:
            return torch.randn(batch, heads, count, geometry.head_dim, dtype=geometry.dtype, device="cuda",
                               generator=random)

        def pool(*rest: int, dtype: torch.dtype = geometry.dtype) -> Tensor:
            fill = float("nan") if dtype.is_floating_point else -1
            return torch.full((pages, geometry.kv_heads, *rest), fill, dtype=dtype, device="cuda")

        page, dim = settings.page_size, geometry.head_dim
        state = {"key": pool(page, dim), "value": pool(page, dim), "bounds": pool(page // settings.block, 2, dim),
                 "codes": pool(page, dim // 16, dtype=torch.int32)}
        table = torch.randperm(pages, device="cuda", generator=random).reshape(batch, slots).int()
        self.tensors = {**{f"{when}_{name}": tensor for name, tensor in state.items() for when in ("past", "present")},
                        "page_table": table, **_lengths(batch, 0, 0)}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.append_ms = 0.0
        for first in range(0, past, CHUNK):
            number = min(CHUNK, past - first)
            chunk = {**self.tensors, "key": normal(geometry.kv_heads, number),
                     "value": normal(geometry.kv_heads, number), **_lengths(batch, first, number)}
            start.record()
            library.append(chunk, settings, torch.cuda.current_stream().cuda_stream)
            end.record()
            end.synchronize()
            self.append_ms += start.elapsed_time(end)
        chosen = settings.mask_k // settings.block
        nothing = torch.full((batch, geometry.kv_heads, chosen), -1, dtype=torch.int32, device="cuda")
        self.tensors |= {
            "query": normal(geometry.query_heads, rows), "key": normal(geometry.kv_heads, rows),
            "value": normal(geometry.kv_heads, rows), **_lengths(batch, past, rows), "past_blocks": nothing,
            "refresh_mask": torch.ones(batch, dtype=torch.int32, device="cuda"), "present_blocks": nothing.clone(),
        }
        self.tensors["output"] = torch.full_like(self.tensors["query"], float("nan"))
        size = library.workspace_size(settings, *(self.tensors[name] for name in ("query", "past_key", "page_table")))
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.library.decode(self.tensors, self.settings, self.workspace, torch.cuda.current_stream().cuda_stream)

    def reuse(self) -> None:
        """From now on attend to what the last call chose."""
        self.tensors["past_blocks"].copy_(self.tensors["present_blocks"])
        self.tensors["refresh_mask"].zero_()


def _lengths(batch: int, past: int, new: int) -> dict[str, Tensor]:
    return {name: torch.full((batch,), number, dtype=torch.int32, device="cuda")
            for name, number in (("past_lengths", past), ("query_lengths", new))}
