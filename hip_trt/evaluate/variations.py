"""Configs that differ from a base in a few fields, and what to call them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError


def in_words(changes: Mapping[str, Any]) -> str:
    """Such as "mask_k 512, branch 2"."""
    return ", ".join(f"{field} {value}" for field, value in changes.items())


def variations_of(base: HipConfig, changes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, HipConfig]]:
    """Name and config of each change; what is not allowed, or is the base itself, is left out."""
    for change in changes:
        try:
            config = base.replace(**change)
        except ConfigError:
            continue
        if config != base:
            yield in_words(change), config
