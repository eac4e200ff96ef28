"""Layers that share a lane on a GPU: what runs beside the calls changes no bit, captured in a CUDA graph or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from clusters import LLAMA, NEEDS_CLUSTERS
from offload_stack import Stack, assert_same
from test_kernels_gpu import library  # noqa: F401  (the fixture)

from hip_trt.library import Library
from hip_trt.offload import Geometry, Offload, OffloadedCache

pytestmark = NEEDS_CLUSTERS

CUDA = torch.device("cuda:0")
LAYERS, SLOTS = 6, 256
SMALL = LLAMA.replace(decode_mask_k=256, leaf_branch=8)
"""Steps that read some of 16k tokens only, so that caches smaller than that have much to do."""
TIGHT, WHOLE = Offload(key_cache=0.03, value_cache=0.01), Offload(key_cache=0.5, value_cache=0.5)


def geometry(batch: int) -> Geometry:
    return Geometry(LAYERS, 8, 8, 128, torch.bfloat16, batch, batch * SLOTS, SLOTS, SMALL)


def compare(
    library: Library, offload: Offload, batch: int, play: Callable[[Stack], None]  # noqa: F811
) -> None:
    """Play on pools in GPU memory and on offloaded ones; steps must have missed blocks, and filled the caches."""
    sizes = geometry(batch)

    def pool() -> torch.Tensor:
        return torch.empty(sizes.pool_shape, dtype=sizes.dtype, device=CUDA)

    resident = Stack(library, [(pool(), pool()) for _ in range(LAYERS)], batch=batch, query_heads=32, config=SMALL)
    play(resident)
    torch.cuda.synchronize()
    with OffloadedCache(sizes, offload, device=CUDA, library=library) as cache:
        pools = [cache.pools(layer) for layer in range(LAYERS)]
        offloaded = Stack(library, pools, batch=batch, query_heads=32, config=SMALL, cache=cache)
        play(offloaded)
        torch.cuda.synchronize()
        assert_same(offloaded, resident)
        stats = cache.stats()
        for counts in (*stats.keys, *stats.values):
            assert counts.hits > 0
            assert counts.fills > 0


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

    compare(library, offload, batch, play)


@pytest.mark.parametrize("layers", [1, LAYERS - 1])
def test_rounds_that_are_broken_off(library: Library, layers: int) -> None:  # noqa: F811
    """Begun again from the first layer, by a step, by a prompt, and by the capture of a graph."""
    def play(stack: Stack) -> None:
        stack.interrupted_prefill(3000, layers=layers)
        stack.prefill([14000, 5000], chunk=8192)
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

    compare(library, TIGHT, 2, play)


def test_several_captures(library: Library) -> None:  # noqa: F811
    """A graph is captured anew, and steps are called in between."""
    def play(stack: Stack) -> None:
        stack.prefill([14000], chunk=16384)
        for _ in range(3):
            stack.decode(2)
            stack.capture()
            stack.decode(12)
            stack.release()

    compare(library, TIGHT, 1, play)
