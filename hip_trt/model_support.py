"""What of a Hugging Face model HiP can represent: decided from its configuration, before any work.

HiP attends causally, to everything or to the blocks that its search keeps. What a model adds to that inside attention
(soft-capping, sinks, position biases, latent keys) has no place in the operator, and cached keys must stay valid, so
RoPE's frequencies must not depend on the sequence's length. A sliding window, and some RoPE variants, differ from that
only beyond some length: up to it the model is represented exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hip_trt.errors import CheckpointError, ConfigError, RuntimeInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE variants whose frequencies are constants."""
LIMITED_ROPE = ("dynamic", "longrope", "su")
"""RoPE variants whose frequencies change beyond some length. ("su" is longrope's older name.)"""

_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_ATTENDS = "HiP attends causally to all tokens, by rotary position embedding or none, in decoder-only models."
_ALIBI = ("bloom", "mpt")
_PARTS = ("text_config", "vision_config", "audio_config")
_SIZES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "num_hidden_layers",
    "vocab_size", "max_position_embeddings",
)
_DOWNLOAD = "Configuration and weights may be of different models: download it again."
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Heads:
    """A model's attention heads: Hq, Hkv and D of the operator's contract."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Limit:
    """A length up to which HiP computes what the model computes.

    Attributes:
        tokens: the length.
        what: what the model does beyond it, as a clause that follows "the model".
        beyond: what an export for longer contexts does at every length instead; empty if there is no such thing.
    """

    tokens: int
    what: str
    beyond: str = ""


def check_sizes(get: Callable[[str], Any], where: str) -> None:
    """Refuse sizes that no model can have.

    Args:
        get: gives a field of the configuration by its name; None where there is no such field.
        where: the model's name or file, for messages.

    Raises:
        CheckpointError: naming the field and its value.
    """
    for field in _SIZES:
        value = get(field)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{where}: {field} is {value!r}; it must be a positive whole number.", _DOWNLOAD)
    query, key_value = get("num_attention_heads"), get("num_key_value_heads")
    if query and key_value and query % key_value:
        raise CheckpointError(
            f"{where}: num_key_value_heads {key_value} does not divide num_attention_heads {query}.", _DOWNLOAD
        )
    hidden = get("hidden_size")
    if query and hidden and get("head_dim") is None and hidden % query:
        raise CheckpointError(
            f"{where}: num_attention_heads {query} does not divide hidden_size {hidden}, and there is no head_dim.",
            _DOWNLOAD,
        )


def heads(config: PreTrainedConfig) -> Heads:
    """A model's heads; its sizes are those that :func:`check_sizes` lets pass."""
    query: int = config.num_attention_heads
    key_value = getattr(config, "num_key_value_heads", None) or query
    return Heads(query, key_value, getattr(config, "head_dim", None) or config.hidden_size // query)


def check_model(config: PreTrainedConfig, where: str, *, traced: bool) -> None:
    """Refuse a model that computes attention in a way that HiP does not, or whose sizes contradict each other.

    Args:
        config: the model's.
        where: the model's name or file, for messages.
        traced: whether its graph is to be traced, and not only run in eager mode.

    Raises:
        CheckpointError: naming what the model has.
    """
    def get(field: str) -> Any:
        return getattr(config, field, None)

    found = unsupported(get, traced=traced)
    if found is not None:
        raise CheckpointError(f"{where}: the model {found}, which is not supported.", _ATTENDS)
    check_sizes(get, where)  # those that the file leaves to defaults too


def unsupported(get: Callable[[str], Any], *, traced: bool) -> str | None:
    """What HiP cannot represent of a configuration, as a clause such as "is an encoder-decoder"; None for nothing.

    Args:
        get: gives a field of the configuration by its name; None where there is no such field.
        traced: see :func:`check_model`.
    """
    parts = [part for part in _PARTS if get(part) is not None] or list(get("sub_configs") or ())
    kinds = sorted(set(get("layer_types") or ()) - set(_ATTENTION_TYPES))
    experts = next((field for field in _EXPERTS if traced and (get(field) or 0) > 1), None)
    alibi = get("alibi") or get("position_embedding_type") == "alibi" or dict(get("attn_config") or {}).get("alibi")
    for there, what in (
        (get("is_encoder_decoder"), "is an encoder-decoder"),
        (parts, f"is made of several models ({', '.join(parts)})"),
        (get("is_causal") is False, "does not attend causally (is_causal false)"),
        (kinds, f"mixes other layers with attention (layer_types {', '.join(kinds)})"),
        (get("state_size"), f"has state-space layers (state_size {get('state_size')})"),
        (get("kv_lora_rank"), f"uses multi-head latent attention (kv_lora_rank {get('kv_lora_rank')})"),
        (get("attn_logit_softcapping") is not None,
         f"caps attention's logits (attn_logit_softcapping {get('attn_logit_softcapping')})"),
        (get("model_type") == "gpt_oss", "has attention sinks"),
        (alibi or (alibi is None and get("model_type") in _ALIBI), "biases attention by distance (ALiBi)"),
        (experts, f"is a mixture of experts ({experts} {get(experts) if experts else ''})"),
        (_rope_type(get) not in (*STATIC_ROPE, *LIMITED_ROPE),
         f"has a RoPE that is not known here (rope_type '{_rope_type(get)}')"),
    ):
        if there:
            return what
    return None


def limits(config: PreTrainedConfig) -> Iterator[Limit]:
    """Lengths below the model's context beyond which HiP would not compute what the model computes."""
    get: Callable[[str], Any] = lambda field: getattr(config, field, None)  # noqa: E731
    context: int = config.max_position_embeddings
    window = get("sliding_window")
    sliding = [index for index, kind in enumerate(get("layer_types") or ()) if kind == "sliding_attention"]
    if window is not None and (sliding or not get("layer_types")) and window < context:
        layers = f" in {len(sliding)} of its layers" if sliding else ""
        yield Limit(window, f"attends to a sliding window of {window} tokens{layers} (sliding_window)")
    match _rope_type(get):
        case "dynamic":  # made for lengths beyond the context that its configuration names
            yield Limit(context, "changes RoPE's frequencies with the length (rope_type 'dynamic')")
        case "longrope":
            original = int(config.rope_parameters["original_max_position_embeddings"])
            if original < context:
                yield Limit(
                    original, "changes RoPE's frequencies with the length (rope_type 'longrope')",
                    "RoPE's long factors hold at every length",
                )


def resolve_context(
    config: PreTrainedConfig, where: str, max_context: int | None, *, option: str, static: bool
) -> tuple[int, tuple[str, ...]]:
    """The longest context that a model with HiP may be given.

    Args:
        config: the model's.
        where: the model's name or file, for messages.
        max_context: what the user asks for, in tokens; None for the model's own.
        option: how the user asks for it, for messages, such as "--max-context {}".
        static: whether :attr:`Limit.beyond` can be done.

    Returns:
        The context in tokens, and in which ways the model then differs from transformers', a line each.

    Raises:
        CheckpointError: the model attends in another way at that length; the text says up to which length it does not.
        ConfigError: ``max_context`` is beyond the model's own context.
    """
    context: int = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= context:
        raise ConfigError(f"max_context: {max_context} is not allowed; it must be from 1 to {context}.")
    different: list[str] = []
    for limit in sorted(limits(config), key=lambda limit: limit.tokens):
        held = limit.beyond if static else ""
        if max_context is not None and (max_context <= limit.tokens or held):
            if max_context > limit.tokens:
                different.append(f"{where}: {held}; transformers takes others up to {limit.tokens} tokens.")
            continue
        raise CheckpointError(
            f"{where}: the model {limit.what}, which HiP does not support.",
            f"Up to {limit.tokens} tokens this makes no difference: pass {option.format(limit.tokens)}."
            + (f" With {option.format(context)} {held}." if held else ""),
        )
    return context if max_context is None else max_context, tuple(different)


def check_call(
    module: nn.Module, key: Tensor, value: Tensor, *, max_context: int | None, dropout: float = 0.0, **options: Any
) -> None:
    """Refuse a call of transformers' attention interface that asks for more than HiP computes.

    Args:
        module: the attention module that calls.
        key, value: [B, Hkv, S, D].
        max_context: see :func:`resolve_context`; None if it is not known.
        dropout, options: other arguments of the call.

    Raises:
        RuntimeInputError: naming the argument.
    """
    window = options.get("sliding_window")
    for unsupported, what in (
        (dropout, "dropout"),
        (window is not None and (max_context is None or max_context > window), f"sliding_window {window}"),
        (options.get("softcap") is not None, "softcap"),
        (options.get("s_aux") is not None, "attention sinks (s_aux)"),
        (options.get("position_bias") is not None, "position_bias"),
        (not options.get("is_causal", getattr(module, "is_causal", True)), "attention that is not causal"),
        (key.shape != value.shape, "values of another shape than keys"),
    ):
        if unsupported:
            raise RuntimeInputError(f"HiP does not support {what}.", "Leave it out, or use the model without HiP.")


def _rope_type(get: Callable[[str], Any]) -> str:
    rope = get("rope_parameters") or get("rope_scaling") or {}
    return str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, dict) else "default"
