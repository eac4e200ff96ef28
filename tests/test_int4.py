"""Weights in four bits: what is stored is what is computed, in ONNX Runtime and in a plan."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import save_checkpoint, tiny_llama
from graph_runner import GraphRunner
from onnx import TensorProto, numpy_helper

from hip_trt.config import HipConfig
from hip_trt.errors import EnvironmentProblem, ExportError
from hip_trt.export import ExportedModel, export_onnx, int4
from hip_trt.export.engine import build_engine
from hip_trt.inspect import describe
from hip_trt.runtime import Session
from hip_trt.runtime.onnxruntime import OrtExecutor

HIP = HipConfig.create(
    mask_k=512, decode_mask_k=512, block_q=16, block_k=16, page_size=64, sink_tokens=16, window_tokens=32
)
PROMPT = [(7 * index) % 250 for index in range(40)]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "head_dim": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """A model of 64 and 160 inputs: blocks of 64 and 32."""
    pytest.importorskip("modelopt.onnx.quantization", reason="needs NVIDIA Model Optimizer")
    folder = tmp_path_factory.mktemp("int4")
    source = save_checkpoint(folder / "checkpoint", tiny_llama(**SIZES))
    return export_onnx(source, folder / "out", config=HIP, quantize="int4")


def initializers(model: ExportedModel) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(model.path).graph.initializer}


def dequantized(model: ExportedModel) -> dict[str, torch.Tensor]:
    """The linear layers' weights as transformers has them, computed from what is stored."""
    stored, weights = initializers(model), {}
    for name, tensor in stored.items():
        if tensor.data_type == TensorProto.INT4:
            integers = numpy_helper.to_array(tensor).astype(np.float32)
            scale = numpy_helper.to_array(stored[f"{name}_scale"])
            block = integers.shape[0] // scale.shape[0]
            weights[name] = torch.from_numpy((integers * scale.repeat(block, axis=0)).T.copy())
    return weights


def test_values_are_within_half_a_step(exported: ExportedModel) -> None:
    original = dict(tiny_llama(**SIZES).named_parameters())
    stored, found = initializers(exported), dequantized(exported)
    assert set(found) == {name for name in original if "_proj" in name}
    for name, weight in found.items():
        scale = numpy_helper.to_array(stored[f"{name}_scale"])
        assert scale.shape[0] == {64: 1, 128: 1, 160: 5}[weight.shape[1]]
        step = torch.from_numpy(scale.repeat(weight.shape[1] // scale.shape[0], axis=0).T.copy())
        assert (weight - original[name].detach()).abs().le(step * 0.5001).all()
        assert (weight - original[name].detach()).abs().max() > 0
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        np.testing.assert_array_equal(numpy_helper.to_array(stored[name]), original[name].detach())
    assert stored["lm_head.weight_transposed"].data_type == TensorProto.FLOAT
    onnx.checker.check_model(exported.path, full_check=True)


def test_computes_what_is_stored(exported: ExportedModel) -> None:
    model = tiny_llama(**SIZES)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        model.load_state_dict(dequantized(exported), strict=False)
        expected, before = (either(torch.tensor([PROMPT])).logits[0, -1].numpy() for either in (model, plain))
    for logits in (
        GraphRunner(exported.path, [[0, 1]], oracle=True).step([PROMPT])[0, 0],
        Session(OrtExecutor(exported.path), max_seq_len=64).append([PROMPT])[0].numpy(),
    ):
        np.testing.assert_allclose(logits.reshape(-1), expected, rtol=0, atol=1e-3)
    assert np.abs(before - expected).max() > 0.1


def test_is_an_eighth_of_float32(exported: ExportedModel) -> None:
    values = sum(weight.numel() for weight in dequantized(exported).values())
    described = describe(exported.path)
    others = sum(parameter.numel() for name, parameter in tiny_llama(**SIZES).named_parameters() if "_proj" not in name)
    assert described.parameters is not None
    assert described.parameters.count == values + others
    assert described.parameters.size == values // 2 + 4 * others
    assert described.layers["DequantizeLinear"] == 7


@pytest.mark.parametrize("strip", [False, True])
def test_plan(exported: ExportedModel, strip: bool) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    plan = exported.path.with_name(f"{strip}.plan")
    described = build_engine(exported.path, plan, compute_capabilities=["8.9"], max_seq_len=128, strip_weights=strip)
    assert len(described.plugin_layers) == 1
    assert described.layers["DEQUANTIZE"] == 7
    assert {tensor.name for tensor in described.bound} == (
        {"model.embed_tokens.weight", "lm_head.weight_transposed"} if strip else set()
    )


def test_blocks() -> None:
    assert int4.block_size("a.q_proj.weight", (8, 4096)) == 128
    assert int4.block_size("a.q_proj.weight", (8, 576)) == 64
    assert int4.block_size("a.q_proj.weight", (8, 96)) == 32
    for name, shape in (("a.q_proj.weight", (8, 48)), ("a.norm.weight", (128,)), ("lm_head.weight", (9, 128)),
                        ("model.embed_tokens.weight", (9, 128))):
        assert int4.block_size(name, shape) is None
    assert int4.quantized_size((10, 128), 64, torch.float16) == 640 + 20 * 2


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work."""
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EnvironmentProblem, match=r"Model Optimizer cannot be imported: .*pip install nvidia-modelopt"):
        export_onnx("/no/such/model", tmp_path / "out", quantize="int4")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"quantize: 'fp8' is not allowed; it must be one of int4"):
        export_onnx("/no/such/model", tmp_path / "out", quantize="fp8")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"no linear layer of the model has inputs in blocks of 32"):
        int4.quantized_parameters({"a.q_proj.weight": (8, 48)})
