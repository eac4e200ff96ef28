"""``hip-trt run``, as a user runs it, on a tiny exported model."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from oracle import OracleExecutor, tiny_llama
from tiny_export import SPARSE, export_tiny
from tiny_plan import write_plan
from typer.testing import CliRunner, Result

from hip_trt.cli.app import app
from hip_trt.errors import EngineError
from hip_trt.runtime import load, tensorrt


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported"))


def run(*arguments: Any, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments), "--threads", "1"], input=stdin)


def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
    """A process of its own, for what concerns pipes, terminals and signals."""
    code = "from hip_trt.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, "run", *map(str, arguments), "--threads", "1"], **options)


def one_line_error(result: Result, text: str) -> bool:
    return result.exit_code == 1 and result.stdout == "" and text in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def chat_text(path: Path) -> str:
    """What the model says to "Hello", by the Python API."""
    generator = load(path, threads=1)
    (result,) = generator.generate(
        [generator.encode_chat([{"role": "user", "content": "Hello"}])], max_new_tokens=9
    )
    return result.text + ("" if result.text.endswith("\n") else "\n")


def test_prompt_is_answered_with_the_chat_template(path: Path, chat_text: str) -> None:
    result = run(path, "--prompt", "Hello", "-n", 9)
    assert (result.exit_code, result.stdout, result.stderr) == (0, chat_text, "")


def test_prompt_from_file_and_stdin(path: Path, chat_text: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Hello")
    assert run(path, "-f", tmp_path / "prompt.txt", "-n", 9).stdout == chat_text
    assert run(path, "-n", 9, stdin="Hello").stdout == chat_text


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfHello", b"Hello\n", b"\xef\xbb\xbfHello\r\n"])
def test_marks_and_the_last_line_ending_are_not_the_prompts(
    path: Path, chat_text: str, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    assert run(path, "-f", tmp_path / "prompt.txt", "-n", 9).stdout == chat_text
    assert run(path, "-n", 9, stdin=content).stdout == chat_text
    (tmp_path / "prompt.txt").write_bytes(content + b"\n")  # an empty line of its own is
    assert run(path, "-f", tmp_path / "prompt.txt", "-n", 9).stdout != chat_text or not content.endswith(b"\n")


def test_raw_leaves_the_template_out(path: Path, chat_text: str) -> None:
    (expected,) = load(path, threads=1).generate(["Hello"], max_new_tokens=9)
    result = run(path, "-p", "Hello", "-n", 9, "--raw")
    assert result.stdout == expected.text + "\n"
    assert result.stdout != chat_text


def test_system_message_changes_the_answer(path: Path, chat_text: str) -> None:
    assert run(path, "-p", "Hello", "-n", 9, "--system", "Be brief.").stdout != chat_text


def test_sampling_is_repeatable_by_seed(path: Path) -> None:
    outputs = [run(path, "-p", "Hello", "-n", 9, "-t", 2.0, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_stats_go_to_standard_error(path: Path, chat_text: str) -> None:
    result = run(path, "-p", "Hello", "-n", 9, "--refresh-interval", 4, "--stats")
    assert result.stdout == chat_text
    assert "prefill: 8 tokens" in result.stderr
    assert "decode: 8 tokens" in result.stderr
    assert "masks searched from the top in 2 of 8 steps" in result.stderr


def test_prompt_longer_than_the_pages_allow(path: Path) -> None:
    result = run(path, "-p", "x" * 100, "--max-seq-len", 64)
    assert one_line_error(result, "103 tokens and 1 to generate are 104, but the KV cache holds 64")
    assert "--max-seq-len" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", ""], "The prompt is empty"),
        (["-p", "x", "-n", "0"], "max_new_tokens: 0 is not allowed"),
        (["-p", "x", "--refresh-interval", "0"], "refresh_interval: 0 is not allowed"),
        (["-p", "x", "--top-p", "7"], "top_p"),
        (["-p", "x", "-t", "-1"], "temperature"),
        (["-f", "no/such/file"], "no/such/file: cannot be read: No such file"),
        (["-p", "x", "--tokenizer", "no/such"], "no/such: no tokenizer_config.json"),
        (["-p", "x", "--weight-budget-mib", "9"], "streams no weights"),
    ],
)
def test_bad_requests(path: Path, arguments: list[str], text: str) -> None:
    assert one_line_error(run(path, "--raw", *arguments), text)


def test_prompt_that_is_not_text(path: Path) -> None:
    assert one_line_error(run(path, stdin=b"a\xff"), "standard input: not UTF-8 text: byte 1 is 0xff")


def test_missing_model(tmp_path: Path) -> None:
    assert one_line_error(run(tmp_path / "model.onnx", "-p", "x"), "no such file")


def test_wrong_usage(path: Path, tmp_path: Path) -> None:
    assert run(path, "-p", "x", "-f", tmp_path).exit_code == 2
    assert run(path, "-p", "x", "--raw", "--system", "y").exit_code == 2


def test_plan_without_a_gpu(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "current_gpu", lambda: None)
    plan = write_plan(tmp_path, OracleExecutor(tiny_llama(), SPARSE).spec)
    result = run(plan, "-p", "x")
    assert one_line_error(result, "a plan needs a GPU")
    assert f"hip-trt run {tmp_path / 'model.onnx'}" in result.stderr


def test_weight_budget_reaches_the_engine_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int | None] = []

    def load_plan(path: Path, *, weight_budget: int | None) -> None:
        budgets.append(weight_budget)
        raise EngineError("loaded")

    monkeypatch.setattr(tensorrt.TensorRTExecutor, "load", load_plan)
    plan = write_plan(tmp_path, OracleExecutor(tiny_llama(), SPARSE).spec, weight_streaming=True)
    for options in ((), ("--weight-budget-mib", "1.5"), ("--weight-budget-mib", "0")):
        assert one_line_error(run(plan, "-p", "x", *options), "loaded")
    assert budgets == [None, 1536 * 1024, 0]
    for size in ("-1", "nan", "inf"):
        assert run(plan, "-p", "x", "--weight-budget-mib", size).exit_code == 2


def test_closed_pipe_ends_quietly(path: Path) -> None:
    process = start(path, "-p", "Hello", "--raw", "-n", 300, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_interrupt_ends_quietly(path: Path) -> None:
    process = start(
        path, "-p", "Hello", "--raw", "-n", 500, "-t", 9.0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"\n")
    assert len(output) < 450


class Terminal:
    """A ``hip-trt run`` with a pseudo-terminal for its input, as in a conversation."""

    def __init__(self, *arguments: Any) -> None:
        self._input, theirs = pty.openpty()
        self.process = start(*arguments, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.close(theirs)
        self.errors = ""

    def type(self, text: bytes) -> None:
        os.write(self._input, text)

    def wait_for_prompt(self, count: int) -> None:
        """Wait for the count-th "> "."""
        assert self.process.stderr
        os.set_blocking(self.process.stderr.fileno(), False)
        deadline = time.monotonic() + 120
        while self.errors.count("> ") < count:
            assert time.monotonic() < deadline, self.errors
            self.errors += (self.process.stderr.read() or b"").decode()
            time.sleep(0.02)

    def finish(self) -> bytes:
        """End the input; what is left of the output."""
        self.type(b"\x04")
        output, _ = self.process.communicate(timeout=60)
        os.close(self._input)
        return output


def test_conversation_at_a_terminal(path: Path) -> None:
    """Two turns and a refused one."""
    terminal = Terminal(path, "-n", 5, "--stats", "--max-seq-len", 120)
    for count, line in enumerate((b"Hello", b"And?", b"x" * 120), start=1):
        terminal.wait_for_prompt(count)
        terminal.type(line + b"\n")
    terminal.wait_for_prompt(4)
    output = terminal.finish()
    assert terminal.process.returncode == 0
    assert "more were in the cache" in terminal.errors
    assert "error: prompt 0:" in terminal.errors
    assert terminal.errors.count("prefill:") == 2
    assert output.strip()


def test_interrupt_ends_a_reply_but_not_the_conversation(path: Path) -> None:
    terminal = Terminal(path, "-n", 5000, "--max-seq-len", 8000)
    terminal.wait_for_prompt(1)
    terminal.type(b"Hello\n")
    assert terminal.process.stdout
    assert terminal.process.stdout.read(1)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for_prompt(2)
    output = terminal.finish()
    assert terminal.process.returncode == 0
    assert output.endswith(b"\n")
    assert len(output) < 5000
