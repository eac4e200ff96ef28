"""Build backend of hip-trt: scikit-build-core, given a CUDA compiler and TensorRT headers.

Both come from the machine where it has them, and from the package registry otherwise; :mod:`.toolchain` says where it
looks. Environment variables:

``HIP_TRT_PLUGIN``
    "on" (default), or "off" to install without the plugin: export to ONNX and ONNX Runtime work, TensorRT does not.
``HIP_TRT_CUDA``
    "auto" (default): an installed CUDA toolkit if there is one, else the registry's compiler; "toolkit" or "registry":
    that one only.
``HIP_TRT_CUDA_ARCHITECTURES``
    GPUs to build for, as CMake's CMAKE_CUDA_ARCHITECTURES, such as "80-real;90a-real"; plugins/CMakeLists.txt has the
    default.
``TENSORRT_INCLUDE_DIR``
    Folder with TensorRT's headers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scikit_build_core import build as backend
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

from . import toolchain

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any]
T = TypeVar("T")

_DOWNLOADS = Path("build", "toolchain")
"""Where fetched headers and the registry's compiler are kept, within the source tree."""


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """Build requirements: scikit-build-core's, and the CUDA packages if there is no toolkit and no kept copy."""
    return _requires(backend.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    """As :func:`get_requires_for_build_wheel`."""
    return _requires(backend.get_requires_for_build_editable, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings | None = None) -> str:
    """Metadata need no compiler, so none is looked for."""
    return str(backend.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings)))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings | None = None) -> str:
    """Metadata need no compiler, so none is looked for."""
    return str(backend.prepare_metadata_for_build_editable(metadata_directory, _settings(config_settings)))


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel with hip_trt/libhip_trt_plugin.so in it."""
    return str(backend.build_wheel(wheel_directory, _with_tools(config_settings), metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Build the plugin, and a wheel that refers to the source tree for all else."""
    return str(backend.build_editable(wheel_directory, _with_tools(config_settings), metadata_directory))


def _requires(base: Callable[[Settings | None], list[str]], config_settings: Settings | None) -> list[str]:
    requires = base(_settings(config_settings))
    if _plugin_wanted():
        requires += _or_exit(lambda: toolchain.cuda_requirements(os.environ, _DOWNLOADS))
    return requires


def _settings(config_settings: Settings | None) -> Settings:
    """The user's settings, and no CMake where the plugin is not wanted."""
    return {**(config_settings or {}), **({} if _plugin_wanted() else {"wheel.cmake": "false"})}


def _with_tools(config_settings: Settings | None) -> Settings:
    """Settings that also tell CMake where the compiler and the headers are; a user's own win."""
    if not _plugin_wanted():
        return _settings(config_settings)
    return {
        "cmake.define.CMAKE_CUDA_COMPILER": str(_or_exit(lambda: toolchain.cuda_compiler(os.environ, _DOWNLOADS))),
        "cmake.define.TENSORRT_INCLUDE_DIR": str(_or_exit(lambda: toolchain.tensorrt_headers(os.environ, _DOWNLOADS))),
        **_settings(config_settings),
    }


def _plugin_wanted() -> bool:
    return _or_exit(lambda: toolchain.plugin_wanted(os.environ))


def _or_exit(step: Callable[[], T]) -> T:
    """Run a step; a failure that the user can act on ends the build with its one line and no stack trace."""
    try:
        return step()
    except toolchain.ToolchainError as error:
        raise SystemExit(f"hip-trt: {error}") from None
