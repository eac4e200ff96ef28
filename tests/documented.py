"""The commands in the pages of the documentation, and how tests run them: on tiny random models in a folder that looks
like the root of the repository.

``hip-trt`` and ``python`` run in this process, which has loaded PyTorch already; everything else in one of its own, and
so what a test wants ``apart``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = (*sorted(ROOT.glob("*.md")), ROOT / "samples" / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_SUBSTITUTION = re.compile(r"\"?\$\((.*?)\)\"?")
_COMMANDS = ("hip-trt ", "make ", "pytest ", "python ", "pip ")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status, standard output and standard error."""

    status: int
    stdout: str
    stderr: str


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks in a language, without their indentation."""
    found = []
    for indent, name, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if name == language:
            found.append("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return found


def commands(page: Path) -> list[str]:
    """The commands of the page's shell blocks, one a line, without comments; also of blocks in no language that begin
    with a command."""
    plain = [block for block in blocks(page, "") if block.startswith(_COMMANDS)]
    lines = "\n".join([*blocks(page, "sh"), *plain]).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines) if line]


class Shell:
    """Runs commands in a folder, as bash would: variables, ``$(...)`` and ``<`` are all that the pages use.

    Args:
        folder: where to run them.
        monkeypatch: of the test, which ends what they export.
        apart: beginnings of commands that want a process of their own.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, apart: tuple[str, ...] = ()) -> None:
        self._monkeypatch, self._apart = monkeypatch, apart
        monkeypatch.chdir(folder)

    def run(self, command: str) -> Outcome:
        line = _SUBSTITUTION.sub(lambda match: shlex.quote(self.run(match[1]).stdout.strip()), command)
        words = shlex.split(line)
        if words[0] == "export":
            for word in words[1:]:
                self._monkeypatch.setenv(*word.split("=", 1))
            return Outcome(0, "", "")
        stdin = ""
        if "<" in words:
            at = words.index("<")
            stdin = Path(words[at + 1]).read_text(encoding="utf-8")
            del words[at : at + 2]
        if words[0] == "hip-trt":
            return _hip_trt(words[1:], stdin)
        if words[0] == "python" and not command.startswith(self._apart):
            return _python(words[1:])
        program = shutil.which(words[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if program is None:
            pytest.skip(f"there is no {words[0]}")
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, input=stdin)
        return Outcome(done.returncode, done.stdout, done.stderr)


def _hip_trt(words: list[str], stdin: str) -> Outcome:
    from hip_trt.cli.app import app

    result = CliRunner().invoke(app, words, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def _python(words: list[str]) -> Outcome:
    out, err, status = io.StringIO(), io.StringIO(), 0
    arguments, sys.argv = sys.argv, words[1:] if words[0] in ("-c", "-m") else words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if words[0] == "-c":
                exec(words[1], {})
            elif words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            err.write(f"{end.code}\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
    return Outcome(status, out.getvalue(), err.getvalue())
