"""The Triton kernels of the next version's decode call against the reference: interpreted on the CPU, compiled where
there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from decode_cases import GRID, SMALL, Case, Outputs, assert_agrees, cases, make_inputs, named, reference
from hypothesis import given, settings

pytest.importorskip("triton")
from hip_trt.errors import RuntimeInputError
from hip_trt.reference.decode import DecodeConfig
from hip_trt.reference.decode_state import write_state
from hip_trt.triton.decode import decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: Case, inputs: dict[str, torch.Tensor]) -> Outputs:
    found = decode_attention(
        **{name: tensor.to(DEVICE) for name, tensor in inputs.items()}, config=case.config, scale=case.scale
    )
    return tuple(tensor.cpu() for tensor in found)


def check(case: Case, inputs: dict[str, torch.Tensor] | None = None) -> Outputs:
    inputs = inputs or make_inputs(case)
    found = run(case, inputs)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    assert_agrees(case, inputs, found, rtol=tolerance, atol=tolerance)
    return found


@pytest.mark.parametrize("case", GRID, ids=str)
def test_agrees_with_reference(case: Case) -> None:
    check(case)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_agrees_with_reference_on_any_case(case: Case) -> None:
    check(case)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases("real"))
def test_agrees_with_reference_on_real_numbers(case: Case) -> None:
    """The first stage's sums may differ in their last bits: the same examples every time, lest one is a near tie."""
    check(case)


@pytest.mark.parametrize("values", ["whole", "real"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "threshold, reuse"])
def test_types(name: str, dtype: torch.dtype, values: Literal["whole", "real"]) -> None:
    check(replace(named(name), dtype=dtype, values=values))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["past_key", "query"])
def test_numbers_that_are_none(name: str, number: float) -> None:
    """NaN shows, and chooses as in the reference; an infinite key is no fault."""
    case = replace(named("eight rows"), config=replace(SMALL, search_k=64))
    inputs = make_inputs(case)
    if name == "query":
        inputs["query"][0, 1, 0, 3] = number
    else:
        for block in (6, 19):
            inputs["past_key"][inputs["page_table"][0, block // 2], 1, block % 2 * 4 + 1, 3] = number
        past = inputs["past_lengths"]
        inputs["past_bounds"], inputs["past_codes"] = write_state(
            inputs["past_key"], inputs["past_bounds"], inputs["past_codes"], inputs["page_table"],
            torch.zeros_like(past), past,
        )
    found, expected = run(case, inputs), reference(case, inputs)
    first, last = case.config.candidates(150)
    assert all(first <= block < last for block in found[-1][0].flatten().tolist())
    if number != number:
        assert torch.equal(found[-1], expected[-1])
        torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        assert found[0][0].isnan().any()
        assert found[0][1].isfinite().all()


def test_a_new_key_that_is_not_a_number_is_in_the_bounds() -> None:
    case = named("eight rows")
    inputs = make_inputs(case)
    inputs["key"][:, 0, 1, 2] = torch.nan
    for tensor, other in zip(run(case, inputs)[1:5], reference(case, inputs)[1:5], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


def test_equal_scores_prefer_the_lower_index() -> None:
    """All keys are equal, so all scores are, in both stages; +0 and -0 too."""
    case = Case((150,), (1,))
    inputs = make_inputs(case)
    for name in ("past_key", "past_bounds", "past_codes"):
        inputs[name].zero_()
    inputs["past_bounds"][:, :, ::2] = -0.0
    assert check(case, inputs)[-1][0].tolist() == [[1, 2, 3, 4]] * 2


def test_a_threshold_that_leaves_out_the_highest_logit() -> None:
    """The second softmax finds a highest of its own: that of the first would leave nothing of what remains. The first
    blocks that it sees are left out whole."""
    config = replace(SMALL, mask_k=64, search_k=64, sink_tokens=0, value_threshold=0.5)
    case = Case((150,), (1,), config=config, heads=(1, 1))
    inputs = make_inputs(case)
    inputs["past_key"].zero_()
    inputs["key"].zero_()
    inputs["query"].fill_(1.0)
    past = inputs["past_lengths"]
    for block in (3, 8):  # equal, so that none has half; far above all others
        inputs["past_key"][inputs["page_table"][0, block // 2], :, block % 2 * 4 : block % 2 * 4 + 4] = 100.0
    inputs["past_bounds"], inputs["past_codes"] = write_state(
        inputs["past_key"], inputs["past_bounds"], inputs["past_codes"], inputs["page_table"],
        torch.zeros_like(past), past,
    )
    output = check(case, inputs)[0]
    last = config.candidates(150)[1]
    window = [inputs["past_value"][inputs["page_table"][0, t // 8], 0, t % 8] for t in range(last * 4, 150)]
    torch.testing.assert_close(output[0, 0, 0], torch.stack([*window, inputs["value"][0, 0, 0]]).mean(dim=0))


def test_inputs_are_not_changed_and_may_have_any_layout() -> None:
    case = named("ragged")
    inputs = make_inputs(case)
    for name in ("query", "key", "value", "past_key", "past_value", "past_codes"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    check(case, inputs)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor, copies[name], atol=0, rtol=0, equal_nan=True)


def test_of_the_sizes_of_a_model() -> None:
    config = DecodeConfig(mask_k=256, search_k=512, value_threshold=1e-4)
    check(Case((1700, 1000), (1, 8), config=config, page_size=128, heads=(4, 2), head_dim=64, values="real"))


def test_refuses_a_type_that_it_does_not_compute() -> None:
    case = named("first token")
    inputs = make_inputs(case)
    inputs["query"] = inputs["query"].double()
    with pytest.raises(RuntimeInputError, match=r"query: type torch\.float64"):
        run(case, inputs)
