"""What ``hip-trt run --offload`` did, as a table, JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hip_trt.errors import RuntimeInputError

if TYPE_CHECKING:
    from rich.table import Table

    from hip_trt.offload import CacheCounts, OffloadStats

_MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """What to say when text has been generated.

    Attributes:
        stats: speeds, and with offload a table, on standard error.
        json, plot: files for the statistics of offload.
    """

    stats: bool = False
    json: Path | None = None
    plot: Path | None = None

    @property
    def wants_offload(self) -> bool:
        return self.stats or self.json is not None or self.plot is not None

    def offload(self, stats: OffloadStats) -> None:
        """Report the statistics of offload.

        Raises:
            RuntimeInputError: a file cannot be written.
            EnvironmentProblem: a plot is wanted, and matplotlib is not there.
        """
        if self.stats:
            from rich.console import Console

            console = Console(stderr=True)
            (console if console.is_terminal else Console(stderr=True, width=100)).print(table(stats))
        if self.json is not None:
            try:
                self.json.write_text(json.dumps(stats.to_json(), indent=2) + "\n")
            except OSError as error:
                raise RuntimeInputError(f"{self.json}: cannot be written: {error.strerror}.") from None
        if self.plot is not None:
            stats.plot(self.plot)


def table(stats: OffloadStats) -> Table:
    """A row for each cache: hit ratio in all, in the worst layer and in the best, and what went over the bus."""
    from rich.table import Table

    result = Table(title="KV cache in host memory: decode steps")
    for heading in ("cache of", "hit ratio", "worst\nlayer", "best\nlayer", "over the bus\nper token", "GPU memory"):
        result.add_column(heading, justify="left" if heading == "cache of" else "right", no_wrap=True)
    tokens = max(stats.tokens, 1)
    for name, total, layers, size in (
        ("keys", stats.all_keys, stats.keys, stats.key_cache_bytes),
        ("values", stats.all_values, stats.values, stats.value_cache_bytes),
    ):
        result.add_row(
            name, _ratio(total), *_worst_and_best(layers),
            f"{total.transfers * stats.block_bytes / tokens / 1024:,.1f} KiB", f"{size / _MIB:,.1f} MiB",
        )
    result.add_section()
    result.add_row("all", "", "", "", f"{stats.bus_bytes_per_token / 1024:,.1f} KiB",
                   f"{stats.gpu_bytes / _MIB:,.1f} MiB")
    share = stats.gpu_bytes / stats.host_bytes if stats.host_bytes else 0.0
    result.caption = (
        f"{stats.tokens:,} decoded tokens. Host memory: {stats.host_bytes / _MIB:,.1f} MiB; "
        f"GPU memory: {share:.1%} of that."
    )
    if stats.prefill.tokens:
        result.caption += f"\n{_prefill(stats)}"
    return result


def _prefill(stats: OffloadStats) -> str:
    prefill = stats.prefill
    staged, written = (
        f"{prefill.per_token(count) / 1024:,.1f} KiB" for count in (prefill.staged_bytes, prefill.written_bytes)
    )
    text = f"Prefill: {prefill.tokens:,} tokens; per token {staged} read over the bus and {written} written."
    if prefill.unstaged_tokens:
        text += f" {prefill.unstaged_tokens:,} of them without a staging area: what they read is not counted."
    return text


def _worst_and_best(layers: tuple[CacheCounts, ...]) -> tuple[str, str]:
    used = [(counts.hit_ratio, index) for index, counts in enumerate(layers) if counts.lookups]
    if not used:
        return "-", "-"
    (worst, first), (best, last) = min(used), max(used)
    return f"{worst:.1%} ({first})", f"{best:.1%} ({last})"


def _ratio(counts: CacheCounts) -> str:
    return f"{counts.hit_ratio:.1%}" if counts.lookups else "-"
