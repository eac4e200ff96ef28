"""What transformers calls a model's KV cache, as an argument and in its output.

It was ``past_key_values`` up to transformers 5.23, and is ``cache`` from 5.24 on, where the old name still works and
warns.
"""

from __future__ import annotations

import inspect
from typing import Any, Final, Literal

CacheName = Literal["cache", "past_key_values"]

CACHE_NAMES: Final[tuple[CacheName, ...]] = ("cache", "past_key_values")


def cache_name(model_class: type) -> CacheName:
    """The name in a model class of the installed transformers."""
    parameters = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    return "cache" if "cache" in parameters else "past_key_values"


def cache_argument(model: object, cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument: ``model(ids, **cache_argument(model, cache))``; None is the model's own."""
    return {cache_name(type(model)): cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache, by either name, out of a call's keyword arguments; None where there is none.

    Raises:
        TypeError: there are two.
    """
    given = [cache for cache in (arguments.pop(name, None) for name in CACHE_NAMES) if cache is not None]
    if len(given) > 1:
        raise TypeError(f"{' and '.join(CACHE_NAMES)} are two names of one argument, and both are given: give one.")
    return given[0] if given else None


def output_cache(model: object, output: Any) -> Any:
    """The cache in what a model has returned."""
    return getattr(output, cache_name(type(model)))
