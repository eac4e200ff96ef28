"""Model families that can be exported.

A family needs what :mod:`hip_trt.export.graph` relies on: decoder layers that call transformers' attention interface
with a ``layer_idx``, full attention, and rotary frequencies that do not depend on the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig

from hip_trt.errors import CheckpointError

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE variants whose frequencies are constants; 'dynamic' and 'longrope' change theirs with the sequence length."""


@dataclass(frozen=True)
class Family:
    """One architecture that can be exported.

    Attributes:
        architecture: class name in transformers, as in the "architectures" field of config.json.
        model_type: its "model_type" in config.json.
        check: raises CheckpointError where a configuration asks for what the exported graph cannot do.
    """

    architecture: str
    model_type: str
    check: Callable[[PreTrainedConfig], None]

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        model_class: type[transformers.PreTrainedModel] = getattr(transformers, self.architecture)
        return model_class

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        config_class: type[PreTrainedConfig] = self.model_class.config_class
        return config_class


def _check_llama(config: PreTrainedConfig) -> None:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in STATIC_ROPE:
        raise CheckpointError(
            f"rope_scaling: type '{rope_type}' is not supported; it must be one of {', '.join(STATIC_ROPE)}.",
            "Its frequencies depend on the length of the sequence, so that cached keys would go stale.",
        )


FAMILIES = {family.architecture: family for family in (Family("LlamaForCausalLM", "llama", _check_llama),)}


def find_family(architecture: str, where: str) -> Family:
    """The family of an architecture, or CheckpointError naming it; ``where`` says which file asks."""
    if architecture not in FAMILIES:
        raise CheckpointError(
            f"{where}: the architecture is {architecture}, which cannot be exported.",
            f"Supported: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[architecture]
