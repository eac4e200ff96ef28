"""The CUDA kernels of decode, version 2, on a GPU: everything that the emulation shows, and what only a GPU and real
sizes can."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from decode_cases import Case, make_inputs, named
from decode_checks import (
    KERNEL_GRID,
    OFF_BY_ONE,
    WIDE_GRID,
    assert_agrees,
    check,
    every_type,
    run,
    settings,
    wide,
)
from torch import Tensor

from hip_trt.decode_library import INPUTS, DecodeLibrary
from hip_trt.library import plugin_path
from hip_trt.reference.decode import DecodeConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LIBRARY = "HIP_TRT_LIBRARY"
"""Environment variable that names a library of these kernels; the installed one if it is not set."""


@pytest.fixture(scope="module")
def library() -> DecodeLibrary:
    return DecodeLibrary(os.environ.get(LIBRARY) or plugin_path())


def llama(past: tuple[int, ...], new: tuple[int, ...], name: str, **fields: object) -> Case:
    return replace(Case(past, new, name, config=DecodeConfig(), page_size=64, heads=(32, 8), head_dim=128,
                        dtype=torch.bfloat16, values="real"), **fields)  # type: ignore[arg-type]


REAL_SIZES = [
    llama((40000, 9000, 70001), (1, 1, 1), "Llama"),
    llama((40000, 9000, 70001), (1, 4, 8), "Llama, rows"),
    llama((40000, 9000, 70001), (1, 1, 1), "Llama, reuse", blocks="kept", refresh=(0, 0, 0)),
    llama((40000, 12000), (3, 1), "Llama, masks of query heads", mask_heads="query"),
    llama((40000,), (1,), "Llama, float32", dtype=torch.float32),
    llama((70000,), (2,), "SmolLM", heads=(9, 3), head_dim=64, dtype=torch.float16),
    llama((12000,) * 24, (1,) * 24, "Llama, many sequences", heads=(8, 2)),
]


@pytest.mark.parametrize("case", every_type(WIDE_GRID + KERNEL_GRID + OFF_BY_ONE), ids=str)
def test_agrees_with_reference(library: DecodeLibrary, case: Case) -> None:
    check(library, case, "cuda", alias=case.dtype == torch.float16)


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(library: DecodeLibrary, case: Case) -> None:
    check(library, case, "cuda")


@pytest.mark.parametrize("case", [*REAL_SIZES[:3], wide(named("ragged"), head_dim=64, dtype=torch.float16)], ids=str)
def test_repeats_give_the_same_bits(library: DecodeLibrary, case: Case) -> None:
    inputs = make_inputs(case)
    first = run(library, case, inputs, "cuda")
    for _ in range(19):
        for tensor, other in zip(first, run(library, case, inputs, "cuda"), strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


class Call:
    """One call on tensors that stay where they are, results on the past tensors."""

    def __init__(self, library: DecodeLibrary, case: Case) -> None:
        self.library, self.settings = library, settings(case)
        given = make_inputs(case)
        self.tensors: dict[str, Tensor] = {name: given[name].cuda() for name in INPUTS}
        for name in ("key", "value", "bounds", "codes"):
            self.tensors[f"present_{name}"] = self.tensors[f"past_{name}"]
        self.tensors["present_blocks"] = torch.empty_like(self.tensors["past_blocks"])
        self.tensors["output"] = torch.empty_like(self.tensors["query"])
        size = library.workspace_size(
            self.settings, *(self.tensors[name] for name in ("query", "past_key", "page_table")))
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.library.decode(self.tensors, self.settings, self.workspace, torch.cuda.current_stream().cuda_stream)
        return self.tensors["output"], self.tensors["present_blocks"]


def test_one_graph_searches_and_reuses(library: DecodeLibrary) -> None:
    """What a call does follows from numbers in GPU memory; steps follow one another in one graph."""
    call = Call(library, llama((40000, 20000), (1, 1), "graph", blocks="kept"))
    expected = []
    for refresh in (1, 0):
        call.tensors["refresh_mask"].fill_(refresh)
        expected.append([tensor.clone() for tensor in call()])
    assert not torch.equal(expected[0][1], expected[1][1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            call()
    for refresh in (0, 1, 1, 0):
        call.tensors["refresh_mask"].fill_(refresh)
        call.tensors["output"].fill_(float("nan"))
        graph.replay()
        for tensor, other in zip((call.tensors["output"], call.tensors["present_blocks"]), expected[1 - refresh],
                                 strict=True):
            assert torch.equal(tensor, other)


def test_steps_read_what_the_step_before_wrote(library: DecodeLibrary) -> None:
    """Kernels of a step start before the step before has ended; a second layer reads the output of the first."""
    case = llama((30000,), (1,), "chain", heads=(8, 8))
    call = Call(library, case)
    first, _ = call()
    query = call.tensors["query"].clone()
    call.tensors["query"].copy_(first)
    second = call()[0].clone()
    for _ in range(20):
        call.tensors["query"].copy_(query)
        call()
        call.tensors["query"].copy_(call.tensors["output"])
        assert torch.equal(call()[0], second)


def test_two_streams_at_once(library: DecodeLibrary) -> None:
    cases = [llama((30000,), (1,), "one"), llama((9000, 40000), (2, 3), "other")]
    alone = [Call(library, case)()[0].clone() for case in cases]
    calls, streams = [Call(library, case) for case in cases], [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                call()
    torch.cuda.synchronize()
    for call, expected in zip(calls, alone, strict=True):
        assert torch.equal(call.tensors["output"], expected)


def test_a_million_tokens(library: DecodeLibrary) -> None:
    case = llama(((1 << 20) - 1,), (1,), "a million tokens", heads=(4, 1))
    inputs = make_inputs(case)
    assert_agrees(case, inputs, run(library, case, inputs, "cuda", alias=True))
