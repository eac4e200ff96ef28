"""Calls of ``HipAttention`` over which implementations are compared with :func:`hip_trt.reference.hip_attention`.

``GRID`` holds named cases, each for one thing that an implementation can get wrong; :func:`cases` is the hypothesis
strategy over everything at once. :func:`make_inputs` gives a case its tensors::

    @pytest.mark.parametrize("case", GRID, ids=str)
    def test_agrees(case):
        inputs = make_inputs(case)
        expected = reference(case, inputs)
        ...

Queries and keys are small whole numbers, so every q.k is exact in float16, bfloat16 and float32, scores tie often, and
all implementations must choose the very same blocks. Rows of the pool that no sequence has committed are NaN, and so
are the padding rows of the new tokens. Cases with ``values="blocks"`` show the attended blocks in the output: see
:func:`attended_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.reference import hip_attention

SMALL = HipConfig.create(
    mask_k=16, decode_mask_k=12, block_q=8, block_k=4, stride_q=2, stride_k=1, branch=3, leaf_branch=2, reuse_level=1,
    page_size=8, sink_tokens=4, window_tokens=10,
)
"""Every length small, no two alike: a hundred tokens reach three tree levels."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        past_lengths: committed tokens of each sequence.
        query_lengths: valid new tokens of each sequence.
        name: shown by pytest.
        config: the operator's attributes.
        new_tokens: S; None is the longest of query_lengths.
        heads: query heads and key/value heads.
        head_dim: D.
        dense: the operator's attribute.
        refresh: the refresh_mask input.
        nodes: past_nodes; "none" is -1, "kept" is what a search may have kept, "mixed" has both in turn.
        shared_pages: leading pages that all sequences share.
        values: "random", or "blocks" for one-hot rows that name their key block (modulo head_dim).
        dtype: T.
        seed: of everything random.
    """

    past_lengths: tuple[int, ...]
    query_lengths: tuple[int, ...]
    name: str = ""
    config: HipConfig = SMALL
    new_tokens: int | None = None
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    dense: bool = False
    refresh: bool = True
    nodes: Literal["none", "kept", "mixed"] = "none"
    shared_pages: int = 0
    values: Literal["random", "blocks"] = "random"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        return self.name or repr(self)

    @property
    def scale(self) -> float:
        """Small, so that every attended token keeps a weight that shows in the output."""
        return 1 / self.head_dim

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence after the call."""
        return [past + count for past, count in zip(self.past_lengths, self.query_lengths, strict=True)]

    @property
    def num_masks(self) -> int:
        return self.config.num_masks(*self.heads)


def make_inputs(case: Case) -> dict[str, Tensor]:
    """The operator's inputs by name, on the CPU; pages lie in the pool in random order, with unused ones between."""
    generator = torch.Generator().manual_seed(case.seed)
    config, page_size, (query_heads, kv_heads) = case.config, case.config.page_size, case.heads
    batch, width = len(case.past_lengths), case.new_tokens or max(*case.query_lengths, 1)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(case.dtype)

    def values(positions: Tensor, *shape: int) -> Tensor:
        """[*shape, N, D] for tokens at positions [N]."""
        if case.values == "random":
            return torch.randn(*shape, len(positions), case.head_dim, generator=generator).to(case.dtype)
        rows = torch.nn.functional.one_hot(positions // config.block_k % case.head_dim, case.head_dim)
        return rows.expand(*shape, -1, -1).to(case.dtype)

    page_table = _page_table(case, generator)
    pages = int(page_table.max()) + 3
    past_key = torch.full((pages, kv_heads, page_size, case.head_dim), float("nan"), dtype=case.dtype)
    past_value = past_key.clone()
    shared = torch.arange(case.shared_pages * page_size)
    shared_key, shared_value = whole(kv_heads, len(shared), case.head_dim), values(shared, kv_heads)
    for b, past in enumerate(case.past_lengths):
        position = torch.arange(past)
        key, value = whole(kv_heads, past, case.head_dim), values(position, kv_heads)
        key[:, : len(shared)], value[:, : len(shared)] = shared_key, shared_value
        page = page_table[b, position // page_size].long()
        past_key[page, :, position % page_size] = key.transpose(0, 1)
        past_value[page, :, position % page_size] = value.transpose(0, 1)

    query, key = whole(batch, query_heads, width, case.head_dim), whole(batch, kv_heads, width, case.head_dim)
    value = torch.stack([values(past + torch.arange(width), kv_heads) for past in case.past_lengths])
    for b, count in enumerate(case.query_lengths):
        for tensor in (query, key, value):
            tensor[b, :, count:] = float("nan")
    return {
        "query": query, "key": key, "value": value, "past_key": past_key, "past_value": past_value,
        "page_table": page_table, "past_lengths": torch.tensor(case.past_lengths, dtype=torch.int32),
        "query_lengths": torch.tensor(case.query_lengths, dtype=torch.int32),
        "past_nodes": _past_nodes(case, generator), "refresh_mask": torch.tensor([case.refresh], dtype=torch.int32),
    }


def _page_table(case: Case, generator: torch.Generator) -> Tensor:
    """[B, M] int32, one slot more than needed."""
    page_size, shared = case.config.page_size, case.shared_pages
    assert all(past >= shared * page_size for past in case.past_lengths), "shared pages must be full and committed"
    slots = [-(-length // page_size) for length in case.lengths]
    pages = torch.randperm(sum(slots) + 5, generator=generator, dtype=torch.int32)
    table = torch.full((len(slots), max(slots) + 1), -1, dtype=torch.int32)
    table[:, :shared], pages = pages[:shared], pages[shared:]
    for row, count in zip(table, slots, strict=True):
        row[shared:count], pages = pages[: max(count - shared, 0)], pages[max(count - shared, 0) :]
    return table


def _past_nodes(case: Case, generator: torch.Generator) -> Tensor:
    """[B, Hm, Kd] int32: ascending nodes of reuse_level among those of the whole sequence, or -1."""
    config, budget = case.config, case.config.decode_mask_blocks
    nodes = torch.full((len(case.past_lengths), case.num_masks, budget), -1, dtype=torch.int32)
    size = config.block_k * (config.leaf_branch if config.reuse_level else 1)
    for index in range(nodes.shape[0] * nodes.shape[1]):
        b, mask = divmod(index, nodes.shape[1])
        there = -(-case.past_lengths[b] // size)
        if case.nodes != "none" and there >= budget and (case.nodes == "kept" or index % 2 == 0):
            nodes[b, mask] = torch.randperm(there, generator=generator)[:budget].sort().values
    return nodes


def reference(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`hip_trt.reference.hip_attention` gives for the case."""
    return hip_attention(**inputs, config=case.config, scale=case.scale, dense=case.dense)


def attended_blocks(case: Case, output: Tensor) -> Tensor:
    """Which key blocks each output row attends to: [B, Hq, S, head_dim] bool, for cases with ``values="blocks"``."""
    assert case.values == "blocks"
    assert max(case.lengths) <= case.head_dim * case.config.block_k, "head_dim is too small to tell blocks apart"
    return output > 0


def named(name: str) -> Case:
    """The case of ``GRID`` with this name."""
    return next(case for case in GRID if case.name == name)


def _grid() -> tuple[Case, ...]:
    page, block = SMALL.page_size, SMALL.block_k
    paper = SMALL.replace(branch=2, leaf_branch=2, reuse_level=0, mask_heads="query")
    blocks = Case((0,), (0,), head_dim=64, values="blocks")
    fits = Case((24, 25, 28, 29), (1, 1, 1, 1))  # three candidates up to 28, as many as are chosen
    reuse = replace(blocks, past_lengths=(250, 187), query_lengths=(1, 1), nodes="kept", refresh=False)
    grid = [
        Case((0,), (1,), "first token"),
        Case((0,), (7,), "shorter than a query block"),
        Case((0,), (203,), "long prefill"),
        Case((0,), (64,), "whole query blocks"),
        Case((64,), (40,), "second chunk"),
        Case((61,), (75,), "chunk from inside a block"),
        Case((61,), (5,), "chunk shorter than a query block"),
        Case((0, 120, 33), (90, 41, 2), "ragged", new_tokens=95),
        Case((0, 17, 130), (0, 90, 0), "idle rows in prefill"),
        Case((150, 12, 300, 0), (1, 1, 0, 1), "idle row in decode"),
        Case((150, 12), (0, 0), "all rows idle", new_tokens=1),
        Case((40, 0), (0, 0), "all rows idle in prefill", new_tokens=9),
        Case((0, 100), (90, 60), "dense", dense=True),
        Case((150, 40), (1, 1), "dense decode", dense=True),
        Case((150, 170), (1, 1), "dense decode ignores nodes", dense=True, nodes="kept", refresh=False),
        Case((160, 176), (60, 33), "shared prefix", shared_pages=20),
        Case((160, 176), (1, 1), "shared prefix, decode", shared_pages=20),
        Case((500, 30, 90, 210), (1, 1, 1, 1), "every start level at once"),
        Case((500, 30, 90, 210), (1, 1, 1, 1), "reuse and search at once", nodes="mixed", refresh=False),
        Case((500, 410), (1, 1), "refresh ignores nodes", nodes="kept"),
        Case((150, 180), (9, 5), "prefill ignores nodes", nodes="kept", refresh=False),
        Case((150, 180), (1, 0), "idle keeps nodes", nodes="kept", refresh=False),
        replace(fits, name="search where candidates just fit, or not"),
        replace(fits, name="reuse where candidates just fit, or not", nodes="kept", refresh=False),
        replace(fits, name="the paper's search where candidates just fit, or not", config=paper),
        replace(fits, name="the paper's reuse where candidates just fit, or not", config=paper, nodes="kept",
                refresh=False),
        Case((0, 90), (120, 30), "mask per query head", config=SMALL.replace(mask_heads="query")),
        Case((120, 310), (1, 1), "mask per query head, decode", config=SMALL.replace(mask_heads="query")),
        Case((0, 50), (120, 90), "nine query heads on three", heads=(9, 3)),
        Case((250, 50), (1, 1), "nine query heads on three, decode", heads=(9, 3)),
        Case((0, 50), (120, 90), "one head", heads=(1, 1)),
        Case((0, 50), (120, 90), "no sink", config=SMALL.replace(sink_tokens=0)),
        Case((0, 50), (120, 90), "sink not whole blocks", config=SMALL.replace(sink_tokens=9)),
        Case((0, 50), (120, 90), "sink longer than the sequence", config=SMALL.replace(sink_tokens=500)),
        Case((0, 50), (120, 90), "window of one token", config=SMALL.replace(window_tokens=1)),
        Case((0, 50), (120, 90), "window longer than the sequence", config=SMALL.replace(window_tokens=500)),
        Case((0, 50), (120, 90), "budget of one block", config=SMALL.replace(mask_k=4)),
        Case((50, 300), (1, 1), "decode budget of one block", config=SMALL.replace(decode_mask_k=4)),
        Case((0, 50), (120, 90), "budget covers everything", config=SMALL.replace(mask_k=4096)),
        Case((0, 50), (120, 90), "every row sampled", config=SMALL.replace(stride_q=1)),
        Case((0, 50), (120, 91), "one row sampled", config=SMALL.replace(stride_q=8)),
        Case((0, 50), (120, 90), "stride in keys", config=SMALL.replace(stride_k=4)),
        Case((0, 50), (60, 40), "query blocks of one row", config=SMALL.replace(block_q=1, stride_q=1)),
        Case((0, 50), (120, 90), "one page a block", config=SMALL.replace(page_size=4)),
        Case((0, 50), (120, 90), "pages of five blocks", config=SMALL.replace(page_size=20)),
        Case((0, 50), (120, 90), "wide tree", config=SMALL.replace(branch=16, leaf_branch=16)),
        Case((480, 350), (1, 1), "wide tree, decode", config=SMALL.replace(branch=16, leaf_branch=16)),
        Case((0, 70), (140, 100), "the paper's tree", config=paper),
        Case((370, 350), (1, 1), "the paper's reuse", config=paper, nodes="mixed", refresh=False),
        Case((370, 350), (1, 1), "the paper's tree, nodes for reuse", config=paper),
        replace(blocks, name="blocks: prefill", past_lengths=(0, 100), query_lengths=(250, 140)),
        replace(blocks, name="blocks: decode", past_lengths=(250, 99), query_lengths=(1, 1)),
        replace(reuse, name="blocks: reuse"),
        replace(reuse, name="blocks: the paper's reuse", config=paper),
    ]
    # Around block, page and window edges, where a length of one more or less changes what is chosen.
    edges = sorted({edge + step for edge in (block, page, 6 * page, 8 * page) for step in (-1, 0, 1)})
    grid += [Case((edge,), (1,), f"decode after {edge}") for edge in edges]
    grid += [Case((0,), (edge,), f"prefill of {edge}") for edge in edges]
    assert len({case.name for case in grid}) == len(grid)
    return tuple(grid)


GRID = _grid()


@st.composite
def configs(draw: st.DrawFn) -> HipConfig:
    """Small configurations, every attribute free."""
    block_q, block_k = draw(st.sampled_from([1, 2, 8, 16])), draw(st.sampled_from([2, 4, 8]))
    divisors = [1, 2, 4, 8, 16]
    return HipConfig.create(
        block_q=block_q, block_k=block_k,
        mask_k=block_k * draw(st.integers(1, 6)), decode_mask_k=block_k * draw(st.integers(1, 6)),
        stride_q=draw(st.sampled_from([n for n in divisors if n <= block_q])),
        stride_k=draw(st.sampled_from([n for n in divisors if n <= block_k])),
        branch=draw(st.integers(2, 5)), leaf_branch=draw(st.integers(2, 5)), reuse_level=draw(st.integers(0, 1)),
        page_size=block_k * draw(st.integers(1, 4)), sink_tokens=draw(st.integers(0, 12)),
        window_tokens=draw(st.integers(1, 24)), mask_heads=draw(st.sampled_from(["kv", "query"])),
    )


@st.composite
def cases(draw: st.DrawFn, configs: st.SearchStrategy[HipConfig] = configs()) -> Case:  # noqa: B008
    """Any small call: batch of 1 to 3, up to 310 tokens, decode as often as prefill, long enough to search mostly."""
    config, batch = draw(configs), draw(st.integers(1, 3))
    decode = draw(st.booleans())
    shared = draw(st.integers(0, 2)) if batch > 1 else 0
    lengths = st.integers(shared * config.page_size, 250)
    past = draw(st.lists(st.one_of(st.integers(150, 250), lengths), min_size=batch, max_size=batch))
    counts = st.sampled_from([1, 1, 1, 0]) if decode else st.integers(0, 40)
    new = draw(st.lists(counts, min_size=batch, max_size=batch))
    kv_heads = draw(st.integers(1, 3))
    return Case(
        tuple(past), tuple(new), config=config, new_tokens=1 if decode else max(*new, 2) + draw(st.integers(0, 5)),
        heads=(kv_heads * draw(st.integers(1, 3)), kv_heads), head_dim=draw(st.sampled_from([4, 8])),
        dense=draw(st.sampled_from([False] * 7 + [True])), refresh=draw(st.booleans()),
        nodes=draw(st.sampled_from(["none", "kept", "mixed"])), shared_pages=shared,
        seed=draw(st.integers(0, 2**16)),
    )
