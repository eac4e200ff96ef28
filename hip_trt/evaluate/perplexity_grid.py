"""Which configs the perplexity study tries, the most important ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError

Mode = Literal["prefill", "decode"]
Method = Literal["hip", "none", "random", "exact"]
Fields = Sequence[Mapping[str, Any]]
"""Of configs: what differs from the defaults."""

METHODS = {
    "hip": "HiP", "none": "sink and window only", "random": "random blocks", "exact": "best blocks, all scored",
}
"""How blocks between sink and window are chosen, in words."""


@dataclass(frozen=True)
class Case:
    """One row of the study.

    Attributes:
        mode: "prefill": query blocks of block_q share a mask, as in a prompt; "decode": after a prompt, each token
            searches by itself.
        method: HiP, or a baseline of :mod:`hip_trt.evaluate.baselines`.
        changes: fields of HipConfig that are not the defaults.
    """

    mode: Mode
    method: Method = "hip"
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> HipConfig:
        """The whole config.

        Raises:
            ConfigError: a field is unknown or has a value that is not allowed.
        """
        return HipConfig.create(**self.changes)

    @property
    def label(self) -> str:
        """What differs from the default, for tables."""
        changes = ", ".join(f"{name} {_value(value)}" for name, value in self.changes.items())
        if self.method == "hip":
            return changes or "default"
        return METHODS[self.method] + (f", {changes}" if changes else "")


def _value(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cases(mode: Mode, rows: Fields, method: Method = "hip") -> list[Case]:
    return [Case(mode, method, row) for row in rows]


def _one(name: str, *values: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


_BUDGETS: Fields = ({"mask_k": 512}, {}, {"mask_k": 2048})
_DECODE_BUDGETS: Fields = ({"decode_mask_k": 256}, {}, {"decode_mask_k": 1024})

SMALL = [
    *_cases("prefill", [{}, *_one("mask_k", 512, 2048), {"leaf_branch": 4}]),
    *_cases("decode", [{}, {"leaf_branch": 4}, {"leaf_branch": 4, "reuse_level": 0}, {"decode_mask_k": 1024}]),
    *_cases("prefill", [{}, {"window_tokens": 1536}], "none"), Case("prefill", "random"), Case("prefill", "exact"),
]
"""A first look: the default, its budgets, and the baselines."""

_PREFILL: list[dict[str, Any]] = [
    *_one("mask_k", 256, 512, 2048, 4096),
    *_one("block_k", 8, 32, 64),
    *_one("leaf_branch", 2, 4, 8),
    *_one("stride_q", 1, 2, 8, 16, 64),
    *_one("branch", 2, 8, 16),
    *_one("window_tokens", 64, 128, 256, 1024),
    *_one("stride_k", 2, 4, 16),
    *_one("sink_tokens", 0, 16, 256),
    *_one("block_q", 16, 32, 128),
    {"mask_heads": "query"},
    *_one("dense_layers", (0,), (0, 1, 2)),
]
"""One field at a time."""

_PREFILL_CROSSES: list[dict[str, Any]] = [
    {"mask_k": 512, "leaf_branch": 4},
    {"mask_k": 512, "leaf_branch": 8},
    {"mask_k": 2048, "leaf_branch": 4},
    {"mask_k": 512, "block_k": 8},
    {"mask_k": 512, "block_k": 32},
    {"mask_k": 2048, "block_k": 32},
    {"mask_k": 2048, "block_k": 64},
    {"block_k": 8, "leaf_branch": 4},
    {"block_k": 32, "leaf_branch": 4},
    {"branch": 2, "leaf_branch": 2},
    {"block_k": 2, "branch": 2, "leaf_branch": 2},  # the paper's tree and key blocks
    {"mask_k": 512, "block_k": 2, "branch": 2, "leaf_branch": 2},
    {"mask_k": 512, "window_tokens": 1024},
    {"mask_k": 512, "stride_q": 1},
    {"mask_k": 512, "dense_layers": (0, 1, 2)},
    {"mask_k": 2048, "stride_q": 16},
    {"mask_k": 2048, "stride_k": 4},
    {"mask_k": 2048, "window_tokens": 1024},
]

_PREFILL_BASELINES = [
    *_cases("prefill", [{}, *_one("window_tokens", 1024, 1536, 2560)], "none"),
    *_cases("prefill", _BUDGETS, "random"),
    *_cases("prefill", _BUDGETS, "exact"),
    *_cases("prefill", _one("block_k", 32, 64), "exact"),
]

_INTERVALS = (1, 2, 4, 8, 16, 32, 64)

_DECODE: list[dict[str, Any]] = [
    {},
    *_one("decode_mask_k", 128, 256, 1024, 2048),
    *({"leaf_branch": 4, "reuse_level": level, "refresh_interval": interval}
      for interval in _INTERVALS for level in ((1, 0) if interval > 1 else (1,))),
    *_one("leaf_branch", 2, 8),
    *({"decode_mask_k": 256, "refresh_interval": interval} for interval in (1, 32)),
    *({"decode_mask_k": 256, "leaf_branch": 8, "refresh_interval": interval} for interval in (1, 8, 32)),
    *({"decode_mask_k": 1024, "leaf_branch": 4, "refresh_interval": interval} for interval in (8, 32, 64)),
    {"reuse_level": 0},
    *({"decode_mask_k": 1024, "reuse_level": 0, "refresh_interval": interval} for interval in (8, 32)),
    *_one("block_k", 8, 32),
    *_one("window_tokens", 128, 256, 1024),
    *_one("branch", 2, 8),
    {"stride_k": 4},
    {"mask_heads": "query"},
    {"dense_layers": (0, 1, 2)},
    {"decode_mask_k": 1024, "stride_k": 4},
]

_DECODE_BASELINES = [
    *_cases("decode", [{}, {"window_tokens": 1024}], "none"),
    *_cases("decode", _DECODE_BUDGETS, "random"),
    *_cases("decode", _DECODE_BUDGETS, "exact"),
]

DEFAULT = [
    Case("prefill"), Case("decode"),
    *_cases("prefill", _PREFILL), *_PREFILL_BASELINES,
    *_cases("decode", _DECODE[1:]), *_DECODE_BASELINES,
    *_cases("prefill", _PREFILL_CROSSES),
]
"""One field at a time around the default, the crosses that matter, and baselines at equal budget."""

LONG = [
    Case("prefill"), Case("decode"),
    *_cases("prefill", [{"mask_k": 512}, {"mask_k": 2048}, {"mask_k": 4096}]),
    *_cases("prefill", [{}, {"window_tokens": 1536}], "none"), Case("prefill", "random"), Case("prefill", "exact"),
    *_cases("prefill", [*_one("leaf_branch", 4, 8), *_one("branch", 2, 8), {"block_k": 8}, {"block_k": 32}]),
    *_cases("decode", [
        *({"reuse_level": level, "refresh_interval": interval}
          for interval in (1, 8, 32, 64) for level in ((1, 0) if interval > 1 else (1,))
          if (level, interval) != (1, 8)),
        *_one("decode_mask_k", 256, 1024, 2048),
        {"decode_mask_k": 1024, "refresh_interval": 32},
        *_one("leaf_branch", 4, 8),
        *({"refresh_interval": interval} for interval in (2, 4, 16)),
    ]),
    Case("decode", "none"), Case("decode", "random"), Case("decode", "exact"),
]
"""Beyond the model's own context, where the search has levels even with a wide leaf level."""

GRIDS = {"default": DEFAULT, "small": SMALL}


def read_grid(name: str) -> list[Case]:
    """A grid by its name, or from a YAML file: a list of fields of HipConfig, with ``mode`` and ``method`` beside them.

    Raises:
        ConfigError: there is no such grid or file, or an entry is not valid.
    """
    if name in GRIDS:
        return list(GRIDS[name])
    path = Path(name)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--grid {name}: no grid of that name, and as a file it cannot be read: {error.strerror}.",
            f"Give {', '.join(GRIDS)}, or a YAML file.",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--grid {path}: not valid YAML: {' '.join(str(error).split())}.") from None
    example = "- {mode: decode, decode_mask_k: 256, refresh_interval: 32}"
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--grid {path}: must be a list of configs.", f"Write lines such as {example}")
    return [_entry(path, number, dict(entry)) for number, entry in enumerate(entries, 1)]


def _entry(path: Path, number: int, entry: dict[str, Any]) -> Case:
    mode, method = entry.pop("mode", "prefill"), entry.pop("method", "hip")
    for what, value, allowed in (("mode", mode, get_args(Mode)), ("method", method, get_args(Method))):
        if value not in allowed:
            raise ConfigError(
                f"--grid {path}, entry {number}: {what}: {value!r} is not allowed; it must be one of "
                f"{', '.join(allowed)}."
            )
    try:
        case = Case(mode, method, {str(name): value for name, value in entry.items()})
        case.config  # noqa: B018  (validates)
    except ConfigError as error:
        raise ConfigError(f"--grid {path}, entry {number}: {error.cause}") from None
    return case
