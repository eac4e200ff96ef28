"""Pools in page-locked host memory on a GPU: the same bits as pools in GPU memory, whatever the caches hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from clusters import LLAMA, NEEDS_CLUSTERS
from offload_steps import CONFIG, Conversation, assert_same
from test_kernels_gpu import library  # noqa: F401  (the fixture)
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.offload import BlockCaches, CacheCounts
from hip_trt.offload.block_caches import Staging
from hip_trt.offload.host_memory import CudaHost, HostMemory

pytestmark = NEEDS_CLUSTERS

CUDA = torch.device("cuda:0")


_held: list[HostMemory] = []


@pytest.fixture(autouse=True)
def host_memory() -> Iterator[None]:
    """Gives back what a test has taken."""
    yield
    torch.cuda.synchronize()
    while _held:
        _held.pop().close()


def host_pool(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Page-locked host memory as a CUDA tensor, until the end of the test."""
    memory = HostMemory(CudaHost(CUDA), math.prod(shape) * dtype.itemsize)
    _held.append(memory)
    return memory.device_bytes().view(dtype).view(*shape)


def pools(batch: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype, config: HipConfig, *,
          host: bool) -> tuple[Tensor, Tensor]:
    shape = (batch * slots + 3, heads, config.page_size, head_dim)
    if host:
        return host_pool(shape, dtype), host_pool(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=CUDA), torch.empty(shape, dtype=dtype, device=CUDA)


def llama(library: Library, batch: int, *, host: bool, slots: int = 180,  # noqa: F811
          config: HipConfig = LLAMA) -> Conversation:
    keys, values = pools(batch, slots, 8, 128, torch.bfloat16, config, host=host)
    return Conversation.start(library, keys, values, batch=batch, slots=slots, query_heads=32, config=config)


def attach(conversation: Conversation, blocks: int, *, staging: bool = True) -> BlockCaches:
    keys = conversation.key_pool
    area = Staging.allocate(keys, conversation.page_table.numel(), CUDA) if staging else None
    return BlockCaches(conversation.library, keys, conversation.value_pool, conversation.config, key_blocks=blocks,
                       value_blocks=blocks, device=CUDA, staging=area)


def talk(conversation: Conversation, prompts: Sequence[int], steps: int) -> list[Tensor]:
    """A prompt, steps, a second turn, steps."""
    conversation.call(prompts)
    conversation.decode(steps // 2)
    conversation.call([40 + b for b in range(len(prompts))], padding=5)
    conversation.decode(steps - steps // 2)
    return conversation.results


@pytest.mark.parametrize("prompts", [(9000,), (9000, 300, 4000, 2500)], ids=["alone", "four"])
def test_a_thousand_steps(library: Library, prompts: tuple[int, ...]) -> None:  # noqa: F811
    resident = talk(llama(library, len(prompts), host=False), prompts, 1000)
    ratios = []
    for blocks in (32, 1024, 4096, 1 << 20):
        conversation = llama(library, len(prompts), host=True)
        with attach(conversation, blocks) as caches:
            assert_same(talk(conversation, prompts, 1000), resident)
            ratios.append(tuple(cache.hit_ratio for cache in caches.counts()))
    assert ratios == sorted(ratios)
    assert min(ratios[-1]) > 0.95


@pytest.mark.parametrize("blocks", [0, 32, 96, 100_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_blocks_and_pages_handed_over(library: Library, dtype: torch.dtype, blocks: int) -> None:  # noqa: F811
    prompts = (330, 40, 133)
    config = CONFIG.replace(block_k=8, page_size=24)
    results = []
    for host in (False, True):
        keys, values = pools(3, 24, 2, 64, dtype, config, host=host)
        conversation = Conversation.start(library, keys, values, batch=3, slots=24, query_heads=6, config=config)
        if host:
            with attach(conversation, blocks):
                results.append(conversation.play(prompts, 40))
        else:
            results.append(conversation.play(prompts, 40))
    assert_same(results[1], results[0])


def test_without_caches(library: Library) -> None:  # noqa: F811
    prompts = (2500,)
    resident = talk(llama(library, 1, host=False), prompts, 20)
    conversation = llama(library, 1, host=True)
    with attach(conversation, 0):
        assert_same(talk(conversation, prompts, 20), resident)


def test_without_staging(library: Library) -> None:  # noqa: F811
    """Prefill reads the pools over the bus, by kernels that add in another order; decode steps are the same bits."""
    resident = talk(llama(library, 1, host=False), (2500,), 20)
    conversation = llama(library, 1, host=True)
    with attach(conversation, 1024, staging=False):
        actual = talk(conversation, (2500,), 20)
    for prefill in (0, 22):
        torch.testing.assert_close(actual[prefill].float(), resident[prefill].float(), rtol=2e-2, atol=2e-3)
        actual[prefill] = resident[prefill]
    assert_same(actual, resident)


def test_masks_per_query_head(library: Library) -> None:  # noqa: F811
    """Several clusters share key blocks, and may want to place the same one at once."""
    config = LLAMA.replace(mask_heads="query", decode_mask_k=256)
    resident = talk(llama(library, 2, host=False, config=config), (6000, 5000), 60)
    conversation = llama(library, 2, host=True, config=config)
    with attach(conversation, 2048):
        assert_same(talk(conversation, (6000, 5000), 60), resident)


def test_graph_replays(library: Library) -> None:  # noqa: F811
    """One captured step, replayed: each replay finds the caches as the last one left them."""
    conversation = llama(library, 1, host=True)
    with attach(conversation, 4096) as caches:
        conversation.call([9000])
        outputs = []
        state = {"query": torch.randn(1, 32, 1, 128, dtype=torch.bfloat16, device=CUDA),
                 "key": torch.randn(1, 8, 1, 128, dtype=torch.bfloat16, device=CUDA),
                 "value": torch.randn(1, 8, 1, 128, dtype=torch.bfloat16, device=CUDA)}
        one = torch.ones(1, dtype=torch.int32, device=CUDA)
        output, nodes = torch.empty_like(state["query"]), torch.empty_like(conversation.nodes)
        workspace = torch.empty(1 << 24, dtype=torch.uint8, device=CUDA)

        def step() -> None:
            library.attention(
                **state, past_key=conversation.key_pool, past_value=conversation.value_pool,
                page_table=conversation.page_table, past_lengths=conversation.lengths, query_lengths=one,
                past_nodes=conversation.nodes, refresh_mask=one, config=LLAMA, scale=128**-0.5, output=output,
                present_key=conversation.key_pool, present_value=conversation.value_pool, present_nodes=nodes,
                workspace=workspace,
            )

        step()
        expected = output.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        caches.forget()
        before = caches.counts()
        for _ in range(3):
            output.fill_(float("nan"))
            graph.replay()
            outputs.append(output.clone())
        assert all(torch.equal(each, expected) for each in outputs)
        keys, values = (after - first for after, first in zip(caches.counts(), before, strict=True))
        assert keys.misses < keys.hits
        assert values.misses * 2 == values.hits
        assert 0 < values.fills <= values.misses


def test_two_streams_share_nothing(library: Library) -> None:  # noqa: F811
    """Two conversations decode at once, each on its own pools and caches."""
    expected = [talk(llama(library, 1, host=False), (n,), 60) for n in (5000, 7000)]
    conversations = [llama(library, 1, host=True) for _ in expected]
    caches = [attach(conversation, 1024) for conversation in conversations]
    streams = [torch.cuda.Stream() for _ in expected]
    torch.cuda.synchronize()
    for turn in range(60):
        for n, conversation, stream in zip((5000, 7000), conversations, streams, strict=True):
            with torch.cuda.stream(stream):
                if turn == 0:
                    conversation.call([n])
                if turn == 30:
                    conversation.call([40], padding=5)
                conversation.call([1], refresh=turn % 30 % LLAMA.refresh_interval == 0)
    for conversation, results in zip(conversations, expected, strict=True):
        assert_same(conversation.results, results)
    for cache in caches:
        cache.detach()
    assert isinstance(caches[0].counts()[0], CacheCounts)


def test_a_pool_beyond_32_bit_offsets(library: Library) -> None:  # noqa: F811
    """The same pages at the end of a pool of 2.2 billion elements."""
    config = LLAMA.replace(page_size=128)
    resident = talk(llama(library, 1, host=False, config=config), (3000,), 20)
    small = llama(library, 1, host=True, config=config)
    pages = 2_200_000_000 // (8 * config.page_size * 128)
    big = [host_pool((pages, 8, config.page_size, 128), torch.bfloat16) for _ in range(2)]
    for pool in big:
        pool[-len(small.key_pool):] = float("nan")
    moved = replace(small, key_pool=big[0], value_pool=big[1],
                    page_table=small.page_table + (pages - len(small.key_pool)))
    with attach(moved, 2048):
        assert_same(talk(moved, (3000,), 20), resident)
