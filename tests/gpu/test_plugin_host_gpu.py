"""The plugin's enqueue on a GPU, through TensorRT's interfaces, on a stream and in CUDA graphs, against the reference.

Once with no TensorRT, and once for each that is installed (or named by HIP_TRT_TENSORRT), whose plugin registry then
loads the library. ``pip install tensorrt-lean-cu13-libs==11.4.0.106`` brings one that runs on Hopper.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decode_cluster_cases import DECODE_GRID
from kernel_checks import KERNEL_GRID, TYPES, check, every_type, renumber_pages, rotated_types, run, same_bits
from kernel_v2_checks import check_chain
from operator_cases import GRID, Case, make_inputs, named
from plugin_host import HostedPlugin, find_host, hosted, tensorrt_libraries, tensorrt_name
from v2_chains import GRID as CHAINS
from v2_chains import Chain
from v2_chains import rotated_types as rotated_chains

from hip_trt import library as binding
from hip_trt.config import HipConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LLAMA = HipConfig()
LLAMA_CASES = tuple(
    Case(past, new, name, **{"config": LLAMA, "heads": (32, 8), "head_dim": 128, **fields})
    for past, new, name, fields in (
        ((0,), (2500,), "prefill", {}),
        ((9000, 3000), (200, 130), "ragged chunk", {}),
        ((6000,), (300,), "mask per query head, chunk", {"config": LLAMA.replace(mask_heads="query")}),
        ((20000, 1000, 0, 9000), (1, 1, 0, 1), "ragged decode", {"new_tokens": 1}),
        ((20000, 9000), (1, 1), "reuse", {"nodes": "mixed", "refresh": False}),
        ((20000, 9000), (1, 1), "the paper's reuse",
         {"nodes": "kept", "refresh": False, "config": LLAMA.replace(branch=2, leaf_branch=2, reuse_level=0)}),
        ((9000,), (1,), "mask per query head, decode", {"config": LLAMA.replace(mask_heads="query")}),
        ((3000, 12000), (70, 64), "head size 64, chunk", {"heads": (9, 3), "head_dim": 64}),
        ((3000, 12000), (1, 1), "head size 64, decode", {"heads": (9, 3), "head_dim": 64}),
        ((4000,), (1,), "dense decode", {"dense": True}),
    )
)
"""The default configuration at Llama-3.1-8B's heads, and SmolLM2's."""


@pytest.fixture(scope="module", params=tensorrt_libraries(), ids=tensorrt_name)
def plugin(request: pytest.FixtureRequest) -> Iterator[HostedPlugin]:
    path = os.environ.get("HIP_TRT_LIBRARY") or binding.plugin_path()
    yield from hosted(find_host(), Path(path), request.param)


@pytest.fixture(scope="module", params=tensorrt_libraries(), ids=tensorrt_name)
def plugin_v2(request: pytest.FixtureRequest) -> Iterator[HostedPlugin]:
    path = os.environ.get("HIP_TRT_LIBRARY") or binding.plugin_path()
    yield from hosted(find_host(), Path(path), request.param, 2)


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("chain", rotated_chains(CHAINS), ids=str)
def test_version_2_agrees_with_reference(plugin_v2: HostedPlugin, chain: Chain, alias: bool) -> None:
    check_chain(plugin_v2, chain, "cpu", alias=alias, chosen=False)


@pytest.mark.parametrize("case", [
    *rotated_types(GRID + KERNEL_GRID), *(replace(case, name=f"decode: {case}") for case in DECODE_GRID),
], ids=str)
def test_agrees_with_reference(plugin: HostedPlugin, case: Case) -> None:
    check(plugin, case, "cpu", chosen=False)


@pytest.mark.parametrize("case", every_type(LLAMA_CASES), ids=str)
def test_real_sizes(plugin: HostedPlugin, case: Case) -> None:
    """Also with present on past, which must not change a bit."""
    aliased = check(plugin, case, "cpu", alias=True, chosen=False)
    aliased.assert_same_bits(run(plugin, case, make_inputs(case), "cpu", chosen=False))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "idle keeps nodes", "the paper's reuse"])
def test_present_on_past(plugin: HostedPlugin, name: str, dtype: torch.dtype) -> None:
    check(plugin, replace(named(name), dtype=dtype), "cpu", alias=True, chosen=False)


@pytest.mark.parametrize("name", ["ragged", "every start level at once", "shared prefix"])
def test_pages_may_be_anywhere(plugin: HostedPlugin, name: str) -> None:
    case = replace(named(name), dtype=torch.bfloat16)
    inputs = make_inputs(case)
    here, there = (run(plugin, case, given, "cpu", chosen=False) for given in (inputs, renumber_pages(inputs, 1)))
    assert same_bits(here.output, there.output)
    assert same_bits(here.present_nodes, there.present_nodes)
