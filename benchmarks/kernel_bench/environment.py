"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(library: Path) -> dict[str, Any]:
    """GPU, driver, versions, date, and which build of the plugin library."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "hip-trt": _version("hip-trt"),
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest()[:12],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _cudnn() -> int | None:
    cudnn: Any = torch.backends.cudnn  # has no types
    version: int | None = cudnn.version()
    return version


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
