"""What tests on a GPU share."""

from __future__ import annotations

import pytest

from hip_trt import library
from hip_trt.errors import PluginError


@pytest.fixture
def installed() -> None:
    """Skip where the installed library, which patched models and PyTorch's operator call, is missing."""
    try:
        library.load()
    except PluginError as error:
        pytest.skip(f"no CUDA kernels: {error.cause}")
