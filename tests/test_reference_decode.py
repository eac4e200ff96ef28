"""The reference's decode call of the operator's next version, against one written out token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decode_by_hand import BlockByHand, CallByHand
from decode_cases import GRID, PRUNED, SMALL, Case, assert_best, cases, make_inputs, named, reference
from hypothesis import given, settings
from torch import Tensor

from hip_trt.reference.decode import DecodeConfig, first_scores, second_scores
from hip_trt.reference.decode_state import dequantise, key_bounds, pack, quantise, unpack, write_state


def same(tensor: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


def assert_as_by_hand(case: Case, inputs: dict[str, Tensor] | None = None) -> None:
    inputs = inputs or make_inputs(case)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    output, key, value, bounds, codes, blocks = reference(case, inputs)
    assert output.dtype == case.dtype
    for name, tensor in inputs.items():
        same(tensor, before[name])
    for b, count in enumerate(case.query_lengths):
        assert output[b, :, count:].eq(0).all()
        for mask in range(case.num_masks):
            if count == 0:
                assert torch.equal(blocks[b, mask], inputs["past_blocks"][b, mask])
                continue
            call = CallByHand(case, inputs, b, mask)
            found = blocks[b, mask].tolist()
            attended = call.blocks
            if found != call.present:
                assert call.scores, "blocks that no search chose differ"
                assert_best(list(call.scores), list(call.scores.values()), found, case.config.chosen)
                attended = found
            of_heads = output[b, list(call.heads), :count].float()
            tolerance = 1e-5 if case.dtype == torch.float32 else 2 * torch.finfo(case.dtype).eps
            torch.testing.assert_close(of_heads, torch.tensor(call.output(attended)), rtol=tolerance, atol=tolerance)
    assert_state_as_by_hand(case, inputs, key, value, bounds, codes)


def assert_state_as_by_hand(
    case: Case, inputs: dict[str, Tensor], key: Tensor, value: Tensor, bounds: Tensor, codes: Tensor
) -> None:
    """What a sequence has, and nothing else, changed; full blocks have their state."""
    expected_key, expected_value = inputs["past_key"].clone(), inputs["past_value"].clone()
    expected_bounds, expected_codes = inputs["past_bounds"].clone(), inputs["past_codes"].clone()
    block = case.config.block
    for b, (past, count) in enumerate(zip(case.past_lengths, case.query_lengths, strict=True)):
        pages = inputs["page_table"][b].tolist()
        for row in range(count):
            page, inside = divmod(past + row, case.page_size)
            expected_key[pages[page], :, inside] = inputs["key"][b, :, row]
            expected_value[pages[page], :, inside] = inputs["value"][b, :, row]
        for filled in () if case.config.dense else range((past + count) // block):
            page, inside = divmod(filled * block, case.page_size)
            for kv in range(case.heads[1]):
                state = BlockByHand.of(expected_key[pages[page], kv, inside : inside + block].tolist())
                expected_bounds[pages[page], kv, inside // block] = torch.tensor([state.low, state.high])
                expected_codes[pages[page], kv, inside : inside + block] = torch.tensor(
                    [state.words(t) for t in range(block)], dtype=torch.int32)
    for tensor, other in ((key, expected_key), (value, expected_value), (bounds, expected_bounds),
                          (codes, expected_codes)):
        same(tensor, other)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case) -> None:
    assert_as_by_hand(case)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_case(case: Case) -> None:
    assert_as_by_hand(case)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases("real"))
def test_real_numbers(case: Case) -> None:
    """The first stage's sums may differ in their last bits: the same examples every time, lest one is a near tie."""
    assert_as_by_hand(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "reuse and search", "threshold"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    assert_as_by_hand(replace(named(name), dtype=dtype))
    assert_as_by_hand(replace(named(name), dtype=dtype, values="real"))


def test_codes_of_a_key_are_the_nearest_quarters() -> None:
    """0, 1 and 2 thirds round up at a sixth, a half and five sixths of the extent."""
    keys = torch.tensor([0.0, 0.99, 1.0, 2.99, 3.0, 4.99, 5.0, 6.0])[:, None].expand(-1, 16)
    codes = quantise(keys, key_bounds(keys))
    assert codes[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dequantise(codes, key_bounds(keys))[:, 5].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_dimension_without_extent_has_code_0_and_its_key() -> None:
    keys = torch.full((4, 16), -1.5)
    codes = quantise(keys, key_bounds(keys))
    assert codes.eq(0).all()
    assert torch.equal(dequantise(codes, key_bounds(keys)), keys)


def test_codes_are_packed_from_the_lowest_bits_up() -> None:
    codes = torch.zeros(32, dtype=torch.int64)
    codes[0], codes[1], codes[15], codes[17] = 3, 1, 2, 1
    assert pack(codes).tolist() == [3 + (1 << 2) - (1 << 31), 1 << 2]
    random = torch.randint(0, 4, (5, 7, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(random)), random)
    assert pack(random).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_key_is_above_its_bound_or_far_from_its_codes(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 64, 32, generator=random).to(dtype)
    queries, bounds = torch.randn(3, 32, generator=random), key_bounds(keys)
    exact = torch.einsum("gd,ntd->gnt", queries, keys.float()).amax(dim=(0, 2))
    assert (first_scores(queries, bounds.float()) >= exact - 1e-4).all()
    extent = (bounds[:, 1:].float() - bounds[:, :1].float())
    away = (dequantise(quantise(keys, bounds), bounds.float()) - keys.float()).abs()
    assert (away <= extent / 6 * 1.001).all()


@pytest.mark.parametrize("steps", [(1,) * 11, (3, 8), (40, 8), (75,), (2, 1, 8, 50)], ids=str)
def test_state_is_the_same_however_blocks_fill(steps: tuple[int, ...]) -> None:
    """Calls of many blocks too, as prefill makes them."""
    lengths = torch.tensor([6, 13], dtype=torch.int32)
    case = Case((6 + sum(steps), 13 + sum(steps)), (0, 0), new_tokens=1)
    inputs = make_inputs(case)
    expected = inputs["past_bounds"], inputs["past_codes"]
    keys, table = inputs["past_key"], inputs["page_table"]
    state = torch.full_like(expected[0], math.nan), torch.zeros_like(expected[1])
    state = write_state(keys, *state, table, torch.zeros_like(lengths), lengths)
    for new in steps:
        state = write_state(keys, *state, table, lengths, torch.full_like(lengths, new))
        lengths = lengths + new
    same(state[0], expected[0])
    written = (expected[1] == state[1]).all(dim=3)
    for b, length in enumerate(lengths.tolist()):
        for t in range(length // 4 * 4):
            assert written[table[b, t // 8], :, t % 8].all()
    untouched = [page for page in range(len(keys)) if page not in table.flatten().tolist()]
    assert state[1][untouched].eq(0).all()


def test_a_block_cut_short_and_refilled_has_the_state_of_its_new_keys() -> None:
    """Its old state says nothing: neither that of the keys that stayed nor of those that went."""
    case = named("ragged")
    long = make_inputs(case)
    for back in (1, 3, 6):
        lengths = tuple(max(past - back, 0) for past in case.past_lengths)
        assert_as_by_hand(
            replace(case, past_lengths=lengths),
            long | {"past_lengths": torch.tensor(lengths, dtype=torch.int32)},
        )


def test_state_beyond_the_candidates_is_not_read() -> None:
    """Of the sink, of the window, and of blocks that are not full."""
    case = named("ragged")
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    bounds, codes = inputs["past_bounds"].clone(), inputs["past_codes"].clone()
    for b, past in enumerate(case.past_lengths):
        first, last = case.config.candidates(past)
        for block in {*range(past // 4)} - {*range(first, last)}:
            at = inputs["page_table"][b, block // 2], slice(None)
            bounds[(*at, block % 2)] = 1e30
            codes[(*at, slice(block % 2 * 4, block % 2 * 4 + 4))] = -1
    output, *_, blocks = reference(case, inputs | {"past_bounds": bounds, "past_codes": codes})
    assert torch.equal(output, expected[0])
    assert torch.equal(blocks, expected[-1])


@pytest.mark.parametrize("config", [SMALL, PRUNED])
def test_first_row_searches_for_all(config: DecodeConfig) -> None:
    """Rows after the first change neither its blocks nor, but for a threshold, its output."""
    case = replace(named("eight rows"), config=config)
    inputs = make_inputs(case)
    output, *_, blocks = reference(case, inputs)
    alone = inputs | {name: inputs[name][:, :, :1] for name in ("query", "key", "value")}
    alone["query_lengths"] = torch.ones_like(inputs["query_lengths"])
    output_alone, *_, blocks_alone = reference(case, alone)
    assert torch.equal(blocks, blocks_alone)
    if config is SMALL:
        torch.testing.assert_close(output[:, :, :1], output_alone)


@pytest.mark.parametrize(("kept", "expected"), [
    ([5, 9, 6, 7], [5, 6, 7, 9]), ([9, -1, -1, 5], [5, 9]), ([9, 9, 5, -1], [5, 9]), ([0, 5, 9, 17], [5, 9]),
    ([0, 0, 0, 0], []), ([17, 2**31 - 1, -7, 4], [4]), ([15, 16, 3, 3], [3]),
], ids=str)
def test_reused_blocks_are_candidates_once_each_with_the_newest(kept: list[int], expected: list[int]) -> None:
    """Of candidates 1 to 16; 15 and 16 are the newest. Values are one-hot of their block, so attention shows."""
    case = Case((77,), (1,), heads=(1, 1), head_dim=32, refresh=(0,))
    assert case.config.candidates(77) == (1, 17)
    inputs = make_inputs(case)
    for t in range(77):
        inputs["past_value"][inputs["page_table"][0, t // 8], 0, t % 8] = torch.eye(32)[t // 4]
    inputs["value"][:] = torch.eye(32)[77 // 4]
    inputs["past_blocks"] = torch.tensor([[kept]], dtype=torch.int32)
    output, *_, blocks = reference(case, inputs)
    assert torch.equal(blocks, inputs["past_blocks"])
    assert output[0, 0, 0].nonzero().flatten().tolist() == [0, *expected, 15, 16, 17, 18, 19]


def broken(case: Case, blocks: list[int], value: float, heads: slice = slice(None)) -> dict[str, Tensor]:
    """Inputs of one sequence in which a token of some blocks has a key with this in one dimension."""
    inputs = make_inputs(case)
    for block in blocks:
        inputs["past_key"][inputs["page_table"][0, block // 2], heads, block % 2 * 4 + 1, 3] = value
    past = inputs["past_lengths"]
    state = write_state(inputs["past_key"], inputs["past_bounds"], inputs["past_codes"], inputs["page_table"],
                        torch.zeros_like(past), past)
    return inputs | dict(zip(("past_bounds", "past_codes"), state, strict=True))


@pytest.mark.parametrize("mask_heads", ["kv", "query"])
def test_a_key_that_is_not_a_number_shows(mask_heads: str) -> None:
    case = Case((150,), (2,), mask_heads=mask_heads)
    inputs = broken(case, [21], math.nan, slice(1, 2))  # the second KV head only
    output, _, _, bounds, _, blocks = reference(case, inputs)
    half = case.num_masks // 2
    assert (blocks[0, half:] == 21).any(dim=1).all()
    assert output[0, 2:].isnan().all()
    assert output[0, :2].isfinite().all()
    assert bounds[inputs["page_table"][0, 10], 1, 1].isnan().all(dim=0).tolist() == [d == 3 for d in range(16)]


def test_keys_that_are_not_numbers_rank_first_by_index_and_leave_the_rest_of_the_search_as_it_was() -> None:
    config = replace(SMALL, mask_k=16, search_k=4096)
    case = Case((150,), (1,), config=config, mask_heads="query")
    clean = reference(case, make_inputs(case))[-1][0]
    found = reference(case, broken(case, [11, 30], math.nan))[-1][0]
    assert (found == 11).any(dim=1).all()
    assert (found == 30).any(dim=1).all()
    for head in range(4):
        others = [block for block in found[head].tolist() if block not in (11, 30)]
        assert len(others) == 2
        assert set(others) <= set(clean[head].tolist())
    many = reference(case, broken(case, [29, 7, 12, 31, 9, 16], math.nan))[-1][0]
    assert many.tolist() == [[7, 9, 12, 16]] * 4


def test_a_query_that_is_not_a_number_has_the_first_candidates() -> None:
    case = Case((150,), (2,))
    inputs = make_inputs(case)
    inputs["query"][0, 1, 0, 5] = math.nan
    output, *_, blocks = reference(case, inputs)
    assert blocks[0, 0].tolist() == [1, 2, 3, 4]
    assert output[0, 1, 0].isnan().all()
    assert output[0, 1, 1].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_keys_of_infinite_value_are_no_fault(value: float) -> None:
    case = Case((150,), (3,))
    blocks = reference(case, broken(case, [5, 8, 22], value))[-1][0]
    first, last = case.config.candidates(150)
    for chosen in blocks.tolist():
        assert chosen == sorted(set(chosen))
        assert all(first <= block < last for block in chosen)


def test_equal_scores_prefer_the_lower_index() -> None:
    """All keys are equal, so all scores are, in both stages; +0 and -0 too."""
    case = Case((150,), (1,))
    inputs = make_inputs(case)
    for name in ("past_key", "past_bounds", "past_codes"):
        inputs[name].zero_()
    inputs["past_bounds"][:, :, ::2] = -0.0
    assert reference(case, inputs)[-1][0].tolist() == [[1, 2, 3, 4]] * 2


def test_a_block_without_a_rival_in_one_head_is_kept_by_its_share() -> None:
    """Two heads, one of scores a hundred times as large: each has its say."""
    large, small = torch.zeros(2, 4, 16), torch.zeros(2, 4, 16)
    keys = torch.cat([large, small])
    keys[0, 0, 0], keys[1, 0, 0], keys[2, 0, 1] = 8.0, 7.9, 1.0
    queries = torch.zeros(2, 16)
    queries[0, 0], queries[1, 1] = 100.0, 10.0
    scores = second_scores(queries, keys, 1.0)
    assert scores.argsort(descending=True).tolist()[:2] in ([0, 2], [2, 0])
    raw = (queries @ keys.mT).amax(dim=(1, 2))
    assert raw.argsort(descending=True).tolist()[:2] == [0, 1]


def test_a_threshold_counts_wherever_there_are_more_candidates_than_are_chosen() -> None:
    """Also where reused blocks and the two newest happen to be all of them."""
    case = Case((33,), (2,), config=replace(SMALL, value_threshold=0.05), refresh=(0,))
    assert case.config.candidates(33) == (1, 6)
    inputs = make_inputs(case)
    inputs["past_blocks"][:] = torch.tensor([1, 2, 3, 4])
    assert_as_by_hand(case, inputs)
    plain = reference(replace(case, config=SMALL), inputs)[0]
    assert not torch.equal(reference(case, inputs)[0], plain)
    fits = replace(case, config=replace(case.config, mask_k=20))
    inputs["past_blocks"] = inputs["past_blocks"].new_full((1, 2, 5), -1)
    assert torch.equal(reference(fits, inputs)[0], plain)
