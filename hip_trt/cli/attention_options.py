"""Options that the studies share: which texts, how long, where, and where results go."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hip_trt.cli.console import out
from hip_trt.errors import RuntimeInputError

if TYPE_CHECKING:
    from hip_trt.evaluate.study import Plot, Study

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a .gguf file.")]
Texts = Annotated[
    str, typer.Option("--texts", metavar="NAME,...", help="Texts that packages ship: bible, code, manual, node.",
                      show_default="those that are installed"),
]
Files = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="A UTF-8 text; may be repeated.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=2, help="Tokens of each text.",
                             show_default="the model's context, at most 8192"),
]
Scaling = Annotated[
    str | None, typer.Option("--scaling", metavar="none|linear|theta|yarn", show_default="refuse longer texts",
                             help="How RoPE reads texts that are longer than the model's context."),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, or cuda.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn at random.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where results go.")]
OUT = Path("build/eval")


def names(texts: str) -> list[str]:
    """Of ``--texts``."""
    return [name.strip() for name in texts.split(",") if name.strip()]


def numbers(option: str, given: str, *, example: str) -> list[int]:
    """Of an option such as ``--lengths``.

    Raises:
        RuntimeInputError: they are no whole numbers from 1 on.
    """
    words = names(given)
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise RuntimeInputError(
            f"{option}: {given!r} is not allowed; it must be whole numbers from 1 on with commas, such as {example}."
        )
    return [int(word) for word in words]


def plugin_of(device: str) -> Path | None:
    """The library that computes on a device; None where the reference does."""
    if not device.startswith("cuda"):
        return None
    from hip_trt.library import plugin_path

    return plugin_path()


def finish(study: Study, folder: Path, plots: Mapping[str, Plot]) -> None:
    """Write a study, and say what it found and where it lies."""
    written = study.write(folder, plots)
    console = out()
    for finding in study.findings:
        console.print(f"- {finding}", markup=False, highlight=False)
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def command(study: str, model: Path | None, **given: Any) -> str:
    """What to type to run a study again: files by their names, options that were given."""
    words = ["hip-trt", "eval", study, *([] if model is None else [model.name])]
    for name, value in given.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item != "":
                words += [f"--{name.replace('_', '-')}", item.name if isinstance(item, Path) else str(item)]
    return shlex.join(words)
