"""Hugging Face models with their KV cache in host memory, on emulated kernels: the same bits as with a resident one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import EmulatedLibrary, build, compiler
from offload_host import FakeHost, emulate
from oracle import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import hip_trt
from hip_trt.config import HipConfig
from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.huggingface import HipCache, cache_argument, output_cache
from hip_trt.offload import Offload, host_limits
from hip_trt.offload.host_limits import HostMemoryLeft
from hip_trt.offload.statistics import PrefillTraffic

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
CONFIG = HipConfig.create(
    mask_k=64, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, branch=2, leaf_branch=2, page_size=16,
    sink_tokens=8, window_tokens=16, refresh_interval=3,
)
TINY, SMALL, WHOLE = (
    Offload(key_cache_mib=0, value_cache_mib=0), Offload(key_cache_mib=1 / 16, value_cache_mib=1 / 16),
    Offload(key_cache=0.5, value_cache=0.5),
)


@pytest.fixture(scope="module")
def library() -> EmulatedLibrary:
    return EmulatedLibrary(build())


@pytest.fixture
def host(library: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    host = emulate(monkeypatch, library)
    yield host
    gc.collect()
    assert host.held == 0


@pytest.fixture
def model() -> Iterator[LlamaForCausalLM]:
    model = tiny_llama(head_dim=64, hidden_size=64, initializer_range=0.2).to(torch.float16)
    with torch.inference_mode():
        yield model
    hip_trt.unpatch(model)


def prompts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def talk(model: LlamaForCausalLM, cache: HipCache | None = None) -> tuple[list[Tensor], HipCache]:
    """Two turns of two sequences, one padded on the left, with decode steps after each: logits of every call."""
    results, valid = [], torch.ones(2, 70, dtype=torch.long)
    valid[1, :37] = 0

    def call(ids: Tensor) -> None:
        nonlocal cache, valid
        if results:
            valid = torch.cat([valid, torch.ones_like(ids)], dim=1)
        given = model(ids, attention_mask=valid, **cache_argument(model, cache), use_cache=True)
        cache = output_cache(model, given)
        results.append(given.logits.clone())

    call(prompts(2, 70))
    for turn in (1, 2):
        for step in range(3):
            call(prompts(2, 1, seed=10 * turn + step))
        if turn == 1:
            call(prompts(2, 20, seed=5))
    assert cache is not None
    return results, cache


_resident: list[list[Tensor]] = []


def resident(model: LlamaForCausalLM) -> list[Tensor]:
    """What :func:`talk` gives where the cache is not offloaded; played once."""
    if not _resident:
        _resident.append(talk(hip_trt.patch(model, CONFIG))[0])
    return _resident[0]


@pytest.mark.parametrize(
    "offload", [TINY, SMALL, WHOLE, Offload(staging_tokens=0), Offload(staging_tokens=64)],
    ids=["no caches", "small", "whole", "no staging", "little staging"],
)
def test_same_bits(model: LlamaForCausalLM, host: FakeHost, offload: Offload) -> None:
    expected = resident(model)
    actual, cache = talk(hip_trt.patch(model, CONFIG, offload=offload))
    for one, other in zip(actual, expected, strict=True):
        assert one.equal(other)
    assert cache.offloaded is not None
    assert host.held == 2  # a range for each layer
    stats = cache.offloaded.stats()
    assert stats.tokens == 12
    assert stats.host_bytes == sum(host.registered.values())
    for counts in (stats.all_keys, stats.all_values):
        assert counts.lookups > 0
        assert (counts.hits > 0) == (offload is not TINY)
    assert stats.bus_bytes_per_token == stats.bus_bytes / 12 > 0
    # 70 and 33 tokens, then 20 each after 73 and 36: of 5 and of 3 pages.
    page, tokens, unstaged = 2 * 2 * 2 * 16 * 64 * 2, 143, offload.staging_tokens is not None
    assert stats.prefill == PrefillTraffic(
        tokens, 0 if unstaged else 8 * page, tokens * page // 16, tokens if unstaged else 0
    )


def test_generate(model: LlamaForCausalLM, host: FakeHost) -> None:
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}
    ids = prompts(2, 40)
    for extra in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 16}):
        expected = hip_trt.patch(model, CONFIG).generate(ids, **options, **extra)
        actual = hip_trt.patch(model, CONFIG, offload=SMALL).generate(ids, **options, **extra)
        assert actual.equal(expected)
        gc.collect()
        assert host.held == 0


def test_growth_keeps_rows_and_counts(model: LlamaForCausalLM, host: FakeHost) -> None:
    """From 3 pages a sequence on; resident pools grow otherwise, and give the same."""
    def grow() -> tuple[list[Tensor], HipCache]:
        cache, results = output_cache(model, model(prompts(2, 46))), []
        for tokens in (1, 1, 1, 1, 14, 1, 1, 1, 40, 1):
            results.append(model(prompts(2, tokens, seed=len(results)), **cache_argument(model, cache)).logits)
        return results, cache

    hip_trt.patch(model, CONFIG)
    expected, _ = grow()
    hip_trt.patch(model, CONFIG, offload=WHOLE)
    actual, cache = grow()
    assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))
    assert cache.offloaded is not None
    assert cache.offloaded.geometry.slots == 9  # 3, 4, 6, 9
    stats = cache.offloaded.stats()
    assert stats.tokens == 16
    in_the_last_steps = model(prompts(2, 1), **cache_argument(model, cache)) and cache.offloaded.stats()
    for before, after in zip(stats.values, in_the_last_steps.values, strict=True):
        assert after.lookups > before.lookups > 7 * (after.lookups - before.lookups) // 2
    assert host.held == 2


def test_enough_pages_at_once_stay(model: LlamaForCausalLM, host: FakeHost) -> None:
    hip_trt.patch(model, CONFIG)
    cache = HipCache(model.config, CONFIG, max_tokens=200, offload=SMALL)
    assert cache.offloaded is None
    model(prompts(1, 30), **cache_argument(model, cache))
    ranges = dict(host.registered)
    for _ in range(4):
        model(prompts(1, 40), **cache_argument(model, cache))
    assert host.registered == ranges
    with pytest.raises(RuntimeInputError, match="cannot be copied"):
        copy.deepcopy(cache)


def test_reordered_and_repeated(model: LlamaForCausalLM, host: FakeHost) -> None:
    ids, last = prompts(3, 40), prompts(4, 1, seed=1)
    results = []
    for offload in (None, WHOLE):
        hip_trt.patch(model, CONFIG, offload=offload)
        cache = output_cache(model, model(ids))
        for step in range(2):
            model(last[:3], **cache_argument(model, cache))  # so that caches hold what will move
            cache.reorder_cache(torch.tensor([2, 0, step]))
        cache.batch_select_indices(torch.tensor([1, 0, 1, 2]))
        results.append([model(last, **cache_argument(model, cache)).logits for _ in range(2)])
        cache.batch_select_indices(torch.tensor([3]))
        results[-1].append(model(last[:1], **cache_argument(model, cache)).logits)
        del cache
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


def test_staging_is_there_for_prefill_only(model: LlamaForCausalLM, host: FakeHost) -> None:
    sizes = {}
    for release in (True, False):
        hip_trt.patch(model, CONFIG, offload=Offload(release_staging=release))
        cache = output_cache(model, model(prompts(1, 40)))
        prefill = cache.offloaded.stats().other_gpu_bytes
        model(prompts(1, 1), **cache_argument(model, cache))
        sizes[release] = prefill - cache.offloaded.stats().other_gpu_bytes
    assert sizes == {True: 2 * 3 * 2 * 16 * 64 * 2 + 4 * 3 * 4, False: 0}


def test_unpatch_gives_memory_back(model: LlamaForCausalLM, host: FakeHost) -> None:
    hip_trt.patch(model, CONFIG, offload=SMALL)
    cache, own = output_cache(model, model(prompts(1, 40))), HipCache(model.config, CONFIG, offload=SMALL)
    model(prompts(1, 8), **cache_argument(model, own))
    assert host.held == 4
    hip_trt.unpatch(model)
    assert host.held == 0
    hip_trt.patch(model, CONFIG, offload=SMALL)
    with pytest.raises(RuntimeInputError, match="released"):
        model(prompts(1, 1), **cache_argument(model, cache))
    cache.close()


def test_error_in_the_middle_gives_memory_back(
    model: LlamaForCausalLM, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    hip_trt.patch(model, CONFIG, offload=SMALL)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(host.held)
        raise ArithmeticError("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        model(prompts(1, 40))
    handle.remove()
    gc.collect()
    assert calls == [2]
    assert host.held == 0


def test_host_memory_too_small(
    model: LlamaForCausalLM, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is taken; and where growing would be too much, what was committed stays usable."""
    layer = 2 * 3 * 2 * 16 * 64 * 2
    left = HostMemoryLeft(2 * layer, "the test's limit")
    monkeypatch.setattr(host_limits, "host_memory_left", lambda: left)
    hip_trt.patch(model, CONFIG, offload=SMALL)
    with pytest.raises(RuntimeInputError, match=rf"2 layers of 3 pages.*\({2 * layer:,} bytes\).*the test's limit"):
        model(prompts(1, 40))
    assert host.held == 0
    left = HostMemoryLeft(4 * layer, "the test's limit")
    cache = output_cache(model, model(prompts(1, 40)))
    left = HostMemoryLeft(layer, "the test's limit")
    with pytest.raises(RuntimeInputError, match=r"2 layers of 5 pages .* grown from 3 pages, needs"):
        model(prompts(1, 40, seed=1), **cache_argument(model, cache))
    assert [layer.lengths.tolist() for layer in cache.layers] == [[40], [40]]
    after = model(prompts(1, 3, seed=2), **cache_argument(model, cache)).logits
    hip_trt.patch(model, CONFIG)
    cache = output_cache(model, model(prompts(1, 40)))
    assert after.equal(model(prompts(1, 3, seed=2), **cache_argument(model, cache)).logits)


def test_locking_refused(model: LlamaForCausalLM, host: FakeHost) -> None:
    hip_trt.patch(model, CONFIG, offload=SMALL)
    host.refuse = 1  # the second layer's range, and what the driver gives of its own
    with pytest.raises(EnvironmentProblem, match="does not lock"):
        model(prompts(1, 40))
    gc.collect()
    assert host.held == 0


def test_growing_refused_half_way(model: LlamaForCausalLM, host: FakeHost) -> None:
    """One layer has grown, the other not: the next call goes on from there."""
    hip_trt.patch(model, CONFIG)
    cache = output_cache(model, model(prompts(1, 40)))
    expected = model(prompts(1, 40, seed=1), **cache_argument(model, cache)).logits
    hip_trt.patch(model, CONFIG, offload=SMALL)
    cache = output_cache(model, model(prompts(1, 40)))
    host.refuse = 1
    with pytest.raises(EnvironmentProblem, match="does not lock"):
        model(prompts(1, 40, seed=1), **cache_argument(model, cache))
    assert [layer.lengths.tolist() for layer in cache.layers] == [[40], [40]]
    host.refuse = None
    assert model(prompts(1, 40, seed=1), **cache_argument(model, cache)).logits.equal(expected)


def test_driver_that_registers_nothing_gives_its_own(
    model: LlamaForCausalLM, host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    expected = resident(model)
    host.refuse_registration = True
    actual, _ = talk(hip_trt.patch(model, CONFIG, offload=SMALL))
    assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))
    assert len(host.allocated) == 2
    assert not host.registered
    assert "the driver's own" in caplog.text


def test_model_on_the_cpu_is_refused(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, CONFIG, offload=SMALL)
    with pytest.raises(RuntimeInputError, match="runs on cpu, where the KV cache is in host memory already"):
        model(prompts(1, 8))
