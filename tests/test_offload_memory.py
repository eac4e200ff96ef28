"""Host memory: what the machine has left, how it is taken and given back, and how caches are sized. No kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_host import FakeHost

from hip_trt.cli.offload_report import table
from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, EnvironmentProblem, RuntimeInputError
from hip_trt.offload import CacheCounts, Geometry, Offload, OffloadStats
from hip_trt.offload.host_limits import HostMemoryLeft, host_memory_left, require_host_memory
from hip_trt.offload.host_memory import HostMemory, host_for
from hip_trt.offload.sizes import cache_sizes
from hip_trt.offload.statistics import PrefillMeter, PrefillTraffic

GIB = 1 << 30


def machine(root: Path, *, available: int, groups: str, files: dict[str, dict[str, str]]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available >> 10} kB\nBuffers: 1 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, contents in files.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (path / name).write_text(text)
    return root


def v2(limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(usage), "memory.stat": f"anon 5\ninactive_file {cache}\n"}


def v1(limit: int, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(usage),
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "left", "limit"),
    [
        ("0::/\n", {}, 64 * GIB, "MemAvailable"),
        ("0::/a/b\n", {"": {}, "a": v2("max", GIB), "a/b": v2("max", GIB)}, 64 * GIB, "MemAvailable"),
        ("0::/a/b\n", {"a": v2(str(8 * GIB), 3 * GIB), "a/b": v2("max", GIB)}, 5 * GIB, "cgroup/a"),
        ("0::/a/b\n", {"a": v2(str(8 * GIB), GIB), "a/b": v2(str(4 * GIB), 3 * GIB, GIB)}, 2 * GIB, "cgroup/a/b"),
        ("0::/../elsewhere\n", {"": v2(str(4 * GIB), GIB)}, 3 * GIB, "cgroup"),
        ("0::/x\n", {"": v2(str(GIB), 2 * GIB)}, 0, "cgroup"),
        ("4:memory:/p\n0::/\n", {"memory": v1(1 << 63, 9), "memory/p": v1(6 * GIB, GIB)}, 5 * GIB, "memory/p"),
        ("4:memory:/gone\n", {"memory": v1(6 * GIB, 2 * GIB, GIB)}, 5 * GIB, "memory"),
        ("4:cpu,cpuacct:/p\n", {"cpu,cpuacct/p": v1(GIB, 0)}, 64 * GIB, "MemAvailable"),
    ],
)
def test_what_is_left(tmp_path: Path, groups: str, files: dict[str, dict[str, str]], left: int, limit: str) -> None:
    found = host_memory_left(machine(tmp_path, available=64 * GIB, groups=groups, files=files))
    assert found.bytes == left
    assert limit in found.limit


def test_this_machine() -> None:
    left = host_memory_left()
    assert 1 << 20 < left.bytes < 1 << 50
    require_host_memory(1 << 20, "A test", "None.")


def test_too_little_names_both() -> None:
    left = HostMemoryLeft(20 * GIB, "the test's limit")
    require_host_memory(19 * GIB, "It", "Less.", left=left)
    with pytest.raises(RuntimeInputError) as error:
        require_host_memory(19 * GIB + 1, "It", "Less.", left=left)
    assert f"({19 * GIB + 1:,} bytes)" in error.value.cause
    assert f"({19 * GIB:,} bytes)" in error.value.cause
    assert "the test's limit" in error.value.cause
    assert error.value.remedy == "Less."


def test_memory_is_registered_and_given_back() -> None:
    host = FakeHost()
    memory = HostMemory(host, 5_000_000)
    ((address, size),) = host.registered.items()
    assert size == memory.size == 5_000_000
    assert address % (2 << 20) == 0  # so that huge pages fit
    memory.device_bytes()[:] = torch.arange(5_000_000) % 251
    assert memory.host_bytes().equal((torch.arange(5_000_000) % 251).to(torch.uint8))
    host.synchronize()
    memory.close()
    memory.close()
    assert host.held == 0


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near a limit of the process, threads may be refused: pages are cleared as they are locked."""
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    host = FakeHost()
    memory = HostMemory(host, 1 << 20)
    assert (memory.host_bytes() == 0xFF).all()  # which the host wrote when it locked them
    host.synchronize()
    memory.close()


def test_memory_that_cannot_be_mapped_or_locked() -> None:
    host = FakeHost()
    with pytest.raises(RuntimeInputError, match=r"no .* bytes of host memory"):
        HostMemory(host, 1 << 60)
    host.refuse = 0
    with pytest.raises(EnvironmentProblem, match=r"does not lock 4,096 bytes .*OUT_OF_MEMORY.*ulimit -l"):
        HostMemory(host, 4096)
    assert host.held == 0


def test_no_gpu() -> None:
    with pytest.raises(RuntimeInputError, match="in host memory already"):
        host_for(torch.device("cpu"))


def test_mapped_memory_goes_with_the_process() -> None:
    """Killed while it holds memory: nothing is left in files, shared memory or System V segments."""
    program = (
        "import os, signal, sys; sys.path[:0] = sys.argv[1:]\n"
        "from offload_host import FakeHost\n"
        "from hip_trt.offload.host_memory import HostMemory\n"
        "memory = HostMemory(FakeHost(), 1 << 20)\n"
        "names = [line.split()[5:] for line in open('/proc/self/maps')\n"
        "         if int(line.split('-')[0], 16) <= memory._address < int(line.split()[0].split('-')[1], 16)]\n"
        "print(names, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    assert done.stdout == "[[]]\n", done.stderr  # an anonymous mapping


# Sizes


def geometry(tokens: int = 131072, batch: int = 1, **changes: Any) -> Geometry:
    """Llama-3.1-8B's."""
    config = HipConfig.create(**changes)
    slots = tokens // config.page_size
    masks = config.num_masks(32, 8)
    return Geometry(32, 8, masks, 128, torch.bfloat16, batch, batch * slots, slots, config)


def test_pools() -> None:
    whole = geometry()
    assert whole.pool_shape == (2048, 8, 64, 128)
    assert whole.layer_bytes * 32 == 16 * GIB
    odd = Geometry(1, 1, 1, 8, torch.float16, 1, 3, 3, HipConfig.create(page_size=16))
    assert odd.layer_bytes == odd.value_offset + odd.pool_bytes == 4096 + 768


@pytest.mark.parametrize("tokens", [131072, 1 << 19, 1 << 20])
def test_defaults_are_under_a_twentieth_and_hold_a_step(tokens: int) -> None:
    whole = geometry(tokens)
    sizes = cache_sizes(Offload(), whole)
    assert sizes.too_small == ()
    assert 0.045 < (sizes.keys + sizes.values) / (2 * whole.pool_blocks) < 0.05
    assert all(held >= need for held, need in zip((sizes.keys, sizes.values), whole.step_blocks(), strict=True))


@pytest.mark.parametrize(("tokens", "batch"), [(4096, 1), (16384, 1), (65536, 4)])
def test_defaults_hold_a_step_of_short_contexts(tokens: int, batch: int) -> None:
    whole = geometry(tokens, batch)
    sizes = cache_sizes(Offload(), whole)
    assert sizes.too_small == ()
    for held, need, steps in zip((sizes.keys, sizes.values), whole.step_blocks(), (1, 2), strict=True):
        wanted = min(steps * need, whole.pool_blocks)
        assert wanted <= held < wanted + whole.pool_blocks // 10 + 32


def test_step() -> None:
    always = 4 + 1 + 32 + 1
    assert geometry().step_blocks() == (8 * (34 * 16 + always), 8 * (32 + always))
    assert geometry(batch=3).step_blocks() == (24 * (34 * 16 + always), 24 * (32 + always))
    # 8192 blocks; 512 nodes of level 1, 128 of level 2, where the search begins: 128 + 32 x 4 + 32 x 16 scores
    assert geometry(refresh_interval=1).step_blocks()[0] == 8 * (128 + 128 + 512 + always)
    assert geometry(reuse_level=0).step_blocks() == geometry(refresh_interval=1).step_blocks()
    assert geometry(mask_heads="query").step_blocks() == (32 * 34 * 16 + 8 * always, 32 * 32 + 8 * always)
    assert geometry(tokens=1024).step_blocks() == (8 * 64, 8 * 64 if 32 + always > 64 else 8 * (32 + always))


def test_sizes_that_are_asked_for() -> None:
    whole = geometry()
    sizes = cache_sizes(Offload(key_cache_mib=800, value_cache=0.02), whole)
    assert sizes.keys == 800 * (1 << 20) // 32 // 4096
    assert sizes.values == int(0.02 * 2 * whole.pool_blocks) // 32 * 32
    share = cache_sizes(Offload.of_share(0.05), whole)
    assert 0.0495 < (share.keys + share.values) / (2 * whole.pool_blocks) <= 0.05
    assert cache_sizes(Offload(key_cache=0.5, value_cache=0), geometry(1024)).keys >= geometry(1024).pool_blocks


def test_warning_names_a_size_that_will_do() -> None:
    (line,) = cache_sizes(Offload(key_cache_mib=100, value_cache_mib=100), geometry()).too_small
    assert line.startswith("key_cache: 100.0 MiB hold less than a decode step reads")
    mib = int(line.split(" MiB would do")[0].split()[-1])
    assert cache_sizes(Offload(key_cache_mib=mib, value_cache_mib=100), geometry()).too_small == ()
    assert cache_sizes(Offload(key_cache_mib=mib - 5, value_cache_mib=100), geometry()).too_small != ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_cache": 1.5}, r"key_cache: 1\.5 is not allowed; it must be less than or equal to 1"),
        ({"value_cache_mib": -1}, "value_cache_mib: -1 is not allowed"),
        ({"key_cache_mib": float("inf")}, "key_cache_mib: inf is not allowed"),
        ({"value_cache_mib": float("nan")}, "value_cache_mib: nan is not allowed"),
        ({"key_cache": 0.1, "key_cache_mib": 3}, "key_cache: give either a share or MiB, not both"),
        ({"staging_tokens": -1}, "staging_tokens: -1 is not allowed"),
        ({"caches": 1}, "caches: no such field; the fields are key_cache, "),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Offload.create(**fields)


# Statistics

STATS = OffloadStats(
    keys=(CacheCounts(90, 10, 4, 2, 4), CacheCounts()),
    values=(CacheCounts(30, 10), CacheCounts(5)), tokens=4, block_bytes=4096,
    key_cache_bytes=1 << 20, value_cache_bytes=1 << 19, other_gpu_bytes=1000,
    host_bytes=1 << 25,
)


def test_statistics() -> None:
    assert STATS.bus_bytes == 24 * 4096
    assert STATS.bus_bytes_per_token == 6 * 4096
    assert STATS.gpu_bytes == (1 << 20) + (1 << 19) + 1000
    values = STATS.to_json()
    assert values["keys"] == {
        "hits": 90, "misses": 10, "fills": 4, "evictions": 2, "rereads": 4, "hit_ratio": 0.9, "bus_bytes": 14 * 4096,
    }
    assert values["layers"][1]["keys"]["hit_ratio"] is None
    assert values["values"]["hit_ratio"] == 35 / 45


def test_prefill_is_counted_from_lengths() -> None:
    """Pages of 16 tokens, 1,000 bytes a token. Rows that are idle stage nothing; a page is staged whole."""
    meter = PrefillMeter(torch.device("cpu"), 16)
    assert meter.traffic(16_000) == PrefillTraffic()

    def lengths(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    with torch.inference_mode():
        meter.count(lengths(0, 0), lengths(40, 3), staged=True)
    meter.count(lengths(40, 3, 64), lengths(5, 0, 2), staged=True)
    assert meter.traffic(16_000) == PrefillTraffic(50, (3 + 4) * 16_000, 50_000, 0)
    meter.count(lengths(45), lengths(10), staged=False)
    traffic = meter.traffic(16_000)
    assert traffic == PrefillTraffic(60, 7 * 16_000, 60_000, 10)
    stats = replace(STATS, prefill=traffic)
    assert stats.to_json()["prefill"] == {
        "tokens": 60, "staged_bytes": 112_000, "written_bytes": 60_000, "unstaged_tokens": 10,
        "staged_bytes_per_token": 112_000 / 60, "written_bytes_per_token": 1000.0,
    }
    assert stats.bus_bytes == STATS.bus_bytes
    assert table(stats).caption == (
        "4 decoded tokens. Host memory: 32.0 MiB; GPU memory: 4.7% of that.\n"
        "Prefill: 60 tokens; per token 1.8 KiB read over the bus and 1.0 KiB written. 10 of them without a staging "
        "area: what they read is not counted."
    )
    assert "Prefill" not in str(table(STATS).caption)


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(EnvironmentProblem, match="matplotlib is not installed"):
            STATS.plot(tmp_path / "plot.png")
        return
    STATS.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name in ("no/plot.png", "plot.xyz"):
        with pytest.raises(RuntimeInputError, match="cannot be written"):
            STATS.plot(tmp_path / name)
