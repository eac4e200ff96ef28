"""What caches did: per layer and cache, as numbers, JSON and a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.offload.block_caches import CacheCounts

_NONE = CacheCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class OffloadStats:
    """Counts since the caches were made, or last reset. Decode steps only: prefill does not use the caches.

    Attributes:
        keys, values: per layer, what each cache counted.
        tokens: decoded tokens, all sequences together.
        block_bytes: bytes of a block, the unit of every count.
        key_cache_bytes, value_cache_bytes: GPU memory of the caches, all layers.
        other_gpu_bytes: GPU memory that the caches need to know their blocks, and prefill's staging area where it is.
        host_bytes: the pools, keys and values of all layers: what a resident cache would take of the GPU.
    """

    keys: tuple[CacheCounts, ...]
    values: tuple[CacheCounts, ...]
    tokens: int
    block_bytes: int
    key_cache_bytes: int
    value_cache_bytes: int
    other_gpu_bytes: int
    host_bytes: int

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
        """Bytes read over the bus for decode steps: misses by the steps themselves, fills beside them."""
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
