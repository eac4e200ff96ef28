"""The kernels of plugins/cuda as a library for the CPU: compiled as C++ with plugins/tests/emulation."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hip_trt.library import Library

PLUGINS = Path(__file__).parent.parent / "plugins"
EMULATION = PLUGINS / "tests" / "emulation"
BUILD = PLUGINS.parent / "build" / "emulation"
SOURCES = (
    "hip_attention", "hip_attention_v2", "decode_plan", "decode_float16", "decode_bfloat16", "decode_float32",
    "plan", "validation", "cache_update", "offload", "offload_fill", "offload_lane", "decode_cluster",
    *(f"decode_cluster{pools}_{dtype}" for pools in ("", "_offloaded") for dtype in ("float16", "bfloat16")),
    *(f"{kernel}_{dtype}" for kernel in ("mask_search", "sparse_attention")
      for dtype in ("float16", "bfloat16", "float32")),
)


class EmulatedLibrary(Library):
    """A library whose kernels run on the CPU, on tensors of the CPU."""

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[int]:
        assert device.type == "cpu"
        yield 0

    def synchronize(self) -> None:
        """Wait for what calls have left to streams beside theirs, which run it as late as they may."""
        self._functions.emulationSynchronize()


def compiler() -> str | None:
    """The C++ compiler, or None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def build() -> Path:
    """Compile the library, unless these very sources were compiled before."""
    files = sorted([*(PLUGINS / "cuda").iterdir(), *EMULATION.iterdir()])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    library = BUILD / f"libhip_trt_emulated-{digest}.so"
    if library.is_file():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [
        str(compiler()), "-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas",
        "-Wno-unused-variable", f"-I{EMULATION}", f"-I{PLUGINS / 'cuda'}",
        f'-DHIP_TRT_VERSION="{metadata.version("hip-trt")}"',
    ]
    with TemporaryDirectory(dir=BUILD) as folder:
        def compile_source(source: Path) -> Path:
            target = Path(folder, f"{source.stem}.o")
            as_cpp = ["-x", "c++", "-include", "emulation.h"] if source.suffix == ".cu" else []
            _run([*command, *as_cpp, "-c", str(source), "-o", str(target)])
            return target

        sources = [*(PLUGINS / "cuda" / f"{name}.cu" for name in SOURCES), *sorted(EMULATION.glob("*.cpp"))]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_source, sources))
        finished = Path(folder, "library.so")
        _run([*command, "-shared", *map(str, objects), "-o", str(finished)])
        finished.replace(library)  # whole or not at all: other test processes may be building too
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
