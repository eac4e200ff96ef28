"""Weights of a Hugging Face folder, read from its safetensors files.

The format: eight bytes with the header's length, the header in JSON, and the weights one after the other, without gaps
(https://github.com/huggingface/safetensors#format). Headers are checked here rather than by the safetensors package, so
that an error names the weight.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from hip_trt.errors import CheckpointError
from hip_trt.export.stored import Extent, StoredTensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "Download it again."
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a folder with model.safetensors, or with shards and their index. Reads headers only.

    Raises:
        CheckpointError: no safetensors, a shard missing, a file damaged or truncated, weights that overlap, an index of
            other shards than these, or weights quantized.
    """
    index = _read_index(folder)
    shards = [SINGLE] if index is None else sorted(set(index.values()))
    tensors: dict[str, StoredTensor] = {}
    home: dict[str, str] = {}
    for shard in shards:
        for name, tensor in _read_shard(folder / shard).items():
            if name in home:
                raise CheckpointError(
                    f"{folder}: the weight {name} is in both {home[name]} and {shard}.", "Remove the wrong one."
                )
            tensors[name], home[name] = tensor, shard
    for name, shard in (index or {}).items():
        if home.get(name) != shard:
            found = f"; it is in {home[name]}" if name in home else ""
            raise CheckpointError(
                f"{folder / INDEX}: it says that the weight {name} is in {shard}, which does not hold it{found}.",
                "Index and shards are of different downloads.",
            )
    return tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    """Which shard holds each weight; None for a folder with a single file."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return None
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder}: its weights are pickled (.bin) files, which can run code when they are read.",
                "Convert them: load the model with transformers and call save_pretrained(), which writes safetensors.",
            )
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}.", "The download may be incomplete.")
    try:
        held: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(held.values()))
        strangers = [shard for shard in shards if PurePath(shard).name != shard]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: not a valid index.", _AGAIN) from None
    if strangers:
        raise CheckpointError(f"{index}: it names {strangers[0]!r}, which is no file of this folder.", _AGAIN)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}.",
            "The download may be incomplete.",
        )
    return held


class _Entry(NamedTuple):
    """One weight in a header; ``begin`` and ``end`` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_shard(path: Path) -> dict[str, StoredTensor]:
    try:
        start, entries = _read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None
    tensors = {}
    for entry in entries:
        extent = Extent(path, start + entry.begin, entry.end - entry.begin, _TYPES[entry.dtype])
        tensors[entry.name] = StoredTensor(entry.shape, partial(_load, path, entry.name), extent)
    return tensors


def _read_header(path: Path) -> tuple[int, list[_Entry]]:
    """Where the weights begin, and what they are; raises CheckpointError unless they fill the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path}: a Git LFS pointer, not the weights themselves (run `git lfs pull`).", _AGAIN
            )
        header = int.from_bytes(start[:8], "little")
        if len(start) < 8 or (8 + header > size and header <= _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}: truncated: its header has {header} bytes, and the file {size}.", _AGAIN
            )
        if header > _LARGEST_HEADER:
            raise CheckpointError(f"{path}: not a safetensors file, or a damaged one.", _AGAIN)
        file.seek(8)
        text = file.read(header)
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        entries = sorted((_entry(name, field) for name, field in fields.items()), key=lambda entry: entry[3:])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or a damaged one ({type(error).__name__} in its header).", _AGAIN
        ) from None
    _check_entries(path, entries, size - 8 - header)
    return 8 + header, entries


def _entry(name: str, field: Any) -> _Entry:
    begin, end = field["data_offsets"]
    shape = tuple(field["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(name)
    return _Entry(name, field["dtype"], shape, begin, end)


def _check_entries(path: Path, entries: list[_Entry], size: int) -> None:
    """Weights of types that can be read lie one after the other from the first byte to the last."""
    previous, end = "the header", 0
    for entry in entries:
        if entry.dtype not in _TYPES:
            raise CheckpointError(
                f"{path}: the weight {entry.name} is stored as {entry.dtype}, which is not supported.",
                "Use a checkpoint in float32, float16 or bfloat16.",
            )
        if entry.begin < end:
            raise CheckpointError(f"{path}: damaged: the weights {previous} and {entry.name} overlap.", _AGAIN)
        if entry.begin > end:
            raise CheckpointError(
                f"{path}: damaged: {entry.begin - end} bytes between {previous} and {entry.name} belong to no weight.",
                _AGAIN,
            )
        needed = math.prod(entry.shape) * _TYPES[entry.dtype].itemsize
        if entry.end - entry.begin != needed:
            raise CheckpointError(
                f"{path}: damaged: the weight {entry.name} of shape {list(entry.shape)} needs {needed} bytes, and has "
                f"{entry.end - entry.begin}.",
                _AGAIN,
            )
        previous, end = entry.name, entry.end
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: its weights have {end} bytes, and the file has {size} of them; {previous} is not "
            "whole.",
            _AGAIN,
        )
    if end < size:
        raise CheckpointError(f"{path}: damaged: {size - end} bytes after the last weight belong to none.", _AGAIN)


def _load(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
