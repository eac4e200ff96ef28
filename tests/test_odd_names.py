"""Folders and files whose names mean something to shells, globs and markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_export import export_tiny
from typer.testing import CliRunner, Result

from hip_trt.cli.app import app

NAME = "a[x] [b]#1 :cat: *{0}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / NAME
    exported = export_tiny(folder, dtype="float32", logits="all")
    return exported.rename(folder / f"{NAME}.onnx")


def run(*arguments: str | Path) -> Result:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_commands(model: Path, tmp_path: Path) -> None:
    assert str(model) in run("inspect", model).stdout
    assert run("run", model, "--prompt", "hi", "-n", "2").stdout
    verified = run("verify", model, "--checkpoint", model.parent / "checkpoint", "--steps", "1", "--max-tokens", "16")
    assert str(model) in verified.stdout
    written = run("serve-repo", model, "--out", tmp_path / NAME, "--name", "demo")
    assert str(tmp_path / NAME / "demo") in written.stdout


def test_export(model: Path, tmp_path: Path) -> None:
    out = tmp_path / NAME / f"{NAME}.onnx"
    assert str(out) in run("export", "--model", model.parent / "checkpoint", "--out", out).stdout
    assert run("run", out, "--prompt", "hi", "-n", "2").stdout


def test_build(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    plan = tmp_path / NAME / f"{NAME}.plan"
    built = run("export", "--model", model, "--out", plan, "--compute-capability", "8.0", "--max-seq-len", "64")
    assert str(plan) in built.stdout
    assert str(plan) in run("inspect", plan).stdout


def test_errors_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / NAME / "none.onnx"
    result = CliRunner().invoke(app, ["inspect", str(missing)])
    assert result.exit_code == 1
    assert str(missing) in result.stderr
