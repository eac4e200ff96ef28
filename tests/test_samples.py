"""The samples, by the commands in samples/README.md, on a tiny model and as far as a machine without a GPU can; and the
Python sample's decode loop on an engine that computes with ONNX Runtime."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from documented import ROOT, Outcome, Shell, commands
from emulated import compiler
from tiny_export import export_tiny, save_tiny_checkpoint

import hip_trt
from hip_trt.export import build_engine
from hip_trt.tensorrt_flavour import installed

SAMPLES = ROOT / "samples"
GPU = torch.cuda.is_available()

NOT_RUN = {
    "hip-trt export --model build/sample/SmolLM2-135M-Instruct.Q4_1.gguf --out build/engine.plan":
        "the fixture exports the tiny model so",
    "HIP_TRT_MODEL=build/model.onnx python -m hip_trt.polygraphy": "executes an engine: needs a GPU",
    "cmake": "test_cpp_sample runs it, with the paths of this machine",
    "build/cpp/decode": "test_cpp_sample runs it",
    "tritonserver": "needs Triton Inference Server",
    "curl": "needs Triton Inference Server",
}
"""Commands of samples/README.md, by how they begin, that test_commands does not run, and why."""

STOPS = {
    "python samples/03_engine_in_python/decode.py": "engine.plan: a plan needs a GPU from here on",
    "hip-trt run build/engine.plan": "engine.plan: a plan needs a GPU",
}
"""Commands that stop without a GPU, and what they say then."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root after the first command of samples/README.md, but with a tiny model."""
    if "tensorrt-rtx" not in installed():
        pytest.skip("needs the extra tensorrt-rtx")
    folder = tmp_path_factory.mktemp("root")
    save_tiny_checkpoint(folder / "Llama-3.2-1B")
    model = export_tiny(folder / "build")
    build_engine(model, model.with_name("engine.plan"), runtime="tensorrt-rtx", max_prefill=64)
    (folder / "samples").symlink_to(SAMPLES)
    (folder / "README.md").write_text("HiP is attention. It needs few keys. " * 4)
    return folder


def on_tiny_model(command: str) -> str:
    for real, tiny in (
        ("build/sample/SmolLM2-135M-Instruct.Q4_1.gguf", "Llama-3.2-1B"), ("seq -s, 0 29", "seq -s, 0 1"),
    ):
        command = command.replace(real, tiny)
    return command


def succeeds(outcome: Outcome, command: str) -> None:
    stop = next((text for start, text in STOPS.items() if command.startswith(start)), None)
    if stop is None or GPU:
        assert outcome.status == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
    else:
        assert outcome.status == 1, f"{command}\n{outcome.stdout}{outcome.stderr}"
        assert stop in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_commands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorRT takes a plugin once in a process, and hip-trt has brought it already.
    shell = Shell(root, monkeypatch, apart=("python samples/03_engine_in_python",))
    monkeypatch.setenv("HIP_TRT_TOKENS", "48")
    outcomes = {}
    listed = commands(SAMPLES / "README.md")
    for command in listed:
        if not command.startswith(tuple(NOT_RUN)):
            outcomes[command] = shell.run(on_tiny_model(command))
            succeeds(outcomes[command], command)
    for start in (*NOT_RUN, *STOPS):
        assert any(command.startswith(start) for command in listed), f"no such command any more: {start}"
    answers = next(outcome.stdout for command, outcome in outcomes.items() if "long_document.py" in command)
    assert " tokens read, 0 reused" in answers
    assert re.search(r" [1-9]\d? tokens read, 1\d\d reused", answers)  # the second question's, after the document
    eager = next(outcome.stdout for command, outcome in outcomes.items() if "generate.py" in command)
    compared = [command for command in outcomes if command.startswith("polygraphy run")][-1]
    monkeypatch.setenv("HIP_TRT_TOKENS", "49")  # other inputs than those of the saved outputs
    other = shell.run(compared)
    assert (other.status, "FAILED" in other.stdout) == (1, True)
    dense, pruned = eager.strip().splitlines()
    assert dense.removeprefix("dense: ") == pruned.removeprefix("HiP: ")  # a short prompt: the budget covers it


def test_every_sample_is_listed() -> None:
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in SAMPLES.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"({folder.name})" in text


def test_cpp_sample(root: Path, tmp_path: Path) -> None:
    """Compiles and links against TensorRT's headers and TensorRT-RTX's library; runs up to where a GPU is needed."""
    headers, toolkit = headers_and_toolkit()
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if compiler() is None or libraries is None:
        pytest.skip("needs a C++ compiler and the package tensorrt_rtx_libs")
    tensorrt = Path(next(iter(libraries.submodule_search_locations or ())), "libtensorrt_rtx.so.1")
    source, program = SAMPLES / "04_engine_in_cpp", tmp_path / "decode"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is not None:
        flags = ["-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror", f"-DCUDAToolkit_ROOT={toolkit}"]
        where = [f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DTENSORRT_LIBRARY={tensorrt}"]
        subprocess.run([cmake, "-S", source, "-B", tmp_path, *where, *flags], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", tmp_path], check=True, stdout=subprocess.DEVNULL)
    else:
        subprocess.run(
            [str(compiler()), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", headers, f"-I{toolkit}/include",
             source / "main.cpp", "-o", program, tensorrt, f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static",
             "-ldl", "-lrt", "-lpthread", f"-Wl,-rpath,{tensorrt.parent}"], check=True,
        )

    def decode(*arguments: Any) -> Outcome:
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    plan, plugin = root / "build" / "engine.plan", hip_trt.library.plugin_path()
    outcome = decode(plan, plugin, "1,2,3", 4)
    first, *others = outcome.stderr.splitlines()
    assert first.startswith(f"plan of {plan.stat().st_size} bytes, plugin {hip_trt.library.version()}, TensorRT 1")
    if not GPU:
        assert (outcome.status, outcome.stdout, len(others)) == (1, "", 1)
        assert f"error: {plan}: a plan needs a GPU from here on: " in others[0]
    assert decode(plan, plugin).status == 2
    for arguments, text in (
        ((tmp_path / "none.plan", plugin, "1"), "none.plan: cannot be read"),
        ((plan, tmp_path / "none.so", "1"), "none.so: cannot open shared object file"),
        ((plan, tensorrt, "1"), "not hip-trt's plugin library"),
        ((plan, plugin, "1,x"), "TOKENS: 'x' is no token id"),
        ((plan, plugin, "1", 0), "NEW_TOKENS and REFRESH_INTERVAL must be positive"),
    ):
        outcome = decode(*arguments)
        assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
        assert text in outcome.stderr


@pytest.mark.parametrize("prompt", [1, 5, 6, 12])
def test_cpp_sample_decodes(cpp_on_stand_in: Path, root: Path, prompt: int) -> None:
    """Chunks, state, pages and the refresh schedule, on the engine of tests/cpp_stand_in: 5 tokens a call at most."""
    tokens = [(7 * index + 3) % 97 for index in range(prompt)]
    expected, sequence, nodes = [], list(tokens), -1
    for step in range(11):
        token = (nodes + 1 + sum(value * (position + 1) for position, value in enumerate(sequence))) % 97
        expected.append(token)
        nodes = len(sequence) if step % 3 == 0 else nodes
        sequence.append(token)
    command = [
        cpp_on_stand_in, root / "build" / "engine.plan", hip_trt.library.plugin_path(), ",".join(map(str, tokens))
    ]
    done = subprocess.run([*command, "11", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == expected
    too_long = subprocess.run([*command, "60"], capture_output=True, text=True)
    assert (too_long.returncode, too_long.stdout) == ((1, "") if prompt + 60 > 64 else (0, too_long.stdout))
    assert prompt + 60 <= 64 or "page_table: outside the plan's profiles" in too_long.stderr


@pytest.fixture(scope="module")
def cpp_on_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("cpp") / "decode"
    source = SAMPLES / "04_engine_in_cpp" / "main.cpp"
    headers = Path(__file__).parent / "cpp_stand_in"
    command = [str(compiler()), "-std=c++17", "-g", "-fsanitize=address,undefined", "-isystem", headers, source]
    subprocess.run([*command, "-o", program, "-ldl"], check=True)
    return program


def headers_and_toolkit() -> tuple[Path, Path]:
    """As the plugin's own build finds them."""
    sys.path.insert(0, str(ROOT / "plugins" / "build_backend"))
    try:
        from hip_trt_build import toolchain
    finally:
        sys.path.pop(0)
    downloads = ROOT / "build" / "toolchain"
    try:
        return (
            toolchain.tensorrt_headers(os.environ, downloads),
            toolchain.cuda_compiler(os.environ, downloads).resolve().parent.parent,
        )
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))


class EngineOnCpu:
    """ICudaEngine and IExecutionContext for the Python sample: ONNX Runtime, on memory given by address."""

    modes = SimpleNamespace(INPUT="input", OUTPUT="output")

    def __init__(self, path: Path, types: dict[torch.dtype, Any], most_new: int) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.most_new, self.types = most_new, types
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.modes_of = {item.name: "input" for item in inputs} | {item.name: "output" for item in outputs}
        self.tensors = {item.name: item for item in (*inputs, *outputs)}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.get_tensor_mode = self.modes_of.__getitem__
        self.contexts: list[ContextOnCpu] = []

    def dtype(self, name: str) -> torch.dtype:
        kinds = {"tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(float)": torch.float32}
        return kinds[self.tensors[name].type]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.types[self.dtype(name)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, int], ...]:
        assert (name, profile) == ("input_ids", 0)
        return (1, 1), (1, self.most_new), (4, self.most_new)

    def create_execution_context(self) -> ContextOnCpu:
        self.contexts.append(ContextOnCpu(self))
        return self.contexts[-1]


class ContextOnCpu:
    def __init__(self, engine: EngineOnCpu) -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[dict[str, np.ndarray[Any, Any]]] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        inputs = {
            name: self.array(name, shape).copy() for name, shape in self.shapes.items()
        }
        width = inputs["input_ids"].shape[1]
        assert width == 1 if self.profile == 1 else width <= engine.most_new
        self.calls.append(inputs)
        outputs = [name for name, mode in engine.modes_of.items() if mode == "output"]
        for name, values in zip(outputs, engine.session.run(outputs, inputs), strict=True):
            self.array(name, values.shape)[...] = values
        return True

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The memory that was bound."""
        dtype = np.dtype(str(self.engine.dtype(name)).removeprefix("torch."))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return runpy.run_path(str(SAMPLES / "03_engine_in_python" / "decode.py"))


@pytest.fixture(scope="module")
def exported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with the logits of the last token, and of every token."""
    return {"last": root / "build" / "model.onnx", "all": export_tiny(tmp_path_factory.mktemp("all"), logits="all")}


@pytest.mark.parametrize(("prompt", "logits"), [(1, "last"), (16, "last"), (17, "all"), (40, "last"), (1, "all")])
def test_python_sample_decodes_as_the_runtime_does(
    exported: dict[str, Path], sample: dict[str, Any], prompt: int, logits: str
) -> None:
    path = exported[logits]
    trt_types = {ours: trt for trt, ours in sample["TYPES"].items()}
    engine = EngineOnCpu(path, trt_types, most_new=16)
    engine.modes_of = {
        name: sample["trt"].TensorIOMode.INPUT if mode == "input" else "output"
        for name, mode in engine.modes_of.items()
    }
    engine.get_tensor_mode = engine.modes_of.__getitem__
    tokens = torch.randint(0, 250, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    decode: Callable[..., Any] = sample["decode"]
    found = list(decode(engine, tokens, 12, refresh_interval=3, device=torch.device("cpu"), stream=0))
    generator = hip_trt.load(path, prefill_chunk=16, threads=1)
    (expected,) = generator.generate([tokens], max_new_tokens=12, temperature=0.0, eos_token_id=[])
    assert found == list(expected.tokens)
    prefill, steps = engine.contexts
    assert (prefill.profile, steps.profile) == (0, 1)
    assert [int(call["refresh_mask"][0]) for call in steps.calls] == [1, 0, 0] * 3 + [1, 0]
    assert {int(call["refresh_mask"][0]) for call in prefill.calls} == {1}
