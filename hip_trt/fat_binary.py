"""Which GPUs a compiled CUDA library has code for, read from the file itself, without CUDA's tools."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from hip_trt.gpu import ComputeCapability

_MAGIC = struct.pack("<I", 0xBA55ED50)
"""Begins each fat binary that nvcc embeds; CUDA does not document the layout."""
_PTX, _CUBIN = 1, 2
_COMPILER = re.compile(rb"Cuda compilation tools, release (\d+)\.(\d+)")
"""In a note that CUDA 13's machine code has; CUDA does not document it."""


@dataclass(frozen=True)
class CompiledFor:
    """What a library was compiled for.

    Attributes:
        cubin: machine code, which runs on GPUs of the same major and the same or a later minor capability.
        ptx: code that the driver compiles for any GPU of this or a later capability.
        cuda: newest release of CUDA that compiled some of it, such as "13.0"; empty where the code does not say.
    """

    cubin: frozenset[ComputeCapability]
    ptx: frozenset[ComputeCapability]
    cuda: str = ""

    def runs_on(self, capability: ComputeCapability) -> bool:
        """Whether some of the code runs on GPUs of this compute capability."""
        return any(item.major == capability.major and item <= capability for item in self.cubin) or any(
            item <= capability for item in self.ptx
        )

    def __str__(self) -> str:
        texts = [str(item) for item in sorted(self.cubin)] + [f"{item} and later" for item in sorted(self.ptx)]
        return ", ".join(texts)


def compiled_for(library: str | Path) -> CompiledFor:
    """Read a library's fat binaries; both sets are empty where it has none.

    Raises:
        OSError: the file cannot be read.
    """
    contents = Path(library).read_bytes()
    found: dict[int, set[ComputeCapability]] = {_PTX: set(), _CUBIN: set()}
    start = contents.find(_MAGIC)
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", contents, start)
        entry, end = start + header, start + header + size
        while entry + 32 <= min(end, len(contents)):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", contents, entry)
            (architecture,) = struct.unpack_from("<I", contents, entry + 28)
            if kind in found:
                found[kind].add(ComputeCapability(*divmod(architecture, 10)))
            if entry_header + entry_size == 0:
                break
            entry += entry_header + entry_size
        start = contents.find(_MAGIC, start + 4)
    releases = [(int(major), int(minor)) for major, minor in _COMPILER.findall(contents)]
    cuda = ".".join(map(str, max(releases))) if releases else ""
    return CompiledFor(frozenset(found[_CUBIN]), frozenset(found[_PTX]), cuda)
