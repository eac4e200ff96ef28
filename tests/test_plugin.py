"""The TensorRT plugin: through TensorRT's interfaces with no TensorRT, and in the registry of a real one."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import onnx
import pytest
import torch
from decode_cluster_cases import decode_case
from kernel_checks import check, rotated_types, run
from kernel_v2_checks import check_chain
from onnx import TensorProto, helper
from operator_cases import Case, make_inputs, named
from plugin_host import (
    HostedPlugin,
    build_emulated,
    find_host,
    hosted,
    tensorrt_headers,
    tensorrt_libraries,
    tensorrt_name,
)
from v2_chains import Chain
from v2_chains import named as named_chain
from v2_chains import rotated_types as rotated_chains

from hip_trt import library
from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.config_v2 import HipConfigV2
from hip_trt.errors import EngineError, HipTrtError, PluginError
from hip_trt.spec import require_format
from hip_trt.tensorrt_flavour import Flavour, find_flavour

ROOT = Path(__file__).parents[1]
CONFIG = HipConfig(page_size=32)
CONFIG_V2 = HipConfigV2(page_size=32, decode_block_k=16, decode_mask_k=512, decode_search_k=2048)


@dataclass(frozen=True)
class Version:
    """A version of the operator, as the plugin's creator of that version knows it."""

    number: int
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: dict[str, str]
    """The input whose type and shape each has."""


VERSIONS = [
    Version(1, names.attributes(CONFIG, scale=0.125), names.INPUTS,
            dict(zip(names.OUTPUTS, ("query", "past_key", "past_value", "past_nodes"), strict=True))),
    Version(2, names.attributes_v2(CONFIG_V2, scale=0.125), names.INPUTS_V2, {"output": "query", **names.STATE_V2}),
]
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: f"version {version.number}")


@pytest.fixture(scope="module")
def plugin_path() -> Path:
    try:
        return library.plugin_path()
    except PluginError:
        pytest.skip("hip-trt was installed without the plugin")


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    try:
        return find_flavour()
    except HipTrtError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def creators(flavour: Flavour, plugin_path: Path) -> Iterator[dict[int, Any]]:
    """The plugin's creators by version, found as the ONNX parser finds them: by name, version and no namespace."""
    flavour.load_plugin(plugin_path)
    builder = flavour.module.Builder(flavour.logger)  # with it TensorRT has a logger
    registry = flavour.module.get_plugin_registry()
    yield {version.number: registry.get_creator(names.OP_TYPE, str(version.number), "") for version in VERSIONS}
    del builder


# The library alone


def symbols(path: Path, *options: str) -> list[str]:
    output = subprocess.run(["nm", "--dynamic", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].partition("@")[0] for line in output.splitlines()]


def test_library_shows_its_interfaces_only(plugin_path: Path) -> None:
    headers = "".join((ROOT / "plugins" / "cuda" / name).read_text()
                      for name in ("hip_attention.h", "hip_attention_v2.h", "hip_offload.h"))
    declared = set(re.findall(r"^HIP_TRT_API .*?(hipTrt\w+)\(", headers, re.MULTILINE))
    assert len(declared) >= 13
    assert set(symbols(plugin_path, "--defined-only")) == declared | {"getCreators", "setLoggerFinder"}


def test_library_needs_no_tensorrt_and_no_cuda(plugin_path: Path) -> None:
    needed = subprocess.run(["readelf", "-d", str(plugin_path)], check=True, capture_output=True, text=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[([^]]+)\.so", needed))
    assert libraries <= {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}
    assert not [name for name in symbols(plugin_path, "--undefined-only") if name.startswith(("cuda", "cu", "nvinfer"))]


# Through TensorRT's interfaces, with no TensorRT, or loaded by the plugin registry of each that is installed


@each_version
@pytest.mark.parametrize("tensorrt", tensorrt_libraries(), ids=tensorrt_name)
def test_interfaces_without_a_gpu(plugin_path: Path, tensorrt: Path | None, version: Version) -> None:
    options = [*(["--tensorrt", tensorrt] if tensorrt else []), "--operator", str(version.number)]
    done = subprocess.run([find_host(), *options, plugin_path, "interfaces"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^interfaces: \d{3,} checks, 0 failed$", done.stdout, re.MULTILINE)
    assert "HipAttention" not in done.stderr  # every message went to the logger


def emulate(tensorrt: Path | None, version: int) -> Iterator[HostedPlugin]:
    if emulated.compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    host, path = build_emulated(tensorrt_headers(find_host()))
    yield from hosted(host, path, tensorrt, version)


@pytest.fixture(scope="module", params=tensorrt_libraries(), ids=tensorrt_name)
def emulated_plugin(request: pytest.FixtureRequest) -> Iterator[HostedPlugin]:
    yield from emulate(request.param, 1)


@pytest.fixture(scope="module", params=tensorrt_libraries(), ids=tensorrt_name)
def emulated_v2(request: pytest.FixtureRequest) -> Iterator[HostedPlugin]:
    yield from emulate(request.param, 2)


CALLS = (
    "first token", "long prefill", "chunk from inside a block", "ragged", "idle rows in prefill", "idle row in decode",
    "all rows idle", "dense", "dense decode", "shared prefix", "every start level at once", "reuse and search at once",
    "idle keeps nodes", "mask per query head", "mask per query head, decode", "the paper's tree", "the paper's reuse",
    "blocks: prefill", "blocks: decode", "blocks: reuse",
)


@pytest.mark.parametrize("case", [
    *rotated_types(tuple(named(name) for name in CALLS)),
    *map(decode_case, ("head_dim 128, bfloat16", "reuse and search at once", "the paper's reuse")),
], ids=str)
def test_enqueue_agrees_with_reference(emulated_plugin: HostedPlugin, case: Case) -> None:
    check(emulated_plugin, case, "cpu", chosen=False)


@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "idle keeps nodes", "the paper's reuse"])
def test_enqueue_with_present_on_past(emulated_plugin: HostedPlugin, name: str) -> None:
    check(emulated_plugin, replace(named(name), dtype=torch.float16), "cpu", alias=True, chosen=False)


CHAINS = (
    "prefill, decode, prefill", "chunks of one token", "idle keeps blocks in prefill", "all idle", "tokens taken back",
    "dense", "mask per query head", "NaN key", "head size 64, heads (4, 1)", "head size 128, heads (3, 3)",
)


@pytest.mark.parametrize("chain", rotated_chains(tuple(named_chain(name) for name in CHAINS)), ids=str)
def test_version_2_agrees_with_reference(emulated_v2: HostedPlugin, chain: Chain) -> None:
    check_chain(emulated_v2, chain, "cpu", chosen=False)


@pytest.mark.parametrize("name", CHAINS[:5])
def test_version_2_with_present_on_past(emulated_v2: HostedPlugin, name: str) -> None:
    check_chain(emulated_v2, replace(named_chain(name), dtype=torch.float16), "cpu", alias=True, chosen=False)


def test_host_sees_a_call_that_fails(emulated_plugin: HostedPlugin) -> None:
    case = named("ragged")
    with pytest.raises(AssertionError, match="stride_q: 3 is not allowed"):
        run(emulated_plugin, replace(case, config=case.config.model_copy(update={"stride_q": 3})), make_inputs(case),
            "cpu", chosen=False)


# In TensorRT's registry


@each_version
def test_creator_asks_for_every_attribute(flavour: Flavour, creators: dict[int, Any], version: Version) -> None:
    creator = creators[version.number]
    types = {int: flavour.module.PluginFieldType.INT32, float: flavour.module.PluginFieldType.FLOAT32,
             str: flavour.module.PluginFieldType.CHAR}
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (
        names.OP_TYPE, str(version.number), "")
    advertised = {field.name: field.type for field in creator.field_names}
    assert advertised == {name: types[type(value)] for name, value in version.attributes.items()}


def create(flavour: Flavour, creator: Any, fields: dict[str, Any], phase: str = "BUILD") -> tuple[Any, list[str]]:
    """A plugin or None, and the errors that TensorRT's logger was told."""
    trt = flavour.module
    types = {str: trt.PluginFieldType.CHAR, int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
    arrays = {name: as_array(value) for name, value in fields.items()}  # a PluginField only points to its array
    collection = trt.PluginFieldCollection(
        [trt.PluginField(name, arrays[name], types[type(value)]) for name, value in fields.items()]
    )
    with flavour.messages() as log:
        plugin = creator.create_plugin("layer", collection, getattr(trt.TensorRTPhase, phase))
    return plugin, log.errors


def as_array(value: str | int | float) -> np.ndarray:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.int8)
    return np.array([value], np.int32 if isinstance(value, int) else np.float32)


@each_version
def test_good_fields(flavour: Flavour, creators: dict[int, Any], version: Version) -> None:
    plugin, errors = create(flavour, creators[version.number], version.attributes)
    assert plugin is not None
    assert errors == []


BOTH = [
    ({"mask_k": 1000}, "mask_k: 1000 is not allowed; it must be a multiple of block_k (16)"),
    ({"decode_mask_k": -16}, "decode_mask_k: -16 is not allowed"),
    ({"block_q": 48}, "block_q: 48 is not allowed; it must be a power of two"),
    ({"block_k": 1}, "block_k: 1 is not allowed"),
    ({"stride_q": 3}, "stride_q: 3 is not allowed; it must be a divisor of block_q (64)"),
    ({"stride_k": 0}, "stride_k: 0 is not allowed"),
    ({"branch": 17}, "branch: 17 is not allowed"),
    ({"leaf_branch": 1}, "leaf_branch: 1 is not allowed"),
    ({"sink_tokens": -1}, "sink_tokens: -1 is not allowed"),
    ({"window_tokens": 0}, "window_tokens: 0 is not allowed"),
    ({"dense": 7}, "dense: 7 is not allowed"),
    ({"mask_heads": "all"}, "mask_heads: 'all' is not allowed; it must be 'kv' or 'query'"),
    ({"scale": float("nan")}, "scale: nan is not allowed"),
    ({"scale": 1}, "scale: 1 value(s) int32 are not allowed; it must be one float32"),
    ({"mask_k": None}, "mask_k: is missing"),
    ({"tile": 3}, "tile: no such field"),
]


@pytest.mark.parametrize(("version", "changes", "message"), [
    *((version, *bad) for version in VERSIONS for bad in BOTH),
    (VERSIONS[0], {"reuse_level": -1}, "reuse_level: -1 is not allowed"),
    (VERSIONS[0], {"page_size": 40}, "page_size: 40 is not allowed; it must be a multiple of block_k (16)"),
    (VERSIONS[1], {"page_size": 40}, "page_size: 40 is not allowed; it must be a multiple of decode_block_k (16)"),
    (VERSIONS[1], {"decode_search_k": 256}, "decode_search_k: 256 is not allowed; it must be 512 to"),
    (VERSIONS[1], {"decode_block_k": 8}, "decode_block_k: 8 is not allowed"),
    (VERSIONS[1], {"reuse_level": 1}, "reuse_level: no such field"),
])
def test_bad_fields(
    flavour: Flavour, creators: dict[int, Any], version: Version, changes: dict[str, Any], message: str
) -> None:
    fields = {name: value for name, value in {**version.attributes, **changes}.items() if value is not None}
    plugin, errors = create(flavour, creators[version.number], fields)
    assert plugin is None
    assert len(errors) == 1
    assert errors[0].startswith(f"HipAttention (layer): {message}")


@each_version
def test_every_bad_field_is_named(flavour: Flavour, creators: dict[int, Any], version: Version) -> None:
    _, errors = create(flavour, creators[version.number], {"tile": 3})
    assert len(errors) == len(version.attributes) + 1


@each_version
def test_engine_of_another_version(flavour: Flavour, creators: dict[int, Any], version: Version) -> None:
    """What decides is the operator's version, not hip-trt's."""
    stored = {**version.attributes, "hip_trt_version": "0.0.7", "operator_version": version.number}
    plugin, errors = create(flavour, creators[version.number], stored, "RUNTIME")
    assert plugin is not None
    assert errors == []


@pytest.mark.parametrize("format_version", [names.OP_VERSION + 1, None])
@pytest.mark.parametrize("built_by", ["0.0.7", ""])
def test_engine_of_another_format(
    flavour: Flavour, creators: dict[int, Any], format_version: int | None, built_by: str
) -> None:
    """It is refused in the words in which its description would be; engines of early versions say neither."""
    stored = {"operator_version": format_version, "hip_trt_version": built_by, "of_another_version": 1}
    plugin, errors = create(flavour, creators[1], {name: value for name, value in stored.items() if value}, "RUNTIME")
    with pytest.raises(EngineError) as refused:
        require_format("HipAttention (layer)", format_version, built_by)
    assert plugin is None
    assert errors == [str(refused.value)]


def test_engine_of_version_1_is_none_of_version_2(flavour: Flavour, creators: dict[int, Any]) -> None:
    stored = {**VERSIONS[1].attributes, "hip_trt_version": "0.0.7", "operator_version": 1}
    plugin, errors = create(flavour, creators[2], stored, "RUNTIME")
    assert plugin is None
    assert "in format 1; this is hip-trt" in errors[0]
    assert ", which reads format 2." in errors[0]


def test_lean_runtime_hands_out_the_capabilities(plugin_path: Path) -> None:
    """TensorRT 11 proper, where its lean runtime is installed (tensorrt-lean-cu13); it needs no GPU for this."""
    if importlib.util.find_spec("tensorrt_lean") is None:
        pytest.skip("tensorrt-lean is not installed")
    program = Path(__file__).with_name("tensorrt_lean_registry.py")
    done = subprocess.run([sys.executable, program, plugin_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["creator"] == told["plugin"] == [names.OP_TYPE, "1", ""]
    assert told["fields"] == sorted(VERSIONS[0].attributes)
    assert told["kinds"] == [
        ["IPluginV3OneCore", "PLUGIN_V3ONE_CORE", 1], ["IPluginV3OneBuildV2", "PLUGIN_V3ONE_BUILD", 2],
        ["IPluginV3OneRuntime", "PLUGIN_V3ONE_RUNTIME", 1],
    ]
    assert told["outputs"] == len(names.OUTPUTS)
    assert "page_size=32 " in told["description"]


# In an engine


def build_engine(
    flavour: Flavour, dtype: int, version: Version = VERSIONS[0], head_dim: int = 64,
    kinds: tuple[int, int, int] = (1, 1, 1), **attributes: Any,
) -> tuple[bytes | None, list[str]]:
    """An engine of one layer for compute capability 8.0, and TensorRT's errors.

    ``kinds``: least, usual and largest size of call_kind.
    """
    trt, page = flavour.module, CONFIG.page_size
    shapes: dict[str, tuple[int, list[Any]]] = {
        "query": (dtype, ["B", 4, "S", head_dim]),
        "key": (dtype, ["B", 2, "S", head_dim]),
        "value": (dtype, ["B", 2, "S", head_dim]),
        "past_key": (dtype, ["P", 2, page, head_dim]),
        "past_value": (dtype, ["P", 2, page, head_dim]),
        "page_table": (TensorProto.INT32, ["B", "M"]),
        "past_lengths": (TensorProto.INT32, ["B"]),
        "query_lengths": (TensorProto.INT32, ["B"]),
        "past_nodes": (TensorProto.INT32, ["B", 2, CONFIG.decode_mask_blocks]),
        "past_bounds": (dtype, ["P", 2, page // CONFIG_V2.decode_block_k, 2, head_dim]),
        "past_codes": (TensorProto.INT32, ["P", 2, page, head_dim // 16]),
        "past_blocks": (TensorProto.INT32, ["B", 2, CONFIG_V2.decode_mask_blocks]),
        "refresh_mask": (TensorProto.INT32, [1] if version.number == 1 else ["B"]),
        "call_kind": (TensorProto.INT32, ["kind"]),
    }
    attributes = {**version.attributes, **attributes}
    if version.number != 1:
        attributes["plugin_version"] = str(version.number)  # which creator the parser asks for
    node = helper.make_node(
        names.OP_TYPE, version.inputs, list(version.outputs), name="layer", domain=names.DOMAIN,
        **{name: value for name, value in attributes.items() if value is not None},
    )
    graph = helper.make_graph(
        [node], "graph", [helper.make_tensor_value_info(name, *shapes[name]) for name in version.inputs],
        [helper.make_tensor_value_info(name, *shapes[alike]) for name, alike in version.outputs.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(names.DOMAIN, names.OP_VERSION)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports)
    with flavour.messages() as log:
        builder = trt.Builder(flavour.logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, flavour.logger)
        if not parser.parse(model.SerializeToString()):
            return None, log.errors
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM80, 0)
        profile = builder.create_optimization_profile()
        rows = (1, 1, 8) if kinds[0] == names.DECODE else (1, 16, 128)
        ranges = {"B": (1, 2, 4), "S": rows, "P": (1, 8, 64), "M": (1, 4, 16), "kind": kinds}
        for name in version.inputs:
            sizes = shapes[name][1]
            profile.set_shape(name, *([ranges.get(size, (size,) * 3)[i] for size in sizes] for i in range(3)))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        return None if engine is None else bytes(engine), log.errors


@pytest.fixture(scope="module")
def ahead_of_time(flavour: Flavour, creators: dict[int, Any]) -> Flavour:
    if not flavour.ahead_of_time:
        pytest.skip("builds for a GPU of another kind need TensorRT-RTX")
    return flavour


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
@pytest.mark.parametrize(("version", "kinds"), [
    (VERSIONS[0], (1, 1, 1)), (VERSIONS[1], (1, 1, 1)), (VERSIONS[1], (2, 2, 2)), (VERSIONS[1], (1, 2, 2)),
], ids=("version 1", "prefill", "decode", "both"))
def test_engine_keeps_the_layer(
    ahead_of_time: Flavour, dtype: int, version: Version, kinds: tuple[int, int, int]
) -> None:
    engine, errors = build_engine(ahead_of_time, dtype, version, kinds=kinds)
    assert errors == []
    assert engine is not None
    assert b"hip_trt_version" in engine
    assert library.version().encode() in engine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 60}, "head_dim: 60 is not supported"),
        ({"page_size": 64}, "past_key: shape [64, 2, 32, 64] is not allowed; it must be [P, Hkv, page_size, D], "
         "where page_size is 64"),
        ({"mask_heads": "query"}, "past_nodes: shape [4, 2, 32] is not allowed; it must be [B, Hm, Kd], where Hm is 4"),
        ({"mask_k": 1 << 22}, "mask_k: 4194304 is not supported"),
        ({"branch": 1}, "branch: 1 is not allowed"),
        ({"branch": None}, "branch: is missing"),
    ],
)
def test_unsupported_layers_are_refused_at_build_time(
    ahead_of_time: Flavour, changes: dict[str, Any], message: str
) -> None:
    engine, errors = build_engine(ahead_of_time, TensorProto.FLOAT16, **changes)
    assert engine is None
    assert errors[0].startswith(f"HipAttention (layer): {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 144}, "head_dim: 144 is not supported; it must be a multiple of 8, at most 128"),
        ({"decode_block_k": 32}, "past_bounds: shape [64, 2, 2, 2, 64] is not allowed; it must be [P, Hkv, page_size / "
         "decode_block_k, 2, D], where page_size / decode_block_k is 1"),
        ({"decode_mask_k": 256}, "past_blocks: shape [4, 2, 32] is not allowed; it must be [B, Hm, K], where K is 16"),
        ({"kinds": (3, 3, 3)}, "call_kind: shape [3] is not allowed; it must be [1] or [2]"),
        ({"decode_search_k": None}, "decode_search_k: is missing"),
    ],
)
def test_unsupported_layers_of_version_2_are_refused_at_build_time(
    ahead_of_time: Flavour, changes: dict[str, Any], message: str
) -> None:
    engine, errors = build_engine(ahead_of_time, TensorProto.FLOAT16, VERSIONS[1], **changes)
    assert engine is None
    assert errors[0].startswith(f"HipAttention (layer): {message}")
