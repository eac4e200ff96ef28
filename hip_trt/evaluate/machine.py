"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device | str = "cpu", library: Path | None = None) -> dict[str, Any]:
    """Processor or GPU, driver, versions and date.

    Args:
        device: where the work was done.
        library: the plugin library that did it, told by the first 12 digits of its SHA-256; None where none did.
    """
    device = torch.device(device)
    facts: dict[str, Any] = _gpu(device) if device.type == "cuda" else _cpu()
    facts |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version for package in ("transformers", "triton", "hip-trt") if (version := _version(package))},
    }
    if library is not None:
        facts["library_sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()[:12]
    return facts | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    cudnn: Any = torch.backends.cudnn  # has no types
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
    }


def _cpu() -> dict[str, Any]:
    return {"cpu": _cpu_name(), "cores": os.cpu_count()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
