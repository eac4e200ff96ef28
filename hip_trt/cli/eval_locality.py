"""``hip-trt eval locality``: how alike the attention scores of neighbouring keys are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hip_trt.cli.attention_options import (
    OUT,
    Device,
    Files,
    MaxTokens,
    Model,
    Out,
    Scaling,
    Seed,
    Texts,
    command,
    finish,
    names,
)
from hip_trt.cli.config_options import resolve_config, with_config_options

_EPILOG = """
Examples:

  hip-trt eval locality build/sample/SmolLM2-135M-Instruct.Q4_1.gguf --max-tokens 4096

  hip-trt eval locality ./Llama-3.2-1B --device cuda --texts bible,code

docs/attention_studies.md says what is measured and how to read it.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command(epilog=_EPILOG)(with_config_options(locality))


def locality(
    model: Model,
    texts: Texts = "",
    files: Files = None,
    max_tokens: MaxTokens = None,
    scaling: Scaling = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Queries of each text that are looked at.")] = 128,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = OUT,
    config_file: Path | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Measure how alike the attention scores of neighbouring keys are.

    The search relies on it: one key, or one block, speaks for the keys around it. By layer and head.
    """
    from hip_trt.evaluate import locality, locality_study
    from hip_trt.evaluate.attention_texts import load
    from hip_trt.evaluate.machine import describe
    from hip_trt.progress import Steps

    config = resolve_config(config_file, fields or {})
    steps = Steps()
    with steps.step("Load model and texts"):
        loaded, tokens, parameters = load(
            model, names=names(texts), files=files or (), max_tokens=max_tokens, device=device
        )
    with steps.step("Measure"):
        data = locality.measure(loaded, tokens, config, rows=rows, seed=seed, scaling=scaling, progress=steps.note)
    study = locality_study.study(
        data, measured_on=describe(device),
        parameters=parameters | {"RoPE scaling": scaling, "rows": rows, "seed": seed},
        command=command("locality", model, texts=texts, text=files, max_tokens=max_tokens, scaling=scaling, rows=rows,
                        device=device, seed=seed, config=config_file, **(fields or {})),
    )
    finish(study, out, locality_study.plots(data))
