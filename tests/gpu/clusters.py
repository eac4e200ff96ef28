"""What tests of the decode kernel share: the GPU that they need, and the configuration of real sizes."""

from __future__ import annotations

import pytest
import torch

from hip_trt.config import HipConfig

NEEDS_CLUSTERS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a GPU with thread-block clusters",
    ),
]

LLAMA = HipConfig.create()
"""The defaults, with Llama-3.1-8B's 32 query heads on 8 and head size 128."""
