"""The engine builder: TensorRT-RTX builds of a tiny graph, what stands beside a plan, and every way it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_graph import HIP, save, tiny_model, tiny_spec

from hip_trt import library, operator, sidecar, tensorrt_flavour
from hip_trt.errors import ConfigError, EngineError, EnvironmentProblem, ExportError, HipTrtError, PluginError
from hip_trt.export import engine
from hip_trt.export.engine import build_engine
from hip_trt.export.profiles import EngineLimits, graph_shapes, profiles
from hip_trt.fat_binary import CompiledFor
from hip_trt.gpu import ComputeCapability, Gpu
from hip_trt.sidecar import Sidecar, read_sidecar, sidecar_path, verify_plan
from hip_trt.tensorrt_flavour import Flavour, covers, find_flavour

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

HOPPER = Gpu(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)
ADA = Gpu(0, "NVIDIA GeForce RTX 4090", ComputeCapability(8, 9), 24 << 30)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_spec()), tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def built(onnx_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for 8.0, built once; tests that change files use :func:`plan`."""
    out = tmp_path_factory.mktemp("plan") / "engine.plan"
    build_engine(onnx_path, out, compute_capabilities=["8.0"], max_batch=3, max_prefill=40, max_seq_len=100)
    return out


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy of the plan and its sidecar."""
    for path in (built, sidecar_path(built)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / built.name


def one_line(error: pytest.ExceptionInfo[HipTrtError], *parts: str) -> None:
    """The error says all of these, on one line."""
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# What is built


def test_plan_has_one_plugin_layer_per_node(built: Path) -> None:
    described = read_sidecar(built)
    assert described.plugin_layers == ("attention.0", "attention.1")
    assert described.layers["PLUGIN_V3"] == 2
    assert described.layers["MATRIX_MULTIPLY"] == 7  # query, key and value twice, and logits


def test_sidecar_describes_the_plan(built: Path, onnx_path: Path) -> None:
    described = read_sidecar(built)
    assert described.plan.size == built.stat().st_size
    assert described.plan.sha256 == hashlib.sha256(built.read_bytes()).hexdigest()
    assert [(file.name, file.size) for file in described.model] == [
        (path.name, path.stat().st_size) for path in (onnx_path, onnx_path.with_name("model.onnx.data"))
    ]
    assert described.model[1].sha256 == hashlib.sha256(onnx_path.with_name("model.onnx.data").read_bytes()).hexdigest()
    assert described.spec == tiny_spec()
    assert (described.flavour, described.compute_capabilities) == ("tensorrt-rtx", ("8.0",))
    assert described.plugin_version == library.version()
    assert described.tensorrt_version == find_flavour("tensorrt-rtx").version


def test_inputs_and_outputs_are_the_model_graph(built: Path) -> None:
    described = read_sidecar(built)
    inputs = {tensor.name: tensor for tensor in described.inputs}
    assert set(inputs) == set(graph_shapes(tiny_spec()))
    assert inputs[operator.INPUT_IDS].dtype == "int64"
    assert inputs[operator.KEY.past(1)].dtype == "float16"
    assert inputs[operator.KEY.past(1)].shape == (-1, 2, 16, 64)
    assert inputs[operator.NODES.past(0)].shape == (-1, 2, 2)
    outputs = {tensor.name: tensor for tensor in described.outputs}
    assert outputs[operator.LOGITS].dtype == "float32"
    assert outputs[operator.NODES.present(1)].dtype == "int32"
    assert len(outputs) == 1 + 3 * 2


def test_profiles_of_prefill_and_decode(built: Path) -> None:
    described = read_sidecar(built)
    assert [profile.name for profile in described.profiles] == ["prefill", "decode"]
    assert described.profile_index("decode") == 1
    prefill, decode = (profile.shapes for profile in described.profiles)
    assert (prefill[operator.INPUT_IDS].min, prefill[operator.INPUT_IDS].max) == ((1, 1), (3, 40))
    assert (decode[operator.INPUT_IDS].min, decode[operator.INPUT_IDS].max) == ((1, 1), (3, 1))
    assert prefill[operator.PAGE_TABLE].max == decode[operator.PAGE_TABLE].max == (3, 7)  # 100 tokens in pages of 16
    assert prefill[operator.KEY.past(0)].max == (21, 2, 16, 64)
    assert operator.REFRESH_MASK not in prefill  # its shape is fixed
    assert described.limits.max_pages == 21


def test_default_compute_capabilities_are_all_supported(onnx_path: Path, tmp_path: Path) -> None:
    built = build_engine(onnx_path, tmp_path / "engine.plan")
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(built.compute_capabilities)
    assert built.limits.max_seq_len == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.plan", "engine.plan.json"]


def test_onnx_file_keeps_its_function(onnx_path: Path, tmp_path: Path) -> None:
    before = onnx_path.read_bytes()
    build_engine(onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.0"])
    assert onnx_path.read_bytes() == before
    assert onnx.load(onnx_path, load_external_data=False).functions


def test_layers_that_the_plugin_did_not_get_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser prefers a function body to a plugin: here one that TensorRT can read, left in."""
    model = tiny_model(tiny_spec())
    del model.functions[0].node[:]
    model.functions[0].node.extend(
        onnx.helper.make_node("Identity", [source], [target])
        for source, target in zip(("query", "past_key", "past_value", "past_nodes"), operator.OUTPUTS, strict=True)
    )
    monkeypatch.setattr(engine, "strip_function", lambda model: model)
    with pytest.raises(EngineError) as error:
        build_engine(save(model, tmp_path / "model.onnx"), tmp_path / "engine.plan", compute_capabilities=["8.0"])
    one_line(error, "made 0 plugin layers of 2 HipAttention nodes")
    assert not (tmp_path / "engine.plan").exists()


# The other flavour's path, on the interfaces that both share. No TensorRT but TensorRT-RTX has run it.


def tensorrt_on_rtx(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None) -> Flavour:
    """TensorRT-RTX under the name ``tensorrt``, with a builder that cannot write to a stream, as older ones."""
    rtx = find_flavour("tensorrt-rtx")
    rtx.load_plugin(library.plugin_path())

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._builder = rtx.module.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            if name == "build_serialized_network_to_stream":
                raise AttributeError(name)
            return getattr(self._builder, name)

    module = types.ModuleType("tensorrt")
    module.__dict__.update({**vars(rtx.module), "Builder": Builder, "__version__": "10.14.1"})
    flavour = Flavour("tensorrt", module)
    flavour.__dict__["logger"] = rtx.logger  # TensorRT accepts one per process
    monkeypatch.setattr(flavour, "load_plugin", lambda path: None)
    monkeypatch.setattr(engine, "current_gpu", lambda: gpu)
    return flavour


def test_tensorrt_builds_for_the_gpu_here(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavour = tensorrt_on_rtx(monkeypatch, HOPPER)
    built = build_engine(onnx_path, tmp_path / "engine.plan", runtime=flavour)
    assert (built.flavour, built.tensorrt_version, built.compute_capabilities) == ("tensorrt", "10.14.1", ("9.0",))
    assert verify_plan(tmp_path / "engine.plan") == built
    assert built.runs_on(HOPPER.compute_capability)
    assert not built.runs_on(ADA.compute_capability)


def test_tensorrt_needs_a_gpu(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = tensorrt_on_rtx(monkeypatch, None)
    with pytest.raises(EnvironmentProblem) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", runtime=flavour)
    one_line(error, "there is none here", "--runtime tensorrt-rtx")


def test_tensorrt_builds_for_no_other_gpu(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = tensorrt_on_rtx(monkeypatch, HOPPER)
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", runtime=flavour, compute_capabilities=["8.9"])
    one_line(error, "NVIDIA H200 (9.0)", "8.9")


# Plans without weights


@pytest.fixture
def beside(onnx_path: Path, tmp_path: Path) -> Path:
    """The model in a folder of its own, where a plan without weights must stand too."""
    for path in onnx_path.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / onnx_path.name


MATRICES = ["embedding.weight", *(f"layers.{layer}.{part}_proj.weight" for layer in (0, 1) for part in "qkv"),
            "lm_head.weight"]


def test_stripped_plan_takes_its_matrices_as_inputs(built: Path, beside: Path) -> None:
    plan = beside.with_name("engine.plan")
    described = build_engine(beside, plan, compute_capabilities=["8.0", "8.9"], strip_weights=True)
    assert described.weights == "bound"
    assert sorted(tensor.name for tensor in described.bound) == sorted(MATRICES)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in described.bound}["layers.1.k_proj.weight"] == (
        "float16", (256, 128)
    )
    assert set(graph_shapes(tiny_spec())) == {tensor.name for tensor in described.inputs}
    assert [file.name for file in described.model] == ["model.onnx", "model.onnx.data"]
    assert described.compute_capabilities == ("8.0", "8.9")
    assert verify_plan(plan) == described
    assert read_sidecar(built).weights == "embedded"
    data = beside.with_name("model.onnx.data").read_bytes()
    weight = data[4096:8192]  # of random numbers: nowhere else by chance
    assert weight in data
    assert weight[:64] in built.read_bytes()
    assert weight[:64] not in plan.read_bytes()


def test_stripped_plan_is_as_small_however_large_the_model(tmp_path: Path) -> None:
    sizes = []
    for width in (64, 128):
        path = tmp_path / f"{width}" / "model.onnx"
        path.parent.mkdir()
        save(tiny_model(tiny_spec(head_dim=width)), path)
        plan = path.with_name("engine.plan")
        sizes.append(build_engine(path, plan, compute_capabilities=["8.0"], strip_weights=True).plan.size)
    assert abs(sizes[0] - sizes[1]) < 100_000


def test_stripped_plan_must_stand_beside_its_model(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.0"], strip_weights=True)
    one_line(error, "must stand beside it", f"--out {onnx_path.with_name('engine.plan')}")
    assert not list(tmp_path.iterdir())


def test_tensorrt_strips_by_itself(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which needs a GPU: what it is asked for is seen here, and answered by an engine with weights."""
    flavour = tensorrt_on_rtx(monkeypatch, HOPPER)
    asked: list[Any] = []
    original = engine._Build._config

    def config(self: Any, cancelled: threading.Event) -> Any:
        made = original(self, cancelled)
        flags = [flavour.module.BuilderFlag.STRIP_PLAN, flavour.module.BuilderFlag.REFIT_IDENTICAL]
        asked.extend(made.get_flag(flag) for flag in flags)
        for flag in flags:
            made.clear_flag(flag)
        return made

    monkeypatch.setattr(engine._Build, "_config", config)
    described = build_engine(beside, beside.with_name("engine.plan"), runtime=flavour, strip_weights=True)
    assert asked == [True, True]
    assert (described.weights, described.bound) == ("refit", ())


def test_weight_streaming(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = build_engine(
        onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.0"], weight_streaming=True
    )
    assert described.weight_streaming
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", strip_weights=True, weight_streaming=True)
    one_line(error, "not allowed with strip_weights", "--weight-streaming")
    rtx = find_flavour("tensorrt-rtx")
    module = types.ModuleType("tensorrt_rtx")
    module.__dict__.update({**vars(rtx.module), "BuilderFlag": object})
    older = Flavour("tensorrt-rtx", module)
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", runtime=older, weight_streaming=True)
    one_line(error, "does not offer it")


def test_memory_is_checked_first(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = beside.with_name("model.onnx.data").stat().st_size
    monkeypatch.setattr(engine, "_free_memory", lambda: size)
    with pytest.raises(EngineError) as error:
        build_engine(beside, beside.with_name("engine.plan"), compute_capabilities=["8.0"])
    one_line(error, "needs about", "of memory", "are free", "--strip-weights")
    build_engine(beside, beside.with_name("engine.plan"), compute_capabilities=["8.0"], strip_weights=True)
    monkeypatch.undo()
    assert (engine._free_memory() or 0) > 1 << 20


# Requests that are refused before any work


@pytest.mark.parametrize(("options", "parts"), [
    ({"compute_capabilities": ["9.0"]}, ("8.0, 8.6, 8.9, 12.0", "not for 9.0", "Hopper", "--runtime tensorrt ")),
    ({"compute_capabilities": ["7.5"]}, ("not for 7.5", "Choose among those")),
    ({"compute_capabilities": ["sm_80"]}, ("'sm_80' is not a compute capability such as 8.9",)),
    ({"runtime": "torch"}, ("runtime: 'torch' is not allowed", "auto, tensorrt or tensorrt-rtx")),
    ({"max_batch": 0}, ("max_batch: 0 is not allowed", "from 1")),
    ({"max_seq_len": 257}, ("max_seq_len: 257", "to 256 (the model's context length)")),
    ({"max_prefill": 65, "max_seq_len": 64}, ("max_prefill: 65", "to 64 (max_seq_len)")),
    ({"max_pages": 15}, ("max_pages: 15", "from 16")),
    ({"max_pages": 2**20}, ("max_pages: 1048576", "to 1048575")),
])
def test_bad_requests(onnx_path: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    out = tmp_path / "engine.plan"
    out.write_bytes(b"older")
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, out, **options)
    one_line(error, *parts)
    assert out.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [out]


def test_most_pages_that_are_allowed_do_build(onnx_path: Path, tmp_path: Path) -> None:
    built = build_engine(onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.0"], max_pages=2**20 - 1)
    assert built.limits.max_pages == 2**20 - 1


def test_default_pages_too_many() -> None:
    spec = tiny_spec().model_copy(update={"max_position_embeddings": 1 << 24})
    with pytest.raises(EngineError) as error:
        EngineLimits.resolve(spec)
    one_line(error, "max_batch 4", "max_seq_len 16777216", "--max-pages")


def test_gpus_without_kernels(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = CompiledFor(frozenset({ComputeCapability(8, 0)}), frozenset())
    monkeypatch.setattr(engine, "compiled_for", lambda path: ampere)
    assert build_engine(onnx_path, tmp_path / "engine.plan").compute_capabilities == ("8.0", "8.6", "8.9")
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.9", "12.0"])
    one_line(error, "no kernels for 12.0", "it has them for 8.0", "HIP_TRT_CUDA_ARCHITECTURES=120")
    hopper = CompiledFor(frozenset({ComputeCapability(9, 0)}), frozenset())
    with monkeypatch.context() as patched:
        patched.setattr(engine, "compiled_for", lambda path: hopper)
        with pytest.raises(EngineError) as error:
            build_engine(onnx_path, tmp_path / "engine.plan")
        one_line(error, "does not run on Hopper", "kernels for 9.0 alone", "pip install 'hip-trt[tensorrt]'")
    flavour = tensorrt_on_rtx(monkeypatch, HOPPER)
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", runtime=flavour)
    one_line(error, "no kernels for 9.0")


def test_missing_flavour(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_flavour, "installed", lambda: ())
    for runtime, extra in (("tensorrt", "hip-trt[tensorrt]"), ("auto", "hip-trt[tensorrt-rtx]")):
        with pytest.raises(EnvironmentProblem) as error:
            build_engine(onnx_path, tmp_path / "engine.plan", runtime=runtime)  # type: ignore[arg-type]
        one_line(error, extra)


def test_head_size_without_kernels(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_spec(head_dim=512)), tmp_path / "model.onnx")
    with pytest.raises(ConfigError) as error:
        build_engine(path, tmp_path / "engine.plan")
    one_line(error, "head_dim: 512")


# Models that cannot be built


def change(model: onnx.ModelProto, index: int = 3, **fields: Any) -> onnx.ModelProto:
    for name, value in fields.items():
        setattr(model.graph.node[index], name, value)
    return model


def with_attribute(model: onnx.ModelProto, name: str, value: int) -> onnx.ModelProto:
    nodes = [node for node in model.graph.node if node.op_type == operator.OP_TYPE]
    next(attribute for attribute in nodes[1].attribute if attribute.name == name).i = value
    return model


def without_input(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input[5].type.tensor_type.shape.dim[2].dim_value = 32
    return model


@pytest.mark.parametrize(("broken", "parts"), [
    (lambda: change(tiny_model(tiny_spec()), op_type="Frobnicate"), ("node node_3 (Frobnicate)", "not found")),
    (lambda: with_attribute(tiny_model(tiny_spec()), "block_k", 15), ("attention.1", "block_k: 15 is not allowed")),
    (lambda: without_input(tiny_model(tiny_spec())), ("past_key_values.0.key", "(-1, 2, 32, 64)", "(-1, 2, 16, 64)")),
], ids=["unknown operator", "attribute", "shape of an input"])
def test_broken_models(tmp_path: Path, broken: Callable[[], onnx.ModelProto], parts: tuple[str, ...]) -> None:
    path = save(broken(), tmp_path / "model.onnx")
    with pytest.raises(EngineError) as error:
        build_engine(path, tmp_path / "plan" / "engine.plan", compute_capabilities=["8.0"])
    one_line(error, *parts)
    assert not (tmp_path / "plan").exists()


def test_onnx_files_that_are_not_ours(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "engine.plan"

    def refuse(*parts: str) -> None:
        with pytest.raises(EngineError) as error:
            build_engine(path, out)
        one_line(error, str(path), *parts)
        assert not out.exists()

    refuse("no such file")
    path.write_bytes(b"\xff" * 100)
    refuse("not an ONNX file")
    model = tiny_model(tiny_spec())
    save(model, path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    refuse("truncated", "model.onnx.data")
    data.unlink()
    refuse("weights are missing", "model.onnx.data")
    del model.metadata_props[:]
    save(model, path)
    refuse("not a model exported by hip-trt")
    onnx.helper.set_model_props(model, {"hip_trt": '{"model_type": "llama"}'})
    save(model, path)
    refuse("another version", "source")


# Writing: all or nothing

STOPPED_IN_THE_MIDDLE = """
import sys, time
from hip_trt import library
from hip_trt.export import engine

write = engine._HashingWriter.write
def slow_write(self, data):
    written = write(self, data[: len(data) // 2])
    self.file.flush()
    print("half written", flush=True)
    time.sleep(1)
    return written
engine._HashingWriter.write = slow_write

from hip_trt.cli import main
sys.argv = ["hip-trt", "export", "--model", sys.argv[1], "--out", sys.argv[2], "--compute-capability", "8.0"]
main()
"""


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_in_the_middle(onnx_path: Path, plan: Path, number: signal.Signals, status: int) -> None:
    before = {path.name: path.read_bytes() for path in plan.parent.iterdir()}
    with start(STOPPED_IN_THE_MIDDLE, onnx_path, plan) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "half written\n"
        process.send_signal(number)
        assert process.wait(timeout=300) == status
        assert "Traceback" not in process.stderr.read()
    after = {path.name: path for path in plan.parent.iterdir() if path.is_file()}
    assert {name: path.read_bytes() for name, path in after.items()} == before
    verify_plan(plan)
    if number == signal.SIGKILL:  # what it left is hidden, and goes with the next build
        assert len(list(plan.parent.iterdir())) == 3
        build_engine(onnx_path, plan, compute_capabilities=["8.0"])
    assert len(list(plan.parent.iterdir())) == 2


def test_signals_end_the_build_in_its_thread() -> None:
    cancelled = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            engine._in_thread(lambda: cancelled.wait(60), cancelled)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.is_set()


def test_tensorrt_heeds_the_end(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def already_cancelled(work: Callable[[], bool], cancelled: threading.Event) -> bool:
        cancelled.set()
        return work()

    monkeypatch.setattr(engine, "_in_thread", already_cancelled)
    with pytest.raises(EngineError) as error:
        build_engine(onnx_path, tmp_path / "engine.plan", compute_capabilities=["8.0"])
    one_line(error, "BuildCanceled")
    assert not list(tmp_path.iterdir())


DISK_FULL = """
import resource, sys
from hip_trt.cli.app import app

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
app(["export", "--model", sys.argv[1], "--out", sys.argv[2], "--compute-capability", "8.0"])
"""


def test_disk_full(onnx_path: Path, plan: Path) -> None:
    before = {path.name: path.read_bytes() for path in plan.parent.iterdir()}
    process = start(DISK_FULL, onnx_path, plan)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (1, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert "writing failed" in errors
    assert {path.name: path.read_bytes() for path in plan.parent.iterdir()} == before


def test_folder_that_cannot_be_written(onnx_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError) as error:
        build_engine(onnx_path, tmp_path / "file" / "engine.plan", compute_capabilities=["8.0"])
    one_line(error, "cannot be written", str(tmp_path / "file"))


def test_a_new_build_replaces_plan_and_sidecar(onnx_path: Path, plan: Path) -> None:
    old = read_sidecar(plan)
    new = build_engine(onnx_path, plan, compute_capabilities=["8.9"], max_batch=2)
    assert verify_plan(plan) == new
    assert new.compute_capabilities == ("8.9",)
    assert new.plan.sha256 != old.plan.sha256


# Reading: a plan and its sidecar belong together


def test_verify_accepts_what_was_built(built: Path) -> None:
    seen: list[int] = []
    assert verify_plan(built, seen.append) == read_sidecar(built)
    assert sum(seen) == built.stat().st_size


def flip_a_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def edit_sidecar(path: Path, **fields: Any) -> None:
    beside = sidecar_path(path)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **fields}))


@pytest.mark.parametrize(("damage", "parts"), [
    (flip_a_byte, ("engine.plan: damaged", "checksum")),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), ("engine.plan: damaged", "bytes")),
    (lambda path: path.unlink(), ("engine.plan: no such plan", "hip-trt export")),
    (lambda path: sidecar_path(path).unlink(), ("engine.plan.json is missing",)),
    (lambda path: sidecar_path(path).write_text("{"), ("engine.plan.json: not the description of a plan", "JSON")),
    (lambda path: sidecar_path(path).write_bytes(b"\xff"), ("engine.plan.json: cannot be read",)),
    (lambda path: edit_sidecar(path, format_version=2), ("engine.plan.json", "format 2", "reads format 1", "again")),
    (lambda path: edit_sidecar(path, spec={"hip": {}}), ("engine.plan.json", "spec.")),
], ids=["byte", "truncated", "missing", "no sidecar", "not JSON", "not text", "format", "spec"])
def test_damaged_plans(plan: Path, damage: Callable[[Path], Any], parts: tuple[str, ...]) -> None:
    damage(plan)
    with pytest.raises(EngineError) as error:
        verify_plan(plan)
    one_line(error, *parts)


def test_environment(built: Path) -> None:
    described, flavour = read_sidecar(built), find_flavour("tensorrt-rtx")
    a100 = Gpu(0, "NVIDIA A100", ComputeCapability(8, 0), 80 << 30)

    def require(described: Sidecar, *, gpu: Gpu = a100) -> None:
        described.require_environment(flavour=flavour, gpu=gpu)

    require(described)
    with pytest.raises(EngineError) as error:
        require(described, gpu=HOPPER)
    one_line(error, "compute capability 8.0", "NVIDIA H200 has 9.0")
    for fields in ({"tensorrt_version": "1.0.0"}, {"flavour": "tensorrt"}):
        with pytest.raises(EngineError) as error:
            require(described.model_copy(update=fields))
        one_line(error, "which alone can read it", repr(flavour))


def test_what_a_plan_covers() -> None:
    eight, twelve = ComputeCapability(8, 9), ComputeCapability(12, 0)
    assert covers([eight], eight)
    assert not covers([eight], ComputeCapability(8, 6))
    assert not covers([eight, twelve], ComputeCapability(9, 0))
    assert covers([eight, twelve], ComputeCapability(12, 1))
    assert not covers([eight], ComputeCapability(12, 1))


# The seam to TensorRT


def test_supported_gpus_leave_out_hopper_and_older() -> None:
    flavour = find_flavour("tensorrt-rtx")
    assert ComputeCapability(7, 5) not in flavour.compute_capabilities
    assert flavour.runs_on(ComputeCapability(8, 9))
    assert not flavour.runs_on(ComputeCapability(9, 0))


def test_plugin_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    flavour = find_flavour("tensorrt-rtx")
    with pytest.raises(PluginError) as error:
        flavour.load_plugin(tmp_path / "missing.so")
    one_line(error, "no such plugin library")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(PluginError) as error:
        flavour.load_plugin(tmp_path / "text.so")
    one_line(error, "cannot be loaded", "file too short")
    copy = tmp_path / "copy.so"
    copy.write_bytes(library.plugin_path().read_bytes())
    flavour.load_plugin(library.plugin_path())
    with pytest.raises(PluginError) as error:
        flavour.load_plugin(copy)
    one_line(error, "refuses the plugin library")


def test_auto_prefers_tensorrt_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_flavour, "installed", lambda: ("tensorrt", "tensorrt-rtx"))
    monkeypatch.setattr(tensorrt_flavour, "_load", lambda name: name)
    monkeypatch.setattr(tensorrt_flavour, "current_gpu", lambda: None)
    assert find_flavour() == "tensorrt-rtx"
    assert find_flavour(gpu=HOPPER) == "tensorrt"


def test_profiles_follow_the_config() -> None:
    spec = tiny_spec(layers=1, hip=HIP.replace(mask_heads="query", page_size=32))
    prefill, _ = profiles(spec, EngineLimits(max_batch=2, max_prefill=8, max_seq_len=33, max_pages=5))
    assert prefill.shapes[operator.NODES.past(0)].max == (2, 4, 2)
    assert prefill.shapes[operator.VALUE.past(0)].max == (5, 2, 32, 64)
    assert prefill.shapes[operator.PAGE_TABLE].opt == (1, 2)


def test_sidecar_name() -> None:
    assert sidecar.sidecar_path("a/engine.plan") == Path("a/engine.plan.json")
    assert os.fspath(sidecar_path(Path("x.engine"))) == "x.engine.json"
