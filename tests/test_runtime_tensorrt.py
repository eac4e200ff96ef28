"""The TensorRT executor's sequence of calls, on an engine that records them and computes with the reference operator.

TensorRT itself needs a GPU: these tests show that its interfaces are called in the documented order, with the right
profile, shapes and addresses, and that failures become errors with TensorRT's own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from oracle import OracleExecutor, tiny_llama
from tiny_graph import save, tiny_model, tiny_spec
from tiny_plan import LIMITS, sidecar, write_plan

from hip_trt import library
from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import EngineError, EnvironmentProblem
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime import Generator, Session
from hip_trt.runtime import tensorrt as executor_module
from hip_trt.runtime.tensorrt import TensorRTExecutor, read_weights, refit
from hip_trt.sidecar import FileRecord, TensorRecord, sidecar_path
from hip_trt.tensorrt_flavour import MessageLog

HIP = HipConfig.create(
    mask_k=16, decode_mask_k=8, block_q=8, block_k=4, stride_q=4, page_size=8, sink_tokens=4, window_tokens=8,
    branch=2, leaf_branch=2, refresh_interval=3,
)


class FakeContext:
    """Runs the oracle on what was bound, found again by address."""

    def __init__(self, engine: FakeEngine, strategy: Any) -> None:
        self.engine, self.strategy = engine, strategy
        self.calls: list[str] = []
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.calls.append("profile")
        self.profile = index
        return stream == FakeStream.handle

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        assert name in self.engine.inputs
        self.calls.append("shape")
        self.shapes[name] = shape
        rows, width = self.shapes[names.INPUT_IDS]
        accepted = rows <= 3 and (width == 1 if self.profile == 1 else 1 <= width <= 16)
        if not accepted:
            self.engine.log.errors.append("IExecutionContext::setInputShape: Error Code 3: (outside profile)")
        return accepted

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append("address")
        self.addresses[name] = address
        return name in {*self.engine.inputs, *self.engine.outputs, *self.engine.weights}

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == FakeStream.handle
        assert self.engine.stream.inside, "enqueued without order"
        self.calls.append("execute")
        if self.engine.broken:
            self.engine.log.errors.append("[enqueue] no memory")
            return False
        if not self.engine.stream.capturing:
            self.compute()
        return True

    def compute(self) -> None:
        tensors = {tensor.data_ptr(): tensor for tensor in self.engine.live}
        inputs = {name: tensors[self.addresses[name]] for name in self.engine.inputs}
        assert all(tuple(tensor.shape) == self.shapes[name] for name, tensor in inputs.items())
        self.engine.oracle.run(inputs, {name: tensors[self.addresses[name]] for name in self.engine.outputs})


class FakeStream:
    handle = 77

    def __init__(self) -> None:
        self.inside = self.capturing = False
        self.captures: list[Callable[[], None]] = []
        self.replays = 0
        self.refuse = False

    @contextmanager
    def ordered(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        work()
        self.capturing = False
        self.captures.append(work)

        def replay() -> None:
            assert self.inside
            self.replays += 1
            work()

        return replay


class FakeEngine:
    def __init__(self, oracle: OracleExecutor, stream: FakeStream) -> None:
        layers = range(oracle.spec.num_layers)
        self.oracle, self.stream, self.log = oracle, stream, MessageLog()
        self.inputs = [
            names.INPUT_IDS, names.PAST_LENGTHS, names.QUERY_LENGTHS, names.PAGE_TABLE, names.REFRESH_MASK,
            *(name(i) for i in layers for name in (names.KEY.past, names.VALUE.past, names.NODES.past)),
        ]
        self.outputs = [names.LOGITS, *(
            name(i) for i in layers
            for name in (names.KEY.present, names.VALUE.present, names.NODES.present)
        )]
        self.weights: set[str] = set()
        self.contexts: list[FakeContext] = []
        self.live: list[torch.Tensor] = []
        self.broken = self.no_context = False

    def create_execution_context(self, strategy: Any) -> FakeContext | None:
        if self.no_context:
            return None
        self.contexts.append(FakeContext(self, strategy))
        return self.contexts[-1]


class FakeFlavour:
    name, version = "tensorrt", "10.99"
    module = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(
        ON_PROFILE_CHANGE="on change", STATIC="static",
    ))

    def __init__(self, log: MessageLog) -> None:
        self.log = log

    def __repr__(self) -> str:
        return f"{self.name} {self.version}"

    @contextmanager
    def messages(self) -> Iterator[MessageLog]:
        self.log.errors.clear()
        yield self.log


class Recording(TensorRTExecutor):
    """Keeps the tensors of a call within reach of the engine, which sees addresses only."""

    def run(self, inputs: Any, outputs: Any) -> None:
        self._engine.live = [*inputs.values(), *outputs.values()]
        super().run(inputs, outputs)


@pytest.fixture(scope="module")
def oracle() -> OracleExecutor:
    return OracleExecutor(tiny_llama(), HIP, limits=LIMITS)


def make(oracle: OracleExecutor, *, cuda_graphs: bool = True) -> tuple[Recording, FakeEngine, FakeStream]:
    stream = FakeStream()
    engine = FakeEngine(oracle, stream)
    flavour: Any = FakeFlavour(engine.log)
    executor = Recording(
        engine, flavour, sidecar(oracle.spec), device=torch.device("cpu"), stream=stream, cuda_graphs=cuda_graphs
    )
    return executor, engine, stream


PROMPTS = [list(range(40)), list(range(5, 12))]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_same_tokens_as_the_oracle(oracle: OracleExecutor, cuda_graphs: bool) -> None:
    executor, engine, stream = make(oracle, cuda_graphs=cuda_graphs)
    expected = [row.tokens for row in Generator(oracle).generate(PROMPTS, max_new_tokens=8)]
    assert [row.tokens for row in Generator(executor).generate(PROMPTS, max_new_tokens=8)] == expected
    prefill, decode = engine.contexts
    assert (prefill.profile, decode.profile) == (0, 1)
    assert {prefill.strategy, decode.strategy} == {"on change"}
    # Bound once, executed at the first of 7 steps, then captured and replayed.
    assert decode.calls.count("shape") == len(engine.inputs)
    assert decode.calls.count("address") == len(engine.inputs) + len(engine.outputs)
    assert (len(stream.captures), stream.replays) == ((1, 6) if cuda_graphs else (0, 0))
    assert prefill.calls.count("execute") == 3  # 40 tokens in chunks of 16


def test_streamed_weights_take_memory_for_all_profiles_at_once(oracle: OracleExecutor) -> None:
    stream = FakeStream()
    engine = FakeEngine(oracle, stream)
    flavour: Any = FakeFlavour(engine.log)
    described = sidecar(oracle.spec).model_copy(update={"weight_streaming": True})
    TensorRTExecutor(engine, flavour, described, device=torch.device("cpu"), stream=stream)
    assert [context.strategy for context in engine.contexts] == ["static"]


def test_present_is_bound_to_past(oracle: OracleExecutor) -> None:
    executor, engine, _ = make(oracle)
    Generator(executor).generate(PROMPTS[0], max_new_tokens=2)
    for context in engine.contexts:
        for layer in range(oracle.spec.num_layers):
            for past, present in (
                (names.KEY.past, names.KEY.present), (names.VALUE.past, names.VALUE.present),
                (names.NODES.past, names.NODES.present),
            ):
                assert context.addresses[present(layer)] == context.addresses[past(layer)]


def test_every_batch_has_a_context_and_graph_of_its_own(oracle: OracleExecutor) -> None:
    executor, engine, stream = make(oracle)
    sessions = [Session(executor, batch=batch, max_seq_len=64) for batch in (1, 2)]
    for running in sessions:
        running.append([[1, 2, 3]] * running.batch)
    for _ in range(3):
        for running in sessions:
            running.step([4] * running.batch)
    assert [context.profile for context in engine.contexts] == [0, 1, 1]
    assert (len(stream.captures), stream.replays) == (2, 4)


def test_old_decode_contexts_are_dropped(oracle: OracleExecutor) -> None:
    executor, _, _ = make(oracle)
    sessions = [Session(executor, max_seq_len=16) for _ in range(6)]
    for running in sessions:
        running.step([1])
    assert len(executor._decoders) == 4


def test_capture_that_fails_is_not_tried_again(oracle: OracleExecutor, caplog: pytest.LogCaptureFixture) -> None:
    executor, _, stream = make(oracle)
    stream.refuse = True
    expected = [row.tokens for row in Generator(oracle).generate(PROMPTS, max_new_tokens=6)]
    assert [row.tokens for row in Generator(executor).generate(PROMPTS, max_new_tokens=6)] == expected
    assert [record.message for record in caplog.records] == [
        "decode steps run without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_limits_are_the_engines(oracle: OracleExecutor) -> None:
    executor, _, _ = make(oracle)
    assert executor.limits == LIMITS
    assert Generator(executor).max_seq_len == 128


def test_shape_outside_the_profiles(oracle: OracleExecutor) -> None:
    executor, _, _ = make(oracle)
    running = Session(executor, max_seq_len=64)
    running._chunk = 24
    with pytest.raises(EngineError, match=r"input_ids: the engine does not take shape \[1, 24\]: .*outside profile"):
        running.append([list(range(24))])


def test_failure_carries_tensorrts_words(oracle: OracleExecutor) -> None:
    executor, engine, _ = make(oracle)
    running = Session(executor, max_seq_len=64)
    engine.broken = True
    with pytest.raises(EngineError, match=r"engine.plan: tensorrt 10.99 failed: \[enqueue\] no memory"):
        running.append([[1, 2]])
    assert running.state.lengths == (0,)


def test_no_context(oracle: OracleExecutor) -> None:
    stream = FakeStream()
    engine = FakeEngine(oracle, stream)
    engine.no_context = True
    flavour: Any = FakeFlavour(engine.log)
    with pytest.raises(EngineError, match="no execution context"):
        TensorRTExecutor(engine, flavour, sidecar(oracle.spec), device=torch.device("cpu"), stream=stream)


def test_plan_without_a_gpu(oracle: OracleExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "current_gpu", lambda: None)
    with pytest.raises(EnvironmentProblem, match=r"needs a GPU \(9.0\).*hip-trt run .*model.onnx"):
        TensorRTExecutor.load(write_plan(tmp_path, oracle.spec))


def test_plan_of_another_format(oracle: OracleExecutor, tmp_path: Path) -> None:
    """Said before a GPU is asked for, so that it is said everywhere."""
    here = names.OP_VERSION
    plan = write_plan(tmp_path, oracle.spec, format_version=here + 1, hip_trt_version="9.9.9")
    message = rf"engine.plan.json: made by hip-trt 9.9.9 in format {here + 1}; this is .* reads format {here}\."
    with pytest.raises(EngineError, match=message):
        TensorRTExecutor.load(plan)


def test_plan_of_another_hip_trt_runs(
    oracle: OracleExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the format decides; fields that a later version adds are passed over."""
    monkeypatch.setattr(executor_module, "current_gpu", lambda: None)
    plan = write_plan(tmp_path, oracle.spec, plugin_version="9.9.9", hip_trt_version="9.9.9")
    beside = sidecar_path(plan)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "later": 1}))
    with pytest.raises(EnvironmentProblem, match="needs a GPU"):  # the first thing that this machine lacks
        TensorRTExecutor.load(plan)


def test_damaged_plan(oracle: OracleExecutor, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, oracle.spec)
    plan.write_bytes(b"plaN")
    with pytest.raises(EngineError, match="damaged"):
        TensorRTExecutor.load(plan)
    sidecar_path(plan).unlink()
    with pytest.raises(EngineError, match=r"engine.plan.json is missing"):
        TensorRTExecutor.load(plan)


# Plans without weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_spec()), tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def beside(model: Path, tmp_path: Path) -> Path:
    for path in model.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / model.name


def records(path: Path) -> tuple[FileRecord, ...]:
    return tuple(FileRecord.of(file) for file in read_onnx(path).files)


BOUND = (
    TensorRecord(name="lm_head.weight", dtype="float16", shape=(256, 32)),
    TensorRecord(name="layers.0.k_proj.weight", dtype="float16", shape=(256, 128)),
)


def test_bound_weights_are_those_of_the_file(beside: Path) -> None:
    record = sidecar(tiny_spec(), weights="bound", bound=BOUND)
    weights = read_weights(read_onnx(beside), record, torch.device("cpu"))
    assert list(weights) == [tensor.name for tensor in BOUND]
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(beside).graph.initializer}
    for name, tensor in weights.items():
        assert torch.equal(tensor, torch.from_numpy(expected[name].copy()))
    wrong = sidecar(tiny_spec(), bound=(BOUND[0].model_copy(update={"shape": (32, 256)}),))
    with pytest.raises(EngineError, match=r"lm_head.weight has shape \[256, 32\], and engine.plan takes \[32, 256\]"):
        read_weights(read_onnx(beside), wrong, torch.device("cpu"))
    strange = sidecar(tiny_spec(), bound=(BOUND[0].model_copy(update={"name": "other.weight"}),))
    with pytest.raises(EngineError, match=r"model\.onnx: the weight other\.weight is missing"):
        read_weights(read_onnx(beside), strange, torch.device("cpu"))


def test_weights_are_bound_to_every_context(oracle: OracleExecutor) -> None:
    stream = FakeStream()
    engine = FakeEngine(oracle, stream)
    flavour: Any = FakeFlavour(engine.log)
    weights = {"lm_head.weight": torch.zeros(4), "embedding.weight": torch.ones(4)}
    engine.weights = set(weights)
    executor = Recording(
        engine, flavour, sidecar(oracle.spec), device=torch.device("cpu"), stream=stream, weights=weights
    )
    expected = [row.tokens for row in Generator(oracle).generate(PROMPTS, max_new_tokens=4)]
    assert [row.tokens for row in Generator(executor).generate(PROMPTS, max_new_tokens=4)] == expected
    assert len(engine.contexts) == 2
    for context in engine.contexts:
        for name, tensor in weights.items():
            assert context.addresses[name] == tensor.data_ptr()
    with pytest.raises(EngineError, match=r"strange\.weight: no such tensor"):
        Recording(
            engine, flavour, sidecar(oracle.spec), device=torch.device("cpu"), stream=stream,
            weights={"strange.weight": torch.zeros(1)},
        )


class FakeRefitter:
    """TensorRT's Refitter and OnnxParserRefitter: takes the weights that the model's file has."""

    def __init__(self, engine: Any, logger: Any) -> None:
        self.engine, self.done = engine, False

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        proto = onnx.ModelProto.FromString(model)
        assert not proto.functions
        onnx.load_external_data_for_model(proto, str(Path(path).parent))
        self.engine.found = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        return not self.get_missing_weights()

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.wanted if name not in self.engine.found]

    def refit_cuda_engine(self) -> bool:
        self.engine.refitted = True
        return True


@pytest.mark.parametrize("wanted", [("lm_head.weight",), ("lm_head.weight", "folded.weight")])
def test_refit(beside: Path, wanted: tuple[str, ...]) -> None:
    engine = SimpleNamespace(wanted=wanted, found={}, refitted=False)
    flavour: Any = FakeFlavour(MessageLog())
    flavour.logger = None
    flavour.module = SimpleNamespace(
        Refitter=FakeRefitter, OnnxParserRefitter=lambda refitter, logger: refitter
    )
    if len(wanted) > 1:
        with pytest.raises(EngineError, match=r"cannot put its weights into the engine: the weights folded.weight are"):
            refit(engine, flavour, read_onnx(beside))
    else:
        refit(engine, flavour, read_onnx(beside))
    assert engine.refitted == (len(wanted) == 1)


def test_streamed_weights_have_a_budget() -> None:
    plan, mib = Path("engine.plan"), 2**20
    engine = SimpleNamespace(streamable_weights_size=100 * mib, get_weight_streaming_automatic_budget=lambda: 70)
    executor_module._stream_weights(plan, engine, None)
    assert engine.weight_streaming_budget_v2 == 70
    for budget in (0, 100 * mib):
        executor_module._stream_weights(plan, engine, budget)
        assert engine.weight_streaming_budget_v2 == budget
    for budget in (-mib, 101 * mib):
        with pytest.raises(EngineError, match=rf"engine.plan: {budget // mib}.0 MiB of .* from 0 to 100.0 MiB can be"):
            executor_module._stream_weights(plan, engine, budget)


def test_weight_budget_of_a_plan_without_streaming(oracle: OracleExecutor, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine.plan: built without weight streaming.*--weight-streaming"):
        TensorRTExecutor.load(write_plan(tmp_path, oracle.spec), weight_budget=0)


@pytest.mark.parametrize("kind", ["bound", "refit"])
def test_stripped_plan_needs_its_model(beside: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Said before a GPU is asked for."""
    plan = write_plan(beside.parent, tiny_spec(), weights=kind, model=records(beside), plugin_version=library.version())
    monkeypatch.setattr(executor_module, "current_gpu", lambda: None)
    with pytest.raises(EnvironmentProblem, match="needs a GPU"):
        TensorRTExecutor.load(plan)
    data = beside.with_name("model.onnx.data")
    data.rename(beside.with_name("gone"))
    with pytest.raises(EngineError, match=r"model\.onnx: its weights are missing"):
        TensorRTExecutor.load(plan)
    beside.write_bytes(beside.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"model\.onnx: changed since engine\.plan was built from it"):
        TensorRTExecutor.load(plan)
    beside.unlink()
    with pytest.raises(EngineError, match=r"engine\.plan: built without its weights, which model\.onnx has"):
        TensorRTExecutor.load(plan)
