"""HipConfigV2: the description of how a model's attention is pruned, for version 2 of the operator.

Stands beside :class:`hip_trt.config.HipConfig` until version 2 replaces version 1 (docs/decode_version_2.md).
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from hip_trt.config import HipConfig, require


class HipConfigV2(HipConfig):
    """Settings of version 2 of the ``HipAttention`` operator, and of how a model uses it.

    Prefill is version 1's. Decode has budgets and a block size of its own; docs/decode_study.md says where their
    defaults come from.

    Raises:
        ConfigError: as :class:`HipConfig`.
    """

    decode_mask_k: int = Field(
        8192, ge=1, le=1 << 22,
        description="Tokens of the blocks that a decoded token selects; a multiple of decode_block_k.",
    )
    decode_search_k: int = Field(
        32768, ge=1, le=1 << 22,
        description="Tokens whose keys a search reads in 2 bits; a multiple of decode_block_k, at least decode_mask_k.",
    )
    decode_block_k: int = Field(
        64, ge=2, le=64, description="Tokens per block of a decode call; a power of two that divides page_size.",
    )
    value_threshold: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False,
        description="Tokens of less probability are left out of the blocks that a decode call selected.",
    )
    reuse_level: Literal[0] = Field(0, exclude=True, description="Version 2 reuses blocks; it has no levels.")

    _in_key_blocks: ClassVar[tuple[str, ...]] = ("mask_k", "page_size")

    @model_validator(mode="after")
    def _check_decode(self) -> Self:
        require(self, self.decode_block_k & (self.decode_block_k - 1) == 0, "decode_block_k", "a power of two")
        for field in ("decode_mask_k", "decode_search_k", "page_size"):
            require(self, getattr(self, field) % self.decode_block_k == 0, field,
                    f"a multiple of decode_block_k ({self.decode_block_k})")
        require(self, self.decode_search_k >= self.decode_mask_k, "decode_search_k",
                f"at least decode_mask_k ({self.decode_mask_k})")
        return self

    @property
    def decode_mask_blocks(self) -> int:
        """Blocks that a decoded token selects, and past_blocks per mask head (the contract's K)."""
        return self.decode_mask_k // self.decode_block_k
