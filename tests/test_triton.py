"""The Triton kernels against the reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from chosen_blocks import chosen_blocks
from hypothesis import given, settings
from operator_cases import GRID, SMALL, Case, cases, make_inputs, named, reference

pytest.importorskip("triton")
from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.triton import hip_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def brief(case: Case) -> Case:
    """The case with new tokens for two query blocks only, the others committed: an interpreted query block is slow."""
    new = tuple(min(count, case.config.block_q + 1) for count in case.query_lengths)
    past = tuple(length - count for length, count in zip(case.lengths, new, strict=True))
    return replace(case, past_lengths=past, query_lengths=new, new_tokens=case.new_tokens and max(*new, 2))


def check(case: Case) -> None:
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    budget = case.config.decode_mask_blocks if inputs["query"].shape[2] == 1 else case.config.mask_blocks
    query_blocks = -(-inputs["query"].shape[2] // case.config.block_q)
    chosen = torch.full(
        (len(case.past_lengths), case.num_masks, query_blocks, budget), -7, dtype=torch.int32, device=DEVICE
    )
    actual = hip_attention(
        **{name: tensor.to(DEVICE) for name, tensor in inputs.items()},
        config=case.config, scale=case.scale, dense=case.dense, chosen_blocks=chosen,
    )
    torch.testing.assert_close(chosen.cpu(), chosen_blocks(case, inputs), atol=0, rtol=0)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    torch.testing.assert_close(actual[0].cpu(), expected[0], atol=tolerance, rtol=tolerance)
    for tensor, other in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(tensor.cpu(), other, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("case", [brief(case) for case in GRID], ids=str)
def test_agrees_with_reference(case: Case) -> None:
    check(case)


@settings(max_examples=6, deadline=None)
@given(cases())
def test_agrees_with_reference_on_any_case(case: Case) -> None:
    check(brief(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "reuse and search at once"])
def test_types(name: str, dtype: torch.dtype) -> None:
    check(brief(replace(named(name), dtype=dtype)))


@pytest.mark.parametrize("head_dim", [1, 24])
def test_head_dim_is_not_a_power_of_two(head_dim: int) -> None:
    check(brief(replace(named("second chunk"), head_dim=head_dim)))


def test_query_block_larger_than_the_call() -> None:
    check(Case((150,), (5,), config=SMALL.replace(block_q=64, stride_q=4)))


def test_inputs_are_not_changed() -> None:
    case = brief(named("ragged"))
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(case).items()}
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    hip_attention(**inputs, config=case.config, scale=case.scale)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor, copies[name], atol=0, rtol=0, equal_nan=True)


def test_tensors_of_any_layout() -> None:
    case = brief(named("ragged"))
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(case).items()}
    expected = hip_attention(**inputs, config=case.config, scale=case.scale)
    for name in ("query", "key", "value", "past_key", "past_value"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    for actual, other in zip(hip_attention(**inputs, config=case.config, scale=case.scale), expected, strict=True):
        torch.testing.assert_close(actual, other, atol=0, rtol=0, equal_nan=True)


def test_refuses_a_type_that_it_does_not_compute() -> None:
    case = named("first token")
    inputs = make_inputs(case)
    inputs["query"] = inputs["query"].double()
    with pytest.raises(RuntimeInputError, match=r"query: type torch\.float64"):
        hip_attention(**inputs, config=case.config, scale=1.0)


def test_refuses_chosen_blocks_of_another_shape() -> None:
    case = named("first token")
    with pytest.raises(RuntimeInputError, match=r"chosen_blocks: shape \[1, 2\].* must be \[1, 2, 1, 3\]"):
        hip_attention(
            **{name: tensor.to(DEVICE) for name, tensor in make_inputs(case).items()},
            config=case.config, scale=1.0, chosen_blocks=torch.empty(1, 2, dtype=torch.int32, device=DEVICE),
        )


def test_refuses_cpu_tensors_without_the_interpreter() -> None:
    program = (
        "import torch; from hip_trt.config import HipConfig; from hip_trt.triton import hip_attention\n"
        "hip_attention(*[torch.zeros(1, 1, 1, 16)] * 10, config=HipConfig(), scale=1.0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert f"{EnvironmentProblem.__name__}: Triton kernels cannot run on tensors on cpu" in result.stderr
    assert "TRITON_INTERPRET=1" in result.stderr
