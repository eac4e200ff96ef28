"""Where the plugin's CUDA compiler and TensorRT headers come from.

CUDA compiler, the first of: ``CUDACXX``; ``CUDA_HOME`` or ``CUDA_PATH``; ``nvcc`` on ``PATH``; /usr/local/cuda; the
registry packages :data:`CUDA_PACKAGES`.

TensorRT headers, the first of: ``TENSORRT_INCLUDE_DIR``; an installed SDK (:data:`SDK_FOLDERS`); the registry package
:data:`HEADERS_PACKAGE`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Environment = Mapping[str, str]

# All of one release: left to themselves, some come newer than nvcc, and ptxas refuses their output.
CUDA_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)
USUAL_COMPILER = Path("/usr/local/cuda/bin/nvcc")
OLDEST_TOOLKIT = (12, 8)
"""The first CUDA release that knows compute capabilities 10.0 and 12.0."""

# NVIDIA's own packages of TensorRT carry no headers; this one carries those of 10.14 (Apache-2.0), and needs much else
# that is not wanted here.
HEADERS_PACKAGE = "kernel-lens==2.0.1"
HEADERS_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
HEADERS_FOLDER = "kernel_lens/include/tensorrt/"
HEADER = "NvInferRuntimePlugin.h"
OLDEST_HEADERS = (10, 14)
SDK_FOLDERS = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
    "/opt/TensorRT/include",
)

_NO_PLUGIN = "or set HIP_TRT_PLUGIN=off to install without the TensorRT plugin."


class ToolchainError(Exception):
    """A tool that the plugin needs cannot be had; the message is one line and says what to do."""


def plugin_wanted(environment: Environment) -> bool:
    """Whether to build the plugin (``HIP_TRT_PLUGIN``)."""
    return _choice(environment, "HIP_TRT_PLUGIN", ("on", "off")) == "on"


def cuda_requirements(environment: Environment) -> list[str]:
    """Registry packages to install before the build: none if a CUDA toolkit will be used.

    Raises:
        ToolchainError: neither a toolkit nor the packages can be had.
    """
    if _toolkit_compiler(environment) is not None:
        return []
    _check_registry_has(CUDA_PACKAGES[0])
    return list(CUDA_PACKAGES)


def cuda_compiler(environment: Environment, downloads: Path, search_path: Iterable[str] | None = None) -> Path:
    """The ``nvcc`` to use.

    Args:
        environment: environment variables.
        downloads: folder to lay the registry's packages out in.
        search_path: Python's module search path, where the registry's packages are looked for; by default this
            process's.

    Raises:
        ToolchainError: there is none.
    """
    compiler = _toolkit_compiler(environment)
    if compiler is not None:
        return compiler
    for folder in sys.path if search_path is None else search_path:
        packages = Path(folder, "nvidia", "cu13")
        if (packages / "bin" / "nvcc").is_file():
            return _as_toolkit(packages.resolve(), downloads.resolve() / "cuda")
    raise ToolchainError(
        "there is no CUDA compiler: no CUDA toolkit in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, and "
        f"{CUDA_PACKAGES[0]} is not installed (build isolation would install it). Install either, {_NO_PLUGIN}"
    )


def tensorrt_headers(environment: Environment, downloads: Path, folders: Iterable[str] = SDK_FOLDERS) -> Path:
    """The folder of TensorRT's headers; fetched if the machine has none.

    Args:
        environment: environment variables.
        downloads: folder to keep fetched headers in.
        folders: where an installed SDK may be.

    Raises:
        ToolchainError: they cannot be fetched, or ``TENSORRT_INCLUDE_DIR`` has none.
    """
    named = environment.get("TENSORRT_INCLUDE_DIR")
    if named:
        if not (Path(named) / HEADER).is_file():
            raise ToolchainError(f"TENSORRT_INCLUDE_DIR={named}: there is no {HEADER} in that folder.")
        return Path(named).resolve()
    for folder in map(Path, folders):
        if (folder / HEADER).is_file() and _header_version(folder) >= OLDEST_HEADERS:
            return folder
    fetched = downloads.resolve() / HEADERS_PACKAGE.replace("==", "-")
    if not (fetched / HEADER).is_file():
        _fetch_headers(fetched)
    return fetched


def _choice(environment: Environment, name: str, allowed: tuple[str, ...]) -> str:
    """An environment variable with a few allowed values, the first being the default."""
    value = environment.get(name) or allowed[0]
    if value not in allowed:
        raise ToolchainError(f"{name}={value} is not allowed; it must be one of {', '.join(allowed)}.")
    return value


def _toolkit_compiler(environment: Environment) -> Path | None:
    """The ``nvcc`` of an installed toolkit, or None where the registry's is to be used."""
    choice = _choice(environment, "HIP_TRT_CUDA", ("auto", "toolkit", "registry"))
    if choice == "registry":
        return None
    passed_over = []
    for where, compiler in _toolkit_candidates(environment):
        version = _compiler_version(compiler)
        if version >= OLDEST_TOOLKIT:
            return compiler
        passed_over.append(f"{compiler} ({where}) is CUDA {_dotted(version)}" if any(version) else f"{compiler} fails")
    if choice == "toolkit":
        found = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise ToolchainError(
            f"HIP_TRT_CUDA=toolkit, and there is no CUDA toolkit {_dotted(OLDEST_TOOLKIT)} or later in CUDACXX, "
            f"CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda{found}. Install one, unset HIP_TRT_CUDA, {_NO_PLUGIN}"
        )
    return None


def _toolkit_candidates(environment: Environment) -> Iterator[tuple[str, Path]]:
    """Compilers that exist, in order of preference, each with the name of where it was found."""
    named = environment.get("CUDACXX")
    if named:
        found = shutil.which(named, path=environment.get("PATH", ""))
        if found is None:
            raise ToolchainError(f"CUDACXX={named}: there is no such program.")
        yield "CUDACXX", Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = environment.get(variable)
        if folder:
            compiler = Path(folder, "bin", "nvcc")
            if not compiler.is_file():
                raise ToolchainError(f"{variable}={folder}: there is no bin/nvcc in that folder.")
            yield variable, compiler
    found = shutil.which("nvcc", path=environment.get("PATH", ""))
    if found is not None:
        yield "PATH", Path(found)
    if USUAL_COMPILER.is_file():
        yield "/usr/local/cuda", USUAL_COMPILER


def _compiler_version(compiler: Path) -> tuple[int, int]:
    """Release that ``nvcc --version`` names; (0, 0) if it cannot be run."""
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0, 0
    match = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _header_version(folder: Path) -> tuple[int, int]:
    """TensorRT's version by its NvInferVersion.h; (0, 0) if it does not say."""
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, 0
    numbers = [
        re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    major, minor = (int(number[1]) if number else 0 for number in numbers)
    return major, minor


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _pip(*arguments: str) -> None:
    """Run pip; a failure raises :class:`ToolchainError` with its last error."""
    process = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["it does not say why"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise ToolchainError(errors[-1].removeprefix("ERROR:").strip())


def _check_registry_has(requirement: str) -> None:
    """Ask before pip is told to install it, so that the user learns what is missing, and not only pip's name for it."""
    try:
        _pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", requirement)
    except ToolchainError as error:
        raise ToolchainError(
            "there is no CUDA compiler: no CUDA toolkit in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, and "
            f"none from the package registry ({error}). Install a CUDA toolkit, {_NO_PLUGIN}"
        ) from None


def _fetch_headers(target: Path) -> None:
    """Fetch :data:`HEADERS_PACKAGE`, without what it depends on, and keep its headers in ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{HEADERS_PACKAGE} --hash=sha256:{HEADERS_SHA256}\n", encoding="utf-8")
        try:
            _pip("download", "--no-deps", "--require-hashes", "--dest", scratch, "--requirement", str(requirements))
        except ToolchainError as error:
            raise ToolchainError(
                "there are no TensorRT headers: none in TENSORRT_INCLUDE_DIR or an installed SDK, and "
                f"{HEADERS_PACKAGE} cannot be fetched ({error}). Set TENSORRT_INCLUDE_DIR, {_NO_PLUGIN}"
            ) from None
        unpacked = Path(scratch, "headers")
        unpacked.mkdir()
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith(HEADERS_FOLDER) and name.endswith(".h"):
                    (unpacked / Path(name).name).write_bytes(wheel.read(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(unpacked, target)


def _as_toolkit(packages: Path, toolkit: Path) -> Path:
    """Lay the registry's packages out as an installed toolkit, with links, and return its ``nvcc``.

    The packages differ from a toolkit in lib64 being called lib, and in the missing link libcudart.so; nvcc and CMake
    look for both. Build isolation puts the packages elsewhere each time, so the folder is made anew for each build.
    """
    shutil.rmtree(toolkit, ignore_errors=True)
    (toolkit / "lib64").mkdir(parents=True)
    (toolkit / "bin").mkdir()  # not a link: nvcc finds the other folders relative to this one
    for name in ("include", "nvvm"):
        (toolkit / name).symlink_to(packages / name)
    for folder, source in (("bin", "bin"), ("lib64", "lib")):
        for file in (packages / source).iterdir():
            (toolkit / folder / file.name).symlink_to(file)
    runtime = next((packages / "lib").glob("libcudart.so*"), None)
    if runtime is not None and not os.path.lexists(toolkit / "lib64" / "libcudart.so"):
        (toolkit / "lib64" / "libcudart.so").symlink_to(runtime)
    return toolkit / "bin" / "nvcc"
