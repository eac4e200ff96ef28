"""The cluster kernel of single-token calls, emulated on the CPU, against the reference."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from chosen_blocks import chosen_blocks
from decode_cluster_cases import BASE, DECODE_GRID, decode_case
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check, renumber_pages, run
from operator_cases import Case, make_inputs

from hip_trt.library import Library

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the kernels are emulated with a C++ compiler")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.EmulatedLibrary(emulated.build())


@pytest.mark.parametrize("case", DECODE_GRID, ids=str)
def test_agrees_with_reference(library: Library, case: Case) -> None:
    check(library, case, "cpu")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 900), st.integers(2, 16), st.integers(2, 16), st.integers(0, 1), st.integers(1, 9),
       st.sampled_from(["none", "kept", "mixed"]), st.booleans(), st.integers(0, 2**16))
def test_agrees_with_reference_on_any_case(
    library: Library, past: int, branch: int, leaf_branch: int, reuse_level: int, group: int, nodes: str, refresh: bool,
    seed: int,
) -> None:
    config = BASE.replace(branch=branch, leaf_branch=leaf_branch, reuse_level=reuse_level, window_tokens=20)
    check(library, Case((past,), (1,), config=config, heads=(group, 1), head_dim=64, dtype=torch.float16, new_tokens=1,
                        nodes=nodes, refresh=refresh, seed=seed), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ragged", "reuse", "the paper's reuse", "the paper's tree", "first tokens"])
def test_present_on_past(library: Library, name: str) -> None:
    case = decode_case(name)
    aliased = check(library, case, "cpu", alias=True)
    aliased.assert_same_bits(run(library, case, make_inputs(case), "cpu"))


@pytest.mark.parametrize("name", ["reuse", "the paper's reuse"])
def test_past_nodes_in_any_order(library: Library, name: str) -> None:
    """The reference takes past_nodes as a set, whatever their order."""
    case = decode_case(name)
    inputs = make_inputs(case)
    inputs["past_nodes"] = inputs["past_nodes"].flip(-1).contiguous()
    inputs["past_nodes"][..., -1] = inputs["past_nodes"][..., 0]
    assert torch.equal(run(library, case, inputs, "cpu").chosen_blocks, chosen_blocks(case, inputs))


def test_pages_may_be_anywhere(library: Library) -> None:
    case = decode_case("ragged")
    inputs = make_inputs(case)
    here, there = (run(library, case, given, "cpu") for given in (inputs, renumber_pages(inputs, 1)))
    for result in ("output", "present_nodes", "chosen_blocks"):
        assert torch.equal(getattr(here, result), getattr(there, result)), result


def test_small_batches_are_split_and_large_ones_are_not(library: Library) -> None:
    """The emulated GPU holds four thread blocks at once: one sequence gets them all, five get one each."""
    case = decode_case("512 candidates, five sequences")
    inputs = make_inputs(case)
    together = run(library, case, inputs, "cpu")
    alone = {name: tensor[:1].contiguous() if name in _PER_SEQUENCE else tensor for name, tensor in inputs.items()}
    one = run(library, replace(case, past_lengths=case.past_lengths[:1], query_lengths=(1,)), alone, "cpu")
    assert torch.equal(one.chosen_blocks, together.chosen_blocks[:1])
    error = (one.output.double() - together.output[:1].double()).norm() / one.output.double().norm()
    assert 0 < error < 1e-3  # equal but for the order of additions


_PER_SEQUENCE = {"query", "key", "value", "page_table", "past_lengths", "query_lengths", "past_nodes"}
