"""The samples that run an engine, on one of genuine TensorRT, by the commands in samples/README.md.

Part of ``pytest -m engine``. SmolLM2-135M, the readme's model: tokens must be those of ONNX Runtime. The C++ sample is
compiled where HIP_TRT_TENSORRT_INCLUDE names a folder with TensorRT's headers and HIP_TRT_TENSORRT_LIBRARY its library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from documented import ROOT, Shell, commands
from test_engines_gpu import lacking

import hip_trt
from hip_trt.export import build_engine, export_onnx

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.skipif(bool(lacking), reason=f"engines need {lacking}")]

README = ROOT / "samples" / "README.md"


@pytest.fixture(scope="module")
def root(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root after the first command of samples/README.md."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "build" / "sample").mkdir(parents=True)
    shutil.copy(sample_model, folder / "build" / "sample")
    exported = export_onnx(sample_model, folder / "build" / "model.onnx").path
    build_engine(exported, folder / "build" / "engine.plan", runtime="tensorrt")
    for name in ("samples", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *beginnings: str) -> dict[str, str]:
    """What the readme's commands that begin so print, in its order."""
    shell = Shell(root, monkeypatch, apart=("python",))  # TensorRT takes a plugin once in a process
    printed = {}
    for command in commands(README):
        if command.startswith(beginnings):
            outcome = shell.run(command)
            assert outcome.status == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
            printed[command] = outcome.stdout
    assert len(printed) >= len(beginnings)
    return printed


def expected_tokens(root: Path) -> list[int]:
    generator = hip_trt.load(root / "build" / "model.onnx")
    return list(generator.generate([[504, 3575, 282, 4649, 314]], max_new_tokens=8)[0].tokens)


def test_polygraphy_compares_the_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(root, monkeypatch)
    for command in commands(README):
        if "build/compare/" in command:
            if command.startswith("HIP_TRT_MODEL="):
                monkeypatch.setenv("HIP_TRT_MODEL", "build/model.onnx")
                command = command.split(" ", 1)[1]
                shell = Shell(root, monkeypatch, apart=("python",))
            outcome = shell.run(command)
            assert outcome.status == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
    assert "Passed: 3/3 iterations" in outcome.stdout
    loose = outcome.stdout
    strict = shell.run(re.sub(r"--atol \S+", "--atol 1e-6", command))
    assert (strict.status, "FAILED" in strict.stdout) == (1, True), loose


def test_python_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(root, monkeypatch, "python samples/03_engine_in_python")
    assert [int(token) for token in re.findall(r"\d+", *printed.values())] == expected_tokens(root)


def test_long_document(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (printed,) = run(root, monkeypatch, "hip-trt run build/engine.plan -f README.md --offload").values()
    assert printed.strip()


def test_cpp_sample(root: Path, tmp_path: Path) -> None:
    include, library = (os.environ.get(f"HIP_TRT_TENSORRT_{name}") for name in ("INCLUDE", "LIBRARY"))
    if not include or not library:
        pytest.skip("needs HIP_TRT_TENSORRT_INCLUDE and HIP_TRT_TENSORRT_LIBRARY")
    program = tmp_path / "decode"
    where = [f"-DTENSORRT_INCLUDE_DIR={include}", f"-DTENSORRT_LIBRARY={library}"]
    subprocess.run(["cmake", "-S", ROOT / "samples" / "04_engine_in_cpp", "-B", tmp_path, *where], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    plan = root / "build" / "engine.plan"
    done = subprocess.run(
        [program, plan, hip_trt.library.plugin_path(), "504,3575,282,4649,314", "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == expected_tokens(root)
