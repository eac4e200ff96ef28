"""KV cache in host memory, with what decode steps touch often kept in GPU memory (plugins/cuda/hip_offload.h).

:class:`Offload` says how much GPU memory serves it, :class:`OffloadedCache` is the memory of one model's cache, and
:class:`BlockCaches` what the library knows of one layer. docs/offload.md explains.
"""

from hip_trt.offload.block_caches import BlockCaches, CacheCounts
from hip_trt.offload.offloaded_cache import OffloadedCache
from hip_trt.offload.settings import Offload
from hip_trt.offload.sizes import Geometry
from hip_trt.offload.statistics import OffloadStats

__all__ = ["BlockCaches", "CacheCounts", "Geometry", "Offload", "OffloadStats", "OffloadedCache"]
