"""Names of the ``HipAttention`` operator and of the model graph: the one place that spells them.

The contract (shapes, types, meaning) is in :func:`hip_trt.reference.hip_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hip_trt.config import HipConfig
    from hip_trt.config_v2 import HipConfigV2

DOMAIN: Final = "hip.trt"
OP_TYPE: Final = "HipAttention"
OP_VERSION: Final = 1
"""Version of the contract. Exported models and engines carry it as their format version, and it alone decides whether
another hip-trt runs them (docs/compatibility.md)."""

INPUTS: Final = (
    "query", "key", "value", "past_key", "past_value", "page_table", "past_lengths", "query_lengths", "past_nodes",
    "refresh_mask",
)
OUTPUTS: Final = ("output", "present_key", "present_value", "present_nodes")

INT_ATTRIBUTES: Final = (
    "mask_k", "decode_mask_k", "block_q", "block_k", "stride_q", "stride_k", "branch", "leaf_branch", "reuse_level",
    "page_size", "sink_tokens", "window_tokens", "dense",
)

# Version 2, which stands beside version 1 until it replaces it (docs/decode_version_2.md).
OP_VERSION_V2: Final = 2
INPUTS_V2: Final = (
    "query", "key", "value", "past_key", "past_value", "page_table", "past_lengths", "query_lengths", "past_bounds",
    "past_codes", "past_blocks", "refresh_mask", "call_kind",
)
OUTPUTS_V2: Final = (
    "output", "present_key", "present_value", "present_bounds", "present_codes", "present_blocks",
)
STATE_V2: Final = {present: present.replace("present", "past") for present in OUTPUTS_V2[1:]}
"""Each output that may be written onto an input, and that input."""

INT_ATTRIBUTES_V2: Final = (
    "mask_k", "block_q", "block_k", "stride_q", "stride_k", "branch", "leaf_branch", "decode_mask_k", "decode_search_k",
    "decode_block_k", "page_size", "sink_tokens", "window_tokens", "dense",
)
PREFILL: Final = 1
DECODE: Final = 2
"""Sizes of call_kind."""

# Model graph: names of inputs and outputs, as in Optimum's decoders.
INPUT_IDS: Final = "input_ids"
PAST_LENGTHS: Final = "past_lengths"
QUERY_LENGTHS: Final = "query_lengths"
PAGE_TABLE: Final = "page_table"
REFRESH_MASK: Final = "refresh_mask"
LOGITS: Final = "logits"



@dataclass(frozen=True)
class StateTensor:
    """A tensor of a layer's state: an input of the operator and of the model graph, and an output of the same shape and
    type, which may share its buffer.

    Attributes:
        part: what it holds.
        paged: a pool of pages, [P, ...], where whoever copies, moves or frees a page takes along what belongs to it;
            else [B, ...], an entry for each sequence.
        integers: int32; else of the model's type.
    """

    part: str
    paged: bool
    integers: bool

    @property
    def past_input(self) -> str:
        """The operator's input."""
        return f"past_{self.part}"

    @property
    def present_output(self) -> str:
        """The operator's output."""
        return f"present_{self.part}"

    def sizes(self, config: HipConfig, *, query_heads: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Its shape after pages, or sequences."""
        if self.part == "nodes":
            return config.num_masks(query_heads, kv_heads), config.decode_mask_blocks
        return kv_heads, config.page_size, head_dim

    def past(self, layer: int) -> str:
        """Name of a decoder layer's input of the model graph."""
        return f"past_key_values.{layer}.{self.part}" if self.paged else f"past_{self.part}.{layer}"

    def present(self, layer: int) -> str:
        """Name of a decoder layer's output of the model graph."""
        return f"present.{layer}.{self.part}" if self.paged else f"present_{self.part}.{layer}"


KEY: Final = StateTensor("key", paged=True, integers=False)
VALUE: Final = StateTensor("value", paged=True, integers=False)
NODES: Final = StateTensor("nodes", paged=False, integers=True)
NOTHING: Final = -1
"""What an entry holds throughout for a sequence that has none."""
STATE: Final = (KEY, VALUE, NODES)
"""A layer's state, in the order of the operator's inputs, its outputs and the model graph."""


def attributes(config: HipConfig, *, scale: float, layer: int | None = None) -> dict[str, int | float | str]:
    """Attributes of one ``HipAttention`` node.

    Args:
        config: the model's pruning.
        scale: factor on q·k, usually head_dim ** -0.5.
        layer: index of the decoder layer, which decides ``dense``; None is not dense.
    """
    values: dict[str, int | float | str] = {name: getattr(config, name) for name in INT_ATTRIBUTES if name != "dense"}
    values["dense"] = int(layer in config.dense_layers)
    values["mask_heads"] = config.mask_heads
    values["scale"] = float(scale)
    return values


def attributes_v2(config: HipConfigV2, *, scale: float, layer: int | None = None) -> dict[str, int | float | str]:
    """Attributes of one node of version 2; see :func:`attributes`."""
    values: dict[str, int | float | str] = {
        name: getattr(config, name) for name in INT_ATTRIBUTES_V2 if name != "dense"
    }
    values["dense"] = int(layer in config.dense_layers)
    values["mask_heads"] = config.mask_heads
    values["value_threshold"] = float(config.value_threshold)
    values["scale"] = float(scale)
    return values
