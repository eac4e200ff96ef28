"""The CUDA kernels behind the C ABI of version 2, on a GPU, over chains of calls as test_kernels_v2.py has them."""

from __future__ import annotations

import os

import pytest
import torch
from kernel_v2_checks import check_chain
from v2_chains import GRID, Chain, every_type

from hip_trt.library import Library, plugin_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def library() -> Library:
    """The installed one, or the one that the environment variable HIP_TRT_LIBRARY names."""
    return Library(os.environ.get("HIP_TRT_LIBRARY") or plugin_path())


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("chain", every_type(GRID), ids=str)
def test_agrees_with_reference(library: Library, chain: Chain, alias: bool) -> None:
    check_chain(library, chain, "cuda", alias=alias)
