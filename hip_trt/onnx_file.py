"""Read an exported .onnx file, without its weights, and check that all of it is there.

Weights lie in other files, to which the .onnx file refers by name, offset and length. Files that the export wrote carry
their checksum in their names, and nobody else writes them. Others may be the checkpoint's own, used in place: what they
were at the export is in the .onnx file's metadata, and is checked whenever it is read.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from hip_trt import operator
from hip_trt.errors import EngineError
from hip_trt.files import require_whole, sha256
from hip_trt.spec import METADATA_KEY, ModelSpec, require_format

WEIGHTS_KEY = "hip_trt_weights"
"""Key of the ONNX metadata entry that holds :data:`WEIGHTS_FILES` in JSON."""

NAME_DIGITS = 12
"""Digits of their checksum that files of weights carry in their names."""

_EXPORT_AGAIN = "Export it again with `hip-trt export`."
_DTYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
}


class WeightsFile(BaseModel):
    """A file of weights as it was at the export.

    Attributes:
        name: from the model's folder, with forward slashes.
        size: bytes.
        sha256: checksum in hexadecimal.
        mtime_ns: for the checkpoint's own files, which their owner may change: when they were last written. Another
            time than this asks for the checksum, unless it is a link's that was copied since, and is ours now. None for
            files that the export wrote.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # what a later hip-trt may add

    name: str
    size: int
    sha256: str
    mtime_ns: int | None = None


WEIGHTS_FILES = TypeAdapter(tuple[WeightsFile, ...])


@dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        path: the .onnx file.
        model: its contents; weights in external data are not loaded.
        spec: facts about the model, from its metadata.
        data: the files that hold its weights, which must stay beside it.
        checksums: what is known of them, by path; nothing for models of older versions.
    """

    path: Path
    model: onnx.ModelProto
    spec: ModelSpec
    data: tuple[Path, ...]
    checksums: dict[Path, WeightsFile]

    @property
    def files(self) -> tuple[Path, ...]:
        """The .onnx file and its weights."""
        return (self.path, *self.data)

    @property
    def attention_nodes(self) -> tuple[onnx.NodeProto, ...]:
        """The graph's HipAttention nodes, in its order."""
        return tuple(
            node for node in self.model.graph.node
            if (node.domain, node.op_type) == (operator.DOMAIN, operator.OP_TYPE)
        )


def read_onnx(path: str | Path) -> OnnxFile:
    """Read a model that hip-trt exported.

    Its weights are checked for presence and size, and not read, unless they are the checkpoint's own and were touched
    since the export: then their checksum decides.

    Raises:
        EngineError: the file or its weights are missing, damaged, changed or outside its folder, an export into it is
            half done, or it is not from hip-trt, or of another format.
    """
    path = Path(path)
    require_whole(path.parent)
    if not path.is_file():
        raise EngineError(f"{path}: no such file.", "Make one with `hip-trt export --model MODEL --out model.onnx`.")
    try:
        model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}.") from None
    except DecodeError:
        raise EngineError(f"{path}: not an ONNX file, or a damaged one.", _EXPORT_AGAIN) from None
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    spec = _spec(path, metadata, model)
    ends = _data_ends(path, model)
    checksums = {path.parent / record.name: record for record in _records(path, metadata) if record.name in ends}
    for location, end in ends.items():
        _check_data(path, path.parent / location, end, checksums.get(path.parent / location))
    return OnnxFile(path, model, spec, tuple(path.parent / location for location in ends), checksums)


def _spec(path: Path, metadata: dict[str, str], model: onnx.ModelProto) -> ModelSpec:
    if METADATA_KEY not in metadata:
        raise EngineError(f"{path}: not a model exported by hip-trt: no {METADATA_KEY} in its metadata.", _EXPORT_AGAIN)
    versions = {imported.domain: imported.version for imported in model.opset_import}
    require_format(path, versions.get(operator.DOMAIN), model.producer_version)
    try:
        return ModelSpec.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        raise _other_version(path, METADATA_KEY, error) from None


def _records(path: Path, metadata: dict[str, str]) -> tuple[WeightsFile, ...]:
    try:
        return WEIGHTS_FILES.validate_json(metadata.get(WEIGHTS_KEY, "[]"))
    except ValidationError as error:
        raise _other_version(path, WEIGHTS_KEY, error) from None


def _other_version(path: Path, key: str, error: ValidationError) -> EngineError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return EngineError(f"{path}: its {key} metadata is of another version: {field}: {first['msg']}.", _EXPORT_AGAIN)


def _data_ends(path: Path, model: onnx.ModelProto) -> dict[str, int]:
    """How many bytes of each external file the model needs, by the name that it gives; names outside are refused."""
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            if info.location not in ends:
                _require_inside(path, info.location)
            ends[info.location] = max(ends.get(info.location, 0), (info.offset or 0) + (info.length or 0))
    return ends


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the graph and of the functions, which may all refer to files."""
    yield from model.graph.initializer
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _attribute_tensors(nodes)


def _attribute_tensors(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graph.initializer
                yield from _attribute_tensors(graph.node)


def _require_inside(path: Path, location: str) -> None:
    """A model may read files of its own folder and below only, also through links."""
    folders = (path.parent.resolve(), path.resolve().parent)  # the same, unless the model itself is a link
    pure, resolved = PurePath(location), (path.parent / location).resolve()
    inside = any(resolved.is_relative_to(folder) for folder in folders)
    if pure.is_absolute() or ".." in pure.parts or not inside:
        raise EngineError(
            f"{path}: it looks for weights in {location!r}, which is outside its folder: refused.",
            "Use a model from a source that you trust, or export again without --link-weights.",
        )


def _check_data(path: Path, data: Path, end: int, record: WeightsFile | None) -> None:
    if not data.is_file():
        raise EngineError(
            f"{path}: its weights are missing: no file {data}.", f"They must stay where they were. {_EXPORT_AGAIN}"
        )
    status = data.stat()
    if record is not None and status.st_size != record.size:
        what = "truncated" if status.st_size < record.size else "changed since the export"
        raise EngineError(
            f"{data}: {what}: it has {status.st_size} bytes, and had {record.size} when {path.name} was exported.",
            _EXPORT_AGAIN,
        )
    if status.st_size < end:
        raise EngineError(
            f"{data}: truncated: it has {status.st_size} bytes, and {path.name} needs {end}.", _EXPORT_AGAIN
        )
    if record is None or record.mtime_ns in (None, status.st_mtime_ns):
        return
    if status.st_nlink == 1 and data.stem.endswith(record.sha256[:NAME_DIGITS]):
        return
    if sha256(data) != record.sha256:
        raise EngineError(
            f"{data}: changed since {path.name} was exported: its checksum is another.",
            f"Put the checkpoint's own file back. {_EXPORT_AGAIN}",
        )


def without_links(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, Path]:
    """A model in memory, and the folder from which it names its weights, for runtimes that follow no symbolic links.

    Args:
        model: from :func:`read_onnx`, which has checked where its weights are, or made from it.
        path: its file.

    Returns:
        The model itself and the folder of ``path``; where weights are links, as in a Hugging Face cache, a copy that
        names the files behind them, and the folder that holds these.
    """
    folder = path.parent.resolve()
    locations = {ExternalDataInfo(tensor).location for tensor in _tensors(model) if uses_external_data(tensor)}
    real = {location: (folder / location).resolve() for location in locations}
    if all(file == folder / location for location, file in real.items()):
        return model, folder
    folder = Path(os.path.commonpath([file.parent for file in real.values()]))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in _tensors(copy):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = real[entry.value].relative_to(folder).as_posix()
    return copy, folder


def map_weights(source: OnnxFile, names: Iterator[str] | tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model by their names, one after the other, mapped from their files and not read.

    Args:
        source: the model.
        names: initializers that lie in external files.

    Yields:
        Name and tensor, on the CPU, in the model's shape and type, to be read only. It keeps its mapping alive.

    Raises:
        EngineError: the model has no such weight.
    """
    stored = {tensor.name: tensor for tensor in source.model.graph.initializer if uses_external_data(tensor)}
    maps: dict[str, mmap.mmap] = {}
    for name in names:
        if name not in stored:
            raise EngineError(f"{source.path}: the weight {name} is missing.", _EXPORT_AGAIN)
        tensor, info = stored[name], ExternalDataInfo(stored[name])
        if info.location not in maps:
            with open(source.path.parent / info.location, "rb") as file:
                maps[info.location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = _DTYPES[tensor.data_type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no tensors that cannot be written, and says so
            content = torch.frombuffer(
                maps[info.location], dtype=torch.uint8, offset=info.offset or 0, count=info.length or 0
            )
        if content.data_ptr() % dtype.itemsize:
            content = content.clone()
        yield name, content.view(dtype).reshape(tuple(tensor.dims))
