"""Read an exported .onnx file, without its weights, and check that all of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import ValidationError

from hip_trt import operator
from hip_trt.errors import EngineError
from hip_trt.spec import METADATA_KEY, ModelSpec

_EXPORT_AGAIN = "Export it again with `hip-trt export`."


@dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        path: the .onnx file.
        model: its contents; weights in external data are not loaded.
        spec: facts about the model, from its metadata.
        data: the files that hold its weights.
    """

    path: Path
    model: onnx.ModelProto
    spec: ModelSpec
    data: tuple[Path, ...]

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
    """Read a model that hip-trt exported; its external data is checked for presence and size, and not read.

    Raises:
        EngineError: the file or its weights are missing or damaged, or it is not from hip-trt.
    """
    path = Path(path)
    if not path.is_file():
        raise EngineError(f"{path}: no such file.", "Make one with `hip-trt export --model MODEL --out model.onnx`.")
    try:
        model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}.") from None
    except DecodeError:
        raise EngineError(f"{path}: not an ONNX file, or a damaged one.", _EXPORT_AGAIN) from None
    return OnnxFile(path, model, _spec(path, model), _data_files(path, model))


def _spec(path: Path, model: onnx.ModelProto) -> ModelSpec:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in metadata:
        raise EngineError(f"{path}: not a model exported by hip-trt: no {METADATA_KEY} in its metadata.", _EXPORT_AGAIN)
    try:
        return ModelSpec.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EngineError(
            f"{path}: its {METADATA_KEY} metadata is of another version: {field}: {first['msg']}.", _EXPORT_AGAIN
        ) from None


def _data_files(path: Path, model: onnx.ModelProto) -> tuple[Path, ...]:
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            ends[info.location] = max(ends.get(info.location, 0), (info.offset or 0) + (info.length or 0))
    for location, end in ends.items():
        data = path.parent / location
        if not data.is_file():
            raise EngineError(f"{path}: its weights are missing: no file {data}.", _EXPORT_AGAIN)
        size = data.stat().st_size
        if size < end:
            raise EngineError(f"{data}: truncated: it has {size} bytes, and {path.name} needs {end}.", _EXPORT_AGAIN)
    return tuple(path.parent / location for location in ends)
