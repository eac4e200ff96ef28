"""Long-context Llama on TensorRT with Hierarchically Pruned Attention, without retraining.

Example:
    >>> import hip_trt
    >>> generator = hip_trt.load("build/model.onnx")                              # doctest: +SKIP
    >>> generator.generate("The capital of France is", max_new_tokens=8)[0].text  # doctest: +SKIP
    ' Paris. ...'

Or in eager mode, with any Hugging Face Llama:
    >>> model = hip_trt.patch(LlamaForCausalLM.from_pretrained("..."))            # doctest: +SKIP
    >>> model.generate(**inputs)                                                  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hip_trt.huggingface import patch, unpatch
    from hip_trt.runtime import load

__all__ = ["load", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    """Import the heavy packages when they are asked for, so that the command line answers at once."""
    if name == "load":
        from hip_trt.runtime import load

        return load
    if name in ("patch", "unpatch"):
        from hip_trt import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
