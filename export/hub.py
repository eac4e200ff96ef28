"""Checkpoints of the Hugging Face hub: from its local cache, or fetched when the user allows it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from hip_trt.errors import CheckpointError
from hip_trt.export.safetensors_folder import INDEX, SINGLE
from hip_trt.files import format_size
from hip_trt.huggingface.closed import VOCABULARIES
from hip_trt.progress import Steps

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights in other formats


def looks_like_hub_id(text: str) -> bool:
    """Whether a text has the form org/name."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".gguf", ".safetensors", ".onnx", ".bin"))


def fetch(hub_id: str, *, allow_download: bool, steps: Steps) -> Path:
    """The folder of a hub model: its newest copy in the local cache, or fetched if that is missing or incomplete and
    fetching is allowed.

    Raises:
        CheckpointError: the cache lacks it, or a part, and it may not be fetched, or fetching failed.
    """
    folder = _cached(hub_id)
    missing = None if folder is None else _missing(folder)
    whole = folder is not None and not missing
    if folder is not None and whole and (not allow_download or any((folder / name).exists() for name in VOCABULARIES)):
        return folder
    if not allow_download:
        if folder is None:
            raise CheckpointError(
                f"{hub_id}: no such file or folder, and no such model in the local Hugging Face cache.",
                "Correct the path, or pass --allow-download to fetch it from the Hugging Face hub.",
            )
        raise CheckpointError(
            f"{hub_id}: its copy in the local Hugging Face cache is incomplete: {missing} is missing.",
            "Pass --allow-download to fetch what is missing from the Hugging Face hub.",
        )
    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        wanted = [file for file in files if _matches(file.rfilename, _WANTED) > _matches(file.rfilename, _UNWANTED)]
        size = format_size(sum(file.size or 0 for file in wanted))
        steps.note(f"Downloading {len(wanted)} files of {hub_id}, {size}, into the local Hugging Face cache.")
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # the hub's client raises errors of its HTTP library, which has changed before
        if folder is not None and whole:
            return folder
        raise CheckpointError(
            f"{hub_id}: cannot be fetched from the Hugging Face hub ({' '.join(str(error).split())[:200]}).",
            "Check the name, the network and your access to the model (`hf auth login`).",
        ) from None


def _cached(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(
            hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True
        ))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _missing(folder: Path) -> str | None:
    """A file that a model needs and a snapshot lacks; None if it is whole.

    The model may have no tokenizer at all, so that is not missed.
    """
    wanted = ["config.json"]
    index = folder / INDEX
    if not index.is_file():
        wanted.append(SINGLE)
    else:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: the reader says how
            wanted += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return next((name for name in wanted if not (folder / name).is_file()), None)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
