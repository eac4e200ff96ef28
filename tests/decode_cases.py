"""Decode calls of the operator's next version, over which implementations are compared with the reference.

``GRID`` holds named cases, :func:`cases` is the hypothesis strategy over everything at once, :func:`make_inputs` gives
a case its tensors, :func:`assert_agrees` compares.

Queries and keys are small whole numbers unless said, so that the first stage's sums are exact and tie often. Scores of
the second stage are not exact: there another block may be chosen where its score is within rounding of the last one
kept. Rows of the pool, bounds and codes that are undefined are NaN or noise, and so are the padding rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from hip_trt.reference import cache
from hip_trt.reference.decode import (
    BlockState,
    DecodeConfig,
    attention,
    decode_attention,
    first_scores,
    second_scores,
)
from hip_trt.reference.decode_state import write_state
from hip_trt.reference.tree import keep_best

SMALL = DecodeConfig(mask_k=16, search_k=32, block=4, sink_tokens=4, window_tokens=10)
"""Four blocks of eight: fifty tokens are searched in one stage, seventy in two."""
PRUNED = replace(SMALL, value_threshold=0.03)
ROUNDING = 2e-5
"""Of the second stage's scores."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        past_lengths: committed tokens of each sequence.
        query_lengths: valid new tokens of each sequence.
        name: shown by pytest.
        config: what decides the call.
        page_size: a multiple of the config's block.
        new_tokens: S; None is the longest of query_lengths.
        heads: query heads and key/value heads.
        mask_heads: "kv" or "query".
        head_dim: D, a multiple of 16.
        refresh: the refresh_mask input, for each sequence.
        blocks: past_blocks; "none" is -1, "kept" is what a search may have kept, "any" has holes, repetitions and
            numbers of no block, in any order.
        shared_pages: leading pages that all sequences share.
        values: of queries and keys, "whole" or "real" numbers.
        dtype: T.
        seed: of everything random.
    """

    past_lengths: tuple[int, ...]
    query_lengths: tuple[int, ...]
    name: str = ""
    config: DecodeConfig = SMALL
    page_size: int = 8
    new_tokens: int | None = None
    heads: tuple[int, int] = (4, 2)
    mask_heads: str = "kv"
    head_dim: int = 16
    refresh: tuple[int, ...] = ()
    blocks: Literal["none", "kept", "any"] = "none"
    shared_pages: int = 0
    values: Literal["whole", "real"] = "whole"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        return self.name or repr(self)

    @property
    def scale(self) -> float:
        """Such that scores differ by some units."""
        return 0.4 / self.head_dim**0.5

    @property
    def num_masks(self) -> int:
        return self.heads[0] if self.mask_heads == "query" else self.heads[1]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """The call's inputs by name, on the CPU; pages lie in the pool in random order, with unused ones between."""
    random = torch.Generator().manual_seed(case.seed)
    batch, width, (query_heads, kv_heads) = len(case.past_lengths), case.new_tokens or max(*case.query_lengths, 1), (
        case.heads)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randint(-3, 4, shape, generator=random) if case.values == "whole" else (
            2 * torch.randn(shape, generator=random))
        return numbers.to(case.dtype)

    table = _page_table(case, random)
    pages, block = int(table.max()) + 3, case.config.block
    pools = []
    for _ in ("key", "value"):
        pool = torch.full((pages, kv_heads, case.page_size, case.head_dim), torch.nan, dtype=case.dtype)
        shared = draw(kv_heads, case.shared_pages * case.page_size, case.head_dim)
        for b, past in enumerate(case.past_lengths):
            rows, position = draw(kv_heads, past, case.head_dim), torch.arange(past)
            rows[:, : shared.shape[1]] = shared
            pool[table[b, position // case.page_size].long(), :, position % case.page_size] = rows.transpose(0, 1)
        pools.append(pool)
    query, key, value = draw(batch, query_heads, width, case.head_dim), *(
        draw(batch, kv_heads, width, case.head_dim) for _ in range(2))
    for b, count in enumerate(case.query_lengths):
        for tensor in (query, key, value):
            tensor[b, :, count:] = torch.nan
    lengths = torch.tensor(case.past_lengths, dtype=torch.int32)
    bounds = torch.full((pages, kv_heads, case.page_size // block, 2, case.head_dim), torch.nan, dtype=case.dtype)
    codes = torch.randint(-(2**31), 2**31, (pages, kv_heads, case.page_size, case.head_dim // 16), generator=random)
    bounds, codes = write_state(pools[0], bounds, codes.int(), table, torch.zeros_like(lengths), lengths)
    return {
        "query": query, "key": key, "value": value, "past_key": pools[0], "past_value": pools[1],
        "page_table": table, "past_lengths": lengths,
        "query_lengths": torch.tensor(case.query_lengths, dtype=torch.int32), "past_bounds": bounds,
        "past_codes": codes, "past_blocks": _past_blocks(case, random),
        "refresh_mask": torch.tensor(case.refresh or (1,) * batch, dtype=torch.int32),
    }


def _page_table(case: Case, random: torch.Generator) -> Tensor:
    """[B, M] int32, one slot more than needed."""
    lengths = [past + count for past, count in zip(case.past_lengths, case.query_lengths, strict=True)]
    assert min(case.past_lengths) >= case.shared_pages * case.page_size, "shared pages must be full and committed"
    slots = [-(-length // case.page_size) for length in lengths]
    pages = iter(torch.randperm(sum(slots) + 5, generator=random).tolist())
    table = torch.full((len(slots), max(slots) + 1), -1, dtype=torch.int32)
    for slot in range(case.shared_pages):
        table[:, slot] = next(pages)
    for row, count in zip(table, slots, strict=True):
        for slot in range(case.shared_pages, count):
            row[slot] = next(pages)
    return table


def _past_blocks(case: Case, random: torch.Generator) -> Tensor:
    """[B, Hm, K] int32."""
    chosen = case.config.chosen
    blocks = torch.full((len(case.past_lengths), case.num_masks, chosen), -1, dtype=torch.int32)
    for b, past in enumerate(case.past_lengths):
        there = past // case.config.block
        for row in blocks[b]:
            if case.blocks == "any":
                row[:] = torch.randint(-1, there + 2, (chosen,), generator=random)
                row[row > there] = 2**31 - 1
            elif case.blocks == "kept" and there >= chosen:
                row[:] = torch.randperm(there, generator=random)[:chosen].sort().values
    return blocks


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """What the reference gives for the case."""
    return decode_attention(**inputs, config=case.config, scale=case.scale)


def assert_agrees(case: Case, inputs: dict[str, Tensor], found: Outputs, *, rtol: float, atol: float) -> None:
    """The state is the reference's bit for bit (NaN is NaN, 0 is -0), blocks but for rounding, the output within rtol
    and atol of the reference's with the same blocks."""
    output, *state, blocks = found
    expected, *expected_state, expected_blocks = reference(case, inputs)
    for tensor, other in zip(state, expected_state, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
    expected = expected.clone()
    for b, mask in (blocks != expected_blocks).any(dim=2).nonzero().tolist():
        expected[b] = _output_with(case, inputs, expected[b], b, mask, blocks[b, mask].long(), expected_state)
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


def _output_with(
    case: Case, inputs: dict[str, Tensor], output: Tensor, b: int, mask: int, blocks: Tensor, state: list[Tensor]
) -> Tensor:
    """A sequence's output, [Hq, S, D], were these blocks attended to, which must be as good as the reference's."""
    config, past, count = case.config, case.past_lengths[b], case.query_lengths[b]
    per_mask = case.heads[0] // case.num_masks
    heads, kv = slice(mask * per_mask, (mask + 1) * per_mask), mask * per_mask * case.heads[1] // case.heads[0]
    searched = count > 0 and config.prunes(past) and (
        bool(inputs["refresh_mask"][b]) or int(inputs["past_blocks"][b, mask, 0]) < 0)
    assert searched, "blocks that no search chose differ"
    queries = inputs["query"][b, heads, :count].float()
    candidates = torch.arange(*config.candidates(past))
    of_head = BlockState(state[2], state[3], inputs["page_table"][b], kv)
    first = first_scores(queries[:, 0], of_head.bounds_of(candidates, torch.float32))
    left = keep_best(candidates, first, config.searched)
    scores = second_scores(queries[:, 0], of_head.keys_of(left, torch.float32), case.scale)
    assert_best(left.tolist(), scores.tolist(), blocks.tolist(), config.chosen)
    keys, values = (
        cache.sequence(pool, inputs["page_table"][b], past + count)[kv].float() for pool in state[:2]
    )
    output = output.clone()
    output[heads, :count] = attention(
        queries, keys, values, blocks, past + torch.arange(count), scale=case.scale, config=config
    ).to(output.dtype)
    return output


def assert_best(blocks: list[int], scores: list[float], chosen: list[int], count: int) -> None:
    """Ascending, ``count`` of the blocks, and none that is worse by more than rounding than one that is missing."""
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    by_block = dict(zip(blocks, scores, strict=True))
    assert by_block.keys() >= set(chosen)
    worst = min(by_block[block] for block in chosen)
    missing = [score for block, score in by_block.items() if block not in chosen]
    assert max(missing, default=worst) <= worst + ROUNDING


def named(name: str) -> Case:
    """The case of ``GRID`` with this name."""
    return next(case for case in GRID if case.name == name)


def _grid() -> tuple[Case, ...]:
    long = Case((150, 201), (1, 1))
    cases = [
        Case((0,), (1,), "first token"),
        Case((0, 3), (8, 5), "first tokens"),
        replace(long, name="long"),
        replace(long, query_lengths=(8, 8), name="eight rows"),
        Case((150, 12, 300, 0), (3, 1, 0, 8), "ragged", new_tokens=8),
        Case((150, 12), (0, 0), "all idle", new_tokens=1, blocks="kept", refresh=(0, 1)),
        Case((0, 0), (0, 0), "all idle and empty", new_tokens=2),
        Case((28, 29, 32, 33), (1, 1, 1, 1), "candidates just fit, or not"),
        Case((28, 29, 32, 33), (1, 1, 1, 1), "candidates just fit, or not, with blocks", blocks="kept",
             refresh=(0,) * 4),
        Case((44, 45, 48, 49), (2, 2, 2, 2), "candidates of one stage, or two"),
        Case((150, 201, 90), (1, 4, 8), "reuse", blocks="kept", refresh=(0, 0, 0)),
        Case((150, 201, 90), (1, 4, 8), "reuse and search", blocks="kept", refresh=(0, 1, 0)),
        Case((150, 201, 90), (8, 8, 8), "reuse of anything", blocks="any", refresh=(0, 0, 0)),
        Case((29, 33, 37), (1, 2, 3), "reuse of few", blocks="kept", refresh=(0, 0, 0), config=PRUNED),
        Case((150, 201), (1, 4), "nothing to reuse", refresh=(0, 0)),
        Case((160, 176), (8, 3), "shared prefix", shared_pages=20),
        replace(long, query_lengths=(1, 5), mask_heads="query", name="mask per query head"),
        replace(long, query_lengths=(1, 5), mask_heads="query", name="reuse per query head", blocks="any",
                refresh=(0, 0)),
        replace(long, heads=(9, 3), name="nine query heads on three"),
        replace(long, heads=(1, 1), name="one head"),
        replace(long, head_dim=48, name="head size no power of two"),
        replace(long, query_lengths=(6, 2), config=PRUNED, name="threshold"),
        replace(long, query_lengths=(6, 2), config=PRUNED, name="threshold, reuse", blocks="kept", refresh=(0, 0)),
        replace(long, config=replace(PRUNED, value_threshold=0.6), name="threshold that leaves sink and window"),
        Case((20, 24), (6, 2), "threshold where all fit", config=PRUNED),
        replace(long, config=replace(SMALL, sink_tokens=0), name="no sink"),
        replace(long, config=replace(SMALL, sink_tokens=9), name="sink not whole blocks"),
        replace(long, config=replace(SMALL, sink_tokens=500), name="sink longer than the sequence"),
        replace(long, config=replace(SMALL, window_tokens=1), name="window of one token"),
        replace(long, config=replace(SMALL, window_tokens=500), name="window longer than the sequence"),
        replace(long, config=replace(SMALL, mask_k=4, search_k=4), name="one block of one"),
        replace(long, config=replace(SMALL, mask_k=4), name="one block of eight"),
        replace(long, config=replace(SMALL, search_k=16), name="first stage decides"),
        replace(long, config=replace(SMALL, search_k=4096), name="second stage decides"),
        replace(long, config=replace(SMALL, mask_k=4096, search_k=4096), name="everything"),
        replace(long, config=replace(PRUNED, dense=True), name="dense"),
        replace(long, config=replace(PRUNED, dense=True), name="dense ignores blocks", query_lengths=(8, 3),
                blocks="kept", refresh=(0, 0)),
        replace(long, page_size=4, name="one page a block"),
        replace(long, page_size=20, name="pages of five blocks"),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return tuple(cases)


GRID = _grid()


@st.composite
def configs(draw: st.DrawFn) -> DecodeConfig:
    """Small configurations, every attribute free."""
    block, chosen = draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 5))
    return DecodeConfig(
        mask_k=block * chosen, search_k=block * (chosen + draw(st.integers(0, 6))), block=block,
        sink_tokens=draw(st.integers(0, 12)), window_tokens=draw(st.integers(1, 24)),
        value_threshold=draw(st.sampled_from([0.0, 0.0, 0.005, 0.05])),
    )


@st.composite
def cases(draw: st.DrawFn, values: Literal["whole", "real"] = "whole") -> Case:
    """Any small call: batch of 1 to 3, up to 160 tokens, long enough to search mostly."""
    config, batch = draw(configs()), draw(st.integers(1, 3))
    page_size = config.block * draw(st.integers(1, 4))
    shared = draw(st.integers(0, 2)) if batch > 1 else 0
    lengths = st.integers(shared * page_size, 160)
    new = draw(st.lists(st.integers(0, 8), min_size=batch, max_size=batch))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        tuple(draw(st.lists(st.one_of(st.integers(90, 160), lengths), min_size=batch, max_size=batch))), tuple(new),
        config=config, page_size=page_size, new_tokens=min(8, max(*new, 1) + draw(st.integers(0, 2))),
        heads=(kv_heads * draw(st.integers(1, 3)), kv_heads), mask_heads=draw(st.sampled_from(["kv", "query"])),
        head_dim=draw(st.sampled_from([16, 32])),
        refresh=tuple(draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch))),
        blocks=draw(st.sampled_from(["none", "kept", "any"])), shared_pages=shared, values=values,
        seed=draw(st.integers(0, 2**16)),
    )
