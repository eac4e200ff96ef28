"""``hip-trt serve-repo``: its files, checked against Triton's own schema, and its model.py behind a stand-in for
Triton's Python backend."""

from __future__ import annotations

import errno
import gc
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated import compiler
from google.protobuf import json_format, text_format
from offload_host import FakeHost
from oracle import OracleExecutor
from test_offload_runtime import host, library, make, oracle  # noqa: F401  (fixtures)
from tiny_export import byte_tokenizer, export_tiny
from tiny_graph import tiny_spec
from tiny_plan import write_plan
from typer.testing import CliRunner, Result

import hip_trt
from hip_trt import library as libraries
from hip_trt.cli.app import app
from hip_trt.cli.run import run as run_command
from hip_trt.cli.serve_repo import serve_repo
from hip_trt.offload import Offload
from hip_trt.offload.settings import KEY_SHARE, VALUE_SHARE
from hip_trt.runtime import Generator
from hip_trt.runtime.tensorrt import TensorRTExecutor
from hip_trt.serve_repo import repository as repository_module
from hip_trt.serve_repo import write_repository
from hip_trt.sidecar import TensorRecord, sidecar_path


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of ``tensorrt``, and a plugin library of its version."""
    plugin = tmp_path / "libhip_trt_plugin.so"
    plugin.write_bytes(b"library")
    monkeypatch.setattr(libraries, "plugin_path", lambda: plugin)
    monkeypatch.setattr(libraries, "version", lambda: "0.1.0")
    folder = tmp_path / "plan"
    folder.mkdir()
    byte_tokenizer().save_pretrained(folder)
    return write_plan(
        folder, tiny_spec(), inputs=(TensorRecord(name="input_ids", dtype="int64", shape=(-1, -1)),),
        outputs=(TensorRecord(name="present.0.key", dtype="float16", shape=(-1, 2, 16, 64)),),
    )


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["serve-repo", *map(str, arguments)])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(result: Result, text: str) -> bool:
    return result.exit_code == 1 and result.stdout == "" and text in result.stderr and result.stderr.count("\n") == 1


def read_config(folder: Path) -> dict[str, Any]:
    """config.pbtxt as Triton reads it: unknown fields and values of the wrong type are errors."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        pytest.skip("needs the package tritonclient")
    # The module alone: the package around it wants gRPC.
    schema = load_module("model_config_pb2", Path(client.submodule_search_locations[0], "grpc", "model_config_pb2.py"))
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    message = text_format.Parse(text, schema.ModelConfig())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_repository_of_an_onnx_model(onnx_path: Path, tmp_path: Path) -> None:
    result = run(onnx_path, "--out", tmp_path / "triton", "--name", "demo", "--instances", 2)
    assert result.exit_code == 0, result.output
    assert "No bare engine: an .onnx is no engine" in result.stdout
    wanted = {"model.onnx", "model.py", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert wanted <= files(tmp_path / "triton" / "demo" / "1")
    assert files(tmp_path / "triton" / "demo") == {"config.pbtxt", *(f"1/{name}" for name in
                                                                     files(tmp_path / "triton" / "demo" / "1"))}
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["demo"]
    config = read_config(tmp_path / "triton" / "demo")
    assert (config["name"], config["backend"]) == ("demo", "python")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert config["parameters"] == {"model": {"string_value": "model.onnx"}}
    assert [tensor["name"] for tensor in config["input"] if not tensor.get("optional")] == ["text_input"]


def test_repository_of_a_plan_has_the_bare_engine_too(plan: Path, tmp_path: Path) -> None:
    repository = write_repository(plan, tmp_path / "triton")
    assert repository.text == tmp_path / "triton" / "tiny"
    assert {"engine.plan", "engine.plan.json", "model.py", "tokenizer.json"} <= files(repository.text / "1")
    assert read_config(repository.text)["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [0]}]
    assert repository.engine == tmp_path / "triton" / "tiny-engine"
    assert files(repository.engine) == {"config.pbtxt", "1/engine.plan", "1/libhip_trt_plugin.so"}
    config = read_config(repository.engine)
    assert (config["platform"], config["default_model_filename"]) == ("tensorrt_plan", "engine.plan")
    assert config["input"] == [{"name": "input_ids", "data_type": "TYPE_INT64", "dims": ["-1", "-1"]}]
    assert config["output"] == [
        {"name": "present.0.key", "data_type": "TYPE_FP16", "dims": ["-1", "2", "16", "64"]}
    ]
    assert config["instance_group"][0]["profile"] == ["0", "1"]


def test_plan_of_tensorrt_rtx_has_no_bare_engine(plan: Path, tmp_path: Path) -> None:
    write_plan(plan.parent, tiny_spec(), flavour="tensorrt-rtx")
    repository = write_repository(plan, tmp_path / "triton")
    assert repository.engine is None
    assert "plan is of tensorrt-rtx" in repository.no_engine
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["tiny"]


def test_existing_model_is_kept_unless_forced(onnx_path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert run(onnx_path, "--out", tmp_path, "--name", "demo").exit_code == 0
    (tmp_path / "demo" / "mine").touch()
    assert refused(run(onnx_path, "--out", tmp_path, "--name", "demo"), "demo: it exists already. Replace it")
    assert (tmp_path / "demo" / "mine").exists()
    assert run(onnx_path, "--out", tmp_path, "--name", "demo", "--force").exit_code == 0
    assert not (tmp_path / "demo" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "other"]


def test_full_disk_leaves_what_was_there(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(onnx_path, tmp_path, name="demo")
    before = files(tmp_path)
    copied = []

    def copy(source: Path, target: Path) -> None:
        copied.append(source)
        if len(copied) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.copyfile(source, target)

    monkeypatch.setattr(repository_module.shutil, "copy2", copy)
    assert refused(run(onnx_path, "--out", tmp_path, "--name", "demo", "--force"), "No space left on device")
    assert files(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_failing_rename_brings_the_old_model_back(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(onnx_path, tmp_path, name="demo")
    before, rename = files(tmp_path), os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "demo" and Path(target).parent == tmp_path:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write_repository(onnx_path, tmp_path, name="demo", force=True)
    assert files(tmp_path) == before


def test_bad_requests(onnx_path: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "triton"
    assert refused(run(tmp_path / "none.plan", "--out", out), "no such plan")
    assert refused(run(tmp_path / "none.onnx", "--out", out), "no such file")
    assert refused(run(onnx_path, "--out", out, "--name", "a/b"), "--name a/b: not allowed")
    assert refused(run(onnx_path, "--out", out, "--instances", 0), "instances: 0 is not allowed")
    assert refused(run(onnx_path, "--out", onnx_path), "cannot be written")
    bare = shutil.copytree(onnx_path.parent, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    assert refused(run(bare / "model.onnx", "--out", out), "there is no tokenizer beside the model")
    beside = sidecar_path(plan)
    described = beside.read_text()
    beside.write_text(described.replace('"format_version":', '"format_version": 9'))
    assert refused(run(plan, "--out", out), "in format 9")
    beside.write_text(described)
    plan.write_bytes(b"plaN")
    assert refused(run(plan, "--out", out), "damaged")
    assert not out.exists()


class Sender:
    """Collects responses; says that the client is gone after ``patience`` of them."""

    def __init__(self, patience: int = 1000) -> None:
        self.patience, self.texts, self.errors, self.finals = patience, list[str](), list[str](), 0

    def is_cancelled(self) -> bool:
        return len(self.texts) >= self.patience

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.finals, "a response after the final one"
        self.finals += flags
        if response is not None and response.error is not None:
            self.errors.append(response.error)
        elif response is not None:
            (tensor,) = response.output_tensors
            assert tensor.name == "text_output"
            assert (tensor.values.dtype, tensor.values.shape) == (np.object_, (1,))
            self.texts.append(tensor.values[0].decode())


Ask = Callable[..., Sender]
Load = Callable[[Path, dict[str, str]], Ask]


class TritonModelException(Exception):
    pass


class Backend(ModuleType):
    """Triton's triton_python_backend_utils, as far as model.py uses it."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonModelException, TritonError = TritonModelException, str

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.log: list[str] = []
        self.Logger = SimpleNamespace(log_verbose=self.log.append)

    @staticmethod
    def Tensor(name: str, values: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, values=values, as_numpy=lambda: values)

    @staticmethod
    def InferenceResponse(output_tensors: Any = (), error: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(output_tensors=output_tensors, error=error)

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return request.inputs.get(name)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend()
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    return backend


@pytest.fixture
def load(backend: Backend) -> Load:
    """Initializes the model.py of a folder with parameters, as Triton's Python backend does, and sends requests."""
    types = {"text_input": np.object_, "stream": np.bool_, "raw": np.bool_, "max_tokens": np.int32, "seed": np.int64}

    def initialize(folder: Path, parameters: dict[str, str]) -> Ask:
        model = load_module("model", folder / "1" / "model.py").TritonPythonModel()
        given = {key: {"string_value": value} for key, value in parameters.items()}
        model.initialize({
            "model_config": json.dumps({"parameters": given}), "model_repository": str(folder), "model_version": "1",
        })

        def send(patience: int = 1000, **inputs: Any) -> Sender:
            inputs["text_input"] = inputs["text_input"].encode()
            sender = Sender(patience)
            tensors = {
                name: backend.Tensor(name, np.array([value], types.get(name, np.float32)))
                for name, value in inputs.items()
            }
            assert model.execute([SimpleNamespace(inputs=tensors, get_response_sender=lambda: sender)]) is None
            assert sender.finals == 1
            return sender

        return send

    return initialize


@pytest.fixture
def ask(onnx_path: Path, tmp_path: Path, load: Load) -> Ask:
    return load(write_repository(onnx_path, tmp_path, name="demo").text, {"model": "model.onnx"})


def test_model_answers_as_the_runtime_does(ask: Ask, onnx_path: Path) -> None:
    generator = hip_trt.load(onnx_path)
    (raw,) = generator.generate(["Hello"], max_new_tokens=9)
    assert ask(text_input="Hello", raw=True, max_tokens=9).texts == [raw.text]
    chat = generator.encode_chat([{"role": "user", "content": "Hello"}])
    (answer,) = generator.generate([chat], max_new_tokens=9)
    assert answer.text != raw.text
    assert ask(text_input="Hello", max_tokens=9).texts == [answer.text]
    streamed = ask(text_input="Hello", max_tokens=9, stream=True).texts
    assert len(streamed) > 1
    assert "".join(streamed) == answer.text
    (sampled,) = generator.generate([chat], max_new_tokens=9, temperature=2.0, seed=3)
    assert ask(text_input="Hello", max_tokens=9, temperature=2.0, seed=3).texts == [sampled.text]


def test_model_stops_for_a_client_that_is_gone(ask: Ask) -> None:
    assert len(ask(text_input="Hello", max_tokens=9, stream=True, patience=2).texts) == 2


def test_model_answers_errors(ask: Ask) -> None:
    assert ask(text_input="Hello", max_tokens=0).errors == [
        "RuntimeInputError: max_new_tokens: 0 is not allowed. It must be at least 1."
    ]
    assert "the KV cache holds" in ask(text_input="x" * 2000).errors[0]


# The KV cache in host memory


def parameters(folder: Path) -> dict[str, str]:
    """Of config.pbtxt, as :func:`read_config` finds them, but for what hip-trt writes alone."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    line = r'^parameters \{ key: "([^"]+)" value \{ string_value: "([^"]+)" \} \}$'
    return dict(re.findall(line, text, re.MULTILINE))


def test_options_of_offload_are_those_of_run() -> None:
    ours, of_run = (inspect.signature(command, eval_str=True).parameters for command in (serve_repo, run_command))
    for name in ("offload", "key_cache_mib", "value_cache_mib", "cache_share"):
        assert ours[name] == of_run[name]
    for name, share in (("key_cache_mib", KEY_SHARE), ("value_cache_mib", VALUE_SHARE)):
        assert f"at least {share:.1%} of the full cache" in ours[name].annotation.__metadata__[0].show_default


@pytest.mark.parametrize(("arguments", "fields"), [
    ([], None),
    (["--offload"], {}),
    (["--offload", "--key-cache-mib", 800, "--value-cache-mib", 0.5], {"key_cache_mib": 800, "value_cache_mib": 0.5}),
    (["--offload", "--value-cache-mib", 0], {"value_cache_mib": 0}),
    (["--offload", "--cache-share", 0.5], Offload.of_share(0.5).model_dump(include={"key_cache", "value_cache"})),
], ids=["none", "defaults", "mib", "nothing", "share"])
def test_offload_is_written(
    plan: Path, tmp_path: Path, arguments: list[Any], fields: dict[str, float] | None
) -> None:
    result = run(plan, "--out", tmp_path / "triton", *arguments)
    assert result.exit_code == 0, result.output
    written = parameters(tmp_path / "triton" / "tiny")
    config = read_config(tmp_path / "triton" / "tiny")
    assert config["parameters"] == {key: {"string_value": value} for key, value in written.items()}
    assert (written.pop("model"), written.pop("offload", None)) == ("engine.plan", None if fields is None else "true")
    assert {key: float(value) for key, value in written.items()} == {
        f"offload.{name}": value for name, value in (fields or {}).items()
    }
    assert "offload" not in (tmp_path / "triton" / "tiny-engine" / "config.pbtxt").read_text()


def test_offload_that_is_refused_when_written(plan: Path, onnx_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "triton"
    for arguments, option in (
        (["--key-cache-mib", 1], "--key-cache-mib"), (["--cache-share", 0.1], "--cache-share"),
        (["--offload", "--cache-share", 0.1, "--value-cache-mib", 1], "--cache-share"),
    ):
        result = run(plan, "--out", out, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"Invalid value for {option}" in result.stderr
    for arguments, message in (
        (["--cache-share", 2], "cache_share: 2.0 is not allowed; it must be from 0 to 1"),
        (["--key-cache-mib", -1], "key_cache_mib: -1.0 is not allowed; it must be greater than or equal to 0"),
    ):
        assert refused(run(plan, "--out", out, "--offload", *arguments), message)
    result = run(onnx_path, "--out", out, "--offload")
    assert refused(result, "model.onnx: ONNX Runtime runs it on the CPU, where the KV cache is in host memory already")
    ran = CliRunner().invoke(app, ["run", str(onnx_path), "-p", "x", "--offload"])
    assert ran.stderr.splitlines()[-1] == result.stderr.rstrip("\n")
    assert not out.exists()


@pytest.mark.parametrize("offload", [
    None, Offload(), Offload(key_cache=0.1, value_cache=1 / 3), Offload(key_cache_mib=800, value_cache_mib=0),
    Offload(key_cache=0.25, value_cache_mib=2.5, staging_tokens=4096, release_staging=False),
], ids=str)
def test_server_loads_what_was_written(
    plan: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, offload: Offload | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(hip_trt, "load", lambda *arguments, **options: seen.append((arguments, options)), raising=False)
    folder = write_repository(plan, tmp_path / "triton", offload=offload).text
    load(folder, parameters(folder))
    assert seen == [((folder / "1" / "engine.plan",), {"offload": offload})]
    load(folder, {**parameters(folder), "offload": "false"})
    assert seen[1][1] == {"offload": None}


def edited(switch: str | None, fields: dict[str, str]) -> dict[str, str]:
    sizes = {f"offload.{name}": value for name, value in fields.items()}
    return sizes if switch is None else {"offload": switch, **sizes}


@pytest.mark.parametrize(("switch", "fields", "message"), [
    ("yes", {}, "parameter offload: 'yes' is not allowed; it must be true or false."),
    ("", {}, "parameter offload: '' is not allowed"),
    ("true", {"key_cache_mib": "many"}, "key_cache_mib: 'many' is not allowed; it must be a valid number"),
    ("true", {"key_cache_mib": "-1"}, "key_cache_mib: '-1' is not allowed; it must be greater than or equal to 0"),
    ("true", {"value_cache": "1.5"}, "value_cache: '1.5' is not allowed; it must be less than or equal to 1"),
    ("false", {"value_cache": "1.5"}, "value_cache: '1.5' is not allowed"),
    ("true", {"staging_tokens": "1.5"}, "staging_tokens: '1.5' is not allowed; it must be a valid integer"),
    ("true", {"key_cahce": "0.1"}, "key_cahce: no such field; the fields are key_cache, value_cache, key_cache_mib"),
    ("true", {"key_cache": "0.1", "key_cache_mib": "1"}, "key_cache: give either a share or MiB, not both"),
    (None, {"key_cache_mib": "1"}, "parameter offload.key_cache_mib: there is no cache to size without the parameter"),
])
def test_edited_config_is_refused_when_loaded(
    plan: Path, tmp_path: Path, load: Load, switch: str | None, fields: dict[str, str], message: str
) -> None:
    """Before the plan is looked at, which would need a GPU."""
    folder = write_repository(plan, tmp_path / "triton").text
    with pytest.raises(TritonModelException) as caught:
        load(folder, {"model": "engine.plan", **edited(switch, fields)})
    assert message in str(caught.value)
    assert str(caught.value).endswith(" Correct it in config.pbtxt, or write the model again with hip-trt serve-repo.")
    assert "\n" not in str(caught.value)


def test_config_of_an_onnx_that_was_edited(onnx_path: Path, tmp_path: Path, load: Load) -> None:
    folder = write_repository(onnx_path, tmp_path, name="demo").text
    with pytest.raises(TritonModelException, match=r"model\.onnx: ONNX Runtime runs it on the CPU"):
        load(folder, {"model": "model.onnx", "offload": "true"})


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def executor(oracle: OracleExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """What runs the plan, on an emulated GPU."""
    executor = make(oracle)[0]
    monkeypatch.setattr(TensorRTExecutor, "load", lambda path, **_: executor)
    return executor


@pytest.fixture
def offloaded(plan: Path, tmp_path: Path, load: Load, executor: Any) -> Ask:
    folder = write_repository(plan, tmp_path / "triton", offload=Offload(key_cache=0.3, value_cache=0.25)).text
    return load(folder, parameters(folder))


TEXT = "the quick brown fox jumps over the lazy dog"


@needs_compiler
def test_model_answers_from_host_memory(
    offloaded: Ask, plan: Path, executor: Any, backend: Backend, host: FakeHost, load: Load  # noqa: F811
) -> None:
    (expected,) = Generator(executor, byte_tokenizer()).generate([TEXT], max_new_tokens=6)
    assert (host.most_held, backend.log) == (0, [])
    assert offloaded(text_input=TEXT, raw=True, max_tokens=6).texts == [expected.text]
    assert "".join(offloaded(text_input=TEXT, raw=True, max_tokens=6, stream=True).texts) == expected.text
    assert (host.held, host.most_held) == (0, 2)  # a pool for each layer
    assert len(backend.log) == 2
    for line in backend.log:
        stats = json.loads(line.removeprefix("hip-trt offload: "))
        assert (stats["tokens"], stats["prefill"]["tokens"]) == (5, len(TEXT))
        assert stats["keys"]["misses"] > 0
        assert "layers" not in stats


@needs_compiler
def test_client_that_is_gone_holds_no_host_memory(
    offloaded: Ask, backend: Backend, host: FakeHost  # noqa: F811
) -> None:
    gc.disable()
    try:
        assert len(offloaded(text_input=TEXT, raw=True, max_tokens=9, stream=True, patience=2).texts) == 2
        assert (host.held, host.most_held) == (0, 2)
    finally:
        gc.enable()
    assert 2 <= json.loads(backend.log[0].removeprefix("hip-trt offload: "))["tokens"] < 8


@needs_compiler
def test_model_survives_a_request_that_fails(
    offloaded: Ask, backend: Backend, executor: Any, host: FakeHost, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    host.refuse = 1
    (error,) = offloaded(text_input=TEXT, raw=True, max_tokens=4).errors
    assert "EnvironmentProblem: offload: CUDA does not lock" in error
    host.refuse = None
    monkeypatch.setattr(executor._engine, "broken", True)
    (error,) = offloaded(text_input=TEXT, raw=True, max_tokens=4).errors
    assert "no memory" in error
    assert (host.held, backend.log) == (0, [])
    monkeypatch.setattr(executor._engine, "broken", False)
    assert offloaded(text_input=TEXT, raw=True, max_tokens=4).texts
