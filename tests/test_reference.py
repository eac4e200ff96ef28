"""The reference against what it is made from: naive dense attention, hand-made trees, and its own invariances."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from operator_cases import SMALL, Case, attended_blocks, make_inputs, named, reference
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.reference import Tree, hip_attention, search, search_from, select_blocks, sparse_attention
from hip_trt.reference import cache as kv_cache

# The paper's halving tree over single keys of two tokens: a level holds four nodes, two are kept.
HALVING = HipConfig.create(
    mask_k=4, decode_mask_k=4, block_q=1, block_k=2, stride_q=1, stride_k=1, branch=2, leaf_branch=2, reuse_level=1,
    page_size=2, sink_tokens=0, window_tokens=1,
)
BUDGET = {"budget": 2, "block_k": 2, "stride_k": 1, "reuse_level": 1}


def keys_of(*scores: float) -> Tensor:
    """[T, 1] keys whose blocks of two tokens score as given against the query 1; the first token of each is lower."""
    return torch.tensor([[float(score - step)] for score in scores for step in (1, 0)])


def dense_attention(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Causal softmax attention, row by row, straight from the definition."""
    output = torch.zeros_like(inputs["query"])
    group = case.heads[0] // case.heads[1]
    for b, (past, count) in enumerate(zip(case.past_lengths, case.query_lengths, strict=True)):
        for head in range(case.heads[0]):
            keys, values = (past_rows(case, inputs, b, head // group, name) for name in ("key", "value"))
            for row in range(count):
                seen = past + row + 1
                weights = torch.softmax(case.scale * (keys[:seen] @ inputs["query"][b, head, row]), dim=0)
                output[b, head, row] = weights @ values[:seen]
    return output


def past_rows(case: Case, inputs: dict[str, Tensor], b: int, head: int, name: str) -> Tensor:
    """[T, D], the cached rows of one head, token by token, and the new ones after them."""
    size, table = case.config.page_size, inputs["page_table"][b].tolist()
    past = [inputs[f"past_{name}"][table[t // size], head, t % size] for t in range(case.past_lengths[b])]
    return torch.stack([*past, *inputs[name][b, head, : case.query_lengths[b]]])


COVERED = SMALL.replace(mask_k=512, decode_mask_k=512)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("lengths", [((0, 90), (70, 31)), ((150, 47), (1, 1)), ((64, 0), (0, 9))], ids=str)
def test_equals_dense_attention_where_candidates_fit(lengths: tuple[tuple[int, ...], ...], heads: str) -> None:
    case = Case(*lengths, config=COVERED.replace(mask_heads=heads), dtype=torch.float64)
    inputs = make_inputs(case)
    output, *_, nodes = reference(case, inputs)
    torch.testing.assert_close(output, dense_attention(case, inputs), rtol=1e-12, atol=1e-12)
    assert torch.equal(nodes, torch.full_like(nodes, -1))
    assert torch.equal(output, reference(replace(case, dense=True), inputs)[0])


def test_dense_attends_to_everything_beyond_the_budget() -> None:
    case = Case((0, 190), (200, 3), dense=True, dtype=torch.float64)
    inputs = make_inputs(case)
    torch.testing.assert_close(reference(case, inputs)[0], dense_attention(case, inputs), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(reference(replace(case, dense=False), inputs)[0], reference(case, inputs)[0])


def test_halving_tree_keeps_the_better_half() -> None:
    """Eight blocks, start at level 1: nodes stand for blocks 1, 3, 5, 7; 0 and 2 win; then blocks 0, 1, 4, 5.

    Block 2 scores highest of all and is missed: the search is greedy.
    """
    keys = keys_of(2, 5, 9, 1, 6, 4, 8, 0)
    tree = Tree(0, 8, branch=2, leaf_branch=2)
    assert tree.start_level(2) == 1
    assert tree.representatives(tree.nodes(1), 1).tolist() == [1, 3, 5, 7]
    blocks, kept = search(torch.ones(1, 1), keys, tree, **BUDGET)
    assert kept is not None
    assert (kept.tolist(), blocks.tolist()) == ([0, 2], [1, 4])


def test_halving_tree_of_three_levels() -> None:
    """Sixteen blocks, start at level 2: nodes of 4 stand for 2, 6, 10, 14; nodes of 2 for their odd blocks."""
    keys = keys_of(1, 3, 7, 2, 0, 0, 1, 0, 0, 8, 5, 4, 0, 0, 2, 0)
    tree = Tree(0, 16, branch=2, leaf_branch=2)
    assert tree.start_level(2) == 2
    assert tree.representatives(tree.nodes(2), 2).tolist() == [2, 6, 10, 14]
    # 2 and 10 win (7, 5): nodes 0, 1, 4, 5 of two blocks score 3, 2, 8, 4; 4 and 5 win; blocks 8 to 11.
    blocks, kept = search(torch.ones(1, 1), keys, tree, **BUDGET)
    assert kept is not None
    assert (kept.tolist(), blocks.tolist()) == ([4, 5], [9, 10])


def test_nodes_are_clipped_to_the_candidates() -> None:
    tree = Tree(3, 9, branch=2, leaf_branch=4)
    assert tree.nodes(1).tolist() == [0, 1, 2]
    assert tree.representatives(tree.nodes(1), 1).tolist() == [3, 6, 8]  # of [3, 4), [4, 8), [8, 9)
    assert tree.children(torch.tensor([0, 2]), 1).tolist() == [3, 8]
    assert tree.size(3) == 16
    assert tree.representatives(tree.nodes(2), 2).tolist() == [5, 8]  # of [3, 8), [8, 9)
    assert tree.children(torch.tensor([0, 1]), 2).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("candidates", "level"), [(1, 0), (10, 0), (11, 1), (30, 1), (31, 2), (90, 2), (91, 3), (270, 3), (271, 4)]
)
def test_start_level_is_the_lowest_that_holds_all_nodes(candidates: int, level: int) -> None:
    """Two of each level are kept: level 0 holds 2 x 5 blocks, others 2 x 3 nodes, of 5, 15, 45 ... blocks."""
    assert Tree(0, candidates, branch=3, leaf_branch=5).start_level(2) == level


def test_candidates_that_just_fit_leave_no_nodes() -> None:
    """They are not searched, so there is nothing to reuse; one more candidate and there is."""
    config = HALVING.replace(reuse_level=0)
    for tokens, searched in ((5, False), (7, True)):
        blocks, kept = select_blocks(
            torch.ones(1, 1, 1), torch.zeros(tokens, 1), torch.tensor([tokens - 1]), config=config, decode=True
        )
        assert blocks.tolist() == [0, 1, tokens // 2]
        assert (kept is not None) == searched


def test_equal_scores_go_to_the_lower_index() -> None:
    blocks, kept = search(torch.ones(1, 1), keys_of(*[1.0] * 8), Tree(0, 8, 2, 2), **BUDGET)
    assert kept is not None
    assert (kept.tolist(), blocks.tolist()) == ([0, 1], [0, 1])


def test_score_is_the_largest_over_rows_and_strided_tokens() -> None:
    keys = torch.tensor([[3.0], [9.0], [-8.0], [1.0], [4.0], [2.0], [4.0], [2.0]])

    def chosen(*rows: float, stride_k: int) -> list[int]:
        queries = torch.tensor([[float(row)] for row in rows])
        options = {"budget": 1, "block_k": 4, "reuse_level": 0}
        return search(queries, keys, Tree(0, 2, 2, 2), stride_k=stride_k, **options)[0].tolist()

    assert chosen(1, stride_k=1) == [0]  # 9 over 4
    assert chosen(1, stride_k=2) == [1]  # 3 under 4: the 9 is not looked at
    assert chosen(1, -1, stride_k=2) == [0]  # the second row scores 8
    assert chosen(1, -1, stride_k=4) == [1]  # 3 under 4


def test_reuse_expands_nodes_and_the_two_newest() -> None:
    """Nodes 0 and 1 of 6; the newest are 4 and 5: blocks 0 to 3 and 8 to 11 are scored, 4 to 7 are not."""
    keys = keys_of(1, 2, 3, 4, 99, 99, 99, 99, 6, 0, 0, 5)
    tree = Tree(0, 12, 2, 2)
    assert search_from(torch.tensor([0, 1]), torch.ones(1, 1), keys, tree, **BUDGET).tolist() == [8, 11]
    keys = keys_of(1, 2, 30, 40, 99, 99, 99, 99, 6, 0, 0, 5)
    assert search_from(torch.tensor([0, 1]), torch.ones(1, 1), keys, tree, **BUDGET).tolist() == [2, 3]
    # A newest node that was kept already counts once, and empty entries not at all.
    assert search_from(torch.tensor([5, -1]), torch.ones(1, 1), keys, tree, **BUDGET).tolist() == [8, 11]


def test_reuse_of_blocks_drops_those_that_are_candidates_no_more() -> None:
    options = BUDGET | {"reuse_level": 0}
    blocks = search_from(torch.tensor([1, 4, 7]), torch.ones(1, 1), keys_of(*range(8)), Tree(2, 7, 2, 2), **options)
    assert blocks.tolist() == [4]


@pytest.mark.parametrize(("stride", "chosen"), [(1, 1), (2, 0), (4, 2)])
def test_sampled_rows_count_back_from_the_last(stride: int, chosen: int) -> None:
    """Row 0 scores block 1 by 4, row 1 block 0 by 3, row 3 block 2 by 1; strides see rows 0 to 3, 1 and 3, or 3."""
    config = HALVING.replace(block_q=4, mask_k=2, stride_q=stride, branch=8, leaf_branch=8)
    keys = torch.zeros(11, 4)
    keys[0, 0], keys[2, 1], keys[4, 2] = 1, 1, 1
    queries = torch.zeros(1, 4, 4)
    queries[0, 0, 1], queries[0, 1, 0], queries[0, 3, 2] = 4, 3, 1
    blocks, _ = select_blocks(queries, keys, torch.arange(7, 11), config=config, decode=False)
    assert blocks.tolist()[:-3] == [chosen]


@pytest.mark.parametrize(("p_first", "window_tokens", "first"), [(20, 1, 10), (20, 2, 9), (21, 2, 10), (21, 3, 9)])
def test_window_begins_at_the_block_that_holds_its_first_token(p_first: int, window_tokens: int, first: int) -> None:
    config = HALVING.replace(window_tokens=window_tokens)
    blocks, _ = select_blocks(
        torch.ones(1, 1, 1), torch.zeros(p_first + 1, 1), torch.tensor([p_first]), config=config, decode=True
    )
    assert blocks.tolist() == [0, 1, *range(first, 11)]  # equal scores: the two lowest


@pytest.mark.parametrize(("sink_tokens", "chosen"), [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2]), (3, [0, 1, 2, 3])])
def test_sink_is_rounded_up_to_whole_blocks(sink_tokens: int, chosen: list[int]) -> None:
    config = HALVING.replace(sink_tokens=sink_tokens)
    blocks, _ = select_blocks(torch.ones(1, 1, 1), torch.zeros(31, 1), torch.tensor([30]), config=config, decode=True)
    assert blocks.tolist() == [*chosen, 15]


def test_sparse_attention_is_softmax_over_the_visible_tokens_of_its_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(n, m, 4, generator=generator) for n, m in ((2, 2), (1, 11), (1, 11)))
    positions = torch.tensor([9, 10])
    output = sparse_attention(queries, keys[0], values[0], torch.tensor([0, 2, 5]), positions, block_k=2, scale=0.5)
    for row, tokens in ((0, [0, 1, 4, 5]), (1, [0, 1, 4, 5, 10])):
        for head in range(2):
            weights = torch.softmax(0.5 * keys[0, tokens] @ queries[head, row], dim=0)
            torch.testing.assert_close(output[head, row], weights @ values[0, tokens])


def test_append_writes_valid_rows_after_the_committed_ones() -> None:
    pool = torch.arange(5 * 2 * 4 * 3, dtype=torch.float32).reshape(5, 2, 4, 3)
    before, new = pool.clone(), -torch.rand(2, 2, 6, 3) - 1
    table = torch.tensor([[3, 1, -1], [0, 4, 2]], dtype=torch.int32)
    after = kv_cache.append(pool, new, table, torch.tensor([2, 7]), torch.tensor([5, 3]))
    assert torch.equal(pool, before)
    expected = pool.clone()
    for b, row, page, slot in [(0, 0, 3, 2), (0, 1, 3, 3), (0, 2, 1, 0), (0, 3, 1, 1), (0, 4, 1, 2),
                               (1, 0, 4, 3), (1, 1, 2, 0), (1, 2, 2, 1)]:
        expected[page, :, slot] = new[b, :, row]
    assert torch.equal(after, expected)
    assert torch.equal(kv_cache.sequence(after, table[0], 7)[:, 2:], new[0, :, :5])


def run_chunks(case: Case, inputs: dict[str, Tensor], bounds: list[int]) -> Tensor:
    """One prefill in several calls; new tokens of row 0 from bounds[i] to bounds[i + 1]."""
    pools, outputs = (inputs["past_key"], inputs["past_value"]), []
    for first, last in pairwise(bounds):
        new = {name: inputs[name][:, :, first:last] for name in ("query", "key", "value")}
        lengths = {"past_lengths": inputs["past_lengths"] + first, "query_lengths": torch.tensor([last - first])}
        output, *pools, _ = hip_attention(
            **inputs | new | lengths | {"past_key": pools[0], "past_value": pools[1]}, config=case.config,
            scale=case.scale,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("bounds", [[0, 8, 200], [0, 64, 72, 160, 200], list(range(0, 201, 8))], ids=len)
def test_chunks_of_whole_query_blocks_change_nothing(bounds: list[int]) -> None:
    case = Case((0,), (200,))
    inputs = make_inputs(case)
    assert torch.equal(run_chunks(case, inputs, bounds), reference(case, inputs)[0])


def test_rows_of_a_ragged_batch_are_what_they_are_alone() -> None:
    case = named("ragged")
    inputs = make_inputs(case)
    output, key, _, nodes = reference(case, inputs)
    for b, count in enumerate(case.query_lengths):
        alone = {name: tensor[b : b + 1] if name not in ("past_key", "past_value", "refresh_mask") else tensor
                 for name, tensor in inputs.items()}
        single, single_key, _, single_nodes = hip_attention(**alone, config=case.config, scale=case.scale)
        assert torch.equal(single[0], output[b])
        assert torch.equal(single_nodes[0], nodes[b])
        page = inputs["page_table"][b, : -(-case.lengths[b] // case.config.page_size)].long()
        assert torch.equal(single_key[page].nan_to_num(), key[page].nan_to_num())
        assert not output[b, :, count:].any(), "padding rows are 0"


@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "shared prefix"])
def test_order_of_pages_changes_no_bit(name: str) -> None:
    case = named(name)
    inputs = make_inputs(case)
    order = torch.randperm(inputs["past_key"].shape[0], generator=torch.Generator().manual_seed(1))
    table = inputs["page_table"]
    moved = inputs | {
        "past_key": inputs["past_key"][order], "past_value": inputs["past_value"][order],
        "page_table": torch.where(table < 0, -1, torch.argsort(order).int()[table.long()]),
    }
    before, after = reference(case, inputs), reference(case, moved)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1].nan_to_num(), before[1][order].nan_to_num())
    assert torch.equal(after[3], before[3])


def test_shared_pages_are_as_good_as_copies() -> None:
    case = named("shared prefix")
    inputs = make_inputs(case)
    table, pages = inputs["page_table"].clone(), len(inputs["past_key"])
    table[1, : case.shared_pages] = torch.arange(case.shared_pages) + pages
    copies = {name: torch.cat([inputs[name], inputs[name][inputs["page_table"][1, : case.shared_pages].long()]])
              for name in ("past_key", "past_value")}
    assert torch.equal(reference(case, inputs | copies | {"page_table": table})[0], reference(case, inputs)[0])


def test_idle_rows_keep_their_nodes_and_write_nothing() -> None:
    case = Case((150, 180), (0, 0), nodes="kept", new_tokens=1)
    inputs = make_inputs(case)
    output, key, _, nodes = reference(case, inputs)
    assert (inputs["past_nodes"] >= 0).all()
    assert torch.equal(nodes, inputs["past_nodes"])
    assert not output.any()
    assert torch.equal(key.nan_to_num(7), inputs["past_key"].nan_to_num(7))


def test_nodes_outlive_decode_steps_until_a_refresh() -> None:
    case = Case((250,), (1,))
    inputs = make_inputs(case)
    *_, kept = reference(case, inputs)
    assert (kept >= 0).all()
    reused = inputs | {"query": -inputs["query"], "past_nodes": kept, "refresh_mask": torch.tensor([0])}
    assert torch.equal(reference(case, reused)[3], kept)
    refreshed = reused | {"refresh_mask": torch.tensor([1])}
    assert not torch.equal(reference(case, refreshed)[3], kept)


def test_budget_and_bounds_of_the_attended_blocks() -> None:
    """Sink and window always, K between them; a mask for each query head where asked, one for each group else."""
    case = named("blocks: decode")
    for heads, distinct in (("kv", 2), ("query", 4)):
        variant = replace(case, config=case.config.replace(mask_heads=heads))
        attended = attended_blocks(variant, reference(variant, make_inputs(variant))[0])[0, :, 0]
        window = (250 - variant.config.window_tokens + 1) // variant.config.block_k
        assert attended[:, 0].all()
        assert attended[:, window : 250 // 4 + 1].all()
        assert (attended[:, 1:window].sum(dim=1) == variant.config.decode_mask_blocks).all()
        assert not attended[:, 250 // 4 + 1 :].any()
        assert len(attended.unique(dim=0)) == distinct
