"""Results appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hip_trt import files
from hip_trt.errors import ExportError

HOLD = """
import signal, sys, time
from hip_trt.files import staging
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores them
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
with staging(sys.argv[1]) as stage:
    (stage.path / "result").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_results_appear_at_publication(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with files.staging(target) as stage:
        (stage.path / "one").write_text("1")
        (stage.path / "two").write_text("2")
        assert [path.name for path in target.iterdir()] == [stage.path.name]
        assert stage.publish(["one", "two"]) == [target / "one", target / "two"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"one": "1", "two": "2"}


def test_obsolete_files_go_last_and_only_they(tmp_path: Path) -> None:
    for name in ("data-1", "data-2", "data", "other"):
        (tmp_path / name).write_text("old")
    with files.staging(tmp_path) as stage:
        (stage.path / "data-2").write_text("new")
        stage.publish(["data-2"], obsolete=re.compile(r"data-\d"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data-2", "other"]
    assert (tmp_path / "data-2").read_text() == "new"


def test_failure_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("old")
    with pytest.raises(ZeroDivisionError), files.staging(tmp_path) as stage:
        (stage.path / "result").write_text(str(1 // 0))
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "old"
    with pytest.raises(ZeroDivisionError), files.staging(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals) -> None:
    process = holder(tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    assert list(tmp_path.iterdir()) == []


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with files.staging(".") as stage:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert not stage.path.exists()


def test_leftovers_of_the_killed_go_and_the_living_stay(tmp_path: Path) -> None:
    killed, living = holder(tmp_path), holder(tmp_path)
    killed.kill()
    killed.wait()
    assert len(hidden(tmp_path)) == 2
    try:
        with files.staging(tmp_path) as stage:
            remaining = [path for path in hidden(tmp_path) if path != stage.path]
            assert len(remaining) == 1
            assert (remaining[0] / "result").read_text() == "half"
    finally:
        living.terminate()
        living.wait()
    assert hidden(tmp_path) == []


def test_publication_waits_for_another(tmp_path: Path) -> None:
    done = threading.Event()

    def publish() -> None:
        files.write_file(tmp_path / "result", "new")
        done.set()

    with files._locked(tmp_path):
        thread = threading.Thread(target=publish)
        thread.start()
        time.sleep(0.2)
        assert not done.is_set()
    thread.join(timeout=10)
    assert done.is_set()


def test_write_file(tmp_path: Path) -> None:
    files.write_file(tmp_path / "new" / "text", "grüße")
    files.write_file(tmp_path / "new" / "bytes", b"\x00")
    assert (tmp_path / "new" / "text").read_text(encoding="utf-8") == "grüße"
    assert (tmp_path / "new" / "bytes").read_bytes() == b"\x00"
    assert hidden(tmp_path / "new") == []


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota"), (errno.EACCES, "Permission denied"),
    (errno.EROFS, "Read-only"),
])
def test_write_errors_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(ExportError, match=words) as caught:
        files.write_file(tmp_path / "result", "text")
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_within_the_block(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No space left"), files.staging(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), files.staging(tmp_path):  # may come from reading: not ours to explain
        raise PermissionError(errno.EACCES, "elsewhere")


def test_target_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100), Path("/proc/no-such")):
        with pytest.raises(ExportError, match="cannot be written"), files.staging(target):
            pass


def test_space_is_checked(tmp_path: Path) -> None:
    files.require_space(tmp_path, 1)
    with pytest.raises(ExportError, match=r"1000000\.0 TB are needed, and .* are free"):
        files.require_space(tmp_path, 10**18)


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 3_000_000)
    counted: list[int] = []
    assert files.sha256(path, counted.append) == "a889aaea4dd43c3ef1b6f125177026b6445c8374d9cd585dd0c52bb020bb8cc5"
    assert sum(counted) == 9_000_000


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000_000, "2.3 GB")])
def test_format_size(count: int, text: str) -> None:
    assert files.format_size(count) == text
