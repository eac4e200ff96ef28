"""Hugging Face models with HiP, in eager mode: :func:`patch`, :func:`unpatch` and the paged :class:`HipCache`."""

from hip_trt.huggingface.attention import patch, unpatch
from hip_trt.huggingface.cache import HipCache
from hip_trt.huggingface.cache_name import cache_argument, output_cache

__all__ = ["HipCache", "cache_argument", "output_cache", "patch", "unpatch"]
