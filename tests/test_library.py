"""hip_trt.library: the plugin library's ABI, its versions, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from operator_cases import SMALL, make_inputs, named

from hip_trt import decode_library as decode_binding
from hip_trt import library as binding
from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, PluginError, RuntimeInputError
from hip_trt.library import Library, Shape

LLAMA = Shape(torch.bfloat16, 32, 8, 128)
CALL = replace(LLAMA, batch=2, new_tokens=64, num_pages=64, pages_per_sequence=32)


@pytest.fixture(scope="module", params=["installed", "emulated"])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "emulated":
        if emulated.compiler() is None:
            pytest.skip("the kernels are emulated with a C++ compiler")
        return emulated.EmulatedLibrary(emulated.build())
    try:
        path = binding.plugin_path()
    except PluginError:
        pytest.skip("hip-trt was installed without the plugin")
    return Library(path)


def unchecked(**fields: Any) -> HipConfig:
    """A configuration that HipConfig itself may refuse."""
    return HipConfig.model_construct(**{**HipConfig().model_dump(), **fields})


def test_structs_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    structs = {"HipTrtConfig": binding.ConfigStruct, "HipTrtShape": decode_binding.ShapeStruct,
               "HipTrtParams": binding.ParamsStruct, "HipTrtV2Config": decode_binding.ConfigV2Struct,
               "HipTrtV2Params": decode_binding.ParamsV2Struct}
    facts = ['"abi", (long)HIP_TRT_ABI_VERSION', '"operator", (long)HIP_TRT_OPERATOR_VERSION',
             '"cuda_error", (long)HIP_TRT_CUDA_ERROR', '"operator v2", (long)HIP_TRT_V2_OPERATOR_VERSION',
             '"any", (long)HIP_TRT_ANY_CALL', '"prefill", (long)HIP_TRT_PREFILL', '"decode", (long)HIP_TRT_DECODE',
             '"float16", (long)HIP_TRT_FLOAT16', '"bfloat16", (long)HIP_TRT_BFLOAT16',
             '"float32", (long)HIP_TRT_FLOAT32']
    expected = {"abi": binding.ABI_VERSION, "operator": names.OP_VERSION, "cuda_error": binding._CUDA_ERROR,
                "operator v2": names.OP_VERSION_V2, "any": decode_binding.ANY_CALL, "prefill": names.PREFILL,
                "decode": names.DECODE,
                **{str(dtype)[6:]: number for dtype, number in decode_binding.TYPES.items()}}
    for name, struct in structs.items():
        facts.append(f'"{name}", (long)sizeof({name})')
        expected[name] = ctypes.sizeof(struct)
        for field in struct._fields_:
            facts.append(f'"{name}.{field[0]}", (long)offsetof({name}, {field[0]})')
            expected[f"{name}.{field[0]}"] = getattr(struct, field[0]).offset
    lines = "\n".join(f'    printf(", \\"%s\\": %ld", {fact});' for fact in facts)
    source = tmp_path / "facts.cpp"
    source.write_text(
        f'#include "hip_attention_v2.h"\n#include <stddef.h>\n#include <stdio.h>\n'
        f'int main()\n{{\n    printf("{{\\"\\": 0");\n{lines}\n    printf("}}");\n}}\n', encoding="utf-8",
    )
    program = tmp_path / "facts"
    subprocess.run([compiler, f"-I{emulated.EMULATION}", f"-I{emulated.PLUGINS / 'cuda'}", str(source), "-o",
                    str(program)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == {"": 0, **expected}


@pytest.mark.parametrize(("fields", "message"), [
    ({"mask_k": 0}, "mask_k: 0 is not allowed; it must be 1 to 4194304"),
    ({"decode_mask_k": -16}, "decode_mask_k: -16 is not allowed; it must be 1 to 4194304"),
    ({"block_q": 256}, "block_q: 256 is not allowed; it must be 1 to 128"),
    ({"block_q": 48}, "block_q: 48 is not allowed; it must be a power of two"),
    ({"block_k": 1}, "block_k: 1 is not allowed; it must be 2 to 128"),
    ({"block_k": 24}, "block_k: 24 is not allowed; it must be a power of two"),
    ({"stride_q": 0}, "stride_q: 0 is not allowed; it must be 1 to 128"),
    ({"stride_q": 3}, "stride_q: 3 is not allowed; it must be a divisor of block_q (64)"),
    ({"stride_k": 32}, "stride_k: 32 is not allowed; it must be a divisor of block_k (16)"),
    ({"branch": 1}, "branch: 1 is not allowed; it must be 2 to 16"),
    ({"leaf_branch": 17}, "leaf_branch: 17 is not allowed; it must be 2 to 16"),
    ({"reuse_level": 2}, "reuse_level: 2 is not allowed; it must be 0 to 1"),
    ({"page_size": 1}, "page_size: 1 is not allowed; it must be 2 to 4096"),
    ({"page_size": 72}, "page_size: 72 is not allowed; it must be a multiple of block_k (16)"),
    ({"mask_k": 100}, "mask_k: 100 is not allowed; it must be a multiple of block_k (16)"),
    ({"decode_mask_k": 8}, "decode_mask_k: 8 is not allowed; it must be a multiple of block_k (16)"),
    ({"sink_tokens": -1}, "sink_tokens: -1 is not allowed; it must be 0 to 1048576"),
    ({"window_tokens": 0}, "window_tokens: 0 is not allowed; it must be 1 to 1048576"),
    ({"mask_k": 1 << 17}, "mask_k: 131072 is not supported; with block_k 16, branch 4 and leaf_branch 16 a search "
     "level holds 131072 nodes, and at most 65536 are allowed"),
    ({"decode_mask_k": 1 << 16}, "decode_mask_k: 65536 is not supported; with block_k 16, branch 4 and leaf_branch 16 "
     "a search level holds 65568 nodes, and at most 65536 are allowed"),
])
def test_refuses_configurations(library: Library, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        library.validate(unchecked(**fields), LLAMA)
    assert error.value.cause == f"{message}."


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_kv_heads": 0}, "num_kv_heads: 0 is not allowed; it must be 1 to 65535"),
    ({"num_query_heads": 12}, "num_query_heads: 12 is not allowed; it must be a multiple of num_kv_heads (8)"),
    ({"num_kv_heads": 1}, "num_query_heads: 32 is not supported; it must be at most 16 times num_kv_heads (1)"),
    ({"head_dim": 256}, "head_dim: 256 is not supported; it must be a multiple of 8, at most 128"),
    ({"head_dim": 100}, "head_dim: 100 is not supported; it must be a multiple of 8, at most 128"),
    ({"head_dim": 0}, "head_dim: 0 is not supported; it must be a multiple of 8, at most 128"),
    ({"batch": 70000}, "batch: 70000 is not allowed; it must be 0 to 65535"),
    ({"new_tokens": -1}, "new_tokens: -1 is not allowed; it must be 0 to 4194304"),
    ({"num_pages": -1}, "num_pages: -1 is not allowed; it must be 0 to 2147483647"),
    ({"pages_per_sequence": 70000}, "pages_per_sequence: 70000 is not allowed; it must be 0 to 65536"),
    ({"dtype": torch.float64}, "type: torch.float64 is not supported; it must be float16, bfloat16 or float32"),
])
def test_refuses_shapes(library: Library, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        library.validate(HipConfig(), replace(LLAMA, **fields))
    assert error.value.cause == f"{message}."


def test_refuses_a_scale_that_is_not_finite(library: Library) -> None:
    with pytest.raises(ConfigError, match="scale: inf is not allowed; it must be finite"):
        library.validate(HipConfig(), LLAMA, scale=float("inf"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (16, 1), (1, 1)])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128])
def test_accepts(library: Library, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    library.validate(HipConfig(), Shape(dtype, *heads, head_dim))
    library.validate(HipConfig(mask_heads="query"), Shape(dtype, *heads, head_dim), dense=True)


def test_workspace_serves_smaller_calls(library: Library) -> None:
    config = HipConfig(decode_mask_k=4096)
    largest = library.workspace_size(config, CALL)
    for fields in ({"batch": 1}, {"new_tokens": 1}, {"new_tokens": 2}, {"num_pages": 1}, {"pages_per_sequence": 1}):
        assert 0 < library.workspace_size(config, replace(CALL, **fields)) <= largest
    assert library.workspace_size(config, replace(CALL, batch=64)) > largest


def test_workspace_needs_every_size(library: Library) -> None:
    with pytest.raises(ConfigError, match="a size is 0"):
        library.workspace_size(HipConfig(), LLAMA)
    with pytest.raises(ConfigError, match="head_dim: 100"):
        library.workspace_size(HipConfig(), replace(CALL, head_dim=100))


def test_refuses_a_missing_library(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"nowhere\.so: no such plugin library") as error:
        Library(tmp_path / "nowhere.so")
    assert error.value.remedy


def test_refuses_another_library(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    with pytest.raises(PluginError, match=r"other\.so: cannot be loaded"):
        Library(other)


def test_refuses_another_version(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.metadata, "version", lambda name: "9.9.9")
    with pytest.raises(PluginError, match=r"but the package is version 9\.9\.9"):
        type(library)(library.path)


def test_refuses_another_abi(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "ABI_VERSION", 2)
    with pytest.raises(PluginError, match="and ABI 1, but the package"):
        type(library)(library.path)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("key", lambda t: t[:, :, :-1].contiguous(), "key: shape"),
    ("past_key", lambda t: t.half(), "past_key: torch.float16"),
    ("past_nodes", lambda t: t.long(), "past_nodes: torch.int64"),
    ("page_table", lambda t: t.repeat(1, 2)[:, ::2], "page_table: torch.int32 on cpu, not contiguous"),
    ("value", lambda t: t.to("meta"), "value: torch.float32 on meta"),
])
def test_refuses_tensors(library: Library, name: str, change: Any, message: str) -> None:
    case = named("second chunk")
    inputs = make_inputs(case)
    with pytest.raises(RuntimeInputError, match=message):
        library.attention(**{**inputs, name: change(inputs[name])}, config=case.config, scale=1.0)


def test_refuses_a_workspace_that_is_too_small(library: Library) -> None:
    case = named("second chunk")
    with pytest.raises(PluginError, match="smaller than hipTrtWorkspaceSize"):
        emulated.EmulatedLibrary(library.path).attention(
            **make_inputs(case), config=SMALL, scale=1.0, workspace=torch.empty(256, dtype=torch.uint8)
        )


def test_names_the_cuda_error(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("second chunk")
    failing = emulated.EmulatedLibrary(library.path)
    monkeypatch.setattr(failing._functions, "hipTrtAttention", lambda *arguments: binding._CUDA_ERROR)
    monkeypatch.setattr(failing._functions, "hipTrtLastCudaError", lambda: b"cudaErrorNoKernelImageForDevice")
    with pytest.raises(PluginError, match="a CUDA call failed: cudaErrorNoKernelImageForDevice") as error:
        failing.attention(**make_inputs(case), config=case.config, scale=1.0)
    assert "HIP_TRT_CUDA_ARCHITECTURES" in error.value.remedy


def test_refuses_tensors_of_the_cpu() -> None:
    if emulated.compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    case = named("second chunk")
    with pytest.raises(RuntimeInputError, match="query: device cpu"):
        Library(emulated.build()).attention(**make_inputs(case), config=case.config, scale=1.0)
