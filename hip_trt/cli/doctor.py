"""``hip-trt doctor``: what works on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from hip_trt.cli.console import Json, Verbose, out, print_json, set_verbose

if TYPE_CHECKING:
    from hip_trt.doctor import Check

_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[red]✗[/]"}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)


def _table(checks: tuple[Check, ...]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for column in ("mark", "name", "found"):
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    for check in checks:
        table.add_row(_MARKS[check.status], f"[b]{check.name}[/]", escape(check.found))
        if check.remedy:
            table.add_row("", "", f"[yellow]→ {escape(check.remedy)}[/]")
    return table


def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Say what works on this machine (export, build, run), what is missing, and which command helps.

    Exit status 0: models can be exported and engines built here. 1: something that this needs is missing.
    """
    from hip_trt.doctor import diagnose

    set_verbose(verbose)
    diagnosis = diagnose()
    if as_json:
        print_json({"can_export": diagnosis.can_export, **diagnosis.model_dump(mode="json")})
    else:
        console = out()
        console.print("[b]This machine[/]", _table(diagnosis.checks), "", "[b]What works here[/]",
                      _table(diagnosis.tasks), sep="\n", highlight=False)
    raise typer.Exit(0 if diagnosis.can_export else 1)
