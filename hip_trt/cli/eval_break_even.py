"""``hip-trt eval break-even``: from which length HiP is faster than dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hip_trt.cli.attention_options import OUT, Out, Seed, command, finish, numbers
from hip_trt.cli.config_options import resolve_config, with_config_options

_EPILOG = """
Examples:

  hip-trt eval break-even

  hip-trt eval break-even --heads 64,8,128 --lengths 4096,8192,16384 --block-k 32

docs/attention_studies.md says what is measured and how to read it.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command(name="break-even", epilog=_EPILOG)(with_config_options(break_even))


def break_even(
    heads: Annotated[
        str, typer.Option("--heads", metavar="Q,KV,SIZE", help="Query heads, key/value heads, head size of the layer.")
    ] = "32,8,128",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,...", help="Tokens; multiples of page_size.",
                          show_default="1k to 32k in prefill, to 64k in decode"),
    ] = "",
    batches: Annotated[str, typer.Option("--batches", metavar="N,...", help="Sequences in decode steps.")] = "1,4,16",
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=1, help="Begin nothing after so long; what is left out says so.")
    ] = None,
    seed: Seed = 0,
    out: Out = OUT,
    config_file: Path | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Measure from which length HiP is faster than dense attention. Needs a GPU.

    One layer in bfloat16, prefill and decode, for the given config and others around it, beside PyTorch's dense
    attention by FlashAttention-2 and cuDNN.
    """
    import torch

    from hip_trt import library
    from hip_trt.bench.geometry import Geometry
    from hip_trt.errors import EnvironmentProblem, RuntimeInputError
    from hip_trt.evaluate import break_even, break_even_study
    from hip_trt.evaluate.machine import describe
    from hip_trt.evaluate.study import Study
    from hip_trt.progress import Steps

    config = resolve_config(config_file, fields or {})
    sizes = numbers("--heads", heads, example="32,8,128")
    tokens = numbers("--lengths", lengths, example="4096,8192")
    sequences = numbers("--batches", batches, example="1,4,16")
    if len(sizes) != 3 or sizes[0] % sizes[1]:
        raise RuntimeInputError(f"--heads {heads}: not allowed.", "Give query heads, key/value heads and head size.")
    query_heads, kv_heads, head_dim = sizes
    wrong = [length for length in tokens if length % config.page_size]
    if wrong:
        raise RuntimeInputError(f"--lengths {wrong[0]}: not allowed.", f"Give multiples of {config.page_size}.")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "break-even compares speeds on a GPU, and PyTorch sees none.", "Run it on a machine with an NVIDIA GPU."
        )
    cuda, steps = library.load(), Steps()
    geometry = Geometry(query_heads, kv_heads, head_dim, torch.bfloat16)

    def finished(data: dict[str, Any]) -> Study:
        return break_even_study.study(
            data, measured_on=describe("cuda", cuda.path),
            parameters={"query heads": query_heads, "key/value heads": kv_heads, "head size": head_dim,
                        "type": "bfloat16", "seed": seed},
            command=command("break-even", None, heads=heads, lengths=lengths, batches=batches, seconds=seconds,
                            seed=seed, config=config_file, **(fields or {})),
        )

    data = break_even.measure(
        cuda, geometry, break_even.cases(config, sequences or break_even.BATCHES), lengths=tokens, seed=seed,
        limit=seconds, progress=steps.note, save=lambda data: finished(data).write(out),
    )
    finish(finished(data), out, break_even_study.plots(data))
