"""ModelSpec: what an exported model is, carried in the ONNX file's metadata and in the plan's sidecar."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from hip_trt import operator
from hip_trt.config import HipConfig
from hip_trt.errors import EngineError

DType = Literal["float16", "bfloat16", "float32"]
Logits = Literal["last", "all"]

METADATA_KEY = "hip_trt"
"""Key of the ONNX metadata entry that holds :meth:`ModelSpec.model_dump_json`."""


def require_format(what: object, found: int | None, made_by: str) -> None:
    """Check that a model or an engine is of this version of the operator's contract, and so can be run.

    Args:
        what: the file, for the message.
        found: the version in it; None: none.
        made_by: version of the hip-trt that made it, as far as the file says.

    Raises:
        EngineError: it is of another.
    """
    if found != operator.OP_VERSION:
        raise EngineError(
            f"{what}: made by hip-trt {made_by or 'of an unknown version'} in format {found or 'none'}; this is "
            f"hip-trt {version('hip-trt')}, which reads format {operator.OP_VERSION}.",
            "Export it again with `hip-trt export`.",
        )


class ModelSpec(BaseModel):
    """Facts about an exported model that a runtime needs. Fields that a later hip-trt may add are passed over.

    Attributes:
        model_type: the transformers model type, such as "llama".
        source: name of the checkpoint, without its folder.
        dtype: type of weights, activations and KV cache. Logits are float32 always.
        logits: "last": [B, 1, vocab_size], the last valid token of each row; "all": [B, S, vocab_size].
        max_position_embeddings: longest context, in tokens: that the model was trained for, or a shorter one that it
            was exported for.
        hip_trt_version: version of hip-trt that exported the model.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str
    source: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: DType
    logits: Logits
    hip: HipConfig
    hip_trt_version: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_masks(self) -> int:
        """Mask heads per sequence (Hm)."""
        return self.hip.num_masks(self.num_attention_heads, self.num_key_value_heads)

    def pool_shape(self, pages: int) -> tuple[int, int, int, int]:
        """Shape of one layer's key (or value) pool: [P, Hkv, page_size, D]."""
        return pages, self.num_key_value_heads, self.hip.page_size, self.head_dim

    def state_shape(self, tensor: operator.StateTensor, count: int) -> tuple[int, ...]:
        """Shape of one layer's tensor of the state, for so many pages, or sequences where it is not paged."""
        return count, *tensor.sizes(
            self.hip, query_heads=self.num_attention_heads, kv_heads=self.num_key_value_heads, head_dim=self.head_dim
        )

    def state_dtype(self, tensor: operator.StateTensor) -> torch.dtype:
        """Type of a tensor of the state."""
        return torch.int32 if tensor.integers else self.torch_dtype
