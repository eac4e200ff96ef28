"""How the command line talks: results on standard output, everything else on standard error, errors on one line."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from hip_trt.errors import HipTrtError

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show details, TensorRT's own messages among them, on standard error.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs, instead of tables.")]


class Commands(TyperGroup):
    """A command group that turns what a user can cause into one line and an exit status, with no stack trace.

    1: a :class:`HipTrtError`; 130: Ctrl-C. Wrong usage exits with 2, as Typer has it.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HipTrtError as error:
            fail(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            fail("interrupted; nothing half-written is left.")
            raise typer.Exit(130) from None


def fail(message: str) -> None:
    """Print an error on one line of standard error, whatever the width of the terminal."""
    Console(stderr=True).print(
        f"error: {' '.join(message.split())}", style="bold red", soft_wrap=True, markup=False, highlight=False,
        emoji=False,
    )


def out() -> Console:
    """Console for results. Piped output is not wrapped to a terminal's width."""
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=160, emoji=False)


def print_json(value: Any) -> None:
    """Print a JSON value to standard output."""
    typer.echo(json.dumps(value, indent=2))


def set_verbose(verbose: bool) -> None:
    """Send the package's log to standard error."""
    if not verbose:
        return
    logger = logging.getLogger("hip_trt")
    logger.setLevel(logging.DEBUG)
    handler = RichHandler(console=Console(stderr=True, emoji=False), show_path=False, show_time=True, markup=False)
    logger.handlers[:] = [handler]
    logger.propagate = False
