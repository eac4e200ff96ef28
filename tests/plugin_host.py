"""The plugin as TensorRT runs it: calls of the operator through the program plugins/tests/plugin_host.cpp.

:class:`HostedPlugin` has the interface of :class:`hip_trt.library.Library`, so everything in kernel_checks.py holds for
it too. The program takes each call through a layer's whole life, from creator to enqueue on a stream and in a CUDA
graph, and fails it for any wrong return code, write out of bounds, changed input or logged error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.config_v2 import HipConfigV2
from hip_trt.library import Library

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
HOST = "HIP_TRT_PLUGIN_HOST"
"""Environment variable that names the program for GPUs; the one of the last build if it is not set."""

SESSION = "HIP_TRT_PLUGIN_SESSION"
"""Environment variable that names the library of plugin_session.cpp; the one of the last build if it is not set."""

TENSORRT = "HIP_TRT_TENSORRT"
"""Environment variable that names TensorRT libraries to load the plugin with, apart by colons; installed ones if unset.
"""

_TENSORRTS = {
    "tensorrt_libs": "libnvinfer.so.*", "tensorrt_lean_libs": "libnvinfer_lean.so.*",
    "tensorrt_rtx_libs": "libtensorrt_rtx.so.*",
}
_PAST = {"output": None, "present_key": "past_key", "present_value": "past_value", "present_nodes": "past_nodes"}
_PAST_V2 = {"output": None, **names.STATE_V2}


def tensorrt_libraries() -> list[Path | None]:
    """TensorRT libraries whose plugin registry can load the plugin; None stands for doing without."""
    if TENSORRT in os.environ:
        return [None, *(Path(path) for path in os.environ[TENSORRT].split(":") if path)]
    found: list[Path | None] = [None]
    for package, pattern in _TENSORRTS.items():
        spec = importlib.util.find_spec(package)
        found += [path for folder in (spec.submodule_search_locations or () if spec else ())
                  for path in sorted(Path(folder).glob(pattern))[:1]]
    return found


def tensorrt_name(library: Path | None) -> str:
    """For pytest's list."""
    return library.name.partition(".")[0] if library else "no TensorRT"


class HostedPlugin(Library):
    """The plugin in a process of its own, on tensors of the CPU.

    Args:
        host: the program.
        path: of the plugin library.
        tensorrt: whose plugin registry loads it; None: the program itself.
        version: of the operator that it computes.
    """

    def __init__(self, host: Path, path: Path, tensorrt: Path | None = None, version: int = 1) -> None:
        super().__init__(path)
        options = [*(["--tensorrt", str(tensorrt)] if tensorrt else []), "--operator", str(version)]
        self._command = [str(host), *options, str(path), "calls"]
        self._process: subprocess.Popen[bytes] | None = None

    def attention(  # type: ignore[override]
        self, *, config: HipConfig, scale: float, dense: bool = False, **tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """As :meth:`Library.attention` with every result given.

        Raises:
            AssertionError: with what the program found wrong.
        """
        attributes = {**names.attributes(config, scale=scale), "dense": int(dense)}
        return self._call(attributes, tensors, names.INPUTS, _PAST)

    def attention_v2(  # type: ignore[override]
        self, *, config: HipConfigV2, scale: float, dense: bool = False, **tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """As :meth:`Library.attention_v2` with every result given.

        Raises:
            AssertionError: with what the program found wrong.
        """
        attributes = {**names.attributes_v2(config, scale=scale), "dense": int(dense)}
        return self._call(attributes, tensors, names.INPUTS_V2, _PAST_V2)

    def _call(
        self, attributes: dict[str, Any], tensors: dict[str, Tensor], names: tuple[str, ...],
        past_of: dict[str, str | None],
    ) -> tuple[Tensor, ...]:
        inputs, results = ([tensors[name] for name in kind] for kind in (names, past_of))
        lines = [_field(name, value) for name, value in attributes.items()]
        lines += [f"tensor {str(tensor.dtype)[6:]} {tensor.dim()} {' '.join(map(str, tensor.shape))}"
                  for tensor in inputs]
        on_past = [past is not None and tensors[name].data_ptr() == tensors[past].data_ptr()
                   for name, past in past_of.items()]
        lines += ["result past" if shared else "result own" for shared in on_past]
        own = [tensor for tensor, shared in zip(results, on_past, strict=True) if not shared]
        self._exchange("\n".join([*lines, "call\n"]).encode(), [*inputs, *own], results)
        return tuple(results)

    def _exchange(self, request: bytes, sent: list[Tensor], received: list[Tensor]) -> None:
        if self._process is None:
            self._messages = TemporaryFile()  # noqa: SIM115  (lives as long as the process)
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages
            )
        assert self._process.stdin
        assert self._process.stdout
        try:
            for part in (request, *(_bytes(tensor) for tensor in sent)):
                self._process.stdin.write(part)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # no answer will come
        if self._process.stdout.readline() != b"done\n":
            raise AssertionError(self._end())
        for tensor in received:
            data = bytearray(self._process.stdout.read(tensor.nbytes))
            assert len(data) == tensor.nbytes, self._end()
            if data:
                tensor.flatten().view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))

    def _end(self) -> str:
        """Stop the program, and return its messages and exit status."""
        if self._process is None:
            return ""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.read()
        self._process.stdout.close()
        status, self._process = self._process.wait(60), None
        self._messages.seek(0)
        messages = self._messages.read().decode(errors="replace")
        self._messages.close()
        return f"{messages}exit status {status}"

    def close(self) -> None:
        """End the program, which unloads the plugin.

        Raises:
            AssertionError: it found something wrong at the end, or died.
        """
        messages = self._end()
        assert not messages or re.search(r"calls: \d+ checks, 0 failed\nexit status 0$", messages), messages


def hosted(host: Path, path: Path, tensorrt: Path | None, version: int = 1) -> Iterator[HostedPlugin]:
    """For fixtures."""
    plugin = HostedPlugin(host, path, tensorrt, version)
    yield plugin
    plugin.close()


def _field(name: str, value: str | int | float) -> str:
    if isinstance(value, float):
        (value,) = struct.unpack("f", struct.pack("f", value))
        return f"field float {name} {value.hex()}"
    return f"field {'int' if isinstance(value, int) else 'text'} {name} {value}"


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def find_host() -> Path:
    """The program for GPUs, which the build puts beside the library when it is asked for; skips the test without."""
    return _find_built(HOST, "plugin_host")


def find_session() -> Path:
    """The library of plugin_session.cpp, likewise."""
    return _find_built(SESSION, "libplugin_session.so")


def _find_built(variable: str, name: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    found = [path for path in (ROOT / "build").glob(f"*/{name}") if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("built without HIP_TRT_BUILD_TESTS (make install builds with it)")
    return found[-1]


def build_emulated(include: Path) -> tuple[Path, Path]:
    """The program and the plugin library for the CPU, around the emulated kernels (emulated.py).

    Args:
        include: folder of TensorRT's headers.
    """
    kernels = emulated.build()
    plugin_sources = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
    host_sources = sorted({*(PLUGINS / "tests").glob("plugin_host*.cpp")} - {
        PLUGINS / "tests" / "plugin_host_device_cuda.cpp"})
    digest = _digest(kernels.name.encode(), (PLUGINS / "tensorrt").iterdir(), (PLUGINS / "tests").glob("plugin_host*"))
    host, library = emulated.BUILD / f"plugin_host-{digest}", emulated.BUILD / f"libhip_trt_plugin-{digest}.so"
    if not (host.is_file() and library.is_file()):
        _compile(include, plugin_sources, library, ["-shared", str(kernels), f"-Wl,-rpath,{kernels.parent}"])
        _compile(include, host_sources, host, ["-ldl"])
    return host, library


def build_session(include: Path) -> Path:
    """The library of plugin_session.cpp, for plugin libraries of any device: it touches none.

    Args:
        include: folder of TensorRT's headers.
    """
    tests = PLUGINS / "tests"
    library = emulated.BUILD / f"libplugin_session-{_digest(b'', tests.glob('plugin_*'))}.so"
    if not library.is_file():
        sources = [tests / f"plugin_{name}.cpp" for name in ("session", "host_layer", "host_load")]
        _compile(include, sources, library, ["-shared", "-ldl"])
    return library


def _digest(start: bytes, *groups: Iterable[Path]) -> str:
    content = b"".join(file.read_bytes() for files in groups for file in sorted(files))
    return hashlib.sha256(start + content).hexdigest()[:16]


def _compile(include: Path, sources: list[Path], target: Path, link: list[str]) -> None:
    command = [
        str(emulated.compiler()), "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra",
        f'-DHIP_TRT_VERSION="{metadata.version("hip-trt")}"', f"-I{emulated.EMULATION}",
        f"-I{PLUGINS / 'cuda'}", "-isystem", str(include),
    ]
    emulated.BUILD.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=emulated.BUILD) as folder:
        def compile_source(source: Path) -> str:
            made = Path(folder, f"{source.stem}.o")
            emulated._run([*command, "-c", str(source), "-o", str(made)])
            return str(made)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_source, sources))
        finished = Path(folder, "finished")
        emulated._run([*command, *objects, *link, "-o", str(finished)])
        finished.replace(target)  # whole or not at all: other test processes may be building too


def tensorrt_headers(host: Path) -> Path:
    """The headers that a program of :func:`find_host` was built with; skips the test if they are gone."""
    cache = host.parent / "CMakeCache.txt"
    found = re.search(r"^TENSORRT_INCLUDE_DIR:\w+=(.+)$", cache.read_text() if cache.is_file() else "", re.MULTILINE)
    if found is None or not Path(found[1]).is_dir():
        pytest.skip("TensorRT's headers are gone; make install brings them")
    return Path(found[1])
