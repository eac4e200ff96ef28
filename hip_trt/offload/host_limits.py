"""How much host memory this process can still lock: asked before anything is allocated.

Locked pages are neither swapped nor reclaimed, so a machine or container that runs out of them kills processes. Nothing
reports that in advance; the sums here do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hip_trt.errors import RuntimeInputError

_KEPT_SHARE = 20
"""One part in so many of what is free stays free, for whatever else runs."""

_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number close to 2**63."""


@dataclass(frozen=True, order=True)
class HostMemoryLeft:
    """Bytes that can be allocated, and what limits them."""

    bytes: int
    limit: str


def host_memory_left(root: Path = Path("/")) -> HostMemoryLeft:
    """The least of what the kernel calls available and what each control group (v1 or v2) above this process has left.

    RLIMIT_MEMLOCK is not counted: CUDA's driver does not lock pages through it. Page caches of files count as free.

    Args:
        root: of the file system that has /proc and /sys.
    """
    left = [HostMemoryLeft(_mem_available(root), "MemAvailable in /proc/meminfo")]
    for folder in _control_groups(root):
        free = _left_in(folder)
        if free is not None:
            left.append(HostMemoryLeft(free, f"the limit of control group {folder.relative_to(root / 'sys/fs')}"))
    return min(left)


def require_host_memory(wanted: int, what: str, remedy: str, *, left: HostMemoryLeft | None = None) -> None:
    """Refuse what cannot be had, before anything is allocated.

    Args:
        wanted: bytes.
        what: what they are for; begins the message.
        remedy: how to want less.
        left: by default :func:`host_memory_left`.

    Raises:
        RuntimeInputError: naming bytes wanted, bytes available and what limits them.
    """
    left = left or host_memory_left()
    available = left.bytes - left.bytes // _KEPT_SHARE
    if wanted > available:
        raise RuntimeInputError(
            f"{what} needs {gib(wanted)} of host memory, and {gib(available)} is available ({left.limit}, less a "
            f"{_KEPT_SHARE}th).",
            remedy,
        )


def gib(count: int) -> str:
    """Bytes for people, exact to a thousandth and with the very number beside it."""
    return f"{count / 2**30:.3f} GiB ({count:,} bytes)"


def _mem_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _control_groups(root: Path) -> list[Path]:
    """This process's control groups that may limit memory, and all above them. In a container the path that the kernel
    names may lie outside what is mounted: then the top of the mount is the container's own group."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / path.lstrip("/")
        while folder != mount:
            folders.append(folder)
            folder = folder.parent
        folders.append(mount)
    return folders


def _left_in(folder: Path) -> int | None:
    """Bytes left in a control group; None if it sets no limit."""
    for limit_file, usage_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_file).read_text().strip()
            usage = int((folder / usage_file).read_text())
            statistics = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        reclaimable = next((int(line.split()[1]) for line in statistics if line.startswith(f"{cache} ")), 0)
        return max(0, int(limit) - usage + reclaimable)
    return None
