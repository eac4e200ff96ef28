"""What must happen before any test module is imported."""

import os

import torch

if not torch.cuda.is_available():  # Triton kernels are then interpreted; triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
