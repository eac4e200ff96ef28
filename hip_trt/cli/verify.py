"""``hip-trt verify``: does an exported model compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hip_trt.cli.console import Verbose, fail, out, set_verbose
from hip_trt.errors import HipTrtError, RuntimeInputError

if TYPE_CHECKING:
    from rich.console import Console

    from hip_trt.verify.report import CaseRecord, Report

DIFFERS, NOT_COMPARED = 1, 2
_EPILOG = """
Exit status: 0 both agree; 1 they differ; 2 nothing could be compared (a file, a package or a GPU is missing).

Examples:

  hip-trt verify build/model.onnx

  hip-trt verify build/model.onnx --against pytorch --checkpoint SmolLM2-135M-Instruct

  hip-trt verify build/engine.plan --against onnxruntime --json report.json

  hip-trt verify build/model-int4.onnx --against onnxruntime --baseline build/model.onnx --rtol 0.5
"""
_TOLERANCES = "Tolerances (docs/verification.md says where the defaults come from)"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EPILOG)(verify)


def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|ENGINE.plan", help="What `hip-trt export` has made.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="reference|onnxruntime|pytorch", show_default="pytorch with --checkpoint, else reference",
            help="[b]reference[/]: the same weights, attention by the reference operator; finds a wrong operator, mask "
            "or RoPE constant. [b]pytorch[/]: the checkpoint in transformers; finds a wrong weight as well. "
            "[b]onnxruntime[/]: another .onnx, or for a plan the one that it was built from.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For pytorch: the folder, .gguf file or cached hub id that was exported."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="OTHER.onnx", help="For onnxruntime: the model to compare with.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Decode steps after a prefill: one searches from the top, the next one reuses.")
    ] = 2,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, show_default="a quarter more than sink + window + mask_k",
            help="Longest context. Its beginning is a random KV cache, so it costs memory, not prefill. Below sink + "
            "window + mask_k nothing is pruned, and the search is not tested.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Continue these prompts, one a line in UTF-8, in place of random tokens."),
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More block edges, and a real prompt of half of --max-tokens; minutes.")
    ] = False,
    atol: Annotated[
        float | None,
        typer.Option(
            min=0, rich_help_panel=_TOLERANCES, show_default="1e-4 float32, 1e-3 float16, 1e-2 bfloat16",
            help="Largest absolute error of an element, in the output's unit, added to --rtol's.",
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            min=0, rich_help_panel=_TOLERANCES, show_default="1e-3 float32, 0.05 float16, 0.25 bfloat16",
            help="Largest error of an element relative to its output's largest value: rounding is relative to that.",
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, rich_help_panel=_TOLERANCES, show_default="0.99 float32, 0.9 float16, 0.7 bfloat16",
            help="Least share of chosen blocks that both sides have in common: rounding turns close scores around.",
        ),
    ] = None,
    require_engine: Annotated[
        bool, typer.Option("--require-engine", help="For a plan: fail (2) where no GPU here can run it.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON too; - for standard output.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Compare an exported model with a reference: short, ragged and long contexts, prefill, then decode.

    An .onnx runs in ONNX Runtime, with the operator's body that it carries. A plan runs where its GPU is; elsewhere its
    .onnx is compared in its place, and the report says so.
    """
    set_verbose(verbose)
    try:
        report = _verify(
            model, against=against or ("pytorch" if checkpoint else "reference"), checkpoint=checkpoint,
            baseline=baseline, steps=steps, max_tokens=max_tokens, prompts=prompts, thorough=thorough, atol=atol,
            rtol=rtol, agreement=agreement, require_engine=require_engine,
        )
        text = report.model_dump_json(indent=2)
        if json_file is not None and str(json_file) != "-":
            _write(json_file, text)
    except HipTrtError as error:
        fail(str(error))
        raise typer.Exit(NOT_COMPARED) from None
    if json_file is not None and str(json_file) == "-":
        typer.echo(text)
    else:
        show(out(), report)
    if not report.agrees:
        raise typer.Exit(DIFFERS)


def _verify(model: Path, *, prompts: Path | None, **options: Any) -> Report:
    try:
        from hip_trt.verify import verify as compare
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "polygraphy":
            raise
        from hip_trt.errors import EnvironmentProblem

        raise EnvironmentProblem("verify needs Polygraphy, which is not installed.", "pip install polygraphy") from None
    from hip_trt.progress import Steps

    return compare(model, prompts=_token_ids(model, prompts) if prompts else None, progress=Steps(), **options)


def _token_ids(model: Path, prompts: Path) -> list[list[int]]:
    from hip_trt.runtime.loading import load_tokenizer

    try:
        lines = [line for line in prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeInputError(f"--prompts {prompts}: cannot be read: {error}.") from None
    if not lines:
        raise RuntimeInputError(f"--prompts {prompts}: no prompt in it.", "Write one a line.")
    tokenizer = load_tokenizer(model.parent)
    return [list(tokenizer(line)["input_ids"]) for line in lines]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RuntimeInputError(f"--json {path}: cannot be written: {error.strerror}.") from None


def show(console: Console, report: Report) -> None:
    """Print a report for reading."""
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    say(f"{report.model} ({report.dtype}): {report.runner}")
    say(f"against {report.other}")
    say("")
    for check in report.checks:
        verdict, style = ("ok    ", "") if check.passed else ("WRONG ", "bold red")
        say(f"{verdict} {check.name}: {check.detail}", style)
    _show_cases(console, report)
    _show_layers(console, report)
    for case in report.cases:
        if not case.agrees:
            say(f"{case.name}: {case.first} is the first to differ, in {case.first_call}. Likely: {case.cause}.", "red")
    for note in report.notes:
        say(f"note: {note}.")
    say(
        f"An error is within tolerance up to {report.atol:g} + {report.rtol:g} x the output's largest value; "
        f"agreement from {report.agreement:.0%}. {report.state[0].upper()}{report.state[1:]}.", "dim",
    )
    verdict = "both agree" if report.agrees else "they DIFFER"
    say(f"{verdict} ({report.seconds:.0f} s)", "bold green" if report.agrees else "bold red")


def _show_cases(console: Console, report: Report) -> None:
    table = Table(pad_edge=False, box=None)
    titles = ("case", "calls", "logits: abs", "relative", "largest error / tolerance", "in", "blocks agree", "first")
    for title in titles:
        table.add_column(title, overflow="fold")
    for case in report.cases:
        worst = max(case.outputs, key=lambda record: record.ratio if record.ratio == record.ratio else float("inf"))
        logits = next(record for record in case.outputs if record.name == "logits")
        table.add_row(
            case.name, f"{len(case.calls)}", f"{logits.max_abs:.2e}", f"{logits.relative:.2e}", f"{worst.ratio:.3f}",
            worst.name, _agreement(case), "ok" if case.agrees else f"{case.first}",
        )
    console.print(table, highlight=False, markup=False)
    console.print()


def _show_layers(console: Console, report: Report) -> None:
    """Errors relative to the output's largest value, the worst of all cases, by layer."""
    errors: dict[tuple[int, str], float] = {}
    shares: dict[tuple[int, str], float] = {}
    for case in report.cases:
        for record in case.outputs:
            kind, _, layer = record.name.rpartition(".")
            if kind:
                errors[int(layer), kind] = max(errors.get((int(layer), kind), 0.0), record.relative)
        for share in case.agreements:
            kind, _, layer = share.name.rpartition(".")
            shares[int(layer), kind] = min(shares.get((int(layer), kind), 1.0), share.agreement)
    first = min((case.first_layer for case in report.cases if case.first_layer is not None), default=None)
    table = Table(pad_edge=False, box=None)
    values, choices = ("query", "key", "value", "attended"), ("chosen_blocks", "nodes")
    for title in ("layer", *values, "blocks agree", "nodes agree", ""):
        table.add_column(title)
    for index in sorted({index for index, _ in errors}):
        table.add_row(
            str(index), *(f"{errors[index, kind]:.1e}" if (index, kind) in errors else "-" for kind in values),
            *(f"{shares[index, kind]:.2%}" if (index, kind) in shares else "-" for kind in choices),
            "first to differ" if index == first else "",
        )
    console.print(table, highlight=False, markup=False)
    console.print()


def _agreement(case: CaseRecord) -> str:
    shares = [record.agreement for record in case.agreements if record.name.startswith("chosen_blocks")]
    return f"{min(shares):.2%}" if shares else "all attended"
