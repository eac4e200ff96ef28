"""The doctor: what it says of machines other than this one, by replacing what it asks."""

from __future__ import annotations

import importlib.metadata
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hip_trt import doctor, library
from hip_trt.cli.app import app
from hip_trt.doctor import Check, diagnose
from hip_trt.errors import EnvironmentProblem, PluginError
from hip_trt.fat_binary import CompiledFor, compiled_for
from hip_trt.gpu import ComputeCapability, Driver, Gpu, cuda_driver, current_gpu
from hip_trt.tensorrt_flavour import Flavour

HOPPER = Gpu(0, "NVIDIA H200", ComputeCapability(9, 0), 150_000_000_000)
ADA = Gpu(1, "NVIDIA GeForce RTX 4090", ComputeCapability(8, 9), 25_000_000_000)
KERNELS = CompiledFor(frozenset({ComputeCapability(8, 0), ComputeCapability(9, 0)}), frozenset())


class Machine:
    """What the doctor finds; by default one with TensorRT-RTX, the plugin, and no GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flavours = {"tensorrt-rtx": "1.7.1"}
        self.driver: Driver | None = None
        self.packages: dict[str, str | None] = {}  # other versions than those here; None: not installed
        self.plugin: Callable[[], Path] = lambda: Path("libhip_trt_plugin.so")
        monkeypatch.setattr(doctor, "cuda_driver", lambda: self.driver)
        monkeypatch.setattr(doctor, "installed", lambda: tuple(self.flavours))
        monkeypatch.setattr(doctor, "find_flavour", self.find_flavour)
        installed = importlib.metadata.version

        def version(name: str) -> str:
            found = self.packages.get(name, "")
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found or installed(name)

        monkeypatch.setattr(doctor.importlib.metadata, "version", version)
        monkeypatch.setattr(doctor, "compiled_for", lambda path: KERNELS)
        monkeypatch.setattr(library, "plugin_path", lambda: self.plugin())
        monkeypatch.setattr(library, "version", lambda: "0.1.0")
        monkeypatch.setattr(Flavour, "load_plugin", lambda flavour, path: None)

    def find_flavour(self, name: str) -> Flavour:
        module = ModuleType(name)
        members = {"SM80": 0, "SM89": 1, "SM120": 2, "CURRENT": 3}
        module.__dict__.update(__version__=self.flavours[name], ComputeCapability=Any)
        module.ComputeCapability = type("ComputeCapability", (), {"__members__": members})
        return Flavour(name, module)  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def check(name: str) -> Check:
    return next(item for item in diagnose().checks if item.name == name)


def task(name: str) -> Check:
    return next(item for item in diagnose().tasks if item.name == name)


def test_without_a_gpu_models_can_be_exported(machine: Machine) -> None:
    assert diagnose().can_export
    assert "builds, without a GPU, for 8.0, 8.9, 12.0" in check("tensorrt-rtx").found
    assert (check("GPU").status, check("plugin").status) == ("note", "ok")
    assert "kernels for 8.0, 9.0" in check("plugin").found
    tasks = [(item.name, item.status) for item in diagnose().tasks]
    assert tasks == [("export", "ok"), ("build", "ok"), ("run", "note")]
    assert "tensorrt-rtx" in task("build").found
    assert "No engine: no CUDA driver" in task("run").found


def test_hopper_is_refused_by_rtx(machine: Machine) -> None:
    machine.driver = Driver("13.0", (HOPPER,))
    found = check("GPU 0")
    assert found.status == "note"
    assert found.found == (
        "NVIDIA H200, compute capability 9.0, 150.0 GB, driver for CUDA 13.0; tensorrt-rtx does not run on it"
    )
    assert "hip-trt[tensorrt]" in found.remedy
    assert diagnose().can_export
    assert (task("run").status, task("run").remedy) == ("note", found.remedy)
    machine.flavours["tensorrt"] = "10.14"
    assert check("GPU 0").status == "ok"
    assert check("GPU 0").found.endswith("tensorrt can run on it")
    assert task("run").status == "ok"


def test_every_gpu_is_looked_at(machine: Machine) -> None:
    machine.driver = Driver("13.0", (HOPPER, ADA))
    assert (check("GPU 0").status, check("GPU 1").status) == ("note", "ok")


def test_gpu_without_kernels(machine: Machine) -> None:
    machine.driver = Driver("13.0", (Gpu(0, "NVIDIA GeForce RTX 5090", ComputeCapability(12, 0), 32_000_000_000),))
    assert "no kernels" in check("GPU 0").found
    assert "HIP_TRT_CUDA_ARCHITECTURES=120" in check("GPU 0").remedy


def test_plugin_for_hopper_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = CompiledFor(frozenset({ComputeCapability(9, 0)}), frozenset())
    monkeypatch.setattr(doctor, "compiled_for", lambda path: hopper)
    assert (check("plugin").status, task("build").status) == ("problem", "problem")
    assert "hip-trt[tensorrt]" in task("build").remedy
    machine.driver, machine.flavours = Driver("13.0", (HOPPER,)), {"tensorrt-rtx": "1.7.1", "tensorrt": "10.14"}
    assert (check("plugin").status, task("run").status) == ("ok", "ok")
    machine.driver, machine.flavours = Driver("13.0", (ADA,)), {"tensorrt": "10.14"}
    assert (check("plugin").status, task("build").status) == ("problem", "problem")


def test_hopper_without_tensorrt(machine: Machine) -> None:
    machine.driver, machine.flavours = Driver("13.0", (HOPPER,)), {}
    assert "hip-trt[tensorrt]" in task("build").remedy
    assert "there is no TensorRT to run engines on it" in check("GPU 0").found


def test_driver_that_shows_no_gpu(machine: Machine) -> None:
    machine.driver = Driver("12.8", ())
    assert "CUDA 12.8" in check("GPU").found
    assert "CUDA_VISIBLE_DEVICES" in check("GPU").remedy


@pytest.mark.parametrize(
    ("plugin", "pytorch", "driver", "what"),
    [
        ("13.0", "13.2", "12.8", "the plugin needs a driver for CUDA 13.0 or later"),
        ("12.8", "13.2", "12.9", "PyTorch needs a driver for CUDA 13.0 or later"),
        ("13.2", "13.2", "13.0", ""),  # one of the same major number will do
        ("", None, "12.8", ""),  # neither says
    ],
)
def test_old_driver(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, plugin: str, pytorch: str | None, driver: str, what: str
) -> None:
    monkeypatch.setattr(doctor, "compiled_for", lambda path: replace(KERNELS, cuda=plugin))
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    machine.driver = Driver(driver, (ADA,))
    found = check("GPU 1")
    assert (found.status, task("run").status) == (("note", "note") if what else ("ok", "ok"))
    assert f"driver for CUDA {driver}; {what}" in found.found
    assert task("run").remedy == ("Update the NVIDIA driver to one for CUDA 13.0 or later." if what else "")
    assert diagnose().can_export


@pytest.mark.parametrize(
    ("name", "version", "works"),
    [
        ("tensorrt", "10.5.0", False), ("tensorrt", "10.6.0.26", True), ("tensorrt", "11.4.2.5", True),
        ("tensorrt", "12.0.1", False), ("tensorrt-rtx", "1.6.0.4", False), ("tensorrt-rtx", "1.7.1.116", True),
        ("tensorrt-rtx", "2.0", False),
    ],
)
def test_versions_of_tensorrt(machine: Machine, name: str, version: str, works: bool) -> None:
    machine.driver, machine.flavours = Driver("13.0", (HOPPER,)), {name: version}
    assert check(name).status == ("ok" if works else "note")
    assert diagnose().can_export == works
    if not works:
        assert check(name).found == f"{version}, which hip-trt does not work with"
        assert check(name).remedy == f"pip install 'hip-trt[{name}]'"


def test_a_problem_with_the_engines_is_named_where_the_gpu_is_fit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.driver = Driver("13.0", (ADA,))
    assert task("run").status == "ok"
    for_ada = CompiledFor(frozenset({ADA.compute_capability}), frozenset())
    monkeypatch.setattr(doctor, "compiled_for", lambda path: for_ada)
    machine.driver, machine.flavours = Driver("13.0", (HOPPER, ADA)), {"tensorrt": "10.14"}
    assert (check("plugin").status, check("GPU 1").status) == ("problem", "ok")
    assert (task("run").status, task("run").remedy) == ("note", check("plugin").remedy)


def test_tensorrt_without_a_gpu_cannot_build(machine: Machine) -> None:
    machine.flavours = {"tensorrt": "10.14"}
    assert not diagnose().can_export
    assert "needs a GPU" in check("tensorrt").found
    assert "hip-trt[tensorrt-rtx]" in check("TensorRT").remedy
    machine.driver = Driver("13.0", (HOPPER,))
    assert diagnose().can_export


def test_no_tensorrt(machine: Machine) -> None:
    machine.flavours = {}
    assert not diagnose().can_export
    assert (check("TensorRT").status, check("plugin").status) == ("problem", "ok")
    assert (task("export").status, task("build").status, task("run").status) == ("ok", "problem", "note")
    assert "hip-trt[tensorrt-rtx]" in task("build").remedy


def test_tensorrt_that_cannot_be_imported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_flavour(name: str) -> Flavour:
        raise EnvironmentProblem("libnvinfer.so is missing.", "Install it again.")

    monkeypatch.setattr(doctor, "find_flavour", find_flavour)
    assert (check("tensorrt-rtx").status, check("tensorrt-rtx").remedy) == ("note", "Install it again.")
    assert not diagnose().can_export


def test_missing_package_and_plugin(machine: Machine) -> None:
    def plugin_path() -> Path:
        raise PluginError("it is not here.", "Install hip-trt again.")

    machine.packages["onnxscript"] = None
    machine.plugin = plugin_path
    assert check("onnxscript") == Check(
        name="onnxscript", status="problem", found="not installed", remedy="pip install 'onnxscript>=0.7.1'"
    )
    assert {item.status for item in diagnose().tasks} == {"problem"}
    assert task("run").found == "onnxscript: not installed"
    assert check("plugin") == Check(
        name="plugin", status="problem", found="it is not here.", remedy="Install hip-trt again."
    )
    assert not diagnose().can_export


def test_versions_outside_the_declared_ranges(machine: Machine) -> None:
    """Of any requirement, although only the main ones are shown when all is well."""
    assert "numpy" not in {item.name for item in diagnose().checks}
    machine.packages.update(numpy="1.26.4", torch="2.8.0")
    assert check("numpy") == Check(
        name="numpy", status="problem", found="1.26.4, which hip-trt does not work with",
        remedy="pip install 'numpy>=2.0'",
    )
    assert check("torch").status == "problem"
    assert task("export").remedy == check("torch").remedy


def test_low_disk_and_old_python(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 1_000_000_000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    checks = {item.name: item for item in diagnose(tmp_path / "not" / "yet").checks}
    assert checks["disk"].status == "note"
    assert checks["disk"].found == f"1.0 GB free in {tmp_path}"
    assert checks["Python"].status == "problem"


def test_command(machine: Machine) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "What works here" in result.stdout
    assert "✓  export" in result.stdout
    machine.flavours = {}
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "hip-trt[tensorrt-rtx]" in result.stdout
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["can_export"]
    assert {"name": "torch", "status": "ok"}.items() <= report["checks"][1].items()
    assert [item["name"] for item in report["tasks"]] == ["export", "build", "run"]


def test_this_machine() -> None:
    """Nothing is replaced: no check raises, and the ones that asked the driver agree."""
    driver, gpu = cuda_driver(), current_gpu()
    assert (gpu is not None) == bool(driver and driver.gpus)
    names = [item.name for item in diagnose().checks]
    assert names[:2] == ["Python", "torch"]
    assert {"plugin", "memory", "disk"} <= set(names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpus_are_those_that_torch_sees() -> None:
    driver = cuda_driver()
    assert driver is not None
    assert len(driver.gpus) == torch.cuda.device_count()
    for gpu in driver.gpus:
        properties = torch.cuda.get_device_properties(gpu.index)
        assert (gpu.name, gpu.memory) == (properties.name, properties.total_memory)
        assert gpu.compute_capability == ComputeCapability(properties.major, properties.minor)


# What a library was compiled for


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """A fat binary of (kind, architecture) entries, as nvcc writes them."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 16, 0, 0, 0, 0, architecture).ljust(64, b"\0") + bytes(16)
        for kind, architecture in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_compiled_for(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"\x7fELF" + fat_binary((2, 80), (2, 90)) + b"between" + fat_binary((2, 120), (1, 120)) + b"end")
    found = compiled_for(path)
    assert str(found) == "8.0, 9.0, 12.0, 12.0 and later"
    for text, runs in {"8.9": True, "9.0": True, "10.0": False, "12.1": True, "13.0": True, "7.5": False}.items():
        assert found.runs_on(ComputeCapability.parse(text)) == runs
    path.write_bytes(b"no CUDA in here")
    assert not compiled_for(path).runs_on(ComputeCapability(8, 0))
    assert compiled_for(path).cuda == ""
    path.write_bytes(b"Cuda compilation tools, release 13.0, V13.0.88\0Cuda compilation tools, release 12.9, V12.9.1")
    assert compiled_for(path).cuda == "13.0"


def test_plugin_is_compiled_for_something() -> None:
    found = compiled_for(library.plugin_path())
    assert found.cubin
    assert re.fullmatch(r"1[2-9]\.\d", found.cuda or "12.8")
