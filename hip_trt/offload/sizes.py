"""Sizes of a KV cache in host memory and of the GPU memory that serves it: arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hip_trt.config import HipConfig
from hip_trt.offload.block_caches import WAYS
from hip_trt.offload.settings import KEY_SHARE, KEY_STEPS, VALUE_SHARE, VALUE_STEPS, Offload

MIB = 1 << 20
_ALIGNMENT = 4096  # of a pool within a layer's memory
_LANDING_PART = 16  # of all layers' caches is as much as the landing area may take
_REUSED_NODES = 2  # level-1 nodes searched beside those that a step reuses


@dataclass(frozen=True)
class Geometry:
    """A model's KV cache.

    Attributes:
        num_masks: mask heads per sequence (Hm).
        batch: sequences.
        pages: in each layer's pool.
        slots: pages of the longest sequence (M).
    """

    num_layers: int
    num_kv_heads: int
    num_masks: int
    head_dim: int
    dtype: torch.dtype
    batch: int
    pages: int
    slots: int
    config: HipConfig

    @property
    def pool_shape(self) -> tuple[int, int, int, int]:
        """[P, Hkv, page_size, D]."""
        return self.pages, self.num_kv_heads, self.config.page_size, self.head_dim

    @property
    def page_bytes(self) -> int:
        """Keys, or values, of one page in one layer."""
        return self.num_kv_heads * self.config.page_size * self.head_dim * self.dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        """Keys, or values, of one layer."""
        return self.pages * self.page_bytes

    @property
    def layer_bytes(self) -> int:
        """Host memory of one layer: the key pool, then the value pool at :attr:`value_offset`."""
        return self.value_offset + self.pool_bytes

    @property
    def value_offset(self) -> int:
        return -(-self.pool_bytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def block_bytes(self) -> int:
        """A key block, or value block, of one KV head."""
        return self.config.block_k * self.head_dim * self.dtype.itemsize

    @property
    def pool_blocks(self) -> int:
        return self.pool_bytes // self.block_bytes

    def step_blocks(self) -> tuple[int, int]:
        """Key blocks and value blocks that a decode step of long sequences reads in one layer, at most.

        Of steps that search from the top where all do; else of those that begin at reused nodes, which are the rule.
        """
        config = self.config
        always = sum(-(-tokens // config.block_k) + 1 for tokens in (config.sink_tokens, config.window_tokens))
        kept = config.decode_mask_blocks
        if config.refresh_interval == 1 or config.reuse_level == 0:
            searched, nodes = kept * config.leaf_branch, self.slots * config.page_size // config.block_k
            nodes = -(-nodes // config.leaf_branch)
            while nodes > kept * config.branch:  # a level below the one that the search begins at
                searched += kept * config.branch
                nodes = -(-nodes // config.branch)
            searched += nodes
        else:
            searched = (kept + _REUSED_NODES) * config.leaf_branch
        per_sequence = self.slots * config.page_size // config.block_k * self.num_kv_heads
        keys, values = (
            min(per_sequence, blocks * self.num_masks + always * self.num_kv_heads) for blocks in (searched, kept)
        )
        return self.batch * keys, self.batch * values


@dataclass(frozen=True)
class CacheSizes:
    """Blocks of one layer's caches, as asked for or chosen; a multiple of WAYS each.

    Attributes:
        too_small: what is less than a decode step reads, and what would do, in words; empty where all is well.
    """

    keys: int
    values: int
    too_small: tuple[str, ...]

    def landing(self, num_layers: int) -> int:
        """Blocks of the landing area: what one layer may miss at once, if that is little beside all caches."""
        return min(self.keys + self.values, (self.keys + self.values) * num_layers // _LANDING_PART)


def cache_sizes(offload: Offload, geometry: Geometry) -> CacheSizes:
    """Blocks per layer for the sizes that the user wants, or for the defaults, which hold what a step reads."""
    blocks, too_small = [], []
    for field, share, steps, need in zip(
        ("key_cache", "value_cache"), (KEY_SHARE, VALUE_SHARE), (KEY_STEPS, VALUE_STEPS), geometry.step_blocks(),
        strict=True,
    ):
        mib, wanted = getattr(offload, f"{field}_mib"), getattr(offload, field)
        if mib is not None:
            count = mib * MIB / geometry.num_layers / geometry.block_bytes
        elif wanted is not None:
            count = wanted * 2 * geometry.pool_blocks
        else:
            count = max(share * 2 * geometry.pool_blocks, min(steps * need, geometry.pool_blocks))
        # What the user asked for is not exceeded, but by what makes a whole pool fit.
        asked = mib is not None or wanted is not None
        whole = (int(count) // WAYS if asked and count < geometry.pool_blocks else math.ceil(count / WAYS)) * WAYS
        blocks.append(whole)
        if whole < min(need, geometry.pool_blocks):
            enough = -(-need // WAYS) * WAYS * geometry.block_bytes * geometry.num_layers
            too_small.append(
                f"{field}: {whole * geometry.block_bytes * geometry.num_layers / MIB:,.1f} MiB hold less than a decode "
                f"step reads; the rest is read over the bus every time. {math.ceil(enough / MIB):,} MiB would do "
                f"(--{field.replace('_', '-')}-mib)."
            )
    return CacheSizes(blocks[0], blocks[1], tuple(too_small))
