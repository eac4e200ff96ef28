"""``hip-trt eval perplexity``: does the model predict real text as well as with dense attention?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hip_trt.cli.console import Verbose, out, set_verbose
from hip_trt.errors import RuntimeInputError

_TEXTS, _LONG = "Texts", "Beyond the model's context"
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
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a .gguf file.")],
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the model runs.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16", show_default="float16 on a GPU, else float32",
            help="Type of weights and activations, for dense attention and HiP alike.",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", rich_help_panel=_TEXTS, show_default="those installed; none if --text is given",
            help="Of bible (Debian's bible-kjv), code (Python's library), manual (Python's reference), node "
            "(Node.js's manual). Nothing is downloaded.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", rich_help_panel=_TEXTS, help="A UTF-8 text; may be given again."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, rich_help_panel=_TEXTS, show_default="8192, or the model's context if that is shorter",
            help="Read so many tokens of each text.",
        ),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=_TEXTS,
            help="Count only predictions with at least so many tokens before them. Rows of decode prefill as many.",
        ),
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
    float32_check: Annotated[
        bool, typer.Option("--float32-check", help="Repeat the first rows in float32, to see what rounding does.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Begin no row after so long; say what is missing.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random blocks.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Write eval_perplexity.json, .md and .png here, after each row.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Does the model predict real text as well as with dense attention? By config, for prefill and decode.

    Every row is the change of perplexity that a config makes, in percent of dense, on the same predictions of real
    texts. Rows of decode are decoded token by token over the known text, with the refresh schedule of the runtime.
    """
    set_verbose(verbose)
    from hip_trt.evaluate import machine, perplexity_report
    from hip_trt.evaluate import texts as shipped
    from hip_trt.evaluate.models import DTYPES, encode, load_model
    from hip_trt.evaluate.perplexity_grid import LONG, read_grid
    from hip_trt.evaluate.perplexity_run import Options, run

    kind = dtype or ("float16" if device.startswith("cuda") else "float32")
    if kind not in DTYPES:
        raise RuntimeInputError(f"--dtype: {kind!r} is not known.", f"Give one of {', '.join(DTYPES)}.")
    longer = _numbers("--lengths", lengths)
    cases, long_cases = read_grid(grid), LONG if long_grid is None else read_grid(long_grid)
    names = texts.split(",") if texts else ([] if text else shipped.installed())
    chosen = shipped.gather(names, text or ())
    loaded, tokenizer = load_model(model, device=device, dtype=DTYPES[kind])
    context = int(loaded.config.max_position_embeddings)
    tokens = min(8192, context) if max_tokens is None else max_tokens
    if tokens > context:
        raise RuntimeInputError(
            f"--max-tokens {tokens} is beyond the model's context of {context}.", "Name longer ones with --lengths."
        )
    encoded = {
        item.name: encode(tokenizer, item.content, max(tokens, *longer, 0), item.name, least=tokens) for item in chosen
    }
    options = Options(
        tokens, skip, cases, lengths=longer, scalings=[name for name in scalings.split(",") if name],
        long_cases=long_cases, float32_check=float32_check, seed=seed, time_limit=time_limit,
    )
    facts = {
        "model": model.name, "texts": {item.name: f"{item.source} (sha256 {item.sha256})" for item in chosen},
        "tokens": tokens, "lengths": longer, "skip": skip, "dtype": kind, "grid": Path(grid).name, "seed": seed,
    }
    measured_on = machine.describe(loaded.device, _library(device))

    def finish(data: dict[str, Any]) -> Any:
        return perplexity_report.study(data, command=_command(), parameters=facts, machine=measured_on)

    def save(data: dict[str, Any]) -> None:
        if folder is not None:
            finish(data).write(folder)

    data = run(loaded, encoded, options, say=lambda line: print(line, file=sys.stderr, flush=True), save=save)
    if folder is not None:
        finish(data).write(folder, {"": perplexity_report.plot(data)})
    console = out()
    for finding in finish(data).findings:
        console.print(f"- {finding}", highlight=False, markup=False, soft_wrap=True)


def _numbers(option: str, given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise RuntimeInputError(
            f"{option}: {given!r} is not allowed; it must be numbers with commas, such as 16384,32768."
        ) from None


def _library(device: str) -> Path | None:
    if not device.startswith("cuda"):
        return None
    from hip_trt.library import plugin_path

    return plugin_path()


def _command() -> str:
    return " ".join(["hip-trt", *sys.argv[1:]])
