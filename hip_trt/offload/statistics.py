"""What caches did: per layer and cache, as numbers, JSON and a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.offload.block_caches import CacheCounts

_NONE = CacheCounts()


@dataclass(frozen=True)
class PrefillTraffic:
    """What prefill moved over the bus, all layers together.

    Attributes:
        tokens: of prompts, all sequences together.
        staged_bytes: pages committed before, read to attend from: whole pages, once per layer and call.
        written_bytes: new keys and values, written to host memory.
        unstaged_tokens: those of ``tokens`` that no staging area served. Their calls read what they attend to where it
            is, over the bus, and nothing counts that.
    """

    tokens: int = 0
    staged_bytes: int = 0
    written_bytes: int = 0
    unstaged_tokens: int = 0

    def per_token(self, count: int) -> float:
        """A number of bytes per token of a prompt; 0 before the first."""
        return count / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **asdict(self),
            "staged_bytes_per_token": self.per_token(self.staged_bytes),
            "written_bytes_per_token": self.per_token(self.written_bytes),
        }


class PrefillMeter:
    """Adds up prefill calls, from their lengths: on the device where those are, so that nothing waits.

    Args:
        device: of the lengths.
        page_size: tokens of a page.
    """

    def __init__(self, device: torch.device, page_size: int) -> None:
        self._page_size = page_size
        self._tokens, self._staged_pages, self._unstaged = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)
        )

    def count(self, past_lengths: Tensor, query_lengths: Tensor, *, staged: bool) -> None:
        """One call.

        Args:
            past_lengths, query_lengths: [B] int32.
            staged: whether the staging area served it.
        """
        tokens = query_lengths.sum()
        # Not in place: a tensor made in inference mode may not be changed outside of it.
        self._tokens = self._tokens + tokens
        if staged:
            pages = (past_lengths + (self._page_size - 1)) // self._page_size
            self._staged_pages = self._staged_pages + (pages * (query_lengths > 0)).sum()
        else:
            self._unstaged = self._unstaged + tokens

    def traffic(self, page_bytes: int) -> PrefillTraffic:
        """Of all calls; waits for the device.

        Args:
            page_bytes: keys and values of a page, all layers together.
        """
        tokens = int(self._tokens)
        return PrefillTraffic(
            tokens, int(self._staged_pages) * page_bytes, tokens * (page_bytes // self._page_size), int(self._unstaged)
        )


@dataclass(frozen=True)
class OffloadStats:
    """Counts since the caches were made, or last reset. Blocks are counted in decode steps: prefill uses no caches.

    Attributes:
        keys, values: per layer, what each cache counted.
        tokens: decoded tokens, all sequences together.
        block_bytes: bytes of a block, the unit of every count.
        key_cache_bytes, value_cache_bytes: GPU memory of the caches, all layers.
        other_gpu_bytes: GPU memory that the caches need to know their blocks, the landing area, and prefill's staging
            area where it is.
        host_bytes: the pools, keys and values of all layers: what a resident cache would take of the GPU.
        prefill: what prefill moved, beside all this.
    """

    keys: tuple[CacheCounts, ...]
    values: tuple[CacheCounts, ...]
    tokens: int
    block_bytes: int
    key_cache_bytes: int
    value_cache_bytes: int
    other_gpu_bytes: int
    host_bytes: int
    prefill: PrefillTraffic = PrefillTraffic()

    @property
    def all_keys(self) -> CacheCounts:
        """All layers together."""
        return sum(self.keys, _NONE)

    @property
    def all_values(self) -> CacheCounts:
        """All layers together."""
        return sum(self.values, _NONE)

    @property
    def gpu_bytes(self) -> int:
        """GPU memory that serves the KV cache."""
        return self.key_cache_bytes + self.value_cache_bytes + self.other_gpu_bytes

    @property
    def bus_bytes(self) -> int:
        """Bytes read over the bus for decode steps: misses by the steps themselves, and rereads beside them."""
        return (self.all_keys.transfers + self.all_values.transfers) * self.block_bytes

    @property
    def bus_bytes_per_token(self) -> float:
        """Of :attr:`bus_bytes`; 0 before the first token."""
        return self.bus_bytes / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; a hit ratio is null where nothing was looked up."""

        def cache(counts: CacheCounts) -> dict[str, Any]:
            ratio = counts.hit_ratio if counts.lookups else None
            return {**asdict(counts), "hit_ratio": ratio, "bus_bytes": counts.transfers * self.block_bytes}

        return {
            "tokens": self.tokens,
            "bus_bytes": self.bus_bytes,
            "bus_bytes_per_token": self.bus_bytes_per_token,
            "gpu_bytes": self.gpu_bytes,
            "key_cache_bytes": self.key_cache_bytes,
            "value_cache_bytes": self.value_cache_bytes,
            "other_gpu_bytes": self.other_gpu_bytes,
            "host_bytes": self.host_bytes,
            "keys": cache(self.all_keys),
            "values": cache(self.all_values),
            "prefill": self.prefill.to_json(),
            "layers": [
                {"keys": cache(keys), "values": cache(values)}
                for keys, values in zip(self.keys, self.values, strict=True)
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Hit ratios and bytes over the bus, over layers, as a .png, .svg or .pdf.

        Raises:
            EnvironmentProblem: matplotlib is not installed.
            RuntimeInputError: the file cannot be written, or is of a kind that matplotlib does not know.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise EnvironmentProblem(
                "matplotlib is not installed, which plots need.", "Install it, or write JSON (--stats-json)."
            ) from None
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for name, caches, color in (("keys", self.keys, "C0"), ("values", self.values, "C1")):
            layers = range(len(caches))
            ratios = [100 * counts.hit_ratio if counts.lookups else math.nan for counts in caches]
            above.plot(layers, ratios, color, marker=".", label=name)
            per_token = [counts.transfers * self.block_bytes / max(self.tokens, 1) / 1024 for counts in caches]
            below.plot(layers, per_token, color, marker=".", label=name)
        above.set_ylabel("hit ratio, %")
        above.set_title(
            f"{self.tokens:,} decoded tokens, {self.gpu_bytes / 2**20:,.1f} MiB of the GPU for "
            f"{self.host_bytes / 2**20:,.1f} MiB on the host"
        )
        above.legend()
        below.xaxis.get_major_locator().set_params(integer=True)
        below.set(xlabel="layer", ylabel="KiB over the bus per token", ylim=(0, None))
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise RuntimeInputError(f"{path}: cannot be written: {error}.", "Name a .png, .svg or .pdf.") from None
