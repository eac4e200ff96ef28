"""The command line: what it prints, how it fails, and that its options follow HipConfig."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from checkpoints import save_checkpoint
from tiny_graph import save, tiny_model, tiny_spec
from typer.models import OptionInfo
from typer.testing import CliRunner, Result
from typer.utils import get_params_from_function

import hip_trt.export
from hip_trt.cli.app import app
from hip_trt.cli.config_options import resolve_config, with_config_options
from hip_trt.cli.console import Commands
from hip_trt.config import HipConfig
from hip_trt.export import ExportedModel
from hip_trt.sidecar import read_sidecar, verify_plan

SMALL = ["--mask-k", "64", "--decode-mask-k", "32", "--sink-tokens", "16", "--window-tokens", "32"]


def run(*arguments: str | Path, width: int = 200) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> None:
    """The command failed with one line on standard error, no stack trace, that says all of these."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_spec(layers=3)), tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def plan(onnx_path: Path) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    result = run("export", "--model", onnx_path, "--out", onnx_path.with_name("engine.plan"), "--max-batch", "2",
                 "--compute-capability", "8.9", "--compute-capability", "8.0")
    assert result.exit_code == 0, result.output
    assert "3 HipAttention plugin layers" in result.stdout
    assert "8.0, 8.9" in result.stdout
    return onnx_path.with_name("engine.plan")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


# Help


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("export", "run", "inspect", "doctor", "verify", "serve-repo"):
        assert command in result.stdout


def test_help_of_export_teaches() -> None:
    result = run("export", "-h")
    assert "hip-trt export --model" in result.stdout
    for name, field in HipConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in result.stdout
        assert (field.description or "").split(";")[0].split()[-1] in result.stdout
    for default in ("(1024)", "(kv)", "(none)", "(the model's context length)"):
        assert f"default: {default}" in result.stdout


def test_options_do_not_depend_on_how_typer_names_them() -> None:
    """Typer 0.27.0 to 0.27.2 name an option after a metavar that spells the same: --MODEL in place of --model."""
    apps, options = [app], 0
    while apps:
        group = apps.pop()
        apps += [registered.typer_instance for registered in group.registered_groups]
        for command in group.registered_commands:
            for name, parameter in get_params_from_function(command.callback).items():
                if isinstance(option := parameter.default, OptionInfo):
                    options += 1
                    spelled = (option.metavar or "").replace("-", "_").lower()
                    assert option.param_decls or spelled != name, f"{command.callback}: name --{name} in its Option"
    assert options > 100


def test_wrong_usage_exits_with_2() -> None:
    result = run("export", "--out", "x.plan")
    assert result.exit_code == 2
    assert "--model" in result.stderr
    assert run("export", "--model", "m", "--out", "x.plan", "--mask-k", "many").exit_code == 2
    assert run("export", "--model", "m", "--out", "x.plan", "--max-batch", "0").exit_code == 2


# HipConfig from options and files


def configured(*arguments: str) -> HipConfig:
    """The config that a command with these arguments gets."""
    seen: list[HipConfig] = []
    commands = typer.Typer(cls=Commands)

    @commands.callback()
    def group() -> None:
        pass

    @commands.command()
    @with_config_options
    def show(*, config_file: Path | None, fields: dict[str, Any]) -> None:
        seen.append(resolve_config(config_file, fields))

    result = CliRunner().invoke(commands, ["show", *arguments])
    if result.exit_code:
        raise ValueError(result.stderr)
    return seen[0]


def test_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("mask_k: 2048\nwindow_tokens: 256\n")
    assert configured() == HipConfig.create()
    assert configured("--config", str(path)) == HipConfig.create(mask_k=2048, window_tokens=256)
    assert configured("--config", str(path), "--mask-k", "512", "--mask-heads", "query", "--dense-layers", "0,3") == (
        HipConfig.create(mask_k=512, window_tokens=256, mask_heads="query", dense_layers=(0, 3))
    )


def test_every_field_has_an_option_that_sets_it() -> None:
    changed = {
        "mask_k": 32, "decode_mask_k": 64, "block_q": 32, "block_k": 32, "stride_q": 8, "stride_k": 2, "branch": 2,
        "leaf_branch": 8, "reuse_level": 0, "page_size": 128, "sink_tokens": 0, "window_tokens": 1,
        "mask_heads": "query", "refresh_interval": 1,
    }
    assert set(changed) == set(HipConfig.model_fields) - {"dense_layers"}
    arguments = [text for name, value in changed.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert configured(*arguments, "--dense-layers", "2") == HipConfig.create(**changed, dense_layers=(2,))


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--mask-k", "100"], ("mask_k: 100 is not allowed", "multiple of block_k (16)")),
    (["--mask-heads", "both"], ("mask_heads: 'both'", "'kv' or 'query'")),
    (["--dense-layers", "first"], ("dense_layers: 'first'", "0,1,2")),
    (["--config", "missing.yaml"], ("missing.yaml: cannot be read",)),
])
def test_bad_config(arguments: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="error: ") as error:
        configured(*arguments)
    for part in parts:
        assert part in str(error.value)


# export


def test_export_from_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    out = tmp_path / "build" / "engine.plan"
    result = run("export", "--model", checkpoint, "--out", out, "--dtype", "float16", "--compute-capability", "8.0",
                 "--logits", "all", "--max-seq-len", "64", "--max-prefill", "32", *SMALL)
    assert result.exit_code == 0, result.output
    described = verify_plan(out)
    assert len(described.plugin_layers) == described.spec.num_layers
    assert (described.spec.dtype, described.spec.logits, described.spec.hip.mask_k) == ("float16", "all", 64)
    assert {"model.onnx", "engine.plan", "engine.plan.json", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in out.parent.iterdir()
    }
    elsewhere = tmp_path / "elsewhere" / "engine.plan"
    result = run("export", "--model", out.with_name("model.onnx"), "--out", elsewhere, "--compute-capability", "8.0")
    assert result.exit_code == 0, result.output
    assert (elsewhere.parent / "tokenizer.json").read_bytes() == (out.parent / "tokenizer.json").read_bytes()
    (elsewhere.parent / "tokenizer.json").write_text("{}")
    refused(run("export", "--model", out.with_name("model.onnx"), "--out", elsewhere), "tokenizer.json other than")


@pytest.mark.parametrize("placement", ["copied", "linked", "in place"])
def test_export_stops_at_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Any) -> None:
    seen: dict[str, Any] = {}
    data = tmp_path / "checkpoint" / "model.safetensors"
    data.parent.mkdir()
    data.write_bytes(bytes(1500))

    def export_onnx(model: str, out: Path, **options: Any) -> ExportedModel:
        seen.update(options, model=model, out=out)
        return ExportedModel(out, (data, data), placement, tiny_spec(), (out,), ())

    monkeypatch.setattr(hip_trt.export, "export_onnx", export_onnx)
    result = run("export", "--model", "org/name", "--out", tmp_path / "tiny.onnx", "--logits", "all", "--mask-k", "64",
                 "--dtype", "bfloat16", "--allow-download", "--max-context", "100", "--link-weights")
    assert result.exit_code == 0, result.output
    for part in (str(tmp_path / "tiny.onnx"), "3.0 kB of weights", "checkpoint/model.safetensors and 1 more"):
        assert part in result.stdout
    assert {"copied": "copied to", "linked": "--link-weights", "in place": "must stay"}[placement] in result.stdout
    del seen["steps"]
    assert seen == {
        "model": "org/name", "out": tmp_path / "tiny.onnx", "config": HipConfig.create(mask_k=64), "logits": "all",
        "dtype": "bfloat16", "allow_download": True, "max_context": 100, "link_weights": True, "quantize": None,
        "check": None,
    }


def test_export_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Neither model nor engine holds any; inspect names the files that do."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    plan = tmp_path / "engine.plan"
    result = run("export", "--model", checkpoint, "--out", plan, "--compute-capability", "8.0", "--strip-weights",
                 "--link-weights", "--max-seq-len", "64", *SMALL)
    assert result.exit_code == 0, result.output
    assert "no weights, which stay with model.onnx" in result.stdout
    assert verify_plan(plan).weights == "bound"
    linked = [path for path in tmp_path.iterdir() if path.stat().st_nlink > 1]
    assert len(linked) == 1
    files = {file["name"] for file in json.loads(run("inspect", plan, "--json").stdout)["files"]}
    assert files == {"engine.plan", "engine.plan.json", "model.onnx", linked[0].name}
    refused(run("export", "--model", tmp_path / "model.onnx", "--out", tmp_path / "other" / "engine.plan",
                "--strip-weights"), "must stand beside it")


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--model", "missing", "--out", "{}/x.onnx"], ("missing: no such file",)),
    (["--model", "missing", "--out", "{}/x.bin"], ("x.bin: must end in .plan",)),
    (["--model", "missing", "--out", "{}/x.plan", "--compute-capability", "9.0"], ("not for 9.0", "Hopper")),
    (["--model", "missing", "--out", "{}/x.plan", "--runtime", "onnx"], ("runtime: 'onnx' is not allowed",)),
    (["--model", "missing", "--out", "{}/x.plan", "--mask-k", "100"], ("mask_k: 100",)),
    (["--model", "missing.onnx", "--out", "{}/x.plan"], ("missing.onnx: no such file",)),
    (["--model", "m.onnx", "--out", "{}/x.onnx"], ("m.onnx: exported already",)),
    (["--model", "m.onnx", "--out", "{}/x.plan", "--dtype", "float32"], ("--dtype: cannot be changed in m.onnx",)),
    (["--model", "m.onnx", "--out", "{}/x.plan", "--link-weights"], ("--link-weights: cannot be changed in m.onnx",)),
    (["--model", "missing", "--out", "{}/x.onnx", "--link-weights", "--quantize", "int4"],
     ("link_weights: not allowed",)),
    (["--model", "missing", "--out", "{}/x.onnx", "--strip-weights"], ("--strip-weights: needs an engine", ".plan")),
    (["--model", "missing", "--out", "{}/x.onnx", "--weight-streaming"], ("--weight-streaming: needs an engine",)),
    (["--model", "m.onnx", "--out", "{}/x.plan", "--block-k", "8"], ("--block-k: cannot be changed in m.onnx",)),
    (["--model", "m.onnx", "--out", "{}/x.plan", "--config", "c.yaml"], ("--config: cannot be changed in m.onnx",)),
])
def test_export_refuses(tmp_path: Path, arguments: list[str], parts: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    refused(run("export", *(argument.format(out) for argument in arguments)), *parts)
    assert not out.exists()


def test_errors_are_one_line_on_a_narrow_terminal(tmp_path: Path) -> None:
    refused(run("export", "--model", tmp_path / "missing.onnx", "--out", tmp_path / "x.plan", width=20), "no such file")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The package's logger, restored afterwards."""
    logger = logging.getLogger("hip_trt")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    yield logger
    logger.setLevel(level)


@pytest.mark.usefixtures("log")
def test_verbose_shows_tensorrt(onnx_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    arguments = ["export", "--model", onnx_path, "--out", tmp_path / "engine.plan", "--compute-capability", "8.0"]
    quiet, verbose = run(*arguments), run(*arguments, "--verbose")
    assert (quiet.exit_code, verbose.exit_code) == (0, 0)
    assert quiet.stderr == ""
    assert "Successfully created plugin: HipAttention" in verbose.stderr
    assert quiet.stdout == verbose.stdout


# inspect


def test_inspect_onnx(onnx_path: Path) -> None:
    result = run("inspect", onnx_path)
    assert result.exit_code == 0, result.output
    for part in (
        "3 HipAttention nodes", "hip.trt::HipAttention 3", "tiny (llama)", "4 query and 2 key/value heads of 64",
        "past_key_values.0.key", "[pages, 2, 16, 64]", "12 tensors alike",
        "plain ONNX Runtime runs it", "mask_k 64", "model.onnx.data (",
    ):
        assert part in result.stdout
    assert "past_key_values.2.key" not in result.stdout
    assert "past_key_values.2.key" in run("inspect", onnx_path, "--all").stdout


def test_inspect_counts_parameters(onnx_path: Path) -> None:
    described = json.loads(run("inspect", onnx_path, "--json").stdout)
    width, heads = 256, 128
    count = 32 * width * 2 + 3 * (width * width + 2 * width * heads)
    assert described["parameters"] == {"count": count, "size": 2 * count}
    assert described["spec"]["hip"]["block_k"] == 16
    assert described["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    assert described["engine"] is None


def test_inspect_plan(plan: Path) -> None:
    result = run("inspect", plan)
    assert result.exit_code == 0, result.output
    for part in (
        "3 HipAttention plugin layers", "PLUGIN_V3 3", "prefill", "decode", "[1, 1] to [2, 256]", "[1, 1] to [2, 1]",
        "compute capability 8.0, 8.9", "engine.plan.json, written by the builder", "only on a GPU",
    ):
        assert part in result.stdout
    described = json.loads(run("inspect", plan, "--json").stdout)
    assert described["attention"] == ["attention.0", "attention.1", "attention.2"]
    assert described["engine"]["limits"]["max_batch"] == 2
    assert described["engine"]["compute_capabilities"] == ["8.0", "8.9"]
    assert described["inputs"][0]["shape"] == [-1, -1]


def test_inspect_refuses(plan: Path, tmp_path: Path) -> None:
    refused(run("inspect", tmp_path / "missing.onnx"), "no such file")
    refused(run("inspect", tmp_path / "missing.plan"), "no such plan")
    refused(run("inspect", tmp_path / "model.bin"), "neither .onnx nor .plan")
    (tmp_path / "engine.plan").write_bytes(plan.read_bytes())
    refused(run("inspect", tmp_path / "engine.plan"), "engine.plan.json is missing")
    (tmp_path / "engine.plan.json").write_text(plan.with_name("engine.plan.json").read_text())
    (tmp_path / "engine.plan").write_bytes(plan.read_bytes()[:-8] + b"damaged!")
    refused(run("inspect", tmp_path / "engine.plan"), "damaged", "checksum")
    assert read_sidecar(plan).plan.size == plan.stat().st_size


# The script


def test_version_answers_without_heavy_imports() -> None:
    code = """
import runpy, sys
sys.argv = ["hip-trt", "--version"]
try:
    runpy.run_module("hip_trt", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("hip-trt ")
    assert result.stdout.endswith("\nFalse\n")
