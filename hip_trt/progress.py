"""Steps of long work, shown on standard error while it runs and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Shows each step with a spinner, or a bar where its size is known, and keeps its time.

    Nothing is shown where standard error is not a terminal; times are kept all the same.

    Attributes:
        seconds: wall time of each finished step by its title, in order.

    Example:
        >>> steps = Steps()
        >>> with steps.step("Write weights", total=1_000_000) as advance:
        ...     advance(1_000_000)
        >>> list(steps.seconds)
        ['Write weights']
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Run one step; ``total`` is its size in bytes, if known. Yields a callable that takes bytes done."""
        start = time.perf_counter()
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if total is not None:
            columns += [BarColumn(), DownloadColumn()]
        with Progress(
            *columns, TimeElapsedColumn(), console=self._console, transient=True,
            disable=not self._console.is_terminal,
        ) as progress:
            yield Step(progress, progress.add_task(title, total=total))
        elapsed = time.perf_counter() - start
        self.seconds[title] = self.seconds.get(title, 0.0) + elapsed
        if self._console.is_terminal:
            self._console.print(f"[green]✓[/] {escape(title)} [dim]{elapsed:.1f} s[/]", highlight=False, emoji=False)

    def note(self, message: str) -> None:
        """Print one line that the user should see, on a terminal or not."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def warn(self, message: str) -> None:
        """Print one warning line, on a terminal or not."""
        self._console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True, emoji=False)


class Step:
    """Advances the bar of a running step; see :meth:`Steps.step`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, count: int) -> None:
        """Add ``count`` bytes to what is done."""
        self._progress.advance(self._task, count)
