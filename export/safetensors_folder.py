"""Weights of a Hugging Face folder, read from its safetensors files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hip_trt.errors import CheckpointError
from hip_trt.export.stored import StoredTensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = ("F64", "F32", "F16", "BF16")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a folder with model.safetensors, or with shards and their index. Reads headers only.

    Raises:
        CheckpointError: no safetensors, a shard missing, a file damaged or truncated, or weights quantized.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    if part.get_dtype() not in _TYPES:
                        raise CheckpointError(
                            f"{path}: the weight {name} is stored as {part.get_dtype()}, which is not supported.",
                            "Use a checkpoint in float32, float16 or bfloat16.",
                        )
                    tensors[name] = StoredTensor(tuple(part.get_shape()), partial(_load, path, name))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {_damage(path, error)}", "Download it again.") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _SINGLE).is_file():
            return [folder / _SINGLE]
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder}: its weights are pickled (.bin) files, which can run code when they are read.",
                "Convert them: load the model with transformers and call save_pretrained(), which writes safetensors.",
            )
        raise CheckpointError(f"{folder}: no {_SINGLE} and no {_INDEX}.", "The download may be incomplete.")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: not a valid index.", "Download it again.") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}.",
            "The download may be incomplete.",
        )
    return [folder / shard for shard in shards]


def _load(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _damage(path: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors refuses."""
    with path.open("rb") as file:
        start = file.read(1 << 20)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves (run `git lfs pull`)."
    try:
        header = 8 + int.from_bytes(start[:8], "little")
        entries = json.loads(path.open("rb").read(header)[8:]) if header <= path.stat().st_size else None
        if entries is None:
            return f"truncated: its header has {header} bytes, and the file {path.stat().st_size}."
        end = header + max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
        if end > path.stat().st_size:
            return f"truncated: it should have {end} bytes and has {path.stat().st_size}."
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return f"not a safetensors file, or a damaged one ({error})."
