"""``hip-trt eval recommend``: which config for which length and loss of quality, and when to stay dense."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hip_trt.cli.attention_options import finish, names
from hip_trt.cli.console import out as console
from hip_trt.errors import RuntimeInputError

_EPILOG = """
Examples:

  hip-trt eval recommend

  hip-trt eval recommend build/eval --budgets 0.5,3 --out build/eval
"""


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command(epilog=_EPILOG)(recommend)


def recommend(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the other studies' results are: their --out.")
    ] = Path("benchmarks/results"),
    budgets: Annotated[
        str, typer.Option(metavar="PERCENT,...", help="Perplexity that may be lost, on the worst text.")
    ] = "0.5,1,2",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", show_default="only print",
                                  help="Write eval_recommend.json and .md here.")
    ] = None,
) -> None:
    """Say which config to use for which length and loss of quality, and when to stay dense.

    Measures nothing: it reads the results of the other studies, and says which of them are missing.
    """
    from hip_trt.evaluate import recommend as recommendation
    from hip_trt.evaluate import recommend_report
    from hip_trt.evaluate.machine import describe

    try:
        losses = [float(word) for word in names(budgets)]
    except ValueError:
        losses = []
    if not losses or not all(loss > 0 for loss in losses):
        raise RuntimeInputError(f"--budgets {budgets}: not allowed.", "Give percents above 0, such as 0.5,1,2.")
    data = recommendation.recommend(recommendation.gather(folder), losses)
    study = recommend_report.study(
        data, command=_command(folder, budgets), parameters={"budgets": losses},
        measured_on={name: value for name, value in describe().items() if name in ("hip-trt", "date")},
    )
    if out is not None:
        finish(study, out, {})
        return
    for table in study.tables:
        console().print(table.markdown() + "\n", markup=False, highlight=False, soft_wrap=True)
    for finding in study.findings:
        console().print(f"- {finding}", markup=False, highlight=False, soft_wrap=True)


def _command(folder: Path, budgets: str) -> str:
    """What to type to have it again; of a folder of this machine only its name."""
    shown = Path(folder.name) if folder.is_absolute() else folder
    return shlex.join(["hip-trt", "eval", "recommend", shown.as_posix(), "--budgets", budgets])
