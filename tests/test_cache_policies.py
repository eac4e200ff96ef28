"""Cache policies against hand-made traces, an exhaustive search, and the counters of the real kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulated import EmulatedLibrary, build, compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_steps import CONFIG, Conversation
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.cache_policy import BYPASSED, HIT, PLACED, POLICIES, REPLACED, sets_of, simulate
from hip_trt.evaluate.cache_trace import Accesses, LayerStates, Trace, replay
from hip_trt.offload import BlockCaches, CacheCounts
from hip_trt.offload.block_caches import WAYS

H, P, R, B = HIT, PLACED, REPLACED, BYPASSED


def met(policy: str, blocks: Sequence[int], size: int, steps: Sequence[int] | None = None) -> list[int]:
    return list(POLICIES[policy](list(blocks), list(steps or range(len(blocks))), size, 0))


@pytest.mark.parametrize(("policy", "blocks", "expected"), [
    ("LRU", [1, 2, 1, 3, 1, 2, 3], [P, P, H, R, H, R, R]),
    ("LRU", [1, 2, 3, 2, 4, 3], [P, P, R, H, R, R]),
    ("CLOCK", [1, 2, 3, 2, 4, 3], [P, P, R, H, R, H]),  # 2 was used, as was 3, and the hand was at 2
    ("CLOCK", [1, 2, 3, 1, 3, 2], [P, P, R, R, H, R]),
    ("LFU", [1, 1, 2, 3, 2, 1, 3], [P, H, P, R, R, H, R]),
    ("LFU", [1, 2, 2, 1, 3, 1, 2], [P, P, H, H, R, H, R]),  # 1 and 2 were used twice: 2 longer ago
    ("optimum", [1, 2, 3, 1, 2, 3], [P, P, B, H, H, B]),
    ("optimum", [1, 2, 3, 3, 1, 3, 2], [P, P, R, H, H, H, B]),
    ("random", [1, 2, 1, 2, 2], [P, P, H, H, H]),
])
def test_hand_made_traces(policy: str, blocks: list[int], expected: list[int]) -> None:
    """Caches of two blocks."""
    assert met(policy, blocks, 2) == expected


def test_textbook_string() -> None:
    """Faults of least recently used that textbooks give for this string: 10 and 8."""
    blocks = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
    assert [12 - met("LRU", blocks, size).count(H) for size in (3, 4)] == [10, 8]


def fewest_reads(blocks: Sequence[int], size: int) -> int:
    """By trying everything that a cache can do."""
    states = {frozenset[int](): 0}
    for block in blocks:
        following: dict[frozenset[int], int] = {}
        for held, reads in states.items():
            if block in held:
                options = [(held, reads)]
            else:
                options = [(held, reads + 1)]
                grown = held | {block}
                options += [(grown, reads + 1)] if len(grown) <= size else [
                    (grown - {out}, reads + 1) for out in held
                ]
            for state, cost in options:
                following[state] = min(cost, following.get(state, cost))
        states = following
    return min(states.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 3))
def test_optimum_is_the_least_possible(blocks: list[int], size: int) -> None:
    assert sum(event != H for event in met("optimum", blocks, size)) == fewest_reads(blocks, size)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 150), max_size=60), min_size=1, max_size=12), st.sampled_from((32, 64, 96)))
def test_no_policy_is_better_than_the_optimum(steps: list[list[int]], size: int) -> None:
    accesses = Accesses.from_steps(steps)
    best = simulate("optimum", accesses, size).counts()
    for policy in POLICIES:
        counts = simulate(policy, accesses, size).counts()
        assert counts.lookups == len(accesses.blocks)
        assert counts.misses >= max(best.misses, len(np.unique(accesses.blocks)))
        placed = {"shipped": counts.fills, "optimum": 0}.get(policy, counts.misses)
        assert counts.evictions >= placed - size


@pytest.mark.parametrize("size", [3, 40, 80])
def test_optimum_with_much_to_forget(size: int) -> None:
    """Long enough that the heap drops what is past: against the plain rule, in quadratic time."""
    blocks = np.random.default_rng().integers(0, 97, 4000).tolist()
    never = len(blocks)
    nexts = [blocks.index(block, i + 1) if block in blocks[i + 1 :] else never for i, block in enumerate(blocks)]
    held: dict[int, int] = {}
    reads = 0
    for block, later in zip(blocks, nexts, strict=True):
        if block not in held:
            reads += 1
        held[block] = later
        if len(held) > size:
            del held[max(held, key=lambda b: held[b])]
    assert sum(event != H for event in met("optimum", blocks, size)) == reads


def test_every_policy_keeps_what_fits() -> None:
    accesses = Accesses.from_steps([range(20), range(10, 30), range(32)])
    for policy in POLICIES:
        simulation = simulate(policy, accesses, 1024)
        assert simulation.hits.tolist() == [0, 10, 30]
        assert simulation.evictions.sum() == 0


def test_shipped_replaces_nothing_that_the_step_used() -> None:
    """One set of 32 slots, all of them in use or not."""
    full = list(range(32))
    assert met("shipped", [*full, 99], 32, [0] * 33)[-1] == B
    assert met("shipped", [*full, *full, 99], 32, [0] * 32 + [1] * 33)[-1] == B
    assert met("shipped", [*full, *full[1:], 99], 32, [0] * 32 + [1] * 32)[-1] == R
    assert met("shipped", [*full, *full[1:], 99, 0], 32, [0] * 32 + [1] * 32 + [2])[-1] == R


def test_shipped_starts_at_the_slot_of_the_block_among_equals() -> None:
    """Blocks 0 to 31 lie in slots 0 to 31; block 37 takes slot 5, block 69 slot 6, block 6 slot 8, block 5 slot 9."""
    blocks = [*range(32), 37, 69, 7, 4, 6, 5, 8, 9]
    steps = [0] * 32 + [9, 9, 10, 10, 10, 10, 11, 11]
    assert met("shipped", blocks, 32, steps)[32:] == [R, R, H, H, R, R, R, R]


def test_shipped_is_filled_after_the_step() -> None:
    assert met("shipped", [1, 1, 2, 1, 2], 32, [0, 0, 0, 1, 1]) == [P, B, P, H, H]
    assert simulate("shipped", Accesses.from_steps([[1, 1, 2], [1, 2]]), 32).counts() == CacheCounts(2, 3, 2, 0)


def test_shipped_has_whole_sets() -> None:
    accesses = Accesses.from_steps([range(40)] * 2)
    assert simulate("shipped", accesses, 31).counts() == CacheCounts(0, 80, 0, 0)
    assert simulate("shipped", accesses, 63).counts() == simulate("shipped", accesses, 32).counts()


@pytest.mark.parametrize(("policy", "size"), [("MRU", 32), ("LRU", -1)])
def test_bad_requests(policy: str, size: int) -> None:
    with pytest.raises(RuntimeInputError, match=r"MRU|-1"):
        simulate(policy, Accesses.from_steps([[1]]), size)


# ---- Against the kernels ----

HEADS, HEAD_DIM, SLOTS, STEPS = 2, 64, 24, 32


def run_kernels(prompt: int, key_blocks: int, value_blocks: int, config: HipConfig) -> tuple[
    Trace, tuple[CacheCounts, CacheCounts], BlockCaches
]:
    """A prompt and STEPS decode steps in emulation: the reference's trace of them, and what the kernels counted."""
    library = EmulatedLibrary(build())
    key_pool, value_pool = (torch.empty(SLOTS + 3, HEADS, config.page_size, HEAD_DIM).half() for _ in range(2))
    conversation = Conversation.start(
        library, key_pool, value_pool, batch=1, slots=SLOTS, query_heads=4, config=config
    )
    conversation.call([prompt])
    queries: list[Tensor] = []

    def attention(query: Tensor, *others: Any, **options: Any) -> Any:
        queries.append(query[0].float())
        return library.attention(query, *others, **options)

    conversation.library = SimpleNamespace(attention=attention)  # type: ignore[assignment]
    with BlockCaches(library, key_pool, value_pool, config, key_blocks=key_blocks, value_blocks=value_blocks,
                     device=torch.device("cpu")) as caches:
        conversation.decode(STEPS)
        counts = caches.counts()
    pages = conversation.page_table[0].long()
    keys = key_pool[pages].transpose(0, 1).flatten(1, 2)[:, : prompt + STEPS].float()
    return replay(LayerStates(torch.cat(queries, dim=1), keys), config, page_table=pages), counts, caches


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("changes", [{}, {"reuse_level": 0}, {"refresh_interval": 1}], ids=str)
@pytest.mark.parametrize(("size", "tolerance"), [(0, 0), (32, 0.1), (64, 0.03), (1 << 20, 0)])
def test_shipped_counts_what_the_kernels_count(size: int, tolerance: float, changes: dict[str, Any]) -> None:
    """Exactly, with no cache or a full one. In between, the order of look-ups decides which blocks have to make room,
    and warps look up at once what the simulation looks up in order: hits agree to a share of look-ups, which is larger
    where a cache of one set is less than a step reads.
    """
    trace, counts, caches = run_kernels(700, size, size, CONFIG.replace(**changes))
    for accesses, counted, blocks in zip(
        (trace.keys, trace.values), counts, (caches.key_blocks, caches.value_blocks), strict=True
    ):
        simulated = simulate("shipped", accesses, blocks).counts()
        assert simulated.lookups == counted.lookups
        assert abs(simulated.hits - counted.hits) <= tolerance * counted.lookups
    for _, owners, slots, _ in caches._memory:
        for block in slots.nonzero().flatten().tolist():
            assert (int(slots[block]) - 1) // WAYS in sets_of(block, len(owners) // WAYS)
            assert int(owners[slots[block] - 1]) >> 32 == block + 1
