"""Build a TensorRT engine from an exported .onnx file."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final

import onnx
from onnx.external_data_helper import uses_external_data

from hip_trt import library, operator
from hip_trt.errors import EngineError, EnvironmentProblem, ExportError
from hip_trt.export.function import strip_function
from hip_trt.export.onnx_export import SHARED_FILES
from hip_trt.export.profiles import EngineLimits, graph_shapes, profiles
from hip_trt.fat_binary import compiled_for
from hip_trt.files import Staging, format_size, require_space, staging
from hip_trt.gpu import ComputeCapability, current_gpu
from hip_trt.onnx_file import OnnxFile, read_onnx, without_links
from hip_trt.progress import Steps
from hip_trt.sidecar import FileRecord, PlanWeights, ProfileRecord, Sidecar, TensorRecord, sidecar_path
from hip_trt.tensorrt_flavour import (
    Flavour,
    MessageLog,
    RuntimeChoice,
    find_flavour,
    nothing_in_common_remedy,
    one_line,
)

_MEMORY_PER_WEIGHT: Final = 1.3
"""Bytes of memory that TensorRT-RTX 1.7 takes for each byte of weights that it puts into a plan; measured. It also maps
the weights' files, which the system takes back when it needs to."""


def build_engine(
    onnx_path: str | Path,
    out: str | Path,
    *,
    runtime: RuntimeChoice | Flavour = "auto",
    compute_capabilities: Sequence[str | ComputeCapability] = (),
    max_batch: int | None = None,
    max_prefill: int | None = None,
    max_seq_len: int | None = None,
    max_pages: int | None = None,
    strip_weights: bool = False,
    weight_streaming: bool = False,
    steps: Steps | None = None,
) -> Sidecar:
    """Build ``out``, a TensorRT plan, and ``out``.json, its description (:class:`~hip_trt.sidecar.Sidecar`).

    Both appear when all is done, and replace older ones then; a failure or an interrupt leaves what was there. In
    another folder than the model's, its tokenizer and configuration are copied beside them.

    TensorRT-RTX needs no GPU; ``tensorrt`` builds for the GPU of this machine. The weights are mapped, not read, and
    the plan is written in pieces; TensorRT-RTX 1.7 itself takes memory for 1.3 times the weights. With
    ``strip_weights`` it takes none for them: matrices become inputs of the engine, which the runtime binds to weights
    read from the model's own files. (TensorRT-RTX cannot strip a plan without a GPU; ``tensorrt``, which has one, does,
    and the runtime puts the weights back.)

    Args:
        onnx_path: a model from :func:`hip_trt.export.export_onnx`.
        out: the plan to write.
        runtime: "auto", "tensorrt" or "tensorrt-rtx", or a flavour in hand.
        compute_capabilities: GPUs to build for, such as "8.9". By default all that TensorRT-RTX and the plugin's
            kernels run on, which costs neither time nor size; for ``tensorrt``, that of the GPU here, the only one
            possible.
        max_batch: sequences per call; 4 by default.
        max_prefill: new tokens per sequence and call; longer prompts are split. 2048 by default.
        max_seq_len: tokens per sequence, prompt and generated together; by default the model's context length.
        max_pages: pages in the KV pool; by default enough for ``max_batch`` sequences of ``max_seq_len``.
        strip_weights: leave the weights out of the plan. They stay in the model's files, in whose folder ``out`` must
            be, and are read when the plan is loaded.
        weight_streaming: let the runtime keep a part of the weights in host memory; slower.
        steps: shows progress.

    Returns:
        The description written.

    Raises:
        EngineError: the model cannot be read, a limit, a compute capability or a combination is not allowed, memory
            does not suffice, or TensorRT fails.
        EnvironmentProblem: TensorRT is not installed, or ``tensorrt`` finds no GPU.
        PluginError: the plugin library is missing, or its kernels do not support the model.
        ExportError: the result cannot be written.
    """
    out = Path(out)
    steps = steps or Steps()
    source = read_onnx(onnx_path)
    limits = EngineLimits.resolve(
        source.spec, max_batch=max_batch, max_prefill=max_prefill, max_seq_len=max_seq_len, max_pages=max_pages
    )
    flavour = runtime if isinstance(runtime, Flavour) else find_flavour(runtime)
    targets = resolve_compute_capabilities(flavour, compute_capabilities)
    weights = _place_weights(flavour, source, out, strip=strip_weights, streaming=weight_streaming)
    library.validate(source.spec)
    plugin = library.plugin_path()
    flavour.load_plugin(plugin)
    with staging(out.parent, exclusive=True) as stage:
        if weights == "embedded":
            require_space(stage.target, _size(source.data))
        build = _Build(flavour, source, limits, targets, weights, weight_streaming)
        with steps.step(f"Read the model into {flavour}"):
            build.parse()
        with steps.step(f"Build the engine with {flavour}"), open(stage.path / out.name, "wb") as file:
            plan = build.write_plan(file, out.name)
        unknown = tuple(path for path in source.files if path not in source.checksums)
        with steps.step("Checksum the model", total=_size(unknown)) as advance:
            model = tuple(_record(source, path, advance) for path in source.files)
        companions = _stage_companions(source.path.parent, stage)
        sidecar = build.describe(plan, model, _companion_records(stage))
        (stage.path / sidecar_path(out).name).write_text(sidecar.model_dump_json(), encoding="utf-8")
        stage.publish([*companions, out.name, sidecar_path(out).name])
    return sidecar


def _place_weights(flavour: Flavour, source: OnnxFile, out: Path, *, strip: bool, streaming: bool) -> PlanWeights:
    """Where the plan's weights will be; EngineError where that cannot be."""
    if streaming and strip:
        raise EngineError(
            "weight_streaming: not allowed with strip_weights: TensorRT streams weights that are in the plan.",
            "Choose one of --strip-weights and --weight-streaming.",
        )
    if streaming and not hasattr(flavour.module.BuilderFlag, "WEIGHT_STREAMING"):
        raise EngineError(f"weight_streaming: {flavour} does not offer it.", "Leave out --weight-streaming.")
    if strip:
        folder = source.path.parent
        if folder.resolve() != out.parent.resolve():
            raise EngineError(
                f"{out}: a plan without weights reads them from the files of {source.path}, and must stand beside it.",
                f"Use --out {folder / out.name}.",
            )
        return "bound" if flavour.ahead_of_time else "refit"
    if flavour.ahead_of_time:
        needed, free = round(_MEMORY_PER_WEIGHT * _size(source.data)), _free_memory()
        if free is not None and free < needed:
            raise EngineError(
                f"{source.path}: {flavour} needs about {format_size(needed)} of memory for an engine with these "
                f"weights, and {format_size(free)} are free.",
                "Use --strip-weights, which leaves them out of the engine.",
            )
    return "embedded"


def _free_memory() -> int | None:
    """Bytes that can be had without killing anything; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":") for line in lines)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None


def _size(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _record(source: OnnxFile, path: Path, advance: Callable[[int], object]) -> FileRecord:
    """Describe a file of the model; its checksum is known if the export wrote it down."""
    known = source.checksums.get(path)
    if known is not None:
        return FileRecord(name=known.name, size=known.size, sha256=known.sha256)
    return FileRecord.of(path, advance)


def _stage_companions(folder: Path, stage: Staging) -> list[str]:
    """Copy what a runtime needs beside a plan from the model's folder; names of the copies.

    Raises:
        ExportError: the plan's folder holds another model's.
    """
    if folder.resolve() == stage.target.resolve():
        return []
    names = [name for name in SHARED_FILES if (folder / name).is_file()]
    for name in names:
        other = stage.target / name
        if other.exists() and not filecmp.cmp(folder / name, other, shallow=False):
            raise ExportError(
                f"{stage.target}: it holds a {name} other than the one in {folder}.", "Choose another folder for --out."
            )
        shutil.copyfile(folder / name, stage.path / name)
    return names


def _companion_records(stage: Staging) -> tuple[FileRecord, ...]:
    """What stands beside the plan when it is published, but for config.json, which no runtime reads."""
    paths = (
        next((folder / name for folder in (stage.path, stage.target) if (folder / name).is_file()), None)
        for name in SHARED_FILES if name != "config.json"
    )
    return tuple(FileRecord.of(path) for path in paths if path is not None)


def resolve_compute_capabilities(
    flavour: Flavour, wanted: Sequence[str | ComputeCapability]
) -> tuple[ComputeCapability, ...]:
    """The compute capabilities to build for, ascending.

    Args:
        flavour: the TensorRT that builds.
        wanted: as for :func:`build_engine`; the default is what both TensorRT and the plugin's kernels run on.

    Raises:
        EngineError: one is malformed, or the flavour cannot build for it, or the plugin has no kernels for it.
        EnvironmentProblem: the flavour builds on a GPU, and there is none.
        PluginError: the plugin library is missing.
    """
    try:
        parsed = sorted({item if isinstance(item, ComputeCapability) else ComputeCapability.parse(item)
                         for item in wanted})
    except ValueError as error:
        raise EngineError(f"compute_capabilities: {error}.") from None
    targets = _ahead_of_time(flavour, parsed) if flavour.ahead_of_time else _for_gpu_here(flavour, parsed)
    kernels = compiled_for(library.plugin_path())
    runnable = tuple(target for target in targets if kernels.runs_on(target))
    if flavour.ahead_of_time and not parsed and not runnable:
        raise EngineError(
            f"compute_capabilities: {flavour} builds for {', '.join(map(str, targets))}; the plugin library has "
            f"kernels for {kernels} alone.",
            nothing_in_common_remedy(),
        )
    if runnable != targets and (parsed or not runnable):
        missing = next(target for target in targets if target not in runnable)
        raise EngineError(
            f"compute_capabilities: the plugin library has no kernels for {missing}; it has them for {kernels}.",
            f"Install hip-trt again with HIP_TRT_CUDA_ARCHITECTURES={missing.major}{missing.minor}.",
        )
    return runnable


def _ahead_of_time(flavour: Flavour, wanted: Sequence[ComputeCapability]) -> tuple[ComputeCapability, ...]:
    """Those wanted, or all that can be had."""
    allowed = flavour.compute_capabilities
    for capability in wanted:
        if capability not in allowed:
            raise EngineError(
                f"compute_capabilities: {flavour} builds for {', '.join(map(str, allowed))}, not for {capability}.",
                "Hopper GPUs need the full TensorRT: use --runtime tensorrt on a machine with one."
                if capability.major == 9 else "Choose among those.",
            )
    return tuple(wanted) or allowed


def _for_gpu_here(flavour: Flavour, wanted: Sequence[ComputeCapability]) -> tuple[ComputeCapability, ...]:
    """That of this machine's GPU, if no other is wanted."""
    gpu = current_gpu()
    if gpu is None:
        raise EnvironmentProblem(
            f"{flavour} builds engines on the GPU that they will run on, and there is none here.",
            "Run it on a machine with that GPU, or use --runtime tensorrt-rtx, which needs none.",
        )
    if any(capability != gpu.compute_capability for capability in wanted):
        raise EngineError(
            f"compute_capabilities: {flavour} builds for the GPU here only, {gpu.name} ({gpu.compute_capability}), not "
            f"for {', '.join(map(str, wanted))}.",
            "Leave --compute-capability out, or run it on a machine with that GPU.",
        )
    return (gpu.compute_capability,)


_TYPE_NAMES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}
"""Names of TensorRT's data types in the model graph."""


class _Build:
    """One build: TensorRT's objects, which must outlive each other in this order."""

    def __init__(
        self, flavour: Flavour, source: OnnxFile, limits: EngineLimits, targets: tuple[ComputeCapability, ...],
        weights: PlanWeights, weight_streaming: bool,
    ) -> None:
        self.flavour, self.source, self.limits, self.targets = flavour, source, limits, targets
        self.weights, self.weight_streaming = weights, weight_streaming
        self.bound: dict[str, tuple[int, ...]] = {}
        self.profiles = profiles(source.spec, limits)
        trt = flavour.module
        self.builder = trt.Builder(flavour.logger)
        # TensorRT 11 knows strongly typed networks only, and may have no name for them.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        self.parser = trt.OnnxParser(self.network, flavour.logger)  # maps the weights, which the network refers to

    def parse(self) -> None:
        """Turn the ONNX graph, without the function that the plugin replaces, into TensorRT's network, and check it."""
        path = self.source.path
        model, folder = without_links(strip_function(self.source.model), path)
        if self.weights == "bound":
            self.bound = _bind_matrices(model)
        with self.flavour.messages() as log:
            if not self.parser.parse(model.SerializeToString(), str(folder / path.name)):
                raise EngineError(f"{path}: {self.flavour} cannot read the model: {self._parser_error(log)}.")
        self._require_plugin_layers()
        self._require_inputs()

    def write_plan(self, file: BinaryIO, name: str) -> FileRecord:
        """Build the engine and write it, a piece at a time; Ctrl-C ends the build at its next step."""
        cancelled = threading.Event()
        config = self._config(cancelled)
        plan = _HashingWriter(file)
        with self.flavour.messages() as log:
            built = _in_thread(lambda: self._serialize(config, plan), cancelled)
        if plan.error:
            raise plan.error
        if not built or not plan.size:
            raise EngineError(
                f"{self.source.path}: {self.flavour} cannot build the engine: {log.cause('it gives no reason')}."
            )
        return FileRecord(name=name, size=plan.size, sha256=plan.digest.hexdigest())

    def describe(
        self, plan: FileRecord, model: tuple[FileRecord, ...], companions: tuple[FileRecord, ...]
    ) -> Sidecar:
        """What was built, as TensorRT's own interfaces tell it."""
        network = self.network
        inputs = [_tensor(network.get_input(index)) for index in range(network.num_inputs)]
        return Sidecar(
            plan=plan,
            model=model,
            companions=companions,
            weights=self.weights,
            bound=tuple(tensor for tensor in inputs if tensor.name in self.bound),
            weight_streaming=self.weight_streaming,
            spec=self.source.spec,
            limits=self.limits.as_limits(),
            inputs=tuple(tensor for tensor in inputs if tensor.name not in self.bound),
            outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
            profiles=self.profiles,
            layers=dict(Counter(layer.type.name for layer in self._layers()).most_common()),
            plugin_layers=tuple(layer.name for layer in self._plugin_layers()),
            flavour=self.flavour.name,
            tensorrt_version=self.flavour.version,
            compute_capabilities=tuple(map(str, self.targets)),
            plugin_version=library.version(),
            hip_trt_version=version("hip-trt"),
            created=datetime.now(UTC).replace(microsecond=0),
        )

    def _layers(self) -> list[Any]:
        return [self.network.get_layer(index) for index in range(self.network.num_layers)]

    def _plugin_layers(self) -> list[Any]:
        return [layer for layer in self._layers() if layer.type == self.flavour.module.LayerType.PLUGIN_V3]

    def _parser_error(self, log: MessageLog) -> str:
        # What a plugin says when it refuses its attributes comes through the log; the parser only says that it did.
        plugin = [message for message in log.errors if message.startswith(operator.OP_TYPE)]
        if plugin or not self.parser.num_errors:
            return MessageLog(plugin or log.errors).cause("it gives no reason")
        error = self.parser.get_error(0)
        return f"node {error.node_name()} ({error.node_operator()}): {one_line(error.desc())}"

    def _require_plugin_layers(self) -> None:
        expected, found = len(self.source.attention_nodes), len(self._plugin_layers())
        if found != expected:
            raise EngineError(
                f"{self.source.path}: {self.flavour} made {found} plugin layers of {expected} {operator.OP_TYPE} nodes."
            )

    def _require_inputs(self) -> None:
        """The network's inputs must be those of the model graph, whose dimensions the profiles give ranges for, and the
        weights that are inputs."""
        expected = self.bound | {
            name: tuple(dim if isinstance(dim, int) else -1 for dim in shape)
            for name, shape in graph_shapes(self.source.spec).items()
        }
        network = self.network
        found = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise EngineError(
                    f"{self.source.path}: input {name} has shape {found.get(name, 'none')}; the model graph of hip-trt "
                    f"has {expected.get(name, 'no such input')}.",
                    "Export it again with `hip-trt export`.",
                )

    def _config(self, cancelled: threading.Event) -> Any:
        config = self.builder.create_builder_config()
        config.progress_monitor = _progress_monitor(self.flavour.module, cancelled)
        flags = self.flavour.module.BuilderFlag
        config.clear_flag(flags.TF32)  # float32 is there to verify with; TF32 is no finer than float16
        if self.weights == "refit":
            config.set_flag(flags.STRIP_PLAN)
            config.set_flag(flags.REFIT_IDENTICAL)
        if self.weight_streaming:
            config.set_flag(flags.WEIGHT_STREAMING)
        if self.flavour.ahead_of_time:
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                member = self.flavour.module.ComputeCapability.__members__[f"SM{target.major}{target.minor}"]
                if not config.set_compute_capability(member, index):
                    raise EngineError(f"{self.flavour} refuses compute capability {target}.")
        for profile in self.profiles:
            config.add_optimization_profile(self._optimization_profile(profile))
        return config

    def _optimization_profile(self, record: ProfileRecord) -> Any:
        profile = self.builder.create_optimization_profile()
        for name, shapes in record.shapes.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        return profile

    def _serialize(self, config: Any, plan: _HashingWriter) -> bool:
        if not hasattr(self.builder, "build_serialized_network_to_stream"):
            serialized = self.builder.build_serialized_network(self.network, config)
            return serialized is not None and plan.write(memoryview(serialized)) > 0
        writer = _stream_writer(self.flavour.module, plan)
        return bool(self.builder.build_serialized_network_to_stream(self.network, config, writer))


def _bind_matrices(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Make inputs of the model's matrices, in place, and return their shapes.

    Vectors, such as the weights of norms, are small, and stay. So do quantized matrices: no input has four bits.
    """
    graph = model.graph
    quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.input}
    matrices = [
        tensor for tensor in graph.initializer
        if uses_external_data(tensor) and len(tensor.dims) > 1 and tensor.name not in quantized
    ]
    bound = {tensor.name for tensor in matrices}
    kept = [tensor for tensor in graph.initializer if tensor.name not in bound]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in matrices
    )
    return {tensor.name: tuple(tensor.dims) for tensor in matrices}


class _HashingWriter:
    """Writes a file and sums it up on the way. TensorRT calls it where no exception may pass, so it keeps the first."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Bytes written; 0 after an error."""
        if self.error:
            return 0
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self.size += len(data)
        self.digest.update(data)
        return len(data)


def _stream_writer(trt: Any, plan: _HashingWriter) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return plan.write(data)

    return Writer()


def _progress_monitor(trt: Any, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _in_thread(work: Callable[[], bool], cancelled: threading.Event) -> bool:
    """Run ``work`` in a thread: so signals reach Python while TensorRT is busy, and end the build."""
    with ThreadPoolExecutor(1, "tensorrt-build") as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            cancelled.set()
            raise


def _tensor(tensor: Any) -> TensorRecord:
    dtype = tensor.dtype.name
    return TensorRecord(name=tensor.name, dtype=_TYPE_NAMES.get(dtype, dtype), shape=tuple(tensor.shape))
