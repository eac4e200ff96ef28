"""The JSON file beside an engine plan: what the plan is, and whether this machine can run it.

A plan is opaque, and TensorRT reads it only on the right GPU with the right library. So the builder writes what
it knows beside it, ``engine.plan.json`` for ``engine.plan``, and every user of the plan checks that first.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hip_trt import files, operator
from hip_trt.errors import EngineError
from hip_trt.gpu import ComputeCapability, Gpu
from hip_trt.runtime.executor import Limits
from hip_trt.spec import ModelSpec, require_format
from hip_trt.tensorrt_flavour import Flavour, FlavourName, covers

ProfileName = Literal["prefill", "decode"]
PlanWeights = Literal["embedded", "bound", "refit"]
"""Where the weights of a plan are. "embedded": in it. Otherwise in the files of the .onnx that it was built from, which
must stay beside it. "bound": matrices are inputs of the engine, and smaller weights are in the plan. "refit": TensorRT
stripped the plan, and puts the weights back when it is loaded."""
Shape = tuple[int, ...]

_EXPORT_AGAIN = "Export the engine again with `hip-trt export`."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # what a later hip-trt may add


class _Header(_Record):
    """What a sidecar of any version has."""

    format_version: int
    hip_trt_version: str


class FileRecord(_Record):
    """One file.

    Attributes:
        name: from the folder of the plan or model that it belongs to.
        size: bytes.
        sha256: checksum in hexadecimal.
    """

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path, advance: Callable[[int], object] = lambda count: None) -> FileRecord:
        """Describe a file, reading all of it."""
        path = Path(path)
        return cls(name=path.name, size=path.stat().st_size, sha256=files.sha256(path, advance))


class TensorRecord(_Record):
    """An input or output of the engine, as TensorRT sees it.

    Attributes:
        dtype: such as "float16" or "int32".
        shape: -1 where dynamic.
    """

    name: str
    dtype: str
    shape: Shape


class ShapeRange(_Record):
    """Shapes that an optimization profile accepts for one input, and the one it is tuned for."""

    min: Shape
    opt: Shape
    max: Shape


class ProfileRecord(_Record):
    """An optimization profile; its index in the engine is its place in :attr:`Sidecar.profiles`.

    Attributes:
        shapes: range of each dynamic input by its name.
    """

    name: ProfileName
    shapes: dict[str, ShapeRange]


class Sidecar(_Record):
    """Everything known about one plan.

    Attributes:
        format_version: the operator's, see :data:`hip_trt.operator.OP_VERSION`.
        plan: the plan file.
        model: the ONNX file, then its external data.
        companions: files beside the plan that runtimes use with it: tokenizer and generation config.
        weights: where the weights are; unless "embedded", the files of ``model`` must stay beside the plan.
        bound: for "bound": the engine's inputs that are weights, in its order, by their names in the ONNX file.
        weight_streaming: whether the runtime may keep a part of the weights in host memory.
        spec: facts about the model, HipConfig included.
        limits: largest shapes that the profiles accept.
        inputs, outputs: in the engine's order; without ``bound``.
        profiles: optimization profiles in the engine's order.
        layers: number of layers in the parsed network by TensorRT's name of their type.
        plugin_layers: names of the HipAttention layers.
        flavour, tensorrt_version: the TensorRT that built the plan, and can read it.
        compute_capabilities: GPUs that the plan is for, such as "8.9".
        plugin_version: version of the plugin library that the plan was built with.
        created: when, with its time zone.
    """

    format_version: int = operator.OP_VERSION
    plan: FileRecord
    model: tuple[FileRecord, ...]
    companions: tuple[FileRecord, ...] = ()
    weights: PlanWeights = "embedded"
    bound: tuple[TensorRecord, ...] = ()
    weight_streaming: bool = False
    spec: ModelSpec
    limits: Limits
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[ProfileRecord, ...]
    layers: dict[str, int]
    plugin_layers: tuple[str, ...]
    flavour: FlavourName
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    plugin_version: str
    hip_trt_version: str
    created: datetime

    def profile_index(self, name: ProfileName) -> int:
        """Index of a profile in the engine."""
        return [profile.name for profile in self.profiles].index(name)

    def runs_on(self, capability: ComputeCapability) -> bool:
        """Whether the plan was built for GPUs of this compute capability."""
        built_for = [ComputeCapability.parse(text) for text in self.compute_capabilities]
        return covers(built_for, capability) if self.flavour == "tensorrt-rtx" else capability in built_for

    def require_environment(self, *, flavour: Flavour, gpu: Gpu) -> None:
        """Check that a TensorRT and a GPU can run the plan.

        Raises:
            EngineError: the plan was built by another TensorRT, or for other GPUs.
        """
        name = self.plan.name
        if (flavour.name, flavour.version) != (self.flavour, self.tensorrt_version):
            raise EngineError(
                f"{name}: built by {self.flavour} {self.tensorrt_version}, which alone can read it; here is {flavour}.",
                f"{_EXPORT_AGAIN} Or install that version.",
            )
        if not self.runs_on(gpu.compute_capability):
            raise EngineError(
                f"{name}: built for GPUs of compute capability {', '.join(self.compute_capabilities)}; "
                f"{gpu.name} has {gpu.compute_capability}.",
                _EXPORT_AGAIN,
            )


def sidecar_path(plan: str | Path) -> Path:
    """``engine.plan.json`` for ``engine.plan``."""
    plan = Path(plan)
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: str | Path) -> Sidecar:
    """Read the sidecar of a plan, without reading the plan.

    Raises:
        EngineError: the sidecar is missing, damaged, or of another format version, or an export into its folder is half
            done.
    """
    path = sidecar_path(plan)
    files.require_whole(path.parent)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EngineError(
            f"{plan}: its description {path.name} is missing.",
            f"Copy it from where the plan was built, or export again with `hip-trt export --out {plan}`.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read: {error}.") from None
    try:
        header = _Header.model_validate_json(text)
        require_format(path, header.format_version, header.hip_trt_version)
        return Sidecar.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" ({where})" if where else ""
        raise EngineError(
            f"{path}: not the description of a plan by this version of hip-trt: {first['msg']}{more}.", _EXPORT_AGAIN
        ) from None


def verify_plan(plan: str | Path, advance: Callable[[int], object] = lambda count: None) -> Sidecar:
    """Read a plan's sidecar and check the plan and what is beside it against it, which reads the whole plan.

    Args:
        plan: the plan file.
        advance: told the bytes read since it was last called.

    Raises:
        EngineError: the plan or its sidecar is missing or damaged, or they do not belong together, or the model and the
            tokenizer beside it have been replaced by another model's.
    """
    plan = Path(plan)
    if not plan.is_file():
        raise EngineError(f"{plan}: no such plan.", f"Build it with `hip-trt export --model MODEL --out {plan}`.")
    sidecar = read_sidecar(plan)
    size = plan.stat().st_size
    if size != sidecar.plan.size:
        raise EngineError(
            f"{plan}: damaged: it has {size} bytes, and {sidecar_path(plan).name} says {sidecar.plan.size}.",
            _EXPORT_AGAIN,
        )
    try:
        checksum = files.sha256(plan, advance)
    except OSError as error:
        raise EngineError(f"{plan}: cannot be read: {error.strerror}.") from None
    if checksum != sidecar.plan.sha256:
        raise EngineError(f"{plan}: damaged: its checksum is not the one in {sidecar_path(plan).name}.", _EXPORT_AGAIN)
    _require_companions(plan, sidecar)
    return sidecar


def _require_companions(plan: Path, sidecar: Sidecar) -> None:
    """Refuse a plan whose .onnx was exported anew from another checkpoint.

    A tokenizer that alone is another one is the user's own doing, and so is a model of the same tokenizer.
    """
    model = plan.with_name(sidecar.model[0].name)
    if not sidecar.companions or not model.is_file() or not _changed(model, sidecar.model[0]):
        return
    for record in sidecar.companions:
        if _changed(plan.with_name(record.name), record):
            raise EngineError(
                f"{plan}: {model.name} and {record.name} beside it are of another model, exported since.",
                f"Build the engine of that model with `hip-trt export --model {model} --out {plan}`, or export the old "
                "one again.",
            )


def _changed(path: Path, record: FileRecord) -> bool:
    try:
        return path.stat().st_size != record.size or files.sha256(path) != record.sha256
    except OSError:
        return True
