"""``hip-trt eval``: what pruning costs in quality, and from which length on it pays. One command a study."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer

from hip_trt.cli.console import Commands

STUDIES = ("perplexity", "retrieval", "recall", "locality", "break_even", "recommend")
"""Modules hip_trt.cli.eval_NAME, in the order in which a reader meets them."""

_HELP = """Measure what pruning costs in quality, and from which length on it pays.

Each command is one study. It prints a short table and writes numbers as JSON, a page in Markdown, and plots.

[b]perplexity[/]: does the model predict real text as well as with dense attention? By config, prefill and decode.

[b]retrieval[/]: does it find a fact wherever it stands in a long context?

[b]recall[/]: how much of the true attention do the chosen blocks hold, beside simpler ways to choose?

[b]locality[/]: do neighbouring keys get like scores, which the search relies on? By layer and head.

[b]break-even[/]: from which length on is pruned attention faster than dense?

[b]recommend[/]: which config for which length and loss of quality, and when to stay dense; from the results above.
"""

_EPILOG = "docs/evaluation.md says how to read the results."


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(
        cls=Commands, help=_HELP, epilog=_EPILOG, rich_markup_mode="rich", no_args_is_help=True,
    )
    for study in STUDIES:
        name = f"hip_trt.cli.eval_{study}"
        if find_spec(name):
            import_module(name).register(group)
    app.add_typer(group, name="eval")
