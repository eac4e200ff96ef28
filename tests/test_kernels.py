"""The CUDA kernels, emulated on the CPU, against the reference; tests/gpu runs the same checks on a GPU."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import KERNEL_GRID, check, renumber_pages, rotated_types, run
from operator_cases import GRID, Case, cases, make_inputs, named

from hip_trt.library import Library

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the kernels are emulated with a C++ compiler")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.EmulatedLibrary(emulated.build())


@pytest.mark.parametrize("case", rotated_types(GRID + KERNEL_GRID), ids=str)
def test_agrees_with_reference(library: Library, case: Case) -> None:
    check(library, case, "cpu")


@settings(max_examples=15, deadline=None)
@given(cases(), st.sampled_from([8, 16, 24]))
def test_agrees_with_reference_on_any_case(library: Library, case: Case, head_dim: int) -> None:
    check(library, replace(case, head_dim=head_dim), "cpu")


@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "idle keeps nodes", "the paper's reuse"])
def test_present_on_past(library: Library, name: str) -> None:
    case = replace(named(name), dtype=torch.float16)
    aliased = check(library, case, "cpu", alias=True)
    aliased.assert_same_bits(run(library, case, make_inputs(case), "cpu"))


def test_chosen_blocks_are_optional(library: Library) -> None:
    case = named("second chunk")
    inputs = make_inputs(case)
    with_them, without = (run(library, case, inputs, "cpu", chosen=chosen) for chosen in (True, False))
    assert torch.equal(with_them.output, without.output)
    assert (without.chosen_blocks == -7).all()


@pytest.mark.parametrize("name", ["ragged", "every start level at once"])
def test_pages_may_be_anywhere(library: Library, name: str) -> None:
    case = named(name)
    inputs = make_inputs(case)
    here, there = (run(library, case, given, "cpu") for given in (inputs, renumber_pages(inputs, 1)))
    for result in ("output", "present_nodes", "chosen_blocks"):
        assert torch.equal(getattr(here, result), getattr(there, result)), result


@pytest.mark.parametrize("name", ["the paper's reuse", "reuse and search at once"])
def test_past_nodes_in_any_order(library: Library, name: str) -> None:
    """The reference takes past_nodes as a set, whatever their order."""
    from chosen_blocks import chosen_blocks

    case = named(name)
    inputs = make_inputs(case)
    inputs["past_nodes"] = inputs["past_nodes"].flip(-1).contiguous()
    inputs["past_nodes"][..., -1] = inputs["past_nodes"][..., 0]
    assert torch.equal(run(library, case, inputs, "cpu").chosen_blocks, chosen_blocks(case, inputs))
