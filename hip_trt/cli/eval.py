"""``hip-trt eval``: what pruning costs in quality, and from which length on it pays. One command a study."""

from __future__ import annotations

import typer

from hip_trt.cli import eval_break_even, eval_locality, eval_perplexity, eval_recall, eval_recommend, eval_retrieval
from hip_trt.cli.console import Commands

_HELP = "\n\n".join((
    "Measure what pruning costs in quality, and from which length on it pays.",
    "Each command is one study. It prints what it found, and writes numbers as JSON, a page in Markdown, and plots.",
    "[b]perplexity[/] and [b]retrieval[/] say whether your model still does its work: predicts real text, finds a fact "
    "in a long context. [b]recall[/] and [b]locality[/] say why: how much of the true attention is held, how alike "
    "neighbouring keys are. [b]break-even[/] says from which length on HiP is faster than dense attention. "
    "[b]recommend[/] puts the results together: which config for which length and loss of quality, and when to stay "
    "dense.",
))

_EPILOG = "docs/evaluation.md says how to read the results."


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(cls=Commands, help=_HELP, epilog=_EPILOG, rich_markup_mode="rich", no_args_is_help=True)
    for study in (eval_perplexity, eval_retrieval, eval_recall, eval_locality, eval_break_even, eval_recommend):
        study.register(group)
    app.add_typer(group, name="eval")
