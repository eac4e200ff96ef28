"""Proves an exported model against a reference, on Polygraphy's runners, comparators and data loaders.

Example:
    >>> from hip_trt.verify import verify
    >>> report = verify("build/model.onnx", against="pytorch", checkpoint="SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> report.agrees                                                                               # doctest: +SKIP
    True
"""

from hip_trt.verify.comparison import verify
from hip_trt.verify.report import Report

__all__ = ["Report", "verify"]
