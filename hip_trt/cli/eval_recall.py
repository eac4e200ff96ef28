"""``hip-trt eval recall``: how much of dense attention the chosen blocks hold."""

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

  hip-trt eval recall build/sample/SmolLM2-135M-Instruct.Q4_1.gguf --max-tokens 4096

  hip-trt eval recall ./Llama-3.2-1B --device cuda --texts bible,code --mask-k 2048

docs/attention_studies.md says what is measured and how to read it.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command(epilog=_EPILOG)(with_config_options(recall))


def recall(
    model: Model,
    texts: Texts = "",
    files: Files = None,
    max_tokens: MaxTokens = None,
    scaling: Scaling = None,
    query_blocks: Annotated[
        int, typer.Option("--query-blocks", min=1, help="Query blocks of each text whose prefill masks are judged.")
    ] = 24,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Decoded tokens of each text that are judged.")] = 128,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = OUT,
    config_file: Path | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Measure how much of dense attention the chosen blocks hold.

    By layer and head, for the given config and others around it, beside random blocks, a longer window, exact block
    top-k and exact token top-k of the same number of tokens.
    """
    from hip_trt import library
    from hip_trt.evaluate import mass_recall, mass_recall_study
    from hip_trt.evaluate.attention_texts import load
    from hip_trt.evaluate.machine import describe
    from hip_trt.evaluate.mass_recall_masks import LibraryMasks, ReferenceMasks
    from hip_trt.progress import Steps

    config = resolve_config(config_file, fields or {})
    steps = Steps()
    with steps.step("Load model and texts"):
        loaded, tokens, parameters = load(
            model, names=names(texts), files=files or (), max_tokens=max_tokens, device=device
        )
    cuda = library.load() if device.startswith("cuda") else None
    with steps.step("Measure"):
        data = mass_recall.measure(
            loaded, tokens, config, masks=LibraryMasks(cuda) if cuda else ReferenceMasks(), query_blocks=query_blocks,
            rows=rows, seed=seed, scaling=scaling, progress=steps.note,
        )
    study = mass_recall_study.study(
        data, measured_on=describe(device, cuda.path if cuda else None),
        parameters=parameters | {"RoPE scaling": scaling, "query blocks": query_blocks, "rows": rows, "seed": seed},
        command=command("recall", model, texts=texts, text=files, max_tokens=max_tokens, scaling=scaling,
                        query_blocks=query_blocks, rows=rows, device=device, seed=seed, config=config_file,
                        **(fields or {})),
    )
    finish(study, out, mass_recall_study.plots(data))
