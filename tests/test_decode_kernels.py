"""The CUDA kernels of decode, version 2, emulated on the CPU, against the reference; tests/gpu does it on a GPU."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from decode_cases import Case, cases, make_inputs, named, reference
from decode_checks import (
    BLOCK,
    KERNEL_GRID,
    OFF_BY_ONE,
    TOLERANCES,
    WIDE_GRID,
    check,
    rewrite_state,
    rotated_types,
    run,
    settings,
    wide,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hip_trt.decode_library import DecodeError, DecodeLibrary, DecodeSettings
from hip_trt.reference.cache import append
from hip_trt.reference.decode_state import write_state

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the kernels are emulated with a C++ compiler")

LLAMA = {"type": 1, "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128}


@pytest.fixture(scope="module")
def library() -> DecodeLibrary:
    return DecodeLibrary(emulated.build())


@pytest.mark.parametrize("case", rotated_types(WIDE_GRID + KERNEL_GRID + OFF_BY_ONE), ids=str)
def test_agrees_with_reference(library: DecodeLibrary, case: Case) -> None:
    check(library, case, "cpu")


@hypothesis_settings(max_examples=40, deadline=None)
@given(cases().filter(lambda case: case.config.block == 4), st.sampled_from([16, 48, 64, 128]),
       st.sampled_from([torch.float16, torch.bfloat16]))
def test_agrees_with_reference_on_any_case(
    library: DecodeLibrary, case: Case, head_dim: int, dtype: torch.dtype
) -> None:
    check(library, wide(case, head_dim=head_dim, dtype=dtype), "cpu")


@pytest.mark.parametrize("name", [
    "ragged", "reuse and search", "reuse of anything", "candidates just fit, or not, with blocks", "all idle",
])
def test_present_on_past(library: DecodeLibrary, name: str) -> None:
    case = wide(named(name), head_dim=64, dtype=torch.float16)
    inputs = make_inputs(case)
    for aliased, apart in zip(
        check(library, case, "cpu", alias=True), run(library, case, inputs, "cpu"), strict=True
    ):
        torch.testing.assert_close(aliased, apart, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("row", ["past_key", "query"])
def test_numbers_that_are_none(library: DecodeLibrary, row: str, head_dim: int) -> None:
    """NaN and infinite scores come first, by index; NaN shows in the output."""
    case = wide(named("long"), head_dim=head_dim, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    page, inside = inputs["page_table"][0, 11], 5
    if row == "past_key":
        inputs["past_key"][page, 0, inside, 3] = torch.nan
        rewrite_state(inputs)
    else:
        inputs["query"][0, 1, 0, 3] = torch.nan
    output, *_, blocks = run(library, case, inputs, "cpu")
    expected, *_, expected_blocks = reference(case, inputs)
    assert torch.equal(blocks[:, 1:], expected_blocks[:, 1:])
    if row == "past_key":
        assert (11 * case.page_size + inside) // BLOCK in blocks[0, 0]
    else:
        first, _ = case.config.candidates(case.past_lengths[0])
        assert blocks[0, 0].tolist() == list(range(first, first + case.config.chosen))
    torch.testing.assert_close(output.isnan(), expected.isnan())
    assert output[0, :2].isnan().any()


def test_ties_go_to_the_lower_index(library: DecodeLibrary) -> None:
    """Also -0 and 0: every candidate is the same."""
    case = wide(named("long"), head_dim=64, dtype=torch.float16)
    inputs = make_inputs(case)
    inputs["query"][:] = torch.where(torch.arange(64) % 2 == 0, 0.0, -0.0)
    *_, blocks = run(library, case, inputs, "cpu")
    first, _ = case.config.candidates(case.past_lengths[0])
    assert (blocks == torch.arange(first, first + case.config.chosen)).all()


def test_holes_and_repetitions_in_past_blocks(library: DecodeLibrary) -> None:
    """[6, -1, 6, ...] attends to block 6 once."""
    case = wide(named("reuse"), head_dim=64, dtype=torch.float16, blocks="kept")
    inputs = make_inputs(case)
    inputs["past_blocks"][:] = torch.tensor([6, -1, 6, -1], dtype=torch.int32)
    output, *_, blocks = run(library, case, inputs, "cpu")
    assert torch.equal(blocks, inputs["past_blocks"])
    expected, *_ = reference(case, inputs)
    torch.testing.assert_close(output, expected, rtol=TOLERANCES[case.dtype], atol=TOLERANCES[case.dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_chunks_of_a_prompt(library: DecodeLibrary, head_dim: int, dtype: torch.dtype) -> None:
    """Rows, bounds and codes of thousands of new rows; those of a block that was cut and filled again are new ones."""
    case = Case((37, 0, 160, 5), (600, 33, 0, 11), "chunk", config=wide(named("long")).config, page_size=32,
                heads=(2, 2), head_dim=head_dim, dtype=dtype, values="real")
    inputs = make_inputs(case)
    inputs["past_lengths"][2] = 150  # the last block was cut short, and is not filled again
    where = [inputs[name] for name in ("page_table", "past_lengths", "query_lengths")]
    key, value = (append(inputs[f"past_{name}"], inputs[name], *where) for name in ("key", "value"))
    bounds, codes = write_state(key, inputs["past_bounds"], inputs["past_codes"], *where)
    tensors = {**inputs, **{name.replace("past", "present"): inputs[name].clone()
                            for name in ("past_key", "past_value", "past_bounds", "past_codes")}}
    library.append(tensors, settings(case))
    for name, expected in (("key", key), ("value", value), ("bounds", bounds), ("codes", codes)):
        torch.testing.assert_close(tensors[f"present_{name}"], expected, rtol=0, atol=0, equal_nan=True, msg=name)


def test_pages_may_be_anywhere(library: DecodeLibrary) -> None:
    case = wide(named("ragged"), head_dim=64, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    order = torch.randperm(len(inputs["past_key"]), generator=torch.Generator().manual_seed(1))
    table = inputs["page_table"]
    moved = {**inputs, "page_table": torch.where(table < 0, table, order.argsort()[table.clamp(min=0)].int()),
             **{name: inputs[name][order] for name in ("past_key", "past_value", "past_bounds", "past_codes")}}
    here, there = (run(library, case, given, "cpu") for given in (inputs, moved))
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[-1], there[-1])


def test_dense_reads_no_state(library: DecodeLibrary) -> None:
    case = wide(named("long"), head_dim=64, dtype=torch.float16)
    inputs = make_inputs(case)
    output, *_, bounds, codes, blocks = run(library, case, inputs, "cpu", dense=True)
    everything = replace(case, config=replace(case.config, mask_k=1 << 16, search_k=1 << 16))
    expected, *_ = reference(everything, {**inputs, "past_blocks": torch.full((2, 2, 1 << 12), -1, dtype=torch.int32)})
    torch.testing.assert_close(output, expected, rtol=TOLERANCES[case.dtype], atol=TOLERANCES[case.dtype])
    assert (blocks == -1).all()
    torch.testing.assert_close(bounds, inputs["past_bounds"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, inputs["past_codes"])


@pytest.mark.parametrize("case", [case for case in KERNEL_GRID if case.name.startswith("threshold")], ids=str)
def test_a_threshold_leaves_tokens_out(library: DecodeLibrary, case: Case) -> None:
    """Else the cases above would hold no threshold to anything."""
    inputs = make_inputs(case)
    whole = run(library, replace(case, config=replace(case.config, value_threshold=0.0)), inputs, "cpu")
    assert not torch.allclose(run(library, case, inputs, "cpu")[0], whole[0], rtol=0.01, atol=0.01)


def test_a_threshold_lets_nan_show(library: DecodeLibrary) -> None:
    case = wide(named("threshold"), head_dim=64, dtype=torch.float16)
    inputs = make_inputs(case)
    page = inputs["page_table"][0, 11]
    inputs["past_key"][page, 0, 5, 3] = torch.nan
    rewrite_state(inputs)
    output, *_ = run(library, case, inputs, "cpu")
    expected, *_ = reference(case, inputs)
    torch.testing.assert_close(output.isnan(), expected.isnan())
    assert output[0, :2].isnan().any()


@pytest.mark.parametrize(("change", "words"), [
    ({"value_threshold": 1.0}, "value_threshold"), ({"value_threshold": -0.1}, "value_threshold"),
    ({"value_threshold": float("nan")}, "value_threshold"), ({"block": 8}, "decode_block_k"),
    ({"block": 48}, "decode_block_k"), ({"mask_k": 100}, "decode_mask_k"), ({"search_k": 4096}, "decode_search_k"),
    ({"search_k": 1 << 20}, "decode_search_k"), ({"page_size": 96}, "page_size"),
])
def test_refuses(library: DecodeLibrary, change: dict[str, float], words: str) -> None:
    library.validate(DecodeSettings(), LLAMA)
    with pytest.raises(DecodeError, match=f"^{words}: "):
        library.validate(replace(DecodeSettings(), **change), LLAMA)


@pytest.mark.parametrize(("change", "words"), [
    ({"new_tokens": 9}, "new_tokens"), ({"head_dim": 72}, "head_dim"), ({"head_dim": 272}, "head_dim"),
    ({"num_query_heads": 136}, "num_query_heads"),
])
def test_refuses_shapes(library: DecodeLibrary, change: dict[str, int], words: str) -> None:
    with pytest.raises(DecodeError, match=f"^{words}: "):
        library.validate(DecodeSettings(), {**LLAMA, **change})
