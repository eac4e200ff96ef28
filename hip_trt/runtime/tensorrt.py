"""Runs an engine plan in TensorRT, on the tensors of the caller, with CUDA graphs for decode steps."""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hip_trt import library
from hip_trt import operator as names
from hip_trt.errors import EngineError, EnvironmentProblem
from hip_trt.files import sha256
from hip_trt.gpu import current_gpu
from hip_trt.onnx_file import OnnxFile, map_weights, read_onnx
from hip_trt.runtime.executor import Limits
from hip_trt.sidecar import ProfileName, Sidecar, verify_plan
from hip_trt.spec import ModelSpec
from hip_trt.tensorrt_flavour import Flavour, MessageLog, find_flavour

_KEPT_DECODERS = 4
"""Decode contexts kept, each with its CUDA graph and activation memory: one for each batch that is being decoded."""

_logger = logging.getLogger("hip_trt.tensorrt")


class Stream(Protocol):
    """What the executor needs of CUDA: an ordered queue, and its capture."""

    @property
    def handle(self) -> int:
        """The cudaStream_t to enqueue on, within :meth:`ordered` and :meth:`capture`."""
        ...

    def ordered(self) -> Any:
        """Context manager: work within comes after what the caller has enqueued, and before what it enqueues next."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` enqueues, without running it; returns what replays it within :meth:`ordered`."""
        ...


class CudaStream:
    """A stream of its own, ordered with torch's current one. TensorRT synchronizes with the host on the default one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay


class _Decoder:
    """A decode context bound to one set of buffers, and its CUDA graph once there is one."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.replay: Callable[[], None] | None = None
        self.capturable = True


class TensorRTExecutor:
    """An :class:`~hip_trt.runtime.executor.Executor` over a deserialized engine; see :meth:`load`.

    Calls of one new token use the decode profile, others the prefill profile. A decode call that repeats the addresses
    and shapes of an earlier one is captured in a CUDA graph, and replayed from then on.

    Args:
        engine: TensorRT's ICudaEngine.
        flavour: the TensorRT that it belongs to.
        sidecar: the engine's description.
        device: where tensors live.
        stream: queue to enqueue on.
        cuda_graphs: whether to capture decode calls.
        weights: the engine's inputs that are weights, by name, on ``device``.

    Raises:
        EngineError: if TensorRT cannot make a context.
    """

    def __init__(
        self, engine: Any, flavour: Flavour, sidecar: Sidecar, *, device: torch.device, stream: Stream,
        cuda_graphs: bool = True, weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._weights = dict(weights or {})
        self._engine, self._flavour, self._sidecar = engine, flavour, sidecar
        self._device, self._stream, self._cuda_graphs = device, stream, cuda_graphs
        with stream.ordered():
            self._prefill = self._context("prefill")
        self._decoders: OrderedDict[tuple[Any, ...], _Decoder] = OrderedDict()

    @classmethod
    def load(
        cls, path: str | Path, *, cuda_graphs: bool = True, weight_budget: int | None = None
    ) -> TensorRTExecutor:
        """Deserialize a plan on this machine's first GPU, and give it its weights if it has none of its own.

        Args:
            path: the plan, with its sidecar beside it, and, if it was built without weights, its .onnx and that one's
                weights.
            cuda_graphs: whether to capture decode calls.
            weight_budget: for a plan built with weight streaming: bytes of weights to keep on the GPU; by default what
                TensorRT finds best for the memory that is free.

        Raises:
            EngineError: the plan, its sidecar or its weights are missing, damaged, or of another model; it was built
                for another TensorRT or GPU; or TensorRT fails.
            PluginError: the plugin library is missing or of another version.
            EnvironmentProblem: there is no GPU, no TensorRT of the plan's flavour, or no CUDA in PyTorch.
        """
        path = Path(path)
        sidecar = verify_plan(path)
        library.load()  # missing or damaged: said before anything takes long
        if weight_budget is not None and not sidecar.weight_streaming:
            raise EngineError(
                f"{path}: built without weight streaming, so all its weights are on the GPU.",
                "Leave the weight budget out, or export with --weight-streaming.",
            )
        source = None if sidecar.weights == "embedded" else _model_of(path, sidecar)
        run_onnx = f"Or run the ONNX model on the CPU: hip-trt run {path.with_name(sidecar.model[0].name)}"
        gpu = current_gpu()
        if gpu is None:
            raise EnvironmentProblem(
                f"{path}: a plan needs a GPU ({', '.join(sidecar.compute_capabilities)}), and there is none here.",
                f"Run it where there is one. {run_onnx}",
            )
        if not torch.cuda.is_available():
            raise EnvironmentProblem(
                f"{path}: there is a GPU ({gpu.name}), but PyTorch {torch.__version__} cannot use it.",
                f"Install a PyTorch with CUDA that the driver supports. {run_onnx}",
            )
        flavour = find_flavour(sidecar.flavour)
        sidecar.require_environment(flavour=flavour, gpu=gpu)
        flavour.load_plugin(library.plugin_path())
        device = torch.device("cuda", 0)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        with flavour.messages() as log, open(path, "rb") as file:
            runtime = flavour.module.Runtime(flavour.logger)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                cause = log.cause("it gives no reason")
                raise EngineError(f"{path}: {flavour} cannot load it: {cause}.", "Export the engine again.")
        if sidecar.weight_streaming:
            _stream_weights(path, engine, weight_budget)
        weights: dict[str, Tensor] = {}
        if source is not None and sidecar.weights == "refit":
            refit(engine, flavour, source)
        elif source is not None:
            weights = read_weights(source, sidecar, device)
        executor = cls(
            engine, flavour, sidecar, device=device, stream=CudaStream(device), cuda_graphs=cuda_graphs, weights=weights
        )
        executor._runtime = runtime  # must outlive the engine
        return executor

    _runtime: Any = None

    @property
    def spec(self) -> ModelSpec:
        return self._sidecar.spec

    @property
    def limits(self) -> Limits:
        return self._sidecar.limits

    @property
    def device(self) -> torch.device:
        return self._device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`.

        Raises:
            EngineError: if a shape is outside the engine's profiles, or TensorRT fails.
        """
        with self._stream.ordered():
            if inputs[names.INPUT_IDS].shape[1] > 1:
                self._bind(self._prefill, inputs, outputs)
                self._enqueue(self._prefill)
            else:
                self._decode(inputs, outputs)

    def forget_calls(self) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`."""
        self._decoders.clear()

    def _decode(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        key = tuple((tensor.data_ptr(), tensor.shape) for tensor in (*inputs.values(), *outputs.values()))
        decoder = self._decoders.get(key)
        if decoder is None:
            # The first call runs uncaptured, which also lets TensorRT do what it does once per shape. The context
            # belongs to these shapes for good: a captured graph refers to its activation memory.
            decoder = _Decoder(self._context("decode"))
            self._bind(decoder.context, inputs, outputs)
            self._enqueue(decoder.context)
            self._decoders[key] = decoder
            if len(self._decoders) > _KEPT_DECODERS:
                self._decoders.popitem(last=False)
            return
        self._decoders.move_to_end(key)
        if decoder.replay is None and decoder.capturable and self._cuda_graphs:
            decoder.capturable = False
            context = decoder.context
            try:
                decoder.replay = self._stream.capture(lambda: self._enqueue(context))
            except (EngineError, RuntimeError) as error:  # torch reports CUDA failures as RuntimeError
                _logger.warning("decode steps run without a CUDA graph: %s", error)
        if decoder.replay is not None:
            decoder.replay()
        else:
            self._enqueue(decoder.context)

    def _context(self, profile: ProfileName) -> Any:
        """A new execution context on one profile, with activation memory for that profile only.

        Or, where weights are streamed, for any profile: TensorRT 10.6 fails there at the first call otherwise.
        """
        strategies = self._flavour.module.ExecutionContextAllocationStrategy
        strategy = strategies.STATIC if self._sidecar.weight_streaming else strategies.ON_PROFILE_CHANGE
        with self._flavour.messages() as log:
            context = self._engine.create_execution_context(strategy)
            index = self._sidecar.profile_index(profile)
            if context is None or not context.set_optimization_profile_async(index, self._stream.handle):
                raise EngineError(f"{self._sidecar.plan.name}: no execution context: {log.cause('no reason given')}.")
            self._address(context, self._weights, log)
        return context

    def _bind(self, context: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        with self._flavour.messages() as log:
            for name, tensor in inputs.items():
                if not context.set_input_shape(name, tuple(tensor.shape)):
                    raise EngineError(
                        f"{self._sidecar.plan.name}: {name}: the engine does not take shape {list(tensor.shape)}: "
                        f"{log.cause('outside its profiles')}.",
                        "Build it with larger limits.",
                    )
            for tensors in (inputs, outputs):
                self._address(context, tensors, log)

    def _address(self, context: Any, tensors: Mapping[str, Tensor], log: MessageLog) -> None:
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"{self._sidecar.plan.name}: {name}: {log.cause('no such tensor')}.")

    def _enqueue(self, context: Any) -> None:
        with self._flavour.messages() as log:
            if not context.execute_async_v3(self._stream.handle):
                raise EngineError(
                    f"{self._sidecar.plan.name}: {self._flavour} failed: {log.cause('it gives no reason')}."
                )


def _model_of(plan: Path, sidecar: Sidecar) -> OnnxFile:
    """The .onnx that holds a plan's weights, which is the very one that the plan was built from."""
    record = sidecar.model[0]
    path = plan.with_name(record.name)
    if not path.is_file():
        raise EngineError(
            f"{plan}: built without its weights, which {record.name} has; there is none beside it.",
            f"Copy {record.name} and its weights from where the plan was built.",
        )
    if path.stat().st_size != record.size or sha256(path) != record.sha256:
        raise EngineError(
            f"{path}: changed since {plan.name} was built from it.", "Export the engine again with `hip-trt export`."
        )
    return read_onnx(path)


def read_weights(source: OnnxFile, sidecar: Sidecar, device: torch.device) -> dict[str, Tensor]:
    """The weights that an engine takes as inputs, read from the model's files, one after the other.

    Raises:
        EngineError: the model lacks one, or has it in another shape.
    """
    weights: dict[str, Tensor] = {}
    shapes = {record.name: record.shape for record in sidecar.bound}
    for name, tensor in map_weights(source, tuple(shapes)):
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(
                f"{source.path}: the weight {name} has shape {list(tensor.shape)}, and {sidecar.plan.name} takes "
                f"{list(shapes[name])}.",
                "Export the engine again with `hip-trt export`.",
            )
        weights[name] = tensor.to(device, copy=True)
    return weights


def refit(engine: Any, flavour: Flavour, source: OnnxFile) -> None:
    """Put the weights of a model into an engine whose plan TensorRT stripped.

    Raises:
        EngineError: TensorRT refuses, or finds weights missing.
    """
    from hip_trt.export.function import strip_function

    module, path = flavour.module, source.path
    with flavour.messages() as log:
        refitter = module.Refitter(engine, flavour.logger)
        parser = module.OnnxParserRefitter(refitter, flavour.logger)
        model = strip_function(source.model).SerializeToString()
        if not parser.refit_from_bytes(model, str(path.resolve())) or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:3])
            cause = log.cause(f"the weights {missing} are missing" if missing else "it gives no reason")
            raise EngineError(f"{path}: {flavour} cannot put its weights into the engine: {cause}.")


def _stream_weights(path: Path, engine: Any, budget: int | None) -> None:
    """Set how many bytes of weights stay on the GPU, before the first context is made."""
    most = engine.streamable_weights_size
    if budget is not None and not 0 <= budget <= most:
        raise EngineError(
            f"{path}: {budget / 2**20:,.1f} MiB of weights cannot be kept on the GPU: "
            f"from 0 to {most / 2**20:,.1f} MiB can be streamed.",
            "Name a weight budget within that.",
        )
    engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if budget is None else budget
