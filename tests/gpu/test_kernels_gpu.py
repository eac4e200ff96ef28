"""The CUDA kernels on a GPU: everything that the emulation shows, and what only a GPU and real sizes can."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from chosen_blocks import chosen_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    KERNEL_GRID,
    TYPES,
    check,
    check_output,
    every_type,
    renumber_pages,
    run,
    same_bits,
)
from operator_cases import GRID, SMALL, Case, cases, make_inputs, named, reference

from hip_trt import library as binding
from hip_trt.config import HipConfig
from hip_trt.library import Library, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LIBRARY = "HIP_TRT_LIBRARY"
"""Environment variable that names the plugin library to test; the installed one if it is not set."""

LLAMA = HipConfig()
"""The defaults, with Llama-3.1-8B's 32 query heads on 8 and head size 128."""


@pytest.fixture(scope="module")
def library() -> Library:
    named_library = os.environ.get(LIBRARY)
    return Library(named_library) if named_library else binding.load()


def large(past: tuple[int, ...], new: tuple[int, ...], name: str, **fields: object) -> Case:
    return replace(Case(past, new, name, config=LLAMA, heads=(32, 8), head_dim=128), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", every_type(GRID + KERNEL_GRID), ids=str)
def test_agrees_with_reference(library: Library, case: Case) -> None:
    check(library, case, "cuda")


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([8, 24, 64, 120]), st.sampled_from(TYPES))
def test_agrees_with_reference_on_any_case(library: Library, case: Case, head_dim: int, dtype: torch.dtype) -> None:
    check(library, replace(case, head_dim=head_dim, dtype=dtype), "cuda")


@pytest.mark.parametrize("case", [
    large((9000, 3000), (200, 130), "Llama, chunk", dtype=torch.bfloat16),
    large((40000, 1000, 16384), (1, 1, 1), "Llama, decode", dtype=torch.bfloat16),
    large((40000, 1000, 16384), (1, 1, 1), "Llama, reuse", dtype=torch.bfloat16, nodes="kept", refresh=False),
    large((12000,), (1,), "Llama, decode, float32", dtype=torch.float32),
    large((0,), (2500,), "SmolLM prefill", heads=(9, 3), head_dim=64, dtype=torch.float16),
    large((6000,), (300,), "mask per query head", dtype=torch.float16, config=LLAMA.replace(mask_heads="query")),
    large((4000,), (700,), "dense chunk", dtype=torch.bfloat16, dense=True),
    large((100000,), (1,), "dense decode", dtype=torch.bfloat16, dense=True, heads=(4, 1)),
    Case((3000,), (400,), "more searches than sets of lists", heads=(2, 1), dtype=torch.float16,
         config=SMALL.replace(mask_k=400, block_k=2, decode_mask_k=400, block_q=1, stride_q=1, leaf_branch=16)),
], ids=str)
def test_real_sizes(library: Library, case: Case) -> None:
    check(library, case, "cuda")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "idle keeps nodes", "the paper's reuse"])
def test_present_on_past(library: Library, name: str, dtype: torch.dtype) -> None:
    case = replace(named(name), dtype=dtype)
    aliased = check(library, case, "cuda", alias=True)
    aliased.assert_same_bits(run(library, case, make_inputs(case), "cuda"))


@pytest.mark.parametrize("case", [
    large((5000,), (100,), "chunk", dtype=torch.bfloat16),
    large((30000, 700), (1, 1), "decode", dtype=torch.bfloat16),
    large((30000, 700), (1, 1), "reuse", dtype=torch.float16, nodes="kept", refresh=False),
    large((3000,), (70,), "float32", dtype=torch.float32),
], ids=str)
def test_repeats_give_the_same_bits(library: Library, case: Case) -> None:
    inputs = make_inputs(case)
    first = run(library, case, inputs, "cuda")
    for _ in range(19):
        first.assert_same_bits(run(library, case, inputs, "cuda"))


@pytest.mark.parametrize("name", ["ragged", "every start level at once", "shared prefix"])
def test_pages_may_be_anywhere(library: Library, name: str) -> None:
    case = replace(named(name), dtype=torch.bfloat16)
    inputs = make_inputs(case)
    here, there = (run(library, case, given, "cuda") for given in (inputs, renumber_pages(inputs, 1)))
    for result in ("output", "present_nodes", "chosen_blocks"):
        assert torch.equal(getattr(here, result), getattr(there, result)), result


def test_a_sequence_gets_the_same_bits_alone(library: Library) -> None:
    """In float32, which portable kernels compute; clusters split a sequence further where there is room."""
    case = large((20000, 500, 7000), (1, 1, 1), "company", dtype=torch.float32)
    inputs = make_inputs(case)
    together = run(library, case, inputs, "cuda")
    for b in range(3):
        alone = {name: tensor[b : b + 1].contiguous() if name in _PER_SEQUENCE else tensor
                 for name, tensor in inputs.items()}
        one = replace(case, past_lengths=case.past_lengths[b : b + 1], query_lengths=(1,))
        assert same_bits(run(library, one, alone, "cuda").output, together.output[b : b + 1])


_PER_SEQUENCE = {"query", "key", "value", "page_table", "past_lengths", "query_lengths", "past_nodes"}


def test_captured_in_a_graph(library: Library) -> None:
    """A captured decode step follows lengths, page table, nodes and refresh_mask as they change between replays."""
    case = large((30000, 700), (1, 1), "graph", dtype=torch.bfloat16, nodes="kept", refresh=False)
    steps = [case, replace(case, refresh=True, seed=1), replace(case, past_lengths=(29000, 3000), seed=2),
             replace(case, query_lengths=(0, 1), new_tokens=1, seed=3)]
    given = [make_inputs(step) for step in steps]
    sizes = {name: tuple(max(dims) for dims in zip(*(inputs[name].shape for inputs in given), strict=True))
             for name in given[0]}
    given = [{name: _padded(tensor, sizes[name]) for name, tensor in inputs.items()} for inputs in given]
    here = {name: tensor.cuda() for name, tensor in given[0].items()}
    shape = Shape(torch.bfloat16, 32, 8, 128, 2, 1, sizes["past_key"][0], sizes["page_table"][1])
    workspace = torch.empty(library.workspace_size(case.config, shape), dtype=torch.uint8, device="cuda")
    results = {"output": torch.empty_like(here["query"]), "present_key": here["past_key"],
               "present_value": here["past_value"], "present_nodes": torch.empty_like(here["past_nodes"])}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.attention(**here, config=case.config, scale=case.scale, workspace=workspace, **results)
    for step, inputs in zip(steps, given, strict=True):
        for name, tensor in inputs.items():
            here[name].copy_(tensor)
        workspace.fill_(0xFF)
        graph.replay()
        direct = run(library, step, inputs, "cuda")
        for name, tensor in results.items():
            assert same_bits(tensor.cpu(), getattr(direct, name)), (str(step.seed), name)


def _padded(tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    padded = tensor.new_full(sizes, -1)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def test_pool_beyond_32_bit_offsets(library: Library) -> None:
    """The same sequence at the end of a pool of more than 2^32 elements."""
    case = large((3000,), (70,), "far", dtype=torch.bfloat16, heads=(8, 8))
    inputs = make_inputs(case)
    expected = run(library, case, inputs, "cuda")
    pages = len(inputs["past_key"])
    far = (1 << 32) // inputs["past_key"][0].numel() + 1
    here = {name: tensor.cuda() for name, tensor in inputs.items()}
    for name in ("past_key", "past_value"):
        pool = torch.empty((far + pages, *inputs[name].shape[1:]), dtype=torch.bfloat16, device="cuda")
        pool[:far] = float("nan")
        pool[far:] = here[name]
        here[name] = pool
    here["page_table"] = torch.where(here["page_table"] < 0, here["page_table"], here["page_table"] + far)
    output, present_key, _, _ = library.attention(
        **here, config=case.config, scale=case.scale, present_key=here["past_key"], present_value=here["past_value"]
    )
    assert same_bits(output.cpu(), expected.output)
    assert same_bits(present_key[far:].cpu(), expected.present_key)


@pytest.mark.parametrize(("new_tokens", "refresh"), [(1, True), (1, False), (90, True)])
def test_four_million_tokens(library: Library, new_tokens: int, refresh: bool) -> None:
    past = (1 << 22) - 200
    case = Case((past,), (new_tokens,), heads=(4, 1), head_dim=64, dtype=torch.bfloat16, config=LLAMA, refresh=refresh,
                nodes="none" if refresh else "kept")
    inputs = make_inputs(case)
    chosen = torch.full((1, 1, -(-new_tokens // 64), 32 if new_tokens == 1 else 64), -7, dtype=torch.int32).cuda()
    here = {name: tensor.cuda() for name, tensor in inputs.items()}
    output, _, _, nodes = library.attention(
        **here, config=case.config, scale=case.scale, chosen_blocks=chosen, present_key=here["past_key"],
        present_value=here["past_value"],
    )
    assert torch.equal(chosen.cpu(), chosen_blocks(case, inputs))
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected = reference(case, exact)
    assert torch.equal(nodes.cpu(), expected[3])
    check_output(case, output.cpu(), expected[0])
