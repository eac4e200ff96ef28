"""Layers that share a lane and a staging area, on emulated kernels: what a round leaves, the next one finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulated import EmulatedLibrary, build, compiler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offload_host import FakeHost, nothing_left
from offload_stack import Stack, assert_same
from offload_steps import CONFIG

from hip_trt.offload import Geometry, Offload, OffloadedCache, OffloadStats
from hip_trt.offload.sizes import CacheSizes

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
LAYERS, BATCH, SLOTS = 3, 2, 8
GEOMETRY = Geometry(LAYERS, 2, 2, 64, torch.float16, BATCH, BATCH * SLOTS, SLOTS, CONFIG)


@pytest.fixture(scope="module")
def library() -> EmulatedLibrary:
    return EmulatedLibrary(build())


@contextmanager
def stack(library: EmulatedLibrary, offload: Offload | None) -> Iterator[Stack]:
    if offload is None:
        pools = [(torch.empty(GEOMETRY.pool_shape).half(), torch.empty(GEOMETRY.pool_shape).half())
                 for _ in range(LAYERS)]
        yield Stack(library, pools, batch=BATCH, query_heads=4, config=CONFIG)
        return
    host = FakeHost(library)
    with nothing_left(host), OffloadedCache(
        GEOMETRY, offload, device=torch.device("cpu"), host=host, library=library
    ) as cache:
        pools = [cache.pools(layer) for layer in range(LAYERS)]
        yield Stack(library, pools, batch=BATCH, query_heads=4, config=CONFIG, cache=cache)


def compare(library: EmulatedLibrary, offload: Offload, play: Callable[[Stack], None]) -> OffloadStats:
    """Play on resident pools and on offloaded ones: the same bits. Returns what the caches did."""
    with stack(library, None) as resident, stack(library, offload) as offloaded:
        play(resident)
        play(offloaded)
        assert_same(offloaded, resident)
        assert offloaded.cache is not None
        return offloaded.cache.stats()


@pytest.mark.parametrize("offload", [
    Offload(key_cache=0.25, value_cache=0.25), Offload(key_cache=0.5, value_cache=0.5, release_staging=False),
    Offload(key_cache=0.25, value_cache=0.25, staging_tokens=0),
], ids=["tiny", "whole", "no staging"])
def test_chunks_between_steps(library: EmulatedLibrary, offload: Offload) -> None:
    def play(stack: Stack) -> None:
        stack.prefill([100, 61], chunk=48)
        stack.decode(4)
        stack.prefill([40, 3], chunk=16)
        stack.decode(3)

    stats = compare(library, offload, play)
    for counts in (*stats.keys, *stats.values):
        assert counts.hits > 0
        assert counts.fills > 0


@pytest.mark.parametrize("landing", [8, 1024], ids=["little lands", "all lands"])
def test_rounds_that_are_broken_off(
    library: EmulatedLibrary, landing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first layers are called, then all again, from the same lengths on."""
    monkeypatch.setattr(CacheSizes, "landing", lambda self, num_layers: landing)

    def play(stack: Stack) -> None:
        stack.interrupted_prefill(30, layers=2)
        stack.prefill([90, 50], chunk=64)
        stack.decode(1, layers=2)  # misses the block that it writes: what landed of it is not what the next step writes
        stack.decode(2)
        stack.decode(1, layers=2)
        stack.decode(3)
        stack.decode(2, layers=1)
        stack.interrupted_prefill(5, layers=1)
        stack.decode(2)
        stack.decode(1, layers=2)
        stack.prefill([12, 20], chunk=64)
        stack.decode(3)

    compare(library, Offload(key_cache=0.25, value_cache=0.25), play)


_COUNTS = st.integers(0, 45)
_OPERATIONS = st.one_of(
    st.tuples(st.just("prefill"), _COUNTS, _COUNTS, st.sampled_from([7, 64])),
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("broken step"), st.integers(1, LAYERS - 1)),
    st.tuples(st.just("broken prompt"), st.integers(2, 20), st.integers(1, LAYERS - 1)),
    st.tuples(st.just("forget")),
)


@given(
    operations=st.lists(_OPERATIONS, min_size=2, max_size=8), share=st.sampled_from([0.25, 0.5]),
    landing=st.sampled_from([0, 1, 16, 1024]), staging=st.sampled_from([None, 0]),
)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_order_of_calls(
    library: EmulatedLibrary, operations: list[tuple[Any, ...]], share: float, landing: int, staging: int | None
) -> None:
    """What is missed, lands, is filled later, and is dropped: no order of calls lets a stale row be seen."""
    def play(stack: Stack) -> None:
        stack.prefill([70, 33], chunk=64)
        room = SLOTS * CONFIG.page_size - 70
        for name, *numbers in operations:
            if name == "prefill" and sum(numbers[:2]) and max(numbers[:2]) < room:
                stack.prefill(numbers[:2], chunk=numbers[2])
                room -= max(numbers[:2])
            elif name == "decode" and numbers[0] < room:
                stack.decode(numbers[0])
                room -= numbers[0]
            elif name == "broken step" and room > 1:
                stack.decode(1, layers=numbers[0])
            elif name == "broken prompt" and numbers[0] < room:
                stack.interrupted_prefill(numbers[0], layers=numbers[1])
            elif name == "forget":
                stack.settle()
        stack.decode(min(room, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheSizes, "landing", lambda self, num_layers: landing)
        compare(library, Offload(key_cache=share, value_cache=share, staging_tokens=staging), play)


def test_one_layer_needs_no_lane(library: EmulatedLibrary) -> None:
    host = FakeHost(library)
    geometry = Geometry(1, 2, 2, 64, torch.float16, 1, SLOTS, SLOTS, CONFIG)
    results = []
    with nothing_left(host), OffloadedCache(
        geometry, Offload(key_cache=0.5, value_cache=0.5), device=torch.device("cpu"), host=host, library=library
    ) as cache:
        resident = [(torch.empty(geometry.pool_shape).half(), torch.empty(geometry.pool_shape).half())]
        for pools, offloaded in (([cache.pools(0)], cache), (resident, None)):
            stack = Stack(library, pools, batch=1, query_heads=4, config=CONFIG, cache=offloaded)
            stack.prefill([100], chunk=64)
            stack.decode(4)
            results.append(stack)
        assert_same(*results)
