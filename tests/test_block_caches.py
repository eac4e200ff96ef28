"""Pools in host memory behind block caches, on emulated kernels: where rows are read changes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import EmulatedLibrary, build, compiler
from offload_steps import CONFIG, Conversation, assert_same
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, PluginError
from hip_trt.library import Library
from hip_trt.offload import BlockCaches, CacheCounts
from hip_trt.offload.block_caches import Landing, Staging

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
HEADS, HEAD_DIM, SLOTS = 2, 64, 16


@pytest.fixture(scope="module")
def library() -> Library:
    return EmulatedLibrary(build())


def pools(batch: int, dtype: torch.dtype = torch.float16, config: HipConfig = CONFIG) -> tuple[Tensor, Tensor]:
    shape = (batch * SLOTS + 3, HEADS, config.page_size, HEAD_DIM)
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


def play(
    library: Library, prompts: tuple[int, ...], *, blocks: int | None, staging: bool = True, steps: int = 7,
    dtype: torch.dtype = torch.float16, config: HipConfig = CONFIG, query_heads: int = 4, landing: int = 0,
) -> tuple[list[Tensor], tuple[CacheCounts, CacheCounts] | None]:
    """Results of a conversation, and what its caches counted.

    Args:
        blocks: of each cache; None: nothing attached.
        landing: blocks of the landing area; 0: none.
    """
    keys, values = pools(len(prompts), dtype, config)
    conversation = Conversation.start(
        library, keys, values, batch=len(prompts), slots=SLOTS, query_heads=query_heads, config=config
    )
    if blocks is None:
        return conversation.play(prompts, steps), None
    area = Staging.allocate(keys, len(prompts) * SLOTS, CPU) if staging else None
    with BlockCaches(
        library, keys, values, config, key_blocks=blocks, value_blocks=blocks, device=CPU, staging=area,
        landing=landing_area(keys, config, landing),
    ) as caches:
        return conversation.play(prompts, steps), caches.counts()


def landing_area(pool: Tensor, config: HipConfig, blocks: int) -> Landing | None:
    if not blocks:
        return None
    area = Landing.allocate(blocks, config.block_k * HEAD_DIM * pool.element_size(), CPU)
    area.rows.fill_(0x7F)  # NaN in every type
    return area


@pytest.mark.parametrize(("prompts", "blocks", "landing"), [
    ((330,), 32, 0), ((330, 40, 133), 0, 8), ((330, 40, 133), 32, 1), ((330, 40, 133), 32, 8),
    ((330, 40, 133), 96, 1024), ((330, 40, 133), 100_000, 0), ((330, 40, 133), 100_000, 1024),
])
def test_every_size_gives_the_same_bits(
    library: Library, prompts: tuple[int, ...], blocks: int, landing: int
) -> None:
    expected, _ = play(library, prompts, blocks=None)
    actual, counts = play(library, prompts, blocks=blocks, landing=landing)
    assert_same(actual, expected)
    assert counts is not None
    for cache in counts:
        assert cache.lookups > 0
        if blocks == 0:
            assert (cache.misses, cache.fills) == (cache.lookups, 0)
            continue
        if landing in (0, 1024):
            assert cache.rereads == (0 if landing else cache.fills)
        else:
            assert 0 < cache.rereads <= cache.fills - (landing > 1)
        if blocks == 100_000:
            assert cache.evictions == 0
            assert cache.hit_ratio > 0.7
        else:
            assert cache.hits > 0
            assert cache.evictions > 0 or blocks > 32


@pytest.mark.parametrize("changes", [
    {"block_k": 8, "decode_mask_k": 32, "page_size": 48}, {"block_k": 32, "decode_mask_k": 64},
    {"block_k": 64, "decode_mask_k": 128, "page_size": 64}, {"mask_heads": "query"}, {"reuse_level": 0},
], ids=str)
def test_configurations(library: Library, changes: dict[str, object]) -> None:
    config = CONFIG.replace(**changes)
    options = {"config": config, "steps": 9, "dtype": torch.bfloat16}
    expected, _ = play(library, (300, 60), blocks=None, **options)
    for landing in (0, 16, 1024):
        actual, counts = play(library, (300, 60), blocks=32, landing=landing, **options)
        assert_same(actual, expected)
        assert counts is not None
        # Values of blocks that two warps read do not land.
        assert (counts[1].rereads < counts[1].fills) == (landing > 0 and config.block_k <= 16)
        if config.block_k < 64:  # else all of it is attended, and nothing searched
            assert (counts[0].rereads < counts[0].fills) == (landing > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_a_staging_area(library: Library, dtype: torch.dtype) -> None:
    """Prefill reads the pools where they are."""
    expected, _ = play(library, (200, 60), blocks=None, dtype=dtype, steps=6)
    for staging in (False, True):
        assert_same(play(library, (200, 60), blocks=64, dtype=dtype, steps=6, staging=staging)[0], expected)


@pytest.mark.parametrize(("dtype", "changes", "query_heads"), [
    (torch.float32, {}, 4), (torch.float32, {"block_k": 32, "decode_mask_k": 64, "mask_heads": "query"}, 4),
    (torch.float16, {"stride_k": 2}, 4), (torch.bfloat16, {"block_k": 4, "decode_mask_k": 32}, 4),
    (torch.float16, {"block_k": 64, "decode_mask_k": 128, "page_size": 64, "stride_k": 4}, 4),
    (torch.float32, {"reuse_level": 0}, 2),
], ids=str)
def test_steps_that_no_cluster_computes(
    library: Library, dtype: torch.dtype, changes: dict[str, object], query_heads: int
) -> None:
    """Kernels for every GPU and type look rows up one by one, and their steps end with a fill."""
    config = CONFIG.replace(**changes)
    options = {"config": config, "steps": 7, "dtype": dtype, "query_heads": query_heads}
    expected, _ = play(library, (270, 60), blocks=None, **options)
    for blocks, landing in ((0, 0), (32, 1024), (100_000, 0)):
        actual, counts = play(library, (270, 60), blocks=blocks, landing=landing, **options)
        assert_same(actual, expected)
        assert counts is not None
        for cache in counts:
            assert cache.misses > 0 or blocks == 0
            assert (cache.hits > 0) == (blocks > 0)
            assert cache.rereads == cache.fills
            if blocks == 100_000:
                assert cache.hit_ratio > 0.7


def test_counts_are_of_blocks(library: Library) -> None:
    """One step over a context that is attended whole: every block once, keys and values; and again, from the caches."""
    keys, values = pools(1)
    conversation = Conversation.start(library, keys, values, batch=1, slots=SLOTS, query_heads=4)
    conversation.call([100])
    with BlockCaches(library, keys, values, CONFIG, key_blocks=512, value_blocks=512, device=CPU) as caches:
        conversation.decode(1)
        blocks = HEADS * 7  # of 16 tokens, 101 in all
        assert caches.counts() == (CacheCounts(0, blocks, blocks, 0, blocks),) * 2
        conversation.decode(1)
        assert caches.counts() == (CacheCounts(blocks, blocks, blocks, 0, blocks),) * 2
        caches.forget()
        conversation.decode(1)
        assert caches.counts() == (CacheCounts(blocks, 2 * blocks, 2 * blocks, 0, 2 * blocks),) * 2
        slots = 2 * 4 * keys.nbytes // caches.block_bytes
        in_caches = (caches.key_blocks + caches.value_blocks) * (16 * HEAD_DIM * 2 + 8 + 8)
        assert caches.nbytes == in_caches + slots + 96 + 2 * 8


def test_least_recently_used_blocks_are_replaced(library: Library) -> None:
    """Sequences take turns; with room for one of them only, each finds nothing of itself; with room for both, all."""
    for blocks, expect_hits in ((32, False), (256, True)):
        keys, values = pools(2)
        conversation = Conversation.start(library, keys, values, batch=2, slots=SLOTS, query_heads=4)
        conversation.call([250, 250])
        with BlockCaches(library, keys, values, CONFIG.replace(decode_mask_k=512), key_blocks=blocks,
                         value_blocks=blocks, device=CPU) as caches:
            conversation.config = CONFIG.replace(decode_mask_k=512)
            conversation.nodes = conversation.nodes.new_full((2, HEADS, 32), -1)
            for _ in range(2):
                for idle in (0, 1):
                    conversation.decode(8, idle=idle)
            before = caches.counts()[1]
            conversation.decode(1, idle=0)
            last = caches.counts()[1] - before
            assert (last.hits == last.lookups) == expect_hits


def test_pages_written_by_others_are_stale_until_forgotten(library: Library) -> None:
    """The one thing that callers have to say; it shows, too, that these tests would notice stale rows."""
    keys, values = pools(1)
    conversation = Conversation.start(library, keys, values, batch=1, slots=SLOTS, query_heads=4)
    conversation.call([100])
    state = conversation.lengths, conversation.nodes

    def step() -> Tensor:
        conversation.lengths, conversation.nodes = state
        conversation.decode(1)
        return conversation.results[-2]

    conversation.results.clear()
    first = step()
    with BlockCaches(library, keys, values, CONFIG, key_blocks=64, value_blocks=64, device=CPU) as caches:
        conversation.results.clear()
        assert torch.equal(step(), first)
        values[conversation.page_table[0, 0]] *= 2
        conversation.results.clear()
        assert torch.equal(step(), first)
        caches.forget()
        conversation.results.clear()
        assert not torch.equal(step(), first)


@pytest.fixture
def attached(library: Library) -> Iterator[tuple[Conversation, BlockCaches]]:
    keys, values = pools(1)
    conversation = Conversation.start(library, keys, values, batch=1, slots=SLOTS, query_heads=4)
    with BlockCaches(library, keys, values, CONFIG, key_blocks=64, value_blocks=64, device=CPU) as caches:
        yield conversation, caches


def test_pools_must_be_past_and_present(library: Library, attached: tuple[Conversation, BlockCaches]) -> None:
    conversation, _ = attached
    with pytest.raises(PluginError, match="past and present"):
        library.attention(
            torch.zeros(1, 4, 1, HEAD_DIM).half(), *(torch.zeros(1, HEADS, 1, HEAD_DIM).half() for _ in range(2)),
            conversation.key_pool.clone(), conversation.value_pool.clone(), conversation.page_table,
            conversation.lengths, torch.ones(1, dtype=torch.int32), conversation.nodes,
            torch.ones(1, dtype=torch.int32), config=CONFIG, scale=1.0, present_key=conversation.key_pool,
            present_value=conversation.value_pool,
        )


def test_sizes(library: Library) -> None:
    keys, values = pools(1)
    with pytest.raises(ConfigError, match="-1 blocks"):
        BlockCaches(library, keys, values, CONFIG, key_blocks=-1, value_blocks=0, device=CPU)
    with BlockCaches(library, keys, values, CONFIG, key_blocks=70, value_blocks=1 << 30, device=CPU) as caches:
        assert caches.key_blocks == 64
        assert keys.nbytes // caches.block_bytes <= caches.value_blocks < keys.nbytes // caches.block_bytes + 32
