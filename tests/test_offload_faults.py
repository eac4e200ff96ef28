"""What goes wrong with a KV cache in host memory, as a user meets it: one line that says what to do, or a right result.

The table of docs/offload.md names these tests. The device is emulated; tests/gpu/test_offload_faults_gpu.py has others.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from emulated import compiler
from offload_host import FakeHost
from test_offload_runtime import OFFLOAD, host, library, make, oracle, run  # noqa: F401  (fixtures)

from hip_trt.offload import host_limits
from hip_trt.offload.host_limits import HostMemoryLeft
from hip_trt.offload.host_memory import HostMemory
from hip_trt.runtime import Session

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

Run = Callable[..., Result]
TEXT = "the quick brown fox jumps over the lazy dog. " * 2  # 90 tokens, of bytes


def refused(result: Result) -> str:
    """The one line that the command says, on standard error, with nothing on standard output."""
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_host_memory_too_small(run: Run, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    left = HostMemoryLeft(100_000, "the limit of control group cgroup/memory")
    monkeypatch.setattr(host_limits, "host_memory_left", lambda: left)
    line = refused(run("-p", TEXT, "--offload"))
    assert "A KV cache of 2 layers of 6 pages of 16 tokens needs" in line
    assert "(98,304 bytes) of host memory, and" in line
    assert "(95,000 bytes) is available (the limit of control group cgroup/memory, less a 20th)" in line
    assert "Use fewer pages" in line
    assert (host.held, host.most_held) == (0, 0)  # before any is taken
    assert run("-p", TEXT[:40], "--offload").exit_code == 0  # which fits


def test_pinning_refused(run: Run, host: FakeHost) -> None:  # noqa: F811
    """By the driver, for the second layer, in both ways: the first layer's memory is given back."""
    host.refuse = 1
    line = refused(run("-p", TEXT, "--offload"))
    assert "CUDA does not lock 49,152 bytes of host memory (cuMemHost: CUDA_ERROR_OUT_OF_MEMORY (2)" in line
    assert "ulimit -l" in line
    assert (host.held, host.most_held) == (0, 1)


def test_registering_refused(run: Run, host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """A driver that has memory of its own to give: the same text, and a warning."""
    plain = run("-p", TEXT)
    host.refuse_registration = True
    result = run("-p", TEXT, "--offload")
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    assert caplog.text.count("host memory is the driver's own, perhaps slower") == 1


@pytest.mark.parametrize("small", [("key",), ("value",), ("key", "value")], ids="-".join)
def test_caches_smaller_than_a_step(
    run: Run, caplog: pytest.LogCaptureFixture, small: tuple[str, ...]  # noqa: F811
) -> None:
    """The same text, and a warning for each that says what would do."""
    plain = run("-p", TEXT)
    result = run("-p", TEXT, "--offload", *(word for name in small for word in (f"--{name}-cache-mib", 0)))
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    for name in ("key", "value"):
        assert caplog.text.count(f"{name}_cache: 0.0 MiB hold less than a decode step reads") == (name in small)
        assert (f"1 MiB would do (--{name}-cache-mib)" in caplog.text) == (name in small)


def test_sequence_longer_than_capacity(run: Run, host: FakeHost) -> None:  # noqa: F811
    line = refused(run("-p", TEXT * 2, "--offload"))  # 180 tokens
    assert "180 tokens and 6 to generate are 186, but the KV cache holds 128 per sequence. Raise max_seq_len" in line
    line = refused(run("-p", TEXT, "--offload", "-n", 60))
    assert "90 tokens and 60 to generate are 150, but the KV cache holds 128 per sequence" in line
    assert host.most_held == 0  # before anything is allocated


def test_capacity_reached_in_the_middle(oracle: object, host: FakeHost) -> None:  # noqa: F811
    """A step too many is refused, and what was committed stays as it was."""
    from hip_trt.errors import RuntimeInputError

    results = []
    for offload in (None, OFFLOAD):
        with Session(make(oracle)[0], max_seq_len=32, offload=offload) as session:
            session.append([list(range(31))])
            session.step([1])
            with pytest.raises(RuntimeInputError, match="33 tokens wanted, but the KV cache has room for 32"):
                session.step([2])
            assert session.state.lengths == (32,)
            session.truncate(0, 30)
            results.append(session.step([3])[0].clone())
    assert results[0].equal(results[1])


def test_device_that_fails(oracle: object, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Every call of it fails from then on: memory is given back all the same, and closing raises nothing."""
    session = Session(make(oracle)[0], max_seq_len=32, offload=OFFLOAD)
    session.append([[1, 2, 3]])

    def failed() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(host, "synchronize", failed)
        host.waits += 1  # nothing runs any more
        session.close()
    assert host.held == 0


CHILD = """
import sys, torch; sys.path[:0] = sys.argv[1:]
from emulated import EmulatedLibrary, build
from offload_host import FakeHost
from offload_stack import Stack
from offload_steps import CONFIG
from hip_trt.offload import Geometry, Offload, OffloadedCache
geometry = Geometry(2, 2, 2, 64, torch.float16, 1, 2048, 8, CONFIG)
library = EmulatedLibrary(build())
cache = OffloadedCache(geometry, Offload(), device=torch.device("cpu"), host=FakeHost(library), library=library)
pools = [cache.pools(layer) for layer in range(2)]
stack = Stack(library, pools, batch=1, query_heads=4, config=CONFIG, cache=cache)
stack.prefill([100], chunk=64)
while True:
    stack.decode(1)
    print(sum(layer.memory.size for layer in cache._layers), flush=True)
"""


def test_process_killed() -> None:
    """While it decodes. What it held was no file's and nobody else's, and the same can be had again."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        held = int(child.stdout.readline())
        assert held == 2 * 2 * 2048 * 2 * 32 * 64 * 2
        assert int(child.stdout.readline()) == held
        maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
        assert any(_size(line) >= held // 2 and len(line.split()) == 5 for line in maps)  # an anonymous mapping
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{child.pid}").exists()
    again = FakeHost()
    memory = HostMemory(again, held)
    again.synchronize()
    memory.close()


def _size(line: str) -> int:
    first, last = (int(number, 16) for number in line.split()[0].split("-"))
    return last - first
