"""Steps are timed always, and shown on terminals only."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hip_trt.progress import Steps


def steps_on(*, terminal: bool) -> tuple[Steps, io.StringIO]:
    text = io.StringIO()
    return Steps(Console(file=text, force_terminal=terminal, width=60, legacy_windows=False)), text


def test_terminal_shows_finished_steps() -> None:
    steps, text = steps_on(terminal=True)
    with steps.step("Write weights", total=3_000_000) as advance:
        advance(1_500_000)
        advance(1_500_000)
    assert "✓" in text.getvalue()
    assert "Write weights" in text.getvalue().splitlines()[-1]
    assert list(steps.seconds) == ["Write weights"]


def test_elsewhere_is_quiet_but_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, text = steps_on(terminal=False)
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("hip_trt.progress.time.perf_counter", lambda: next(clock))
    for _ in range(2):
        with steps.step("Trace") as advance:
            advance(1)
    assert text.getvalue() == ""
    assert steps.seconds == {"Trace": 3.5}


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_shown_as_they_are(terminal: bool) -> None:
    steps, text = steps_on(terminal=terminal)
    name = "a[x] [b]#1[/b] :cat:"
    with steps.step(name):
        pass
    steps.note(f"note {name}")
    steps.warn(f"warn {name}")
    shown = text.getvalue()
    assert f"note {name}" in shown
    assert f"{name}\n" in shown.partition("warn")[2]
    if terminal:
        assert name in shown.partition("✓")[0]  # while it runs
        assert name in shown.partition("✓")[2].partition("note")[0]  # when it is done


def test_failed_steps_are_not_called_done() -> None:
    steps, text = steps_on(terminal=True)
    with pytest.raises(ZeroDivisionError), steps.step("Divide"):
        _ = 1 // 0
    assert "✓" not in text.getvalue()
    assert steps.seconds == {}


def test_notes_and_warnings_are_one_line_anywhere() -> None:
    steps, text = steps_on(terminal=False)
    steps.warn("weights [extra] are left out: " + "x" * 100)
    steps.note("[bold] " + "y" * 100)
    first, second = text.getvalue().splitlines()
    assert first == "warning: weights [extra] are left out: " + "x" * 100
    assert second == "[bold] " + "y" * 100


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Steps().warn("look")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: look\n")
