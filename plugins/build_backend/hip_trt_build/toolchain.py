"""Where the plugin's CUDA compiler and TensorRT headers come from.

CUDA compiler, the first of: ``CUDACXX``; ``CUDA_HOME`` or ``CUDA_PATH``; ``nvcc`` on ``PATH``; /usr/local/cuda; the
registry packages :data:`CUDA_PACKAGES`, of which the first build keeps a copy for those that follow.

TensorRT headers, the first of: ``TENSORRT_INCLUDE_DIR``; an installed SDK (:data:`SDK_FOLDERS`); the registry package
:data:`HEADERS_PACKAGE`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

Environment = Mapping[str, str]

# All of one release: left to themselves, some come newer than nvcc, and ptxas refuses their output.
CUDA_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)
PACKAGES_FOLDER = PurePosixPath("nvidia", "cu13")
"""Within site-packages, where all of them lie."""
STAMP = "packages.txt"
"""Within the kept copy: which packages, in which versions."""
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


def cuda_requirements(environment: Environment, downloads: Path) -> list[str]:
    """Registry packages to install before the build: none if a CUDA toolkit or the kept copy will be used.

    Args:
        environment: environment variables.
        downloads: the folder of the kept copy.

    Raises:
        ToolchainError: neither a toolkit nor the packages can be had.
    """
    if (_toolkit_compiler(environment) or _kept_compiler(_kept_folder(downloads))) is not None:
        return []
    _check_registry_has(CUDA_PACKAGES[0])
    return list(CUDA_PACKAGES)


def cuda_compiler(environment: Environment, downloads: Path, search_path: Iterable[str] | None = None) -> Path:
    """The ``nvcc`` to use.

    Args:
        environment: environment variables.
        downloads: folder to keep a copy of the registry's packages in.
        search_path: Python's module search path, where the registry's packages are looked for; by default this
            process's.

    Raises:
        ToolchainError: there is none.
    """
    toolkit = _kept_folder(downloads)
    compiler = _toolkit_compiler(environment) or _kept_compiler(toolkit)
    if compiler is not None:
        return compiler
    packages = _installed_packages(sys.path if search_path is None else search_path)
    if packages is not None:
        return _keep(packages, toolkit)
    raise ToolchainError(
        "there is no CUDA compiler: no CUDA toolkit in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, and "
        f"not all of {' '.join(CUDA_PACKAGES)} are installed (build isolation would install them). Install either, "
        f"{_NO_PLUGIN}"
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


def _kept_folder(downloads: Path) -> Path:
    return downloads.resolve() / "cuda"


def _kept_compiler(toolkit: Path) -> Path | None:
    """The ``nvcc`` of the copy that an earlier build kept, if it is whole and of :data:`CUDA_PACKAGES`."""
    try:
        stamp = (toolkit / STAMP).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    of_these = len(stamp) == len(CUDA_PACKAGES) and all(map(fnmatch, stamp, CUDA_PACKAGES))
    compiler = toolkit / "bin" / "nvcc"
    return compiler if of_these and compiler.is_file() else None


def _installed_packages(search_path: Iterable[str]) -> list[Distribution] | None:
    """:data:`CUDA_PACKAGES`, in their order, if all are installed, in these versions, in one of these folders."""
    names = [requirement.partition("==")[0] for requirement in CUDA_PACKAGES]
    for folder in filter(None, search_path):
        found = {package.name: package for package in distributions(path=[folder])}
        packages = [found[name] for name in names if name in found]
        if len(packages) == len(names) and all(map(fnmatch, map(_name_and_version, packages), CUDA_PACKAGES)):
            return packages
    return None


def _name_and_version(package: Distribution) -> str:
    return f"{package.name}=={package.version}"


def _keep(packages: list[Distribution], toolkit: Path) -> Path:
    """Copy the registry's packages, laid out as an installed toolkit, and return its ``nvcc``.

    A copy, because build isolation removes the packages after the build. It gets its name when it is whole, so that a
    build that was stopped leaves nothing that the next one would use.
    """
    toolkit.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=toolkit.parent, prefix="cuda-") as scratch:
        copy = Path(scratch, "cuda")
        for package in packages:
            for file in package.files or ():
                if file.is_relative_to(PACKAGES_FOLDER):
                    target = copy / file.relative_to(PACKAGES_FOLDER)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(str(file.locate()), target)
        # nvcc and CMake look for a toolkit's lib64, and for libcudart.so in it.
        (copy / "lib64").symlink_to("lib")
        for runtime in (copy / "lib").glob("libcudart.so.*"):
            (copy / "lib" / "libcudart.so").symlink_to(runtime.name)
        (copy / STAMP).write_text("".join(f"{_name_and_version(package)}\n" for package in packages), encoding="utf-8")
        shutil.rmtree(toolkit, ignore_errors=True)
        copy.rename(toolkit)
    return toolkit / "bin" / "nvcc"
