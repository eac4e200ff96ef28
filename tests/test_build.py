"""The build backend: where the CUDA compiler and the TensorRT headers come from, and what a wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BACKEND = ROOT / "plugins" / "build_backend"


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, on a machine with no CUDA, and with a registry that has nothing."""
    monkeypatch.syspath_prepend(str(BACKEND))
    from hip_trt_build import toolchain

    def refuse(*arguments: str) -> None:
        raise toolchain.ToolchainError(f"No matching distribution found for {arguments[-1]}")

    monkeypatch.setattr(toolchain, "_pip", refuse)
    monkeypatch.setattr(toolchain, "USUAL_COMPILER", tmp_path / "usual" / "bin" / "nvcc")
    return toolchain


def make_compiler(folder: Path, release: str = "13.0") -> Path:
    """A program that answers as ``nvcc --version`` does."""
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    compiler.chmod(0o755)
    return compiler


def make_headers(folder: Path, version: tuple[int, int] = (10, 14)) -> Path:
    """Headers of TensorRT, as NVIDIA writes their version."""
    folder.mkdir(parents=True)
    (folder / "NvInferRuntimePlugin.h").touch()
    (folder / "NvInferVersion.h").write_text(
        f"#define TRT_MAJOR_ENTERPRISE {version[0]}\n#define TRT_MINOR_ENTERPRISE {version[1]}\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.\n"
    )
    return folder


PACKAGES = {
    "nvidia-cuda-nvcc": ["bin/nvcc"],
    "nvidia-cuda-crt": ["include/crt/host_config.h"],
    "nvidia-nvvm": ["nvvm/bin/cicc"],
    "nvidia-cuda-runtime": ["include/cuda_runtime.h", "lib/libcudart.so.13", "lib/libcudart_static.a"],
    "nvidia-cuda-cccl": ["include/cccl/nv/target"],
    "nvidia-cublas": ["lib/libcublas.so.13"],
}
"""Packages in nvidia/cu13 and files of theirs; the last one is no part of a compiler."""


def make_packages(site: Path, version: str = "13.0.88") -> Path:
    """The registry's CUDA packages, as pip installs them; returns ``site``."""
    folder = site / "nvidia" / "cu13"
    make_compiler(folder)
    for name, files in PACKAGES.items():
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        facts = site / f"{name.replace('-', '_')}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        record = [f"{facts.name}/METADATA", *(f"nvidia/cu13/{file}" for file in files)]
        (facts / "RECORD").write_text("".join(f"{file},,\n" for file in record))
    return site


def test_compiler_order(toolchain: ModuleType, tmp_path: Path) -> None:
    places = ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "usual"]
    compilers = {place: make_compiler(tmp_path / place) for place in places}
    environment = {
        "CUDACXX": str(compilers["CUDACXX"]),
        "CUDA_HOME": str(tmp_path / "CUDA_HOME"),
        "CUDA_PATH": str(tmp_path / "CUDA_PATH"),
        "PATH": str(compilers["PATH"].parent),
    }
    for place in places:
        assert toolchain.cuda_compiler(environment, tmp_path / "downloads", []) == compilers[place]
        assert toolchain.cuda_requirements(environment, tmp_path / "downloads") == []
        environment.pop(place, None)


def test_registry_compiler_is_kept_as_a_toolkit(toolchain: ModuleType, tmp_path: Path) -> None:
    site, downloads = make_packages(tmp_path / "site"), tmp_path / "downloads"
    make_compiler(tmp_path / "toolkit")
    environment = {"HIP_TRT_CUDA": "registry", "CUDA_HOME": str(tmp_path / "toolkit")}
    first = toolchain.cuda_compiler(environment, downloads, ["", str(site)])
    shutil.rmtree(site)  # as build isolation does
    toolkit = downloads / "cuda"
    assert first == toolkit / "bin" / "nvcc"
    assert os.access(first, os.X_OK)
    assert (toolkit / "lib64" / "libcudart_static.a").is_file()
    assert (toolkit / "lib64" / "libcudart.so").resolve() == toolkit / "lib" / "libcudart.so.13"
    assert not (toolkit / "lib" / "libcublas.so.13").exists()
    assert (toolkit / "include" / "cuda_runtime.h").is_file()
    assert (toolkit / "nvvm" / "bin" / "cicc").is_file()
    assert [entry.name for entry in downloads.iterdir()] == ["cuda"]
    # The next build asks the registry, which has nothing here, for nothing.
    assert toolchain.cuda_requirements(environment, downloads) == []
    assert toolchain.cuda_compiler(environment, downloads, []) == first


def test_a_stopped_copy_is_not_used(toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, downloads = make_packages(tmp_path / "site"), tmp_path / "downloads"
    copy = shutil.copy2

    def stop_at_headers(source: str, target: Path) -> None:
        if source.endswith(".h"):
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(toolchain.shutil, "copy2", stop_at_headers)
    with pytest.raises(KeyboardInterrupt):
        toolchain.cuda_compiler({}, downloads, [str(site)])
    assert not (downloads / "cuda").exists()
    with pytest.raises(toolchain.ToolchainError):
        toolchain.cuda_requirements({}, downloads)


@pytest.mark.parametrize("damage", ["no stamp", "other versions", "a package less", "no compiler"])
def test_another_copy_is_replaced(
    toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    site, downloads = make_packages(tmp_path / "site"), tmp_path / "downloads"
    compiler = toolchain.cuda_compiler({}, downloads, [str(site)])
    stamp = downloads / "cuda" / "packages.txt"
    good = stamp.read_text()
    if damage == "no compiler":
        compiler.unlink()
    elif damage == "no stamp":
        stamp.unlink()
    else:
        lines = good.splitlines()
        stamp.write_text("\n".join(lines[1:]) if damage == "a package less" else good.replace("13.0.", "13.1."))
    monkeypatch.setattr(toolchain, "_pip", lambda *arguments: None)
    assert len(toolchain.cuda_requirements({}, downloads)) == 5
    assert toolchain.cuda_compiler({}, downloads, [str(site)]).is_file()
    assert stamp.read_text() == good
    assert toolchain.cuda_requirements({}, downloads) == []


def test_packages_of_another_release_are_not_used(toolchain: ModuleType, tmp_path: Path) -> None:
    site = make_packages(tmp_path / "site", "13.2.78")
    with pytest.raises(toolchain.ToolchainError, match="not all of nvidia-cuda-nvcc"):
        toolchain.cuda_compiler({}, tmp_path / "downloads", [str(site)])


def test_registry_packages_are_of_one_release(
    toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_pip", lambda *arguments: None)
    requirements = toolchain.cuda_requirements({"HIP_TRT_CUDA": "registry"}, tmp_path)
    assert {requirement.partition("==")[2] for requirement in requirements} == {"13.0.*"}
    assert len(requirements) == 5


def test_old_toolkits_are_passed_over(toolchain: ModuleType, tmp_path: Path) -> None:
    old = make_compiler(tmp_path / "old", "12.7")
    new = make_compiler(tmp_path / "new", "12.8")
    environment = {"CUDACXX": str(old), "PATH": str(new.parent)}
    assert toolchain.cuda_compiler(environment, tmp_path, []) == new
    with pytest.raises(toolchain.ToolchainError, match=r"old/bin/nvcc \(CUDACXX\) is CUDA 12\.7\)"):
        toolchain.cuda_compiler({"CUDACXX": str(old), "HIP_TRT_CUDA": "toolkit"}, tmp_path, [])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HIP_TRT_CUDA": "none"}, "HIP_TRT_CUDA=none is not allowed; it must be one of auto, toolkit, registry."),
        ({"CUDACXX": "/no/nvcc"}, "CUDACXX=/no/nvcc: there is no such program."),
        ({"CUDA_HOME": "/no"}, "CUDA_HOME=/no: there is no bin/nvcc in that folder."),
        ({"HIP_TRT_CUDA": "toolkit"}, "there is no CUDA toolkit 12.8 or later"),
        ({}, "No matching distribution found for nvidia-cuda-nvcc==13.0.*). Install a CUDA toolkit, or set HIP_TRT_PL"),
    ],
)
def test_no_compiler_is_one_clear_line(
    toolchain: ModuleType, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(toolchain.ToolchainError) as raised:
        toolchain.cuda_requirements(environment, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_compiler_without_build_isolation(toolchain: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(toolchain.ToolchainError, match=r"not all of nvidia-cuda-nvcc==13\.0\.\* "):
        toolchain.cuda_compiler({}, tmp_path, [str(tmp_path)])


def test_header_order(toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, sdk = make_headers(tmp_path / "named"), make_headers(tmp_path / "sdk")
    old = make_headers(tmp_path / "old", (10, 13))
    downloads, folders = tmp_path / "downloads", [str(tmp_path / "none"), str(old), str(sdk)]
    fetches = []

    def fetch(*arguments: str) -> None:
        fetches.append(arguments)
        target = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(target / "kernel_lens-2.0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("kernel_lens/include/tensorrt/NvInferRuntimePlugin.h", "fetched")
            wheel.writestr("kernel_lens/include/other/NvInferRuntimePlugin.h", "not this")

    monkeypatch.setattr(toolchain, "_pip", fetch)
    assert toolchain.tensorrt_headers({"TENSORRT_INCLUDE_DIR": str(named)}, downloads, folders) == named
    assert toolchain.tensorrt_headers({}, downloads, folders) == sdk
    assert not fetches
    for _ in range(2):  # the second time they are there
        fetched = toolchain.tensorrt_headers({}, downloads, [str(old)])
        assert (fetched / "NvInferRuntimePlugin.h").read_text() == "fetched"
    assert len(fetches) == 1
    assert {"--no-deps", "--require-hashes"} <= set(fetches[0])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TENSORRT_INCLUDE_DIR": "/no"}, "TENSORRT_INCLUDE_DIR=/no: there is no NvInferRuntimePlugin.h"),
        ({}, "kernel-lens==2.0.1 cannot be fetched (No matching distribution found"),
    ],
)
def test_no_headers_is_one_clear_line(
    toolchain: ModuleType, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(toolchain.ToolchainError) as raised:
        toolchain.tensorrt_headers(environment, tmp_path / "downloads", [])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def call_backend(hook: str, folder: Path, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call a hook of the backend as pip does, in a process of its own within the source tree."""
    return subprocess.run(
        [sys.executable, "-c", f"import hip_trt_build; print(hip_trt_build.{hook})"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(BACKEND), "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_a_failed_build_prints_one_line(tmp_path: Path) -> None:
    for hook in ("get_requires_for_build_wheel()", "build_wheel('.')", "get_requires_for_build_editable()"):
        done = call_backend(hook, tmp_path, HIP_TRT_PLUGIN="maybe")
        assert done.returncode == 1
        assert done.stderr == "hip-trt: HIP_TRT_PLUGIN=maybe is not allowed; it must be one of on, off.\n"


def test_without_the_plugin_nothing_is_required(tmp_path: Path) -> None:
    done = call_backend("get_requires_for_build_wheel()", tmp_path, HIP_TRT_PLUGIN="off", HIP_TRT_CUDA="registry")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds an sdist or, without the plugin, a wheel, from a copy of the files that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files are sources")
    folder = tmp_path_factory.mktemp("distributions")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())

    def build(kind: str) -> Path:
        done = call_backend(f"build_{kind}({str(folder)!r})", folder, folder / "source", HIP_TRT_PLUGIN="off")
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    return build


def test_wheel_holds_the_whole_package(distributions: Callable[[str], Path]) -> None:
    wheel = distributions("wheel")
    assert wheel.name == f"hip_trt-{project_version()}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    source = wheel.parent / "source"
    expected = {str(file.relative_to(source)) for file in source.glob("hip_trt/**/*") if file.is_file()}
    expected |= {f"hip_trt/{file.relative_to(source)}" for file in source.glob("export/**/*") if file.is_file()}
    assert {"hip_trt/py.typed", "hip_trt/export/__init__.py", "hip_trt/reference/operator.py"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_sdist_can_build_the_plugin(distributions: Callable[[str], Path]) -> None:
    sdist = distributions("sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = sdist.parent / "source"
    needed = {str(f.relative_to(source)) for d in ("plugins", "export") for f in (source / d).rglob("*") if f.is_file()}
    assert needed | {"pyproject.toml", "README.md", "hip_trt/__init__.py"} <= names


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
