"""The study of decode, version 2: its ways to choose against loops written by hand, on tiny tensors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from decode_study.attention import Decoding, Rows, searched
from decode_study.case import Case
from decode_study.facts import rows_of_facts
from decode_study.representatives import (
    Representative,
    box,
    exact,
    few_bits,
    gaussian,
    mean,
    middle,
    outward,
    strided,
)
from decode_study.selection import (
    DENSE,
    WINDOW_ONLY,
    Method,
    Pool,
    Ranking,
    largest,
    normalised,
    summed_mass,
)

HEADS, GROUP, ROWS, BLOCKS, BLOCK, DIM = 2, 3, 4, 12, 64, 8


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(HEADS, BLOCKS, BLOCK, DIM, generator=torch.Generator().manual_seed(1)).bfloat16().float()


@pytest.fixture
def queries() -> Tensor:
    return torch.randn(HEADS, GROUP, ROWS, DIM, generator=torch.Generator().manual_seed(2))


def chosen(method: Method, queries: Tensor, keys: Tensor, budget: int, candidates: Tensor | None = None) -> Tensor:
    if candidates is None:
        candidates = torch.ones(ROWS, BLOCKS, dtype=torch.bool)
    return method.chooser(keys).choose(queries, candidates, budget, torch.zeros(queries.shape[:3]))


def by_hand(name: str, query: Tensor, block: Tensor) -> float:
    """A block's score for one query; block: [B, D]."""
    scores = [float(query @ key) for key in block]
    low, high = block.amin(0), block.amax(0)
    centre = sum(float(q * (a + b) / 2) for q, a, b in zip(query, low, high, strict=True))
    radius = sum(float(abs(q) * (b - a) / 2) for q, a, b in zip(query, low, high, strict=True))
    match name:
        case "bounds":
            return centre + radius
        case "quarter":
            return centre + 0.25 * radius
        case "mean":
            return sum(float(q * m) for q, m in zip(query, block.mean(0).bfloat16().float(), strict=True))
        case "largest":
            return max(scores)
        case "log-sum":
            return math.log(sum(map(math.exp, scores)))
        case "middle":
            return max(scores[24:40])
        case "strided":
            return math.log(sum(map(math.exp, scores[::8])))
        case _:
            raise AssertionError(name)


REPRESENTATIVES = {
    "bounds": box(1), "quarter": box(0.25), "mean": mean(), "largest": exact(log_sum=False),
    "log-sum": exact(log_sum=True), "middle": middle(16), "strided": strided(8),
}


@pytest.mark.parametrize("pool", [largest, normalised, summed_mass])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_choice_is_that_of_a_loop(name: str, pool: Pool, queries: Tensor, keys: Tensor) -> None:
    found = chosen(Method((Ranking(REPRESENTATIVES[name], pool),)), queries, keys, 3)
    for head in range(HEADS):
        for row in range(ROWS):
            scores = [[by_hand(name, queries[head, each, row], block) for block in keys[head]] for each in range(GROUP)]
            sums = [math.log(sum(map(math.exp, of_head))) for of_head in scores]
            pooled = []
            for block in range(BLOCKS):
                column = [of_head[block] for of_head in scores]
                less = [score - total for score, total in zip(column, sums, strict=True)]
                pooled.append({
                    "largest": max(column), "normalised": max(less), "summed_mass": sum(map(math.exp, less)),
                }[pool.__name__])
            best = sorted(range(BLOCKS), key=lambda block: -pooled[block])[:3]
            assert found[head, row].nonzero().flatten().tolist() == sorted(best)


def test_bounds_bound(queries: Tensor, keys: Tensor) -> None:
    true = (queries.flatten(1, 2) @ keys.flatten(1, 2).mT).reshape(HEADS, -1, BLOCKS, BLOCK).amax(-1)
    for bounds in (box(1), box(1, bits=8), box(1, bits=8, part=32, log_sum=False)):
        assert bool((bounds.score(queries.flatten(1, 2), bounds.prepare(keys)) >= true - 1e-5).all())


def test_bounds_of_8_bits_are_rounded_outward_by_a_power_of_two(keys: Tensor) -> None:
    low, high = outward(keys.amin(2), keys.amax(2))
    assert bool((low <= keys.amin(2)).all())
    assert bool((high >= keys.amax(2)).all())
    assert float((high - keys.amax(2)).max()) <= 2 * float(keys.abs().max()) / 127


def test_two_stages_with_all_blocks_in_the_first_are_one_by_the_second(queries: Tensor, keys: Tensor) -> None:
    second = Ranking(few_bits(2), normalised)
    two = Method((Ranking(box(1), largest),), BLOCKS // 3, second)
    assert torch.equal(chosen(two, queries, keys, 3), chosen(Method((second,)), queries, keys, 3))


def test_the_second_stage_chooses_among_the_first(queries: Tensor, keys: Tensor) -> None:
    first = Ranking(box(1), largest)
    kept = chosen(Method((first,)), queries, keys, 6)
    found = chosen(Method((first,), 2, Ranking(exact(log_sum=True), normalised)), queries, keys, 3)
    assert bool((found <= kept).all())
    assert bool((found.sum(-1) == 3).all())


def test_a_mixture_takes_its_shares_and_no_block_twice(queries: Tensor, keys: Tensor) -> None:
    method = Method((Ranking(mean(), normalised, 0.5), Ranking(box(1), largest, 0.5)))
    found = chosen(method, queries, keys, 4)
    assert bool((found.sum(-1) == 4).all())
    assert bool((found >= chosen(Method((Ranking(mean(), normalised),)), queries, keys, 2)).all())


def test_only_candidates_are_chosen(queries: Tensor, keys: Tensor) -> None:
    candidates = torch.zeros(ROWS, BLOCKS, dtype=torch.bool)
    candidates[:, 2:5] = True
    found = chosen(Method((Ranking(gaussian(1), normalised),)), queries, keys, 8, candidates)
    assert torch.equal(found, candidates.expand(HEADS, -1, -1))


@pytest.mark.parametrize(("representative", "of_dim"), [
    (box(1), 4), (box(1, bits=8), 2), (mean(), 2), (gaussian(1), 4), (few_bits(2), 20), (few_bits(3), 28),
    (strided(8), 0), (exact(log_sum=True), 0),
])
def test_state_bytes(representative: Representative, of_dim: int) -> None:
    scales = 1 if "8 bits" in representative.name else 0
    assert representative.state(64, 128) == of_dim * 128 + scales


def test_stages_share_the_bounds_they_keep() -> None:
    method = Method((Ranking(box(1), largest),), 4, Ranking(few_bits(2), normalised))
    assert method.state_bytes(128) == 20 * 128
    read = method.bytes_per_step(131_072, 8192, heads=8, dim=128, near=608)
    assert read == {
        "scan": 8 * (131_072 - 608) / 64 * 512, "second": 8 * 512 * 20 * 128, "attention": 8 * (8192 + 608) * 512,
    }


def test_rows_attend_to_what_they_chose_and_no_more() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, rows = 1020, 4
    queries = torch.randn(1, 2, rows, DIM, generator=generator)
    keys, values = torch.randn(2, 1, tokens, DIM, generator=generator)
    steps = Rows.of_text(tokens - rows, rows)
    for method, positions in ((DENSE, range(tokens)), (WINDOW_ONLY, [*range(64), *range(448, tokens)])):
        found = Decoding(method, 128).attend(queries, keys, values, steps)
        for row in range(rows):
            seen = [position for position in positions if position <= tokens - rows + row]
            weights = torch.softmax(queries[0, :, row] @ keys[0, seen].mT, -1)
            torch.testing.assert_close(found[0, :, row], weights @ values[0, seen])


def test_a_threshold_leaves_out_values_of_chosen_tokens_only() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(1, 2, 1, DIM, generator=generator)
    keys, values = torch.randn(2, 1, 1020, DIM, generator=generator)
    weights = torch.softmax(queries[0, :, 0] @ keys[0].mT, -1)
    weights[:, 64:448] *= (weights[:, 64:448] >= 2e-3).any(0)
    decoding = Decoding(DENSE, 128, 2e-3)
    torch.testing.assert_close(
        decoding.attend(queries, keys, values, Rows.of_text(1019, 1))[0, :, 0], weights @ values[0]
    )
    assert decoding.values[0] == 384
    assert 0 < decoding.values[1] < 384
    again = Decoding(DENSE, 128, 2e-3, renormalised=True).attend(queries, keys, values, Rows.of_text(1019, 1))
    torch.testing.assert_close(again[0, :, 0], weights / weights.sum(-1, keepdim=True) @ values[0])


def test_kept_choices_are_joined_by_the_two_newest_candidates() -> None:
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(1, 2048, DIM, generator=generator)
    queries = torch.randn(1, 2, 8, DIM, generator=generator)
    method = Method((Ranking(box(1), largest),))
    steps, pieces = Rows.of_text(2040, 8, interval=8), [torch.arange(8)]
    found = Decoding(method, 256).choose(queries, keys, steps, pieces)[0]
    alone = Decoding(method, 256).choose(queries, keys, Rows.of_text(2040, 8), pieces)[0]
    assert torch.equal(found[0], alone[0])
    for row in range(1, 8):
        newest = [int(steps.window(64)[row]) - 2, int(steps.window(64)[row]) - 1]
        expected = sorted({*alone[0].nonzero().flatten().tolist(), *newest})
        assert found[row].nonzero().flatten().tolist() == expected


def test_a_case_decodes_as_its_row_says() -> None:
    case = Case(DENSE, 512, 8, 1e-4, renormalised=True)
    assert case.decoding() == Decoding(DENSE, 512, 1e-4, renormalised=True)
    assert case.as_json() == {
        "method": "dense", "budget": 512, "interval": 8, "threshold": 1e-4, "renormalised": True,
    }


def test_which_search_a_step_uses() -> None:
    step = torch.arange(10)
    assert searched(step, 1).tolist() == list(range(10))
    assert searched(step, 4).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert searched(step, 4, 2).tolist() == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6]
    assert searched(step, 0).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_questions_see_the_context_and_themselves() -> None:
    rows = rows_of_facts(2, 3, 5, 1)
    assert rows.positions.tolist() == [5, 6, 7, 5, 6, 7]
    assert rows.visible[4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9]
