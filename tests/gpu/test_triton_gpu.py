"""The Triton kernels, compiled, against the reference and the CUDA kernels: three implementations that must agree."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from kernel_checks import Results, check_output, renumber_pages, rotated_types, run, same_bits
from kernel_checks import check as check_cuda
from operator_cases import GRID, Case, make_inputs, named, reference
from torch import Tensor

pytest.importorskip("triton")
from chosen_blocks import chosen_blocks

from hip_trt import library as binding
from hip_trt.config import HipConfig
from hip_trt.errors import PluginError
from hip_trt.library import Library
from hip_trt.triton import hip_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LLAMA = HipConfig.create()
"""The defaults, with Llama-3.1-8B's 32 query heads on 8 and head size 128."""

BIG = [
    Case((9000, 3000), (200, 130), "chunk"),
    Case((40000, 1000, 16384), (1, 1, 1), "decode"),
    Case((40000, 1000, 16384), (1, 1, 1), "reuse", nodes="kept", refresh=False),
    Case((4000,), (300,), "dense chunk", dense=True),
]
BIG = [replace(case, config=LLAMA, heads=(32, 8), head_dim=128, dtype=torch.bfloat16) for case in BIG]

MILLION = [
    replace(case, config=LLAMA, heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    for case in (
        Case((1_000_000,), (1,), "decode at 1M"),
        Case((1_000_000,), (1,), "reuse at 1M", nodes="kept", refresh=False),
        Case((999_900,), (150,), "chunk at 1M"),
    )
]


@pytest.fixture(scope="module")
def library() -> Library | None:
    """The CUDA kernels, if they were built; HIP_TRT_LIBRARY names a library that is not the installed one."""
    path = os.environ.get("HIP_TRT_LIBRARY")
    try:
        return Library(path) if path else binding.load()
    except PluginError:
        return None


def run_triton(case: Case, inputs: dict[str, Tensor]) -> Results:
    config, new_tokens = case.config, inputs["query"].shape[2]
    budget = config.decode_mask_blocks if new_tokens == 1 else config.mask_blocks
    shape = len(case.past_lengths), case.num_masks, -(-new_tokens // config.block_q), budget
    chosen = torch.full(shape, -7, dtype=torch.int32, device="cuda")
    results = hip_attention(
        **{name: tensor.cuda() for name, tensor in inputs.items()}, config=config, scale=case.scale, dense=case.dense,
        chosen_blocks=chosen,
    )
    return Results(*(tensor.cpu() for tensor in (*results, chosen)))


def check(case: Case) -> Results:
    inputs = make_inputs(case)
    results = run_triton(case, inputs)
    _, present_key, present_value, present_nodes = reference(case, inputs)
    assert torch.equal(results.chosen_blocks, chosen_blocks(case, inputs)), "chosen_blocks"
    assert torch.equal(results.present_nodes, present_nodes), "present_nodes"
    assert same_bits(results.present_key, present_key), "present_key"
    assert same_bits(results.present_value, present_value), "present_value"
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    check_output(case, results.output, reference(case, exact)[0])
    return results


@pytest.mark.parametrize("case", rotated_types(GRID), ids=str)
def test_agrees_with_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", BIG, ids=str)
def test_real_sizes(library: Library | None, case: Case) -> None:
    check(case)
    if library is not None:
        check_cuda(library, case, "cuda")


@pytest.mark.parametrize("case", MILLION, ids=str)
def test_a_million_tokens(library: Library | None, case: Case) -> None:
    """The reference takes float32 here: a float64 copy of the pool is as large as the rest together."""
    inputs = make_inputs(case)
    output, _, _, nodes = reference(case, inputs)
    blocks = chosen_blocks(case, inputs)
    implementations = [run_triton(case, inputs)] + ([run(library, case, inputs, "cuda")] if library else [])
    for results in implementations:
        assert torch.equal(results.chosen_blocks, blocks)
        assert torch.equal(results.present_nodes, nodes)
        check_output(case, results.output, output.double())


@pytest.mark.parametrize("name", ["ragged", "reuse and search at once"])
def test_same_bits_wherever_pages_are_and_however_often(name: str) -> None:
    case = replace(named(name), dtype=torch.bfloat16)
    inputs = make_inputs(case)
    first = run_triton(case, inputs)
    for seed in range(5):
        again = run_triton(case, renumber_pages(inputs, seed))
        for result in ("output", "present_nodes", "chosen_blocks"):
            assert same_bits(getattr(first, result), getattr(again, result)), result


def test_pool_of_more_than_two_to_the_31_elements() -> None:
    """The same pages at the end of a pool of 2.2M tokens and 8 heads: offsets need 64 bits."""
    case = replace(BIG[1], past_lengths=(3000, 700), query_lengths=(1, 1))
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(case).items()}
    expected = hip_attention(**inputs, config=case.config, scale=case.scale)
    pages = inputs["past_key"].shape[0]
    first = 2_200_000 // case.config.page_size - pages
    assert first * inputs["past_key"][0].numel() > 1 << 31
    for name in ("past_key", "past_value"):
        pool = inputs[name].new_empty((first + pages, *inputs[name].shape[1:]))
        pool[first:] = inputs[name]
        inputs[name] = pool
    inputs["page_table"] = torch.where(inputs["page_table"] < 0, -1, inputs["page_table"] + first).int()
    actual = hip_attention(**inputs, config=case.config, scale=case.scale)
    assert same_bits(actual[0], expected[0])
    assert same_bits(actual[1][first:], expected[1])
    assert same_bits(actual[3], expected[3])
