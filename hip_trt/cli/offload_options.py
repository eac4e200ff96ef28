"""Options that keep the KV cache in host memory, and the Offload that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hip_trt.offload import Offload

PANEL = "KV cache in host memory (docs/offload.md; results are the same bits)"

Switch = Annotated[
    bool, typer.Option("--offload", help="Keep the KV cache in host memory, and on the GPU only what decode steps "
                       "touch often: for contexts larger than GPU memory. The same plan serves both.",
                       rich_help_panel=PANEL)
]
KeyCacheMib = Annotated[
    float | None, typer.Option("--key-cache-mib", help="GPU memory for hot keys, which the mask search reads most, "
                               "all layers together.", rich_help_panel=PANEL,
                               show_default="what a step reads, at least 3.8% of the full cache")
]
ValueCacheMib = Annotated[
    float | None, typer.Option("--value-cache-mib", help="GPU memory for hot values, which attention reads, all "
                               "layers together.", rich_help_panel=PANEL,
                               show_default="what two steps read, at least 0.9% of the full cache")
]
CacheShare = Annotated[
    float | None, typer.Option("--cache-share", help="Both together, as a share of the full cache, such as 0.05.",
                               rich_help_panel=PANEL)
]


def offload_of(
    offload: bool, *, key_cache_mib: float | None, value_cache_mib: float | None, cache_share: float | None
) -> Offload | None:
    """What the options ask for; None without --offload.

    Raises:
        BadParameter: options that do not go together.
        ConfigError: a value is not allowed.
    """
    sizes = {"--key-cache-mib": key_cache_mib, "--value-cache-mib": value_cache_mib, "--cache-share": cache_share}
    given = [name for name, value in sizes.items() if value is not None]
    if not offload:
        if given:
            raise typer.BadParameter("there is no cache to size without --offload", param_hint=given[0])
        return None
    if cache_share is not None and len(given) > 1:
        raise typer.BadParameter("give either a share or MiB, not both", param_hint="--cache-share")
    from hip_trt.offload import Offload

    if cache_share is not None:
        return Offload.of_share(cache_share)
    return Offload.create(key_cache_mib=key_cache_mib, value_cache_mib=value_cache_mib)
