"""RoPE scaling by transformers' own means: how a model reads texts that are longer than what it was trained for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hip_trt.errors import RuntimeInputError
from hip_trt.model_support import heads

SCALINGS = {
    "none": "positions go on beyond the trained ones",
    "linear": "positions divided by the factor",
    "theta": "a larger rope_theta (NTK-aware, what dynamic scaling computes for this length)",
    "yarn": "YaRN: high frequencies kept, low ones divided, queries and keys scaled",
}
"""Ways to scale, and what they do. All have constant frequencies, so cached keys stay valid."""


@contextmanager
def scaled(model: Any, scaling: str, factor: float) -> Iterator[None]:
    """Within the block, the model's RoPE is scaled for a context ``factor`` times as long as the trained one.

    Args:
        model: a transformers model with plain RoPE.
        scaling: of :data:`SCALINGS`.
        factor: above 1; "none" does without.

    Raises:
        RuntimeInputError: the scaling is unknown, or the model scales its RoPE already.
    """
    check(model, scaling)
    if scaling == "none":
        yield
        return
    base = model.base_model
    trained = model.config.rope_parameters
    config = copy.deepcopy(model.config)
    config.rope_parameters = _parameters(trained, scaling, factor, heads(config).size, config.max_position_embeddings)
    own = base.rotary_emb
    base.rotary_emb = type(own)(config=config).to(own.inv_freq.device)
    try:
        yield
    finally:
        base.rotary_emb = own


def check(model: Any, scaling: str) -> None:
    """Refuse what :func:`scaled` would."""
    if scaling not in SCALINGS:
        raise RuntimeInputError(f"--scalings: {scaling!r} is not known.", f"Give some of {', '.join(SCALINGS)}.")
    own = model.config.rope_parameters.get("rope_type", "default")
    if scaling != "none" and own != "default":
        raise RuntimeInputError(
            f"--scalings {scaling}: the model scales its RoPE already ({own}).", "Give --scalings none."
        )


def _parameters(trained: dict[str, Any], scaling: str, factor: float, size: int, context: int) -> dict[str, Any]:
    theta = trained["rope_theta"]
    match scaling:
        case "linear":
            return {**trained, "rope_type": "linear", "factor": factor}
        case "theta":
            return {**trained, "rope_theta": theta * factor ** (size / (size - 2))}
        case _:
            return {**trained, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
