"""Names of the ``HipAttention`` operator and of the model graph: the one place that spells them.

The contract (shapes, types, meaning) is in :func:`hip_trt.reference.hip_attention`.
"""

from __future__ import annotations

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


def past_key_name(layer: int) -> str:
    return f"past_key_values.{layer}.key"


def past_value_name(layer: int) -> str:
    return f"past_key_values.{layer}.value"


def past_nodes_name(layer: int) -> str:
    return f"past_nodes.{layer}"


def present_key_name(layer: int) -> str:
    return f"present.{layer}.key"


def present_value_name(layer: int) -> str:
    return f"present.{layer}.value"


def present_nodes_name(layer: int) -> str:
    return f"present_nodes.{layer}"


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
