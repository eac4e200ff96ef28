"""What the kernels take."""

from __future__ import annotations

import triton
from torch import Tensor, bfloat16, float16, float32

from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.triton.cache import append

TYPES = (float16, bfloat16, float32)


def check_query(query: Tensor) -> None:
    """Refuse what cannot be computed, by the query, whose type and device are those of all.

    Raises:
        EnvironmentProblem: if the tensors are on the CPU, and Triton was imported without its interpreter.
        RuntimeInputError: if the type is not one of :data:`TYPES`.
    """
    if query.dtype not in TYPES:
        raise RuntimeInputError(f"query: type {query.dtype} is not supported.", "Use float16, bfloat16 or float32.")
    if not query.is_cuda and isinstance(append, triton.JITFunction):
        raise EnvironmentProblem(
            f"Triton kernels cannot run on tensors on {query.device}.",
            "Use CUDA tensors, or set TRITON_INTERPRET=1 before triton is first imported.",
        )
