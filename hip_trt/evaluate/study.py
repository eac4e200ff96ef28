"""What a study leaves behind: NAME.json for programs, NAME.md for people, and plots.

A study measures, keeps what it measured as plain data, and makes tables and findings from that data alone, so that
both can be made anew from the JSON file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hip_trt.errors import RuntimeInputError
from hip_trt.files import staging

Cell = str | int | float | None
"""What stands in a table: a number is written as the column says, None as nothing."""

Plot = Callable[[Any], None]
"""Draws into an empty matplotlib Figure."""


@dataclass(frozen=True)
class Table:
    """A table for reading.

    Attributes:
        title: a heading, without a full stop.
        columns: headings.
        rows: as long as ``columns``.
        note: what a reader must know of it; may be empty.
        formats: of numbers, by column heading, as in format(); others are written as they are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"{self.title}: a row of {len(wrong[0])} cells under {len(self.columns)} columns")

    def texts(self) -> list[list[str]]:
        """The rows as they are written."""
        return [
            [self._text(column, cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows
        ]

    def markdown(self) -> str:
        """Heading, note and table."""
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

        lines = [line(self.columns), f"|{'---|' * len(self.columns)}", *map(line, self.texts())]
        return "\n\n".join([f"## {self.title}", *([self.note] if self.note else []), "\n".join(lines)])

    def _text(self, column: str, cell: Cell) -> str:
        if cell is None:
            return ""
        if isinstance(cell, str) or column not in self.formats:
            return str(cell)
        return format(cell, self.formats[column])


@dataclass(frozen=True)
class Study:
    """A finished study, or one that is still under way.

    Attributes:
        name: of its command and of its files, such as "perplexity".
        title: a heading.
        command: what to type to do it again.
        parameters: what it was asked for: model, texts, lengths, seeds, type of the weights.
        measured_on: machine and versions, from :func:`hip_trt.evaluate.machine.describe`.
        data: what was measured, as JSON has it; what other programs read.
        tables: made from ``data``.
        findings: sentences that follow from ``data``, the most important one first.
        notes: what a reader must know to judge it; what was not measured.
    """

    name: str
    title: str
    command: str
    parameters: Mapping[str, Any]
    measured_on: Mapping[str, Any]
    data: Any
    tables: Sequence[Table] = ()
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"eval_{self.name.replace('-', '_')}"

    def markdown(self, plots: Sequence[str] = ()) -> str:
        """The page.

        Args:
            plots: names of picture files beside it.
        """
        parts = [f"# {self.title}"]
        if self.findings:
            parts.append("\n".join(f"- {finding}" for finding in self.findings))
        parts += [f"![{self.title}]({plot})" for plot in plots]
        parts += [table.markdown() for table in self.tables]
        notes = [*self.notes, f"Made by `{self.command}`.", *map(_listed, (self.parameters, self.measured_on))]
        parts.append("\n".join(["## How it was measured", "", *(f"- {note}" for note in notes if note)]))
        return "\n\n".join(parts) + "\n"

    def write(self, folder: str | Path, plots: Mapping[str, Plot] | None = None) -> list[Path]:
        """Write the files, whole, each replacing its predecessor.

        Args:
            folder: made if absent.
            plots: what draws a picture, by what its file's name ends in after the stem: "" or "_layers", say. Where
                matplotlib is not installed, pictures are left out, those of an earlier run left as they are.

        Returns:
            The files.

        Raises:
            ExportError: the folder cannot be written.
        """
        with staging(folder) as stage:
            pictures = []
            for ending, draw in (plots or {}).items():
                if _save_plot(draw, stage.path / f"{self.stem}{ending}.png"):
                    pictures.append(f"{self.stem}{ending}.png")
            (stage.path / f"{self.stem}.json").write_text(_json(asdict(self)), encoding="utf-8")
            (stage.path / f"{self.stem}.md").write_text(self.markdown(pictures), encoding="utf-8")
            return stage.publish([f"{self.stem}.json", f"{self.stem}.md", *pictures])

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """What :meth:`write` wrote.

        Raises:
            RuntimeInputError: there is no such file, or it holds no study.
        """
        remedy = "Make it with hip-trt eval."
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            tables = [Table(**table) for table in content.pop("tables")]
            return cls(**content, tables=tables)
        except OSError as error:
            raise RuntimeInputError(f"{path}: cannot be read: {error.strerror}.", remedy) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RuntimeInputError(f"{path}: not a study's JSON: {error}.", remedy) from None


def _save_plot(draw: Plot, path: Path) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=110)
    return True


def _json(value: Any) -> str:
    """Indented, but a list of numbers on one line."""
    text = json.dumps(value, indent=1, allow_nan=False)
    return re.sub(r"\[\n[-+\d.eE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in facts.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) + ")"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return str(value)
