"""Look at this machine and say what works, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import BaseModel, ConfigDict

from hip_trt import library
from hip_trt.errors import HipTrtError
from hip_trt.fat_binary import CompiledFor, compiled_for
from hip_trt.files import format_size
from hip_trt.gpu import Driver, Gpu, cuda_driver
from hip_trt.tensorrt_flavour import (
    Flavour,
    find_flavour,
    install_command,
    installed,
    nothing_in_common_remedy,
)

Status = Literal["ok", "note", "problem"]

_LEAST_PYTHON = (3, 11)
_MAIN_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
"""Shown always; the other requirements only where something is wrong with them."""
_LOW_MEMORY = 4_000_000_000
"""Bytes; a model of 135M parameters needs about half."""
_LOW_DISK = 2_000_000_000


class Check(BaseModel):
    """One thing looked at.

    Attributes:
        status: "ok"; "note": something optional is missing, which limits what can be done here; "problem": models
            cannot be exported, or no engine built.
        found: what is there.
        remedy: what to do about it; empty where nothing need be done.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    status: Status
    found: str
    remedy: str = ""


class Diagnosis(BaseModel):
    """What was found, and what can be done here.

    Attributes:
        checks: in the order in which to read them.
        tasks: "export" (a checkpoint to .onnx), "build" (an .onnx to an engine) and "run" (both), each with the command
            that helps where it, or a part of it, does not work.
    """

    model_config = ConfigDict(frozen=True)

    checks: tuple[Check, ...]
    tasks: tuple[Check, ...]

    @property
    def can_export(self) -> bool:
        """Whether the main job works here: from a checkpoint to an engine."""
        return all(task.status == "ok" for task in self.tasks if task.name in ("export", "build"))


def diagnose(folder: str | Path = ".") -> Diagnosis:
    """Run every check; none raises.

    Args:
        folder: where results would be written, for the free disk space.
    """
    driver = cuda_driver()
    flavours, flavour_checks = _flavours(driver)
    kernels, plugin_check = _plugin(flavours, driver)
    packages = (_python(), *_packages())
    gpus = tuple(_gpus(driver, flavours, kernels))
    engines = (*flavour_checks, plugin_check)
    return Diagnosis(
        checks=(*packages, *engines, *gpus, _memory(), _disk(Path(folder))),
        tasks=(_export(packages), _build(packages, engines, flavours), _run(packages, engines, gpus)),
    )


def _export(packages: tuple[Check, ...]) -> Check:
    problem = _first_problem(packages)
    return problem.model_copy(update={"name": "export"}) if problem else Check(
        name="export", status="ok", found="a checkpoint to .onnx: hip-trt export --model MODEL --out model.onnx"
    )


def _build(packages: tuple[Check, ...], engines: tuple[Check, ...], flavours: list[Flavour]) -> Check:
    problem = _first_problem((*packages, *engines))
    return problem.model_copy(update={"name": "build"}) if problem else Check(
        name="build", status="ok",
        found=f"an engine, with {' or '.join(flavour.name for flavour in flavours)}: hip-trt export --model MODEL "
        "--out engine.plan",
    )


def _run(packages: tuple[Check, ...], engines: tuple[Check, ...], gpus: tuple[Check, ...]) -> Check:
    """ONNX models run wherever they can be exported; engines need a GPU that is fit for them, too."""
    problem = _first_problem(packages)
    if problem:
        return problem.model_copy(update={"name": "run"})
    fit = any(gpu.status == "ok" for gpu in gpus)
    lacking = _first_problem(engines) if fit else gpus[0]
    if lacking is None:
        return Check(name="run", status="ok", found=".onnx on the CPU, engines on the GPU: hip-trt run FILE")
    return Check(
        name="run", status="note", found=f".onnx on the CPU: hip-trt run model.onnx. No engine: {lacking.found}",
        remedy=lacking.remedy,
    )


def _first_problem(checks: tuple[Check, ...]) -> Check | None:
    for check in checks:
        if check.status == "problem":
            return check.model_copy(update={"found": f"{check.name}: {check.found}"})
    return None


def _python() -> Check:
    least = ".".join(map(str, _LEAST_PYTHON))
    if sys.version_info < _LEAST_PYTHON:
        return Check(name="Python", status="problem", found=platform.python_version(), remedy=f"Use {least} or later.")
    return Check(name="Python", status="ok", found=f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Check]:
    """The packages that hip-trt requires, against the versions that it declares."""
    for requirement in _requirements():
        check = _package(requirement)
        if check.status != "ok" or requirement.name in _MAIN_PACKAGES:
            yield check


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """What hip-trt declares, with or without an extra."""
    for requirement in map(Requirement, importlib.metadata.requires("hip-trt") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _package(requirement: Requirement) -> Check:
    name, remedy = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, status="problem", found="not installed", remedy=remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(
            name=name, status="problem", found=f"{version}, which hip-trt does not work with", remedy=remedy
        )
    return Check(name=name, status="ok", found=version)


def _flavours(driver: Driver | None) -> tuple[list[Flavour], list[Check]]:
    """The TensorRT flavours that work here, and what to say about both."""
    found: list[Flavour] = []
    checks: list[Check] = []
    for name in ("tensorrt-rtx", "tensorrt"):
        if name not in installed():
            continue
        try:
            flavour = find_flavour(name)
        except HipTrtError as error:
            checks.append(Check(name=name, status="note", found=error.cause, remedy=error.remedy))
            continue
        if not _works_with(flavour):
            checks.append(Check(
                name=name, status="note", found=f"{flavour.version}, which hip-trt does not work with",
                remedy=install_command(name),
            ))
            continue
        if flavour.ahead_of_time:
            where = f"builds, without a GPU, for {', '.join(map(str, flavour.compute_capabilities))}"
        elif driver and driver.gpus:
            where = f"builds for the GPU here, {driver.gpus[0].compute_capability}"
        else:
            checks.append(Check(
                name=name, status="note", found=f"{flavour.version}; cannot build, as it needs a GPU",
                remedy=f"To build without a GPU: {install_command('tensorrt-rtx')}",
            ))
            continue
        found.append(flavour)
        checks.append(Check(name=name, status="ok", found=f"{flavour.version}; {where}"))
    if not found:
        hopper = driver and any(gpu.compute_capability.major == 9 for gpu in driver.gpus)
        checks.append(Check(
            name="TensorRT", status="problem", found="none that can build an engine here",
            remedy=f"{install_command('tensorrt')}, for the Hopper GPU here" if hopper
            else f"{install_command('tensorrt-rtx')}, which needs no GPU",
        ))
    return found, checks


def _works_with(flavour: Flavour) -> bool:
    """Whether its version is in the range that the extra of its name declares."""
    declared = next(one for one in _requirements(flavour.name) if one.name.startswith(flavour.name))
    return declared.specifier.contains(flavour.version, prereleases=True)


def _plugin(flavours: list[Flavour], driver: Driver | None) -> tuple[CompiledFor | None, Check]:
    """The GPUs that the plugin library has kernels for, and whether each TensorRT takes it."""
    try:
        path, version = library.plugin_path(), library.version()
        for flavour in flavours:
            flavour.load_plugin(path)
    except HipTrtError as error:
        return None, Check(name="plugin", status="problem", found=error.cause, remedy=error.remedy)
    kernels = compiled_for(path)
    found = f"{version}, ABI {library.ABI_VERSION}, kernels for {kernels} ({path})"
    here = [gpu.compute_capability for gpu in (driver.gpus if driver else ())[:1]]
    targets = [one for flavour in flavours for one in (flavour.compute_capabilities or here)]
    if targets and not any(map(kernels.runs_on, targets)):
        names = " and ".join(flavour.name for flavour in flavours)
        return kernels, Check(
            name="plugin", status="problem", found=f"{found}; {names} builds for none of these",
            remedy=nothing_in_common_remedy(),
        )
    return kernels, Check(name="plugin", status="ok", found=found)


def _gpus(driver: Driver | None, flavours: list[Flavour], kernels: CompiledFor | None) -> Iterator[Check]:
    """Each GPU, and whether engines run on it. Exporting needs none, so nothing here is a problem."""
    if driver is None:
        yield Check(
            name="GPU", status="note", found="no CUDA driver, so no engine runs here",
            remedy="Engines run on machines with an NVIDIA GPU and its driver; ONNX models run on the CPU.",
        )
        return
    if not driver.gpus:
        yield Check(
            name="GPU", status="note", found=f"a driver for CUDA {driver.cuda}, and no GPU that it shows",
            remedy="Look at nvidia-smi and at CUDA_VISIBLE_DEVICES.",
        )
    for gpu in driver.gpus:
        status, usable, remedy = _usable(gpu, driver, flavours, kernels)
        yield Check(
            name=f"GPU {gpu.index}", status=status, remedy=remedy,
            found=f"{gpu.name}, compute capability {gpu.compute_capability}, {format_size(gpu.memory)}, driver for "
            f"CUDA {driver.cuda}; {usable}",
        )


def _usable(
    gpu: Gpu, driver: Driver, flavours: list[Flavour], kernels: CompiledFor | None
) -> tuple[Status, str, str]:
    """Whether engines run on a GPU, in words, and what to do if not."""
    for what, cuda in (("the plugin", kernels.cuda if kernels else ""), ("PyTorch", torch.version.cuda)):
        least = _least_driver(cuda or "")
        if Version(driver.cuda) < least:
            return "note", f"{what} needs a driver for CUDA {least} or later", (
                f"Update the NVIDIA driver to one for CUDA {least} or later."
            )
    capability = gpu.compute_capability
    if kernels is not None and not kernels.runs_on(capability):
        return "note", "the plugin has no kernels for it", (
            f"Install hip-trt again with HIP_TRT_CUDA_ARCHITECTURES={capability.major}{capability.minor}."
        )
    usable = [flavour.name for flavour in flavours if flavour.runs_on(capability)]
    if usable:
        return "ok", f"{' and '.join(usable)} can run on it", ""
    names = " or ".join(flavour.name for flavour in flavours)
    usable_by = f"{names} does not run on it" if names else "there is no TensorRT to run engines on it"
    return "note", usable_by, f"To run engines here: {install_command('tensorrt')}"


def _least_driver(cuda: str) -> Version:
    """CUDA version of the oldest driver for code of a CUDA release: the first of the same major number will do."""
    return Version(f"{cuda.partition('.')[0] or 0}.0")


def _memory() -> Check:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            size = int(line.split()[1]) * 1024
    low = size < _LOW_MEMORY
    return Check(
        name="memory", status="note" if low else "ok", found=f"{format_size(size)} available",
        remedy="Exporting takes at least 2 GB, and an engine build twice the size of the weights." if low else "",
    )


def _disk(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    low = free < _LOW_DISK
    return Check(
        name="disk", status="note" if low else "ok", found=f"{format_size(free)} free in {folder.resolve()}",
        remedy="An ONNX model and an engine each take the size of the weights." if low else "",
    )
