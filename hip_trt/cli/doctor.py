"""``hip-trt doctor``: what works on this machine."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from hip_trt.cli.console import Json, Verbose, out, print_json, set_verbose

_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[red]✗[/]"}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)


def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Look at Python, TensorRT, the plugin and the GPU, and say what to do about each thing missing.

    Exit status 0: models can be exported and engines built here. 1: something that this needs is missing.
    """
    from hip_trt.doctor import diagnose

    set_verbose(verbose)
    diagnosis = diagnose()
    if as_json:
        print_json({"can_export": diagnosis.can_export, **diagnosis.model_dump(mode="json")})
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for column in ("mark", "name", "found"):
            table.add_column(column, overflow="fold", no_wrap=column != "found")
        for check in diagnosis.checks:
            table.add_row(_MARKS[check.status], f"[b]{check.name}[/]", escape(check.found))
            if check.remedy:
                table.add_row("", "", f"[yellow]→ {escape(check.remedy)}[/]")
        console = out()
        console.print(table, highlight=False)
        console.print(
            "[green]Models can be exported here.[/]" if diagnosis.can_export
            else "[red]Models cannot be exported here before the problems marked ✗ are solved.[/]"
        )
    raise typer.Exit(0 if diagnosis.can_export else 1)
