"""Hugging Face models with HiP, in eager mode: :func:`patch`, :func:`unpatch` and the paged :class:`HipCache`."""

from hip_trt.huggingface.attention import patch, unpatch
from hip_trt.huggingface.cache import HipCache

__all__ = ["HipCache", "patch", "unpatch"]
