"""The application: which commands there are."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from hip_trt.cli import doctor, eval, export, inspect, run, serve_repo, verify
from hip_trt.cli.console import Commands

app = typer.Typer(
    name="hip-trt",
    cls=Commands,
    help="Long-context Llama on TensorRT with Hierarchically Pruned Attention (HiP), without retraining.",
    epilog="Begin with `hip-trt doctor`, then see `hip-trt export --help`.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hip-trt {version('hip-trt')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (export, run, verify, eval, inspect, serve_repo, doctor):
    command.register(app)
