"""``hip-trt eval retrieval``: facts found in long contexts, dense against HiP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hip_trt.cli.attention_options import (
    OUT,
    Device,
    Files,
    Model,
    Out,
    Seed,
    Texts,
    command,
    finish,
    names,
    numbers,
    plugin_of,
)
from hip_trt.cli.config_options import resolve_config, with_config_options
from hip_trt.errors import RuntimeInputError

if TYPE_CHECKING:
    from hip_trt.evaluate.retrieval import Setting

_EPILOG = """
Examples:

  hip-trt eval retrieval benchmarks/recall_model --device cuda

  hip-trt eval retrieval build/sample/SmolLM2-135M-Instruct.Q4_1.gguf --lengths 2048,4096 --texts manual

docs/retrieval.md says what is measured and how to read it.
"""
_RECALL_LENGTHS = (8192, 16384, 32768, 65536, 131072)
_TEXT_LENGTHS = (2048, 4096, 6144, 8192)


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command(epilog=_EPILOG)(with_config_options(retrieval))


def retrieval(
    model: Model,
    lengths: Annotated[
        str, typer.Option(metavar="TOKENS,...", show_default="8192 to 131072 by twos; in real texts 2048 to 8192",
                          help="Lengths of context, question and answer together."),
    ] = "",
    texts: Texts = "",
    files: Files = None,
    stretches: Annotated[
        str, typer.Option(metavar="TOKENS,...", help="For the recall model: over so many tokens a fact is repeated, "
                          "every 16; 1: it stands there once."),
    ] = "1,64,256",
    facts: Annotated[
        int | None, typer.Option(min=1, show_default="16; in real texts 8", help="Facts in a context, over its depth.")
    ] = None,
    probes: Annotated[int, typer.Option(min=1, help="Contexts of each kind and length.")] = 4,
    asked: Annotated[
        str, typer.Option("--question", metavar="prefill|decode",
                          help="Read a question as one more chunk of prompt, or token by token."),
    ] = "prefill",
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", show_default="built in", help="Configs to try: a list of fields "
                                  "that each changes, such as - {mask_k: 4096, decode_mask_k: 4096}."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|float16|bfloat16", show_default="float16 on a GPU, else float32",
                                 help="Type of weights and activations, for dense attention and HiP alike."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Begin no row after so long; say what is missing.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = OUT,
    config_file: Path | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Does the model find a fact wherever it stands in a long context?

    A fact is a line of tokens, its question the line's beginning, its answer the rest. Contexts are prefilled, answers
    decoded, with dense attention and with HiP. MODEL is the small recall model, whose synthetic language is used then,
    or any other, with real texts.
    """
    from hip_trt.evaluate import retrieval, retrieval_report
    from hip_trt.evaluate import texts as shipped
    from hip_trt.evaluate.machine import describe
    from hip_trt.evaluate.models import DTYPES, evaluation_dtype, load_model
    from hip_trt.evaluate.retrieval_language import RecallLanguage
    from hip_trt.evaluate.retrieval_probes import synthetic_probe, text_probe

    if asked not in ("prefill", "decode"):
        raise RuntimeInputError(f"--question: {asked!r} is not known.", "Give prefill or decode.")
    kind = evaluation_dtype(dtype, device)
    choices = retrieval.choices(
        retrieval.GRID if grid is None else retrieval.read_grid(grid), resolve_config(config_file, fields or {})
    )
    loaded, tokenizer = load_model(model, device=device, dtype=DTYPES[kind])
    language = RecallLanguage.of(loaded.config)
    context = int(loaded.config.max_position_embeddings)
    usual = _TEXT_LENGTHS if language is None else _RECALL_LENGTHS
    tokens = (
        numbers("--lengths", lengths, example="4096,8192")
        or [length for length in usual if length <= context] or [context]
    )
    retrieval.check_lengths(loaded, tokens)
    spans = numbers("--stretches", stretches, example="4096,8192")
    chosen = [] if language else shipped.choose(names(texts), files or ())
    each = facts or (16 if language else 8)

    def settings() -> Iterator[Setting]:
        for length in tokens:
            for span in spans if language else ():
                assert language is not None
                made = [synthetic_probe(language, length, facts=each, stretch=span, seed=seed + number)
                        for number in range(probes)]
                yield retrieval.Setting(length, "stands once" if span <= 1 else f"over {span} tokens", made)
            for text in chosen:
                yield retrieval.Setting(length, text.name, [
                    text_probe(tokenizer, text, length, facts=each, seed=seed + number) for number in range(probes)
                ])

    measured_on = describe(loaded.device, plugin_of(device))
    parameters = {
        "model": model.name, "facts in a context": each, "contexts": probes, "dtype": kind, "seed": seed,
        **({"texts": {text.name: f"{text.source} (sha256 {text.sha256})" for text in chosen}} if chosen else {}),
    }
    line = command(
        "retrieval", model, lengths=lengths, texts=texts, text=files, stretches=stretches if language else None,
        facts=facts, probes=probes, question=asked, grid=grid, dtype=dtype, device=device, seed=seed,
        config=config_file, **(fields or {}),
    )

    def report(data: dict[str, Any]) -> Any:
        return retrieval_report.study(
            data, synthetic=language is not None, command=line, parameters=parameters, machine=measured_on
        )

    data = retrieval.run(
        loaded, settings(), choices, asked=cast("retrieval.Asked", asked), time_limit=time_limit,
        say=lambda text: print(text, file=sys.stderr, flush=True), save=lambda data: report(data).write(out),
    )
    finish(report(data), out, retrieval_report.plots(data))
