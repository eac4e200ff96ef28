"""``hip-trt serve-repo``: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hip_trt.cli.console import Verbose, out, set_verbose
from hip_trt.cli.offload_options import CacheShare, KeyCacheMib, Switch, ValueCacheMib, offload_of

_EPILOG = """
Examples:

  hip-trt serve-repo build/engine.plan --out build/triton

  hip-trt serve-repo build/model.onnx --out build/triton --name demo --force

  hip-trt serve-repo build/engine.plan --out build/triton --offload --cache-share 0.1
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("serve-repo", epilog=_EPILOG)(serve_repo)


def serve_repo(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|ENGINE.plan", help="What `hip-trt export` has made.")],
    to: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the repository; it may hold other models.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name in Triton.", show_default="the checkpoint's")
    ] = None,
    instances: Annotated[
        int, typer.Option("--instances", help="Copies of the model that answer at once, each with its own weights.")
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
    offload: Switch = False,
    key_cache_mib: KeyCacheMib = None,
    value_cache_mib: ValueCacheMib = None,
    cache_share: CacheShare = None,
    verbose: Verbose = False,
) -> None:
    """Write a model repository for Triton Inference Server: text in, text out, tokenizer included.

    Triton's Python backend runs the model with hip-trt's runtime. A plan of `tensorrt` is also given to Triton's
    TensorRT backend as it is, with the plugin library, for clients that keep the KV cache themselves. Writing needs no
    GPU and no Triton. --offload and its sizes become parameters in config.pbtxt, where they can be changed.
    """
    from hip_trt.serve_repo import write_repository

    set_verbose(verbose)
    sizes = offload_of(
        offload, key_cache_mib=key_cache_mib, value_cache_mib=value_cache_mib, cache_share=cache_share
    )
    repository = write_repository(model, to, name=name, instances=instances, offload=sizes, force=force)
    console = out()
    bare = f"{repository.engine}: the bare engine" if repository.engine else f"No bare engine: {repository.no_engine}"
    for line in (
        f"{repository.text}: text in, text out", bare,
        f"Where Triton's Python has hip_trt: tritonserver --model-repository={to}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
