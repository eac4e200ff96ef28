"""``hip-trt eval perplexity``: does the model predict real text as well as with dense attention?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hip_trt.cli.attention_options import (
    OUT,
    Device,
    Files,
    MaxTokens,
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
from hip_trt.errors import RuntimeInputError

if TYPE_CHECKING:
    from hip_trt.evaluate.study import Study

_LONG = "Beyond the model's context"
_EPILOG = """
Examples:

  The default and what is around it, on the texts that are installed; minutes on a GPU, hours on a CPU:

    hip-trt eval perplexity ./SmolLM2-135M --device cuda --out results

  A first look on a text of yours:

    hip-trt eval perplexity ./Llama-3.2-1B --grid small --text book.txt --max-tokens 4096

  With contexts beyond the model's own as well:

    hip-trt eval perplexity model.gguf --device cuda --lengths 16384,32768 --out results
"""


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command("perplexity", epilog=_EPILOG)(perplexity)


def perplexity(
    model: Model,
    texts: Texts = "",
    text: Files = None,
    max_tokens: MaxTokens = None,
    skip: Annotated[
        int,
        typer.Option(min=0, help="Count only predictions with at least so many tokens before them. Rows of decode "
                     "prefill as many."),
    ] = 2048,
    grid: Annotated[
        str,
        typer.Option(
            metavar="default|small|FILE",
            help="Configs to try. A YAML file lists them: - {mode: decode, method: hip, decode_mask_k: 256}; mode is "
            "prefill or decode; method is hip, none (sink and window only), random, or exact (all blocks scored).",
        ),
    ] = "default",
    lengths: Annotated[
        str,
        typer.Option(
            metavar="TOKENS,...", rich_help_panel=_LONG, show_default="none",
            help="Read so many tokens as well, with RoPE scaled: dense under each of --scalings, then HiP under the "
            "one that serves dense attention best.",
        ),
    ] = "",
    scalings: Annotated[
        str, typer.Option(metavar="NAME,...", rich_help_panel=_LONG, help="Ways to scale RoPE, by constant factors.")
    ] = "none,linear,theta,yarn",
    long_grid: Annotated[
        str | None,
        typer.Option(metavar="FILE", rich_help_panel=_LONG, show_default="built in", help="Configs to try there.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16", show_default="float16 on a GPU, else float32",
            help="Type of weights and activations, for dense attention and HiP alike.",
        ),
    ] = None,
    float32_check: Annotated[
        bool, typer.Option("--float32-check", help="Repeat the first rows in float32, to see what rounding does.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Begin no row after so long; what is left out is said.")
    ] = None,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Does the model predict real text as well as with dense attention? By config, for prefill and decode.

    Every row is the change of perplexity that a config makes, in percent of dense, on the same predictions of real
    texts. Rows of decode are decoded token by token over the known text, with the refresh schedule of the runtime.
    """
    from hip_trt.evaluate import machine, perplexity_report
    from hip_trt.evaluate import texts as shipped
    from hip_trt.evaluate.models import DTYPES, encode, evaluation_dtype, load_model
    from hip_trt.evaluate.perplexity_grid import LONG, read_grid
    from hip_trt.evaluate.perplexity_run import Options, run
    from hip_trt.progress import Steps

    kind = evaluation_dtype(dtype, device)
    longer = numbers("--lengths", lengths, example="16384,32768")
    cases, long_cases = read_grid(grid), LONG if long_grid is None else read_grid(long_grid)
    chosen = shipped.choose(names(texts), text or ())
    loaded, tokenizer = load_model(model, device=device, dtype=DTYPES[kind])
    context = int(loaded.config.max_position_embeddings)
    tokens = min(8192, context) if max_tokens is None else max_tokens
    if tokens > context:
        raise RuntimeInputError(
            f"--max-tokens {tokens} is beyond the model's context of {context}.", "Name longer ones with --lengths."
        )
    encoded = {
        item.name: encode(tokenizer, item.content, max([tokens, *longer]), item.name, least=tokens) for item in chosen
    }
    measured_on = machine.describe(device, plugin_of(device))

    def finished(data: dict[str, Any]) -> Study:
        return perplexity_report.study(
            data, measured_on=measured_on,
            command=command(
                "perplexity", model, texts=texts, text=text, max_tokens=max_tokens, skip=skip,
                grid=Path(grid).name,
                lengths=lengths, scalings=scalings if longer else None,
                long_grid=long_grid and Path(long_grid).name, device=device, dtype=dtype,
                seconds=seconds, seed=seed,
            ) + (" --float32-check" if float32_check else ""),
            parameters={
                "model": model.name, "texts": {item.name: f"{item.source}, {item.sha256}" for item in chosen},
                "tokens": tokens, "lengths": longer, "skip": skip, "type": kind, "grid": Path(grid).name, "seed": seed,
            },
        )

    options = Options(
        tokens, skip, cases, lengths=longer, scalings=names(scalings), long_cases=long_cases,
        float32_check=float32_check, seed=seed, time_limit=seconds,
    )
    data = run(loaded, encoded, options, say=Steps().note, save=lambda data: finished(data).write(out))
    finish(finished(data), out, {"": perplexity_report.plot(data)})
