"""The operator in plain PyTorch, float32, short: read it beside the paper (arXiv 2406.09827)."""

from hip_trt.reference.attention import sparse_attention
from hip_trt.reference.operator import hip_attention, select_blocks
from hip_trt.reference.tree import Tree, search, search_from

__all__ = ["Tree", "hip_attention", "search", "search_from", "select_blocks", "sparse_attention"]
