"""What the contract (docs/decode_version_2.md) makes a decode call read."""

from __future__ import annotations

from dataclasses import dataclass

from hip_trt.bench.geometry import Geometry
from hip_trt.decode_library import DecodeSettings


@dataclass(frozen=True)
class Work:
    """Bytes of one call and layer, by phase."""

    bounds: int
    codes: int
    attention: int

    @property
    def total(self) -> int:
        return self.bounds + self.codes + self.attention


def candidates(settings: DecodeSettings, past: int) -> tuple[int, int]:
    """The blocks [first, last) that may be chosen."""
    last = max(0, past - settings.window_tokens + 1) // settings.block
    return min(-(-settings.sink_tokens // settings.block), last), last


def count(geometry: Geometry, settings: DecodeSettings, past: int, batch: int, *, searched: bool) -> Work:
    """What a call of one row a sequence reads, with masks of key/value heads."""
    first, last = candidates(settings, past)
    number, row = last - first, geometry.row_bytes
    kept, scored = settings.mask_k // settings.block, min(number, settings.search_k // settings.block)
    pairs = batch * geometry.kv_heads
    searches = searched and number > kept
    bounds = number * 2 * row if searches and number > scored else 0
    codes = scored * (settings.block * geometry.head_dim // 4 + 2 * row) if searches else 0
    attended = (first + min(number, kept)) * settings.block + past + 1 - last * settings.block
    return Work(pairs * bounds, pairs * codes, pairs * attended * 2 * row)
