"""The machine and the versions that a timing of kernels belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hip_trt.evaluate import machine


def describe(library: Path) -> dict[str, Any]:
    """GPU, driver, versions, date, and which build of the plugin library."""
    return machine.describe("cuda", library)
