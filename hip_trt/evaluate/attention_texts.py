"""The model and the texts that a study of attention looks at, and the facts about them that it writes down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hip_trt.evaluate import texts
from hip_trt.evaluate.models import encode, load_model

MOST_TOKENS = 8192
"""Of a text, unless more are asked for: rows of dense attention grow with it."""


def load(
    path: str | Path, *, names: Sequence[str] = (), files: Sequence[str | Path] = (), max_tokens: int | None = None,
    device: str = "cpu",
) -> tuple[Any, dict[str, list[int]], dict[str, Any]]:
    """Load a model in float32 and encode texts.

    Args:
        path: a Hugging Face folder, or a .gguf file.
        names: of texts that packages ship; those that are installed if neither names nor files are given.
        files: UTF-8 texts.
        max_tokens: tokens of each text; by default the model's context, at most :data:`MOST_TOKENS`.
        device: where the model goes, such as "cuda".

    Returns:
        The model, token ids by text, and parameters for the study.

    Raises:
        CheckpointError, EnvironmentProblem, RuntimeInputError: what is given cannot be loaded, or a text is too short.
    """
    found = texts.choose(names, files)
    model, tokenizer = load_model(path, device=device, dtype=torch.float32)
    count = min(MOST_TOKENS, model.config.max_position_embeddings) if max_tokens is None else max_tokens
    tokens = {text.name: encode(tokenizer, text.content, count, text.name) for text in found}
    parameters = {
        "model": Path(path).stem, "type": "float32", "tokens": count,
        "texts": {text.name: f"{text.source}, {text.sha256}" for text in found},
    }
    return model, tokens, parameters
