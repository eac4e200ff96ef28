"""A checkpoint as a transformers model and its tokenizer, ready to be evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from hip_trt.errors import CheckpointError, EnvironmentProblem, RuntimeInputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def evaluation_dtype(name: str | None, device: str) -> str:
    """A name of :data:`DTYPES`: the given one, or else float16 on a GPU and float32 elsewhere.

    Raises:
        RuntimeInputError: there is no such type.
    """
    kind = name or ("float16" if device.startswith("cuda") else "float32")
    if kind not in DTYPES:
        raise RuntimeInputError(f"--dtype: {kind!r} is not known.", f"Give one of {', '.join(DTYPES)}.")
    return kind


def load_model(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer. Nothing is fetched.

    Args:
        path: a Hugging Face folder, or a .gguf file.
        device: where the model goes, such as "cuda".
        dtype: of its weights and activations.

    Returns:
        The model, not patched, in evaluation mode; and the tokenizer.

    Raises:
        CheckpointError: the path is missing, or transformers cannot load what is there.
        EnvironmentProblem: there is no such device.
    """
    from hip_trt.huggingface.closed import load_causal_lm, load_tokenizer

    path = Path(path)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentProblem(f"--device {device}: PyTorch sees no GPU.", "Give --device cpu.")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.", "Give a .gguf file or a Hugging Face folder.")
    _refuse_foreign(path)
    try:
        with _quiet():
            tokenizer = load_tokenizer(path)
            model = load_causal_lm(path, dtype=dtype)
    except Exception as error:  # transformers raises many kinds over damaged or missing files
        raise CheckpointError(
            f"{path}: transformers cannot load it: {' '.join(str(error).split())[:300]}.",
            "Give a whole checkpoint of a causal language model, with its tokenizer.",
        ) from None
    return model.to(device).eval(), tokenizer


def _refuse_foreign(folder: Path) -> None:
    """Refuse weights that are pickles, which can run code, and those that packages named by the folder would read."""
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: no *.safetensors. Weights in pickles (.bin) are not read, as these can run code.",
            "Get the model in safetensors, or convert it with transformers' save_pretrained.",
        )
    with suppress(OSError, ValueError):
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(fields, dict) and fields.get("quantization_config"):
            raise CheckpointError(
                f"{folder / 'config.json'}: the weights are quantized, which is not supported.",
                "Use the checkpoint in float16 or bfloat16 that it was made from, or a GGUF file.",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def encode(tokenizer: Any, content: str, count: int, name: str, *, least: int | None = None) -> list[int]:
    """The first ``count`` tokens of a text.

    Args:
        tokenizer: of transformers.
        content: the text; only so much as may be needed is read.
        count: tokens wanted.
        name: of the text, for messages.
        least: tokens needed; by default all.

    Raises:
        RuntimeInputError: the text is shorter.
    """
    read = 16 * count + 1000  # characters: no tokenizer in use has tokens so long
    ids: list[int] = tokenizer(content[:read])["input_ids"][:count]
    if len(ids) < (count if least is None else least):
        raise RuntimeInputError(
            f"The text {name} has {len(ids)} tokens, and {count if least is None else least} are needed.",
            "Give a longer text, or a smaller --max-tokens.",
        )
    return ids
