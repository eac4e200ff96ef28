"""The decode call of the operator's next version, against loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hip_trt.reference import Tree
from hip_trt.reference.decode import (
    DecodeConfig,
    attended_blocks,
    attention,
    bound_scores,
    decode_attention,
    key_bounds,
    search,
    write_bounds,
)

CONFIG = DecodeConfig(mask_k=16, block=4, branch=4, sink_tokens=4, window_tokens=8)
PAGE = 8
GROUP, KV_HEADS, HEAD_DIM = 2, 2, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Sequences:
    """Ragged sequences in shuffled pages, whose undefined rows and bounds are NaN; bounds were written token by token.

    Attributes:
        state: past_key, past_value, past_bounds, page_table, past_lengths.
    """

    def __init__(self, *lengths: int, seed: int = 0, whole: bool = False) -> None:
        random = torch.Generator().manual_seed(seed)
        slots = -(-(max(lengths) + 8) // PAGE)
        pages = len(lengths) * slots
        draw = (lambda *shape: torch.randint(-3, 4, shape, generator=random).float()) if whole else (
            lambda *shape: torch.randn(*shape, generator=random))
        self.draw = draw
        self.rows = {name: [draw(KV_HEADS, length, HEAD_DIM) for length in lengths] for name in ("key", "value")}
        table = torch.randperm(pages, generator=random).reshape(len(lengths), slots).int()
        pools = {name: torch.full((pages, KV_HEADS, PAGE, HEAD_DIM), math.nan) for name in ("key", "value")}
        bounds = torch.full((pages, KV_HEADS, PAGE // CONFIG.block, 2, HEAD_DIM), math.nan)
        for b, length in enumerate(lengths):
            for t in range(length):
                for name, pool in pools.items():
                    pool[table[b, t // PAGE], :, t % PAGE] = self.rows[name][b][:, t]
            for block in range(length // CONFIG.block):
                keys = self.rows["key"][b][:, block * CONFIG.block : (block + 1) * CONFIG.block]
                page, inside = divmod(block * CONFIG.block, PAGE)
                bounds[table[b, page], :, inside // CONFIG.block] = torch.stack([keys.amin(1), keys.amax(1)], 1)
        self.lengths = lengths
        self.state = {
            "past_key": pools["key"], "past_value": pools["value"], "past_bounds": bounds, "page_table": table,
            "past_lengths": torch.tensor(lengths, dtype=torch.int32),
        }

    def call(self, new: int, counts: tuple[int, ...] = (), config: DecodeConfig = CONFIG, **changes: Tensor) -> tuple[
        dict[str, Tensor], tuple[Tensor, ...]
    ]:
        """The inputs and outputs of a call with ``new`` random rows a sequence, as many of them valid as ``counts``."""
        batch = len(self.lengths)
        inputs = {
            "query": self.draw(batch, GROUP * KV_HEADS, new, HEAD_DIM),
            "key": self.draw(batch, KV_HEADS, new, HEAD_DIM), "value": self.draw(batch, KV_HEADS, new, HEAD_DIM),
            "query_lengths": torch.tensor(counts or (new,) * batch, dtype=torch.int32),
            "past_blocks": torch.full((batch, KV_HEADS, config.blocks), -1, dtype=torch.int32),
            "refresh_mask": torch.ones(batch, dtype=torch.int32), **self.state, **changes,
        }
        return inputs, decode_attention(**inputs, config=config, scale=0.5)


def by_hand(inputs: dict[str, Tensor], sequences: Sequences, b: int, head: int, row: int, tokens: list[int]) -> Tensor:
    """Softmax attention of one row over some tokens."""
    kv = head // GROUP
    keys, values = (torch.cat([sequences.rows[n][b][kv], inputs[n][b, kv]]) for n in ("key", "value"))
    weights = torch.softmax(0.5 * (keys[tokens] @ inputs["query"][b, head, row]), 0)
    return weights @ values[tokens]


def best_bounds(inputs: dict[str, Tensor], sequences: Sequences, b: int, kv: int, config: DecodeConfig) -> list[int]:
    """The K candidates of the largest bound on q.k, counted out element by element."""
    first, last = config.candidates(sequences.lengths[b])
    scores = {}
    for block in range(first, last):
        keys = sequences.rows["key"][b][kv, block * config.block : (block + 1) * config.block]
        scores[block] = max(
            sum(
                max(float(q * keys[:, d].min()), float(q * keys[:, d].max()))
                for d, q in enumerate(inputs["query"][b, kv * GROUP + g, 0])
            )
            for g in range(GROUP)
        )
    return sorted(sorted(scores, key=lambda block: (-scores[block], block))[: config.blocks])


@pytest.mark.parametrize("new", [1, 5])
def test_equals_dense_attention_where_candidates_fit(new: int) -> None:
    sequences = Sequences(3, 17, 28)
    inputs, (output, *_, blocks) = sequences.call(new)
    assert blocks.eq(-1).all()
    for b, length in enumerate(sequences.lengths):
        for head in range(GROUP * KV_HEADS):
            for row in range(new):
                expected = by_hand(inputs, sequences, b, head, row, list(range(length + row + 1)))
                torch.testing.assert_close(output[b, head, row], expected)


@pytest.mark.parametrize("new", [1, 3])
def test_attends_to_the_best_bounds(new: int) -> None:
    """A flat search: no more candidates than K x branch."""
    sequences = Sequences(61, 74, whole=True)
    inputs, (output, *_, blocks) = sequences.call(new)
    for b, length in enumerate(sequences.lengths):
        first, last = CONFIG.candidates(length)
        for head in range(GROUP * KV_HEADS):
            chosen = best_bounds(inputs, sequences, b, head // GROUP, CONFIG)
            assert blocks[b, head // GROUP].tolist() == chosen
            inside = [t for block in chosen for t in range(block * CONFIG.block, (block + 1) * CONFIG.block)]
            for row in range(new):
                tokens = [*range(first * CONFIG.block), *inside, *range(last * CONFIG.block, length + row + 1)]
                torch.testing.assert_close(
                    output[b, head, row], by_hand(inputs, sequences, b, head, row, tokens), equal_nan=False
                )


def test_bounds_bound() -> None:
    keys, queries = torch.randn(7, 4, 8), torch.randn(3, 8)
    exact = torch.einsum("gd,ntd->gnt", queries, keys).amax(dim=(0, 2))
    assert (bound_scores(queries, key_bounds(keys)) >= exact - 1e-5).all()
    alone = key_bounds(keys[:, :1])  # of a single key they are exact
    torch.testing.assert_close(bound_scores(queries, alone), (queries @ keys[:, 0].mT).amax(0))


def test_a_tree_of_two_levels_is_descended() -> None:
    """Eight blocks, two kept, branch 2: nodes of two stand for blocks 1, 3, 5, 7; 0 and 2 win: blocks 0, 1, 4, 5."""
    scores = [2, 5, 9, 1, 6, 4, 8, 0]
    bounds = torch.tensor([[[float(s)], [float(s)]] for s in scores])
    assert search(torch.ones(1, 1), bounds, Tree(0, 8, 2, 2), 2).tolist() == [1, 4]
    assert search(torch.ones(1, 1), bounds, Tree(0, 8, 4, 4), 2).tolist() == [2, 6]  # flat: the two best of all


def test_first_row_searches_for_all() -> None:
    """Rows after the first change neither its blocks nor its output, and are not in the way where they are padding."""
    sequences = Sequences(85, 70)
    inputs, (output, *_, blocks) = sequences.call(6, counts=(6, 2))
    alone = {name: inputs[name][:, :, :1] for name in ("query", "key", "value")}
    _, (output_alone, *_, blocks_alone) = sequences.call(1, **alone)
    assert torch.equal(blocks, blocks_alone)
    torch.testing.assert_close(output[:, :, :1], output_alone)
    assert output[1, :, 2:].eq(0).all()
    assert not output.isnan().any()


def test_an_idle_sequence_keeps_its_blocks() -> None:
    sequences = Sequences(70, 70)
    kept = torch.arange(16).reshape(2, 2, 4).int()
    _, (output, *_, blocks) = sequences.call(2, counts=(0, 2), past_blocks=kept)
    assert torch.equal(blocks[0], kept[0])
    assert output[0].eq(0).all()
    assert not torch.equal(blocks[1], kept[1])


@pytest.mark.parametrize("steps", [(1,) * 11, (3, 8), (8, 3), (2, 1, 8)], ids=str)
def test_bounds_are_those_of_full_blocks_however_they_fill(steps: tuple[int, ...]) -> None:
    sequences = Sequences(6, 13)
    pool, bounds, lengths = sequences.state["past_key"], sequences.state["past_bounds"], list(sequences.lengths)
    table, rows = sequences.state["page_table"], [rows.clone() for rows in sequences.rows["key"]]
    for new in steps:
        lengths_before = torch.tensor(lengths, dtype=torch.int32)
        keys = torch.randn(2, KV_HEADS, new, HEAD_DIM)
        for b in range(2):
            for t in range(new):
                pool[table[b, (lengths[b] + t) // PAGE], :, (lengths[b] + t) % PAGE] = keys[b, :, t]
            rows[b] = torch.cat([rows[b], keys[b]], dim=1)
        bounds = write_bounds(pool, bounds, table, lengths_before, torch.full((2,), new))
        lengths = [length + new for length in lengths]
    slots = PAGE // CONFIG.block
    for b, length in enumerate(lengths):
        for block in range(table.shape[1] * slots):
            found = bounds[table[b, block // slots], :, block % slots]
            if block < length // CONFIG.block:
                keys = rows[b][:, block * CONFIG.block : (block + 1) * CONFIG.block]
                assert torch.equal(found, torch.stack([keys.amin(1), keys.amax(1)], 1))
            else:
                assert found.isnan().all()


@pytest.mark.parametrize("kept", [[5, 9, 6, 7], [9, -1, -1, 5], [9, 9, 5, -1], [0, 5, 9, 19]], ids=str)
def test_reused_blocks_are_candidates_once_each_with_the_newest(kept: list[int]) -> None:
    """Of candidates 1 to 18; 17 and 18 are the newest. Holes, repetitions, the sink (0) and the window (19) drop."""
    past = torch.tensor(kept)
    blocks, present = attended_blocks(
        torch.ones(1, 1), torch.zeros(19, 2, 1), past, position=85, refresh=False, config=CONFIG
    )
    assert CONFIG.candidates(85) == (1, 19)
    assert blocks.tolist() == sorted({b for b in kept if 1 <= b < 19} | {17, 18})
    assert torch.equal(present, past)


def test_what_kept_nothing_searches_though_it_was_not_asked_to() -> None:
    sequences = Sequences(74, 74)
    kept = torch.full((2, KV_HEADS, 4), -1, dtype=torch.int32)
    kept[1] = torch.tensor([2, 3, 4, 5])
    inputs, (*_, blocks) = sequences.call(1, past_blocks=kept, refresh_mask=torch.zeros(2, dtype=torch.int32))
    assert blocks[0, 1].tolist() == best_bounds(inputs, sequences, 0, 1, CONFIG)
    assert torch.equal(blocks[1], kept[1])


def test_a_key_that_is_not_a_number_shows() -> None:
    sequences = Sequences(70)
    page, inside = sequences.state["page_table"][0, 33 // PAGE], 33 % PAGE
    sequences.state["past_key"][page, :, inside] = math.nan
    sequences.state["past_bounds"][page, :, inside // CONFIG.block] = math.nan
    _, (output, *_, blocks) = sequences.call(1)
    assert (blocks == 33 // CONFIG.block).any(dim=2).all()
    assert output.isnan().all()


def test_tokens_of_little_probability_are_left_out_of_the_chosen_blocks() -> None:
    config = DecodeConfig(mask_k=16, block=4, branch=4, sink_tokens=4, window_tokens=8, value_threshold=0.05)
    queries, keys, values = torch.randn(2, 3, 8), torch.randn(88, 8), torch.randn(88, 8)
    positions, blocks = torch.arange(85, 88), torch.tensor([3, 7, 8, 12])
    found = attention(queries, keys, values, blocks, positions, scale=0.7, config=config)
    first, last = config.candidates(85)
    always = [*range(first * 4), *range(last * 4, 88)]
    chosen = [int(block) * 4 + t for block in blocks for t in range(4)]

    def weights(head: int, row: int, tokens: list[int]) -> dict[int, float]:
        seen = [t for t in tokens if t <= positions[row]]
        return dict(zip(seen, torch.softmax(0.7 * (keys[seen] @ queries[head, row]), 0).tolist(), strict=True))

    everything = [[weights(head, row, [*always, *chosen]) for row in range(3)] for head in range(2)]
    left = [t for t in chosen if any(of_row[t] >= 0.05 for of_head in everything for of_row in of_head)]
    assert 0 < len(left) < len(chosen)
    for head in range(2):
        for row in range(3):
            kept = weights(head, row, [*always, *left])
            expected = sum(weight * values[t] for t, weight in kept.items())
            torch.testing.assert_close(found[head, row], expected, atol=1e-5, rtol=1e-4)
    every = torch.arange(first, last)  # nothing was pruned, so nothing is left out
    plain = DecodeConfig(mask_k=16, block=4, branch=4, sink_tokens=4, window_tokens=8)
    torch.testing.assert_close(
        attention(queries, keys, values, every, positions, scale=0.7, config=config),
        attention(queries, keys, values, every, positions, scale=0.7, config=plain),
    )
