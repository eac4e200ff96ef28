"""What is in an exported .onnx file or a built .plan, without loading a weight or needing a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx
from pydantic import BaseModel, ConfigDict

from hip_trt import operator
from hip_trt.errors import EngineError
from hip_trt.onnx_file import OnnxFile, read_onnx
from hip_trt.runtime.executor import Limits
from hip_trt.sidecar import ProfileRecord, sidecar_path, verify_plan
from hip_trt.spec import ModelSpec

_PARAMETERS = (".weight", ".bias")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Tensor(_Part):
    """An input or output; dynamic dimensions by their ONNX name, or -1 in a plan."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class File(_Part):
    """A file that belongs to the model; size in bytes."""

    name: str
    size: int


class Parameters(_Part):
    """The weights of a model: initializers named as transformers names parameters, shared ones once.

    Attributes:
        count: number of values.
        size: their bytes.
    """

    count: int
    size: int


class Engine(_Part):
    """What only a plan has; see :class:`~hip_trt.sidecar.Sidecar`."""

    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    plugin_version: str
    created: str
    limits: Limits
    profiles: tuple[ProfileRecord, ...]


class Description(_Part):
    """An exported model.

    Attributes:
        source: where the facts come from, in words.
        files: the model's files, which must stay together.
        layers: number of nodes by ONNX operator, or of TensorRT layers by type.
        attention: names of the HipAttention nodes, or plugin layers.
        function_body: whether an .onnx carries the operator's body, with which plain ONNX Runtime runs it.
        parameters: None for a plan.
        engine: None for an .onnx.
    """

    kind: Literal["onnx", "plan"]
    path: str
    source: str
    files: tuple[File, ...]
    spec: ModelSpec
    layers: dict[str, int]
    attention: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    function_body: bool | None = None
    parameters: Parameters | None = None
    engine: Engine | None = None


def describe(path: str | Path, advance: Callable[[int], object] = lambda count: None) -> Description:
    """Describe an .onnx file or a .plan, by its extension.

    A plan is checked against its sidecar, which reads all of it; ``advance`` is told the bytes read since then.

    Raises:
        EngineError: the file is neither, missing, damaged or not from hip-trt.
    """
    path = Path(path)
    match path.suffix:
        case ".onnx":
            return _describe_onnx(read_onnx(path))
        case ".plan" | ".engine":
            return _describe_plan(path, advance)
    raise EngineError(f"{path}: neither .onnx nor .plan.", "Name a file that `hip-trt export` has made.")


def _describe_onnx(source: OnnxFile) -> Description:
    graph = source.model.graph
    return Description(
        kind="onnx",
        path=str(source.path),
        source="the ONNX file",
        files=tuple(
            File(name=path.relative_to(source.path.parent).as_posix(), size=path.stat().st_size)
            for path in source.files
        ),
        spec=source.spec,
        layers=dict(Counter(_operator_name(node) for node in graph.node).most_common()),
        attention=tuple(node.name for node in source.attention_nodes),
        inputs=tuple(map(_tensor, graph.input)),
        outputs=tuple(map(_tensor, graph.output)),
        function_body=any(
            (function.domain, function.name) == (operator.DOMAIN, operator.OP_TYPE)
            for function in source.model.functions
        ),
        parameters=_parameters(graph),
    )


def _describe_plan(path: Path, advance: Callable[[int], object]) -> Description:
    sidecar = verify_plan(path, advance)
    beside = sidecar_path(path)
    return Description(
        kind="plan",
        path=str(path),
        source=f"{beside.name}, written by the builder from TensorRT's own interfaces, whose checksum the plan has. "
        "TensorRT itself opens a plan only on a GPU that it was built for.",
        files=(
            File(name=path.name, size=sidecar.plan.size),
            File(name=beside.name, size=beside.stat().st_size),
            *(File(name=file.name, size=file.size) for file in sidecar.model if sidecar.weights != "embedded"),
        ),
        spec=sidecar.spec,
        layers=sidecar.layers,
        attention=sidecar.plugin_layers,
        inputs=tuple(Tensor(name=item.name, dtype=item.dtype, shape=item.shape) for item in sidecar.inputs),
        outputs=tuple(Tensor(name=item.name, dtype=item.dtype, shape=item.shape) for item in sidecar.outputs),
        engine=Engine(
            flavour=sidecar.flavour,
            tensorrt_version=sidecar.tensorrt_version,
            compute_capabilities=sidecar.compute_capabilities,
            plugin_version=sidecar.plugin_version,
            created=sidecar.created.isoformat(),
            limits=sidecar.limits,
            profiles=sidecar.profiles,
        ),
    )


def _operator_name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    return Tensor(
        name=value.name,
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
    )


def _parameters(graph: onnx.GraphProto) -> Parameters:
    counts = {
        tensor.name: (math.prod(tensor.dims), _bits(tensor.data_type))
        for tensor in graph.initializer if tensor.name.removesuffix("_transposed").endswith(_PARAMETERS)
    }
    return Parameters(
        count=sum(count for count, _ in counts.values()),
        size=sum(count * bits // 8 for count, bits in counts.values()),
    )


def _bits(data_type: int) -> int:
    if data_type == onnx.TensorProto.INT4:
        return 4
    size: int = onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return 8 * size
