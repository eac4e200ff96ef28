"""Import single modules of hip-attn without what its package needs beside: debug plots, UVM caches, other backends.

hip-attn's own code is used as it is; it is not part of this project, and its licence is not this project's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch

_BARE = ("hip_attn", "hip_attn.utils", "hip_attn.v1_0", "hip_attn.v1_1", "hip_attn.v1_2")
"""Packages whose __init__ imports far more than the modules under them need."""

_UNUSED = (
    "nvtx", "cupy", "cv2", "matplotlib", "matplotlib.pyplot", "tilelang", "tilelang.language", "tilelang.autotuner",
    "hip_attn.v1_0.attention1_block_gpu", "hip_attn.v1_1.offload_runner.tensor_from_pointer",
)
"""Imported by the modules that are timed, called only for debugging, for profiling or for offloaded caches."""

_UNUSED_IF_ABSENT = ("tqdm", "cuda", "cuda.bindings", "cuda.bindings.runtime")


class _Nothing:
    """Stands for any function, decorator, decorator factory or context manager: it does nothing."""

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _UnusedModule(types.ModuleType):
    """A module of which anything may be imported, and all of it is :class:`_Nothing`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__all__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def import_module(site: Path, name: str) -> types.ModuleType:
    """A module of the hip-attn that is unpacked in ``site``, which must also be on the path with its Triton.

    Raises:
        ImportError: it, or something that it needs, is not there.
    """
    for package in _BARE:
        module = types.ModuleType(package)
        module.__path__ = [str(site / package.replace(".", "/"))]
        _install(package, module)
    for unused in (*_UNUSED, *(name for name in _UNUSED_IF_ABSENT if not _found(name))):
        _install(unused, _UnusedModule(unused))
    _install_numba()
    return importlib.import_module(name)


def _install(name: str, module: types.ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _install_numba() -> None:
    """All that is asked of numba at run time is the number of multiprocessors, for which it takes seconds to import."""
    device = types.SimpleNamespace()
    if torch.cuda.is_available():
        device.MULTIPROCESSOR_COUNT = torch.cuda.get_device_properties(0).multi_processor_count
    _install("numba", _UnusedModule("numba"))
    cuda = _UnusedModule("numba.cuda")
    cuda.get_current_device = lambda: device  # type: ignore[attr-defined]
    _install("numba.cuda", cuda)


def _found(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        return importlib.util.find_spec(name) is not None
    return False
