"""The operator in Triton, for verification: written to be read beside :mod:`hip_trt.reference`, same names.

It runs on a CUDA GPU, and on the CPU through Triton's interpreter, which takes ``TRITON_INTERPRET=1`` in the
environment before Triton is first imported.
"""

from hip_trt.errors import EnvironmentProblem

try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    raise EnvironmentProblem("The package triton is not installed.", "Install it: pip install triton.") from None

from hip_trt.triton.operator import hip_attention

__all__ = ["hip_attention"]
