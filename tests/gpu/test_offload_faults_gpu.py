"""What goes wrong with a KV cache in host memory on a GPU: a clear error or a right result, and nothing left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import offload_child
import pytest
import torch
from clusters import NEEDS_CLUSTERS
from offload_child import CONFIG, CUDA, begin, digest, geometry
from offload_stack import assert_same
from oracle import tiny_llama
from test_kernels_gpu import library  # noqa: F401  (the fixture)
from torch import Tensor

import hip_trt
from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.huggingface import cache_argument, output_cache
from hip_trt.library import Library
from hip_trt.offload import Geometry, Offload, OffloadedCache, host_limits
from hip_trt.offload.host_limits import HostMemoryLeft, host_memory_left
from hip_trt.offload.host_memory import CudaHost, Refused, warn_once
from hip_trt.offload.sizes import MIB

pytestmark = NEEDS_CLUSTERS

GIB = 1 << 30
LAYERS, SLOTS, STEPS = 4, 64, 40
CHILD = [sys.executable, offload_child.__file__]


def resident_pools(sizes: Geometry) -> list[tuple[Tensor, Tensor]]:
    def pool() -> Tensor:
        return torch.empty(sizes.pool_shape, dtype=sizes.dtype, device=CUDA)

    return [(pool(), pool()) for _ in range(sizes.num_layers)]


@pytest.fixture(scope="module")
def expected(library: Library) -> str:  # noqa: F811
    """The digest of what a child gives, from pools in GPU memory."""
    stack = begin(library, resident_pools(geometry(LAYERS, SLOTS)))
    stack.decode(STEPS - 1)
    return digest(stack)


def child(*arguments: object, before: str = "true") -> tuple[int, list[str]]:
    """Run a child after a command of the shell; its exit status and lines."""
    done = subprocess.run(
        ["bash", "-c", f'{before} && exec "$0" "$@"', *CHILD, *map(str, arguments)], capture_output=True, text=True,
        timeout=120, check=False,
    )
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout.splitlines()


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def test_killed_while_it_decodes(library: Library) -> None:  # noqa: F811
    """4 GiB of locked memory come back, and the GPU's; the same can be had at once."""
    layers, slots = 8, 2048
    torch.cuda.empty_cache()
    host, gpu = host_memory_left().bytes, torch.cuda.mem_get_info()[0]
    with subprocess.Popen([*CHILD, str(layers), str(slots), "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"decoding {4 * GIB}\n"
        during = host_memory_left().bytes
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert host - during > 3 * GIB
    assert eventually(lambda: host - host_memory_left().bytes < GIB // 2), "host memory was not given back"
    assert eventually(lambda: gpu - torch.cuda.mem_get_info()[0] < GIB // 4), "GPU memory was not given back"
    with OffloadedCache(geometry(layers, slots), Offload(), device=CUDA, library=library) as cache:
        begin(library, [cache.pools(layer) for layer in range(layers)], cache)
        assert sum(layer.memory.size for layer in cache._layers) == 4 * GIB


def test_limit_of_locked_memory(expected: str) -> None:
    """`ulimit -l` does not count for CUDA's driver; if it did somewhere, that would have to be said."""
    status, lines = child(LAYERS, SLOTS, STEPS, before="ulimit -l 64")
    if status == 0:
        assert lines[-1] == f"digest {expected}"
    else:
        assert (status, len(lines)) == (1, 1)
        assert lines[0].startswith("error: offload: CUDA does not lock ")


def test_limit_of_address_space() -> None:
    status, lines = child(16, 1024, 2, "address_space")
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("error: offload: no 268,435,456 bytes of host memory: ")


def test_device_that_fails() -> None:
    """A kernel has failed, and every call fails after it: closing says so and ends all the same."""
    status, lines = child(2, SLOTS, 2, "device_error")
    assert lines == [f"decoding {2 * SLOTS * 256 * 1024}"]
    assert status == 0


def test_child_without_fault(expected: str) -> None:
    assert child(LAYERS, SLOTS, STEPS) == (0, [f"decoding {LAYERS * SLOTS * 256 * 1024}", f"digest {expected}"])


def test_driver_that_registers_nothing(
    library: Library, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    """It gives memory of its own: the same bits, and a warning."""
    def refuse(*_: object) -> int:
        raise Refused("cuMemHostRegister_v2: CUDA_ERROR_NOT_SUPPORTED (801)")

    warn_once.cache_clear()
    monkeypatch.setattr(CudaHost, "register", refuse)
    with OffloadedCache(geometry(LAYERS, SLOTS), Offload(), device=CUDA, library=library) as cache:
        assert not any(layer.memory.registered for layer in cache._layers)
        stack = begin(library, [cache.pools(layer) for layer in range(LAYERS)], cache)
        stack.decode(STEPS - 1)
        assert digest(stack) == expected
    assert caplog.text.count("host memory is the driver's own") == 1


def test_pinning_refused(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """In both ways, at the third layer: what the first two had is given back, and the GPU goes on."""
    real, asked = CudaHost.register, []

    def refuse_third(host: CudaHost, address: int, size: int) -> int:
        asked.append(size)
        if len(asked) == 3:
            raise Refused("cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")
        return real(host, address, size)

    def refuse(*_: object) -> tuple[int, int]:
        raise Refused("cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)")

    before = host_memory_left().bytes
    with monkeypatch.context() as patch:
        patch.setattr(CudaHost, "register", refuse_third)
        patch.setattr(CudaHost, "allocate", refuse)
        with pytest.raises(EnvironmentProblem, match=r"CUDA does not lock 1,073,741,824 bytes of host memory"):
            OffloadedCache(geometry(4, 4096), Offload(), device=CUDA, library=library)
    assert eventually(lambda: before - host_memory_left().bytes < GIB // 2)
    assert torch.ones(1000, device=CUDA).sum() == 1000


@pytest.mark.parametrize("blocks", [0, 32])
def test_caches_smaller_than_a_step(
    library: Library, blocks: int, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    """32 blocks a layer, where a step reads a thousand."""
    sizes = geometry(LAYERS, SLOTS)
    mib = blocks * sizes.block_bytes * LAYERS / MIB
    resident = begin(library, resident_pools(sizes))
    for _ in range(2):
        resident.decode(STEPS)
    warn_once.cache_clear()
    offload = Offload(key_cache_mib=mib, value_cache_mib=mib)
    with OffloadedCache(sizes, offload, device=CUDA, library=library) as cache:
        stack = begin(library, [cache.pools(layer) for layer in range(LAYERS)], cache)
        stack.decode(STEPS)
        stack.capture()
        stack.decode(STEPS)
        stats = cache.stats()
        assert stats.all_keys.misses > stats.all_keys.hits
        assert {layer.caches.key_blocks for layer in cache._layers} == {blocks}
        assert_same(stack, resident)
    assert caplog.text.count("hold less than a decode step reads") == 2


def test_host_memory_too_small(library: Library) -> None:  # noqa: F811
    """More than the machine has left: said before any is taken."""
    before = host_memory_left()
    slots = before.bytes // (2 * 256 * 1024) + 1
    with pytest.raises(RuntimeInputError, match=r"2 layers of .* needs .* of host memory, and .* available") as error:
        OffloadedCache(geometry(2, slots), Offload(), device=CUDA, library=library)
    assert f"({slots * 2 * 256 * 1024:,} bytes)" in error.value.cause
    assert before.bytes - host_memory_left().bytes < GIB // 4


@pytest.mark.usefixtures("installed")
def test_sequence_that_grows_beyond_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched model: the call that does not fit is refused, and the cache goes on from where it was."""
    model = tiny_llama(head_dim=64, hidden_size=64, initializer_range=0.2, max_position_embeddings=4096)
    model = model.to(CUDA, torch.bfloat16)
    ids = torch.randint(1, 61, (1, 900), generator=torch.Generator().manual_seed(0)).to(CUDA)
    results = []
    for offload in (None, Offload()):
        hip_trt.patch(model, CONFIG, offload=offload)
        with torch.inference_mode():
            cache = output_cache(model, model(ids[:, :500], use_cache=True))
            if offload:
                with monkeypatch.context() as patch:
                    patch.setattr(host_limits, "host_memory_left", lambda: HostMemoryLeft(100_000, "the test's limit"))
                    with pytest.raises(RuntimeInputError, match=r"grown from 8 pages, needs .*the test's limit"):
                        model(ids[:, 500:], **cache_argument(model, cache))
            results.append(model(ids[:, 500:], **cache_argument(model, cache)).logits.cpu())
            results.append(model(ids[:, :1], **cache_argument(model, cache)).logits.cpu())
        del cache
        gc.collect()
        hip_trt.unpatch(model)
    assert results[0].equal(results[2])
    assert results[1].equal(results[3])
