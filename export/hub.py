"""Checkpoints of the Hugging Face hub: from its local cache, or fetched when the user allows it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from hip_trt.errors import CheckpointError
from hip_trt.files import format_size
from hip_trt.progress import Steps

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights in other formats


def looks_like_hub_id(text: str) -> bool:
    """Whether a text has the form org/name."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".gguf", ".safetensors", ".onnx", ".bin"))


def fetch(hub_id: str, *, allow_download: bool, steps: Steps) -> Path:
    """The folder of a hub model: its newest copy in the local cache, or fetched if it is not there and that is allowed.

    Raises:
        CheckpointError: it is not in the cache and may not be fetched, or fetching failed.
    """
    try:
        return Path(snapshot_download(
            hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True
        ))
    except (LocalEntryNotFoundError, HFValidationError):
        if not allow_download:
            raise CheckpointError(
                f"{hub_id}: no such file or folder, and no such model in the local Hugging Face cache.",
                "Correct the path, or pass --allow-download to fetch it from the Hugging Face hub.",
            ) from None
    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        wanted = [file for file in files if _matches(file.rfilename, _WANTED) > _matches(file.rfilename, _UNWANTED)]
        size = format_size(sum(file.size or 0 for file in wanted))
        steps.note(f"Downloading {len(wanted)} files of {hub_id}, {size}, into the local Hugging Face cache.")
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # the hub's client raises errors of its HTTP library, which has changed before
        raise CheckpointError(
            f"{hub_id}: cannot be fetched from the Hugging Face hub ({' '.join(str(error).split())[:200]}).",
            "Check the name, the network and your access to the model (`hf auth login`).",
        ) from None


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
