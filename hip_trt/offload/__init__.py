"""KV cache in host memory, with what decode steps touch often kept in GPU memory (plugins/cuda/hip_offload.h)."""

from hip_trt.offload.block_caches import BlockCaches, CacheCounts

__all__ = ["BlockCaches", "CacheCounts"]
