"""Model families that can be exported: a line each. docs/adding_a_family.md says how to add one.

A family needs what :mod:`hip_trt.export.graph` relies on: a causal language model of transformers whose decoder layers
call its attention interface with a ``layer_idx``. Everything else (norms, biases, multipliers, layers without RoPE) is
traced from transformers' own code. What a configuration asks for beyond HiP is refused by
:mod:`hip_trt.model_support`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hip_trt.errors import CheckpointError
from hip_trt.model_support import unsupported

ENTRY_POINTS = "hip_trt.families"
"""Group of package entry points that name further :class:`Family` objects, for the command line."""


@dataclass(frozen=True)
class Family:
    """One architecture that can be exported.

    Attributes:
        architecture: class name of the causal language model, as in the "architectures" field of config.json.
        model_type: its "model_type" in config.json.
        layers: where the model keeps its list of decoder layers.
        renamed: parameters that checkpoints store under another name: their names by the stored ones.
        implementation: the class, if transformers does not have it under that name.
    """

    architecture: str
    model_type: str
    layers: str = "model.layers"
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)
    implementation: type[PreTrainedModel] | None = None

    @property
    def model_class(self) -> type[PreTrainedModel]:
        model_class: type[PreTrainedModel] = self.implementation or getattr(transformers, self.architecture)
        return model_class

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        config_class: type[PreTrainedConfig] = self.model_class.config_class
        return config_class


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),  # Llama 2, 3, 3.1, 3.2; SmolLM 2
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2"),  # Qwen 2, 2.5
        Family("Qwen3ForCausalLM", "qwen3"),
        Family("SmolLM3ForCausalLM", "smollm3"),
        Family("Phi3ForCausalLM", "phi3"),  # Phi 3, 3.5, 4
        Family("GraniteForCausalLM", "granite"),
        Family("Olmo2ForCausalLM", "olmo2"),
    )
}


def register_family(family: Family) -> None:
    """Add a family to those that can be exported, or replace one."""
    FAMILIES[family.architecture] = family


def find_family(fields: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration.

    Args:
        fields: of config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: naming the architecture, and what it has that HiP does not support.
    """
    architecture = _architecture(fields, where)
    if architecture not in FAMILIES:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            register_family(entry.load())
    if architecture not in FAMILIES:
        what = unsupported(fields.get, traced=True)
        because = f": it {what}, which is not supported" if what else ""
        raise CheckpointError(
            f"{where}: the architecture is {architecture}, which cannot be exported{because}.",
            f"Supported: {', '.join(FAMILIES)}." + ("" if what else " docs/adding_a_family.md says how to add one."),
        )
    return FAMILIES[architecture]


def _architecture(fields: Mapping[str, Any], where: str) -> str:
    match fields.get("architectures"), fields.get("model_type"):
        case [str(architecture), *_], _:
            return architecture
        case _, str(model_type):
            named = [family.architecture for family in FAMILIES.values() if family.model_type == model_type]
            return named[0] if named else model_type
    raise CheckpointError(f"{where}: it names no architecture.", "Give a folder in Hugging Face format.")
