"""Layers that share a lane on a GPU: what runs beside the calls changes no bit, captured in a CUDA graph or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from clusters import LLAMA, NEEDS_CLUSTERS
from offload_stack import Stack, assert_same
from offload_steps import CONFIG
from test_kernels_gpu import library  # noqa: F401  (the fixture)

from hip_trt.library import Library
from hip_trt.offload import Geometry, Offload, OffloadedCache, OffloadStats

pytestmark = NEEDS_CLUSTERS

CUDA = torch.device("cuda:0")
LAYERS, SLOTS = 6, 256
SMALL = LLAMA.replace(decode_mask_k=256, leaf_branch=8)
"""Steps that read some of 16k tokens only, so that caches smaller than that have much to do."""
TIGHT, WHOLE = Offload(key_cache=0.03, value_cache=0.01), Offload(key_cache=0.5, value_cache=0.5)


def llama(batch: int) -> Geometry:
    return Geometry(LAYERS, 8, 8, 128, torch.bfloat16, batch, batch * SLOTS, SLOTS, SMALL)


def compare(
    library: Library, offload: Offload, sizes: Geometry, play: Callable[[Stack], None]  # noqa: F811
) -> OffloadStats:
    """Play on pools in GPU memory and on offloaded ones: the same bits. Steps must have missed, and filled caches."""
    def pool() -> torch.Tensor:
        return torch.empty(sizes.pool_shape, dtype=sizes.dtype, device=CUDA)

    def stack(pools: list[tuple[torch.Tensor, torch.Tensor]], cache: OffloadedCache | None = None) -> Stack:
        heads = 4 * sizes.num_kv_heads
        played = Stack(library, pools, batch=sizes.batch, query_heads=heads, config=sizes.config, cache=cache)
        play(played)
        torch.cuda.synchronize()
        return played

    resident = stack([(pool(), pool()) for _ in range(sizes.num_layers)])
    with OffloadedCache(sizes, offload, device=CUDA, library=library) as cache:
        assert_same(stack([cache.pools(layer) for layer in range(sizes.num_layers)], cache), resident)
        stats = cache.stats()
    for counts in (*stats.keys, *stats.values):
        assert counts.hits > 0
        assert counts.fills > 0
    return stats


@pytest.mark.parametrize("offload", [TIGHT, WHOLE], ids=["tight", "whole"])
@pytest.mark.parametrize("captured", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_between_steps(
    library: Library, batch: int, captured: bool, offload: Offload  # noqa: F811
) -> None:
    """Prompts in chunks, steps, a second turn: whose rows caches must not serve from before."""
    def play(stack: Stack) -> None:
        stack.prefill([14000, 5000, 900][:batch], chunk=4096)
        stack.decode(10)
        if captured:
            stack.capture()
        stack.decode(60)
        stack.prefill([700, 30, 2000][:batch], chunk=512)
        stack.decode(60)

    compare(library, offload, llama(batch), play)


@pytest.mark.parametrize("layers", [1, LAYERS - 1])
def test_rounds_that_are_broken_off(library: Library, layers: int) -> None:  # noqa: F811
    """Begun again from the first layer, by a step, by a prompt, and by the capture of a graph."""
    def play(stack: Stack) -> None:
        stack.interrupted_prefill(3000, layers=layers)
        stack.prefill([14000, 5000], chunk=8192)
        stack.decode(1, layers=layers)
        for _ in range(4):
            stack.decode(2, layers=layers)
            stack.decode(3)
        stack.decode(1, layers=layers)
        stack.prefill([300, 200], chunk=512)
        stack.interrupted_prefill(50, layers=layers)
        stack.decode(3)
        stack.decode(1, layers=layers)
        stack.capture()
        stack.decode(20)
        stack.interrupted_prefill(2000, layers=layers)
        stack.settle()
        stack.decode(20)

    compare(library, TIGHT, llama(2), play)


def test_several_captures(library: Library) -> None:  # noqa: F811
    """A graph is captured anew, and steps are called in between."""
    def play(stack: Stack) -> None:
        stack.prefill([14000], chunk=16384)
        for _ in range(3):
            stack.decode(2)
            stack.capture()
            stack.decode(12)
            stack.release()

    compare(library, TIGHT, llama(1), play)


@pytest.mark.parametrize("staging", [None, 0], ids=["staged", "unstaged"])
@pytest.mark.parametrize(("dtype", "head_dim"), [
    (torch.float16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 32),
], ids=str)
def test_a_small_stack(
    library: Library, dtype: torch.dtype, head_dim: int, staging: int | None  # noqa: F811
) -> None:
    """Every kernel of offload in few and small calls, for tools that make each take long."""
    slots, config = 16, CONFIG.replace(decode_mask_k=32, leaf_branch=2)
    sizes = Geometry(2, 2, 2, head_dim, dtype, 2, 2 * slots, slots, config)

    def play(stack: Stack) -> None:
        stack.prefill([400, 250], chunk=256)
        stack.decode(4)
        stack.settle()
        stack.decode(1)
        stack.prefill([40, 3], chunk=64)
        stack.decode(3)

    offload = Offload(key_cache=0.25, value_cache=0.25, staging_tokens=staging)
    if staging is None:
        stats = compare(library, offload, sizes, play)
        assert stats.all_keys.evictions > 0
    else:  # prefill rounds otherwise: see docs/offload.md
        with OffloadedCache(sizes, offload, device=CUDA, library=library) as cache:
            pools = [cache.pools(layer) for layer in range(2)]
            stack = Stack(library, pools, batch=2, query_heads=8, config=config, cache=cache)
            play(stack)
            assert not any(result.isnan().any() for result in stack.results)
            assert cache.stats().all_keys.fills > 0
