"""Long-context Llama on TensorRT with Hierarchically Pruned Attention, without retraining.

Example:
    >>> import hip_trt
    >>> generator = hip_trt.load("build/model.onnx")                              # doctest: +SKIP
    >>> generator.generate("The capital of France is", max_new_tokens=8)[0].text  # doctest: +SKIP
    ' Paris. ...'
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hip_trt.runtime import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import the heavy packages when they are asked for, so that the command line answers at once."""
    if name == "load":
        from hip_trt.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
