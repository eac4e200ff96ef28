"""Give a loaded shared library a second name that ``dlopen`` finds."""

from __future__ import annotations

import ctypes
import struct
import tempfile
from pathlib import Path

_ELF_HEADER, _PROGRAM_HEADER, _DYNAMIC_ENTRY, _SYMBOL = 64, 56, 16, 24
_ET_DYN, _PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 3, 1, 2, 0x6474E551
_READ_WRITE = 6
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14


def add_shared_name(library: Path, name: str) -> None:
    """Make ``dlopen(name)`` find a library that this process has loaded under its own file name.

    The dynamic linker finds loaded libraries by their SONAME. So this loads an empty library whose SONAME is ``name``
    and which needs ``library``; symbols looked up in it are then found in ``library``. Nothing stays on disk, and no
    folder of another package is touched.

    Args:
        library: a 64-bit ELF library, loaded, whose file name is its SONAME.
        name: the bare name to add, such as "libexample.so".

    Raises:
        OSError: the library cannot be read, or the dynamic linker refuses.
    """
    with library.open("rb") as file:
        head = file.read(_ELF_HEADER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(_empty_library(name, library.name, head))
        ctypes.CDLL(str(path))  # stays mapped when the file is gone


def _empty_library(soname: str, needed: str, head: bytes) -> bytes:
    """An ELF shared library with no code, for the machine that ``head``, another library's header, names."""
    (machine,) = struct.unpack_from("<H", head, 18)
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    dynamic_at = _ELF_HEADER + 3 * _PROGRAM_HEADER
    symbols_at = dynamic_at + 8 * _DYNAMIC_ENTRY
    hash_at = symbols_at + _SYMBOL
    strings_at = hash_at + 20
    size = strings_at + len(strings)
    dynamic = [
        (_DT_NEEDED, 1 + len(soname) + 1), (_DT_SONAME, 1), (_DT_HASH, hash_at), (_DT_STRTAB, strings_at),
        (_DT_SYMTAB, symbols_at), (_DT_STRSZ, len(strings)), (_DT_SYMENT, _SYMBOL), (_DT_NULL, 0),
    ]

    def segment(kind: int, at: int, length: int, alignment: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, _READ_WRITE, at, at, at, length, length, alignment)

    return b"".join([
        head[:16],
        struct.pack(
            "<HHIQQQIHHHHHH", _ET_DYN, machine, 1, 0, _ELF_HEADER, 0, 0, _ELF_HEADER, _PROGRAM_HEADER, 3, 0, 0, 0
        ),
        segment(_PT_LOAD, 0, size, 0x10000),  # the linker relocates the dynamic section in place, hence writable
        segment(_PT_DYNAMIC, dynamic_at, len(dynamic) * _DYNAMIC_ENTRY, 8),
        segment(_PT_GNU_STACK, 0, 0, 16),  # without it an executable stack is asked for, which hardened systems refuse
        *(struct.pack("<qQ", tag, value) for tag, value in dynamic),
        bytes(_SYMBOL),
        struct.pack("<5I", 1, 1, 0, 0, 0),  # a hash table with one bucket and the null symbol
        strings,
    ])
