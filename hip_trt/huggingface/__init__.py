"""Hugging Face models with HiP, in eager mode: :func:`patch`, :func:`unpatch` and the paged :class:`HipCache`."""

from hip_trt.huggingface.cache import HipCache
from hip_trt.huggingface.patch import patch, unpatch

__all__ = ["HipCache", "patch", "unpatch"]
