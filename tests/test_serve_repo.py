"""``hip-trt serve-repo``: its files, checked against Triton's own schema, and its model.py behind a stand-in for
Triton's Python backend."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from tiny_export import byte_tokenizer, export_tiny
from tiny_graph import tiny_spec
from tiny_plan import write_plan
from typer.testing import CliRunner, Result

import hip_trt
from hip_trt import library
from hip_trt.cli.app import app
from hip_trt.serve_repo import repository as repository_module
from hip_trt.serve_repo import write_repository
from hip_trt.sidecar import TensorRecord


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of ``tensorrt``, and a plugin library of its version."""
    plugin = tmp_path / "libhip_trt_plugin.so"
    plugin.write_bytes(b"library")
    monkeypatch.setattr(library, "plugin_path", lambda: plugin)
    monkeypatch.setattr(library, "version", lambda: "0.1.0")
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
    monkeypatch.setattr(library, "version", lambda: "0.2.0")
    assert refused(run(plan, "--out", out), "built with plugin version 0.1.0; here is 0.2.0")
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


@pytest.fixture
def ask(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Sends a request to the repository's model.py as Triton's Python backend does."""

    class TritonModelException(Exception):
        pass

    def tensor(name: str, values: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, values=values, as_numpy=lambda: values)

    backend: Any = ModuleType("triton_python_backend_utils")
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    backend.TritonModelException, backend.TritonError, backend.Tensor = TritonModelException, str, tensor
    backend.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(
        output_tensors=output_tensors, error=error
    )
    backend.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    folder = write_repository(onnx_path, tmp_path, name="demo").text
    model = load_module("model", folder / "1" / "model.py").TritonPythonModel()
    model.initialize({
        "model_config": json.dumps({"parameters": {"model": {"string_value": "model.onnx"}}}),
        "model_repository": str(folder), "model_version": "1",
    })
    types = {"text_input": np.object_, "stream": np.bool_, "raw": np.bool_, "max_tokens": np.int32, "seed": np.int64}

    def send(patience: int = 1000, **inputs: Any) -> Sender:
        inputs["text_input"] = inputs["text_input"].encode()
        sender = Sender(patience)
        tensors = {name: tensor(name, np.array([value], types.get(name, np.float32))) for name, value in inputs.items()}
        assert model.execute([SimpleNamespace(inputs=tensors, get_response_sender=lambda: sender)]) is None
        assert sender.finals == 1
        return sender

    return send


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
