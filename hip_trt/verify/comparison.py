"""Runs both sides over the calls of :mod:`hip_trt.verify.inputs` and compares what they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from hip_trt import operator as names
from hip_trt.errors import EngineError, EnvironmentProblem, HipTrtError, PluginError, RuntimeInputError
from hip_trt.onnx_file import OnnxFile, read_onnx
from hip_trt.progress import Steps
from hip_trt.sidecar import verify_plan
from hip_trt.spec import ModelSpec
from hip_trt.verify.checks import check_attributes, check_weights, rope_constants
from hip_trt.verify.choices import Shown
from hip_trt.verify.compare import (
    DEFAULTS,
    LAYER_CHOICES,
    LAYER_VALUES,
    ChoicesCompareFunc,
    Normalize,
    Tolerances,
    ValuesCompareFunc,
)
from hip_trt.verify.inputs import Call, Script, plan_cases, real_text, searching_context
from hip_trt.verify.report import Against, AgreementRecord, CaseRecord, Check, OutputRecord, Report
from hip_trt.verify.runners import ExecutorRunner, OnnxRunner

_NEAR = 0.25  # of the tolerance; rounding takes up to an eighth
_STATE = "each call began with the state (KV cache, tree nodes) that the model under test had given; both sides got it"
_ORDER = ("query", "key", "value", "chosen_blocks", "attended", "nodes")  # as a layer computes them


def verify(
    model: str | Path,
    *,
    against: Against = "reference",
    checkpoint: str | Path | None = None,
    baseline: str | Path | None = None,
    steps: int = 2,
    max_tokens: int | None = None,
    thorough: bool = False,
    prompts: Sequence[Sequence[int]] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    agreement: float | None = None,
    require_engine: bool = False,
    progress: Steps | None = None,
) -> Report:
    """Compare an exported model with a reference, call by call, over explicit state.

    Args:
        model: an .onnx, run in ONNX Runtime with the operator's body that it carries; or a .plan, run in TensorRT where
            a GPU and a TensorRT for it are there. Where not, the .onnx that it was built from is compared in its place,
            and the report says so.
        against: "reference": the same graph, its weights included, with attention by :mod:`hip_trt.reference`, as the
            model's facts have it, and RoPE as the config.json beside it has it; "pytorch": the checkpoint, with
            :func:`hip_trt.patch`, which knows nothing of the file; "onnxruntime": another .onnx.
        checkpoint: for "pytorch": what the model was exported from.
        baseline: for "onnxruntime": the other .onnx; by default, for a plan, the one that it was built from.
        steps: decode steps after each prefill that decodes.
        max_tokens: longest context; by default long enough that calls search, a quarter beyond what they attend to.
        thorough: more prompt lengths, and long prompts.
        prompts: token ids to continue. Other prompts are pieces of an English text, or random where the model's folder
            has no tokenizer.
        atol, rtol, agreement: see :class:`~hip_trt.verify.compare.Tolerances`; by default as the model's type allows.
        require_engine: refuse to compare a plan that cannot run here.
        progress: shows what is being done.

    Raises:
        HipTrtError: if nothing can be compared: a file or a package is missing, or the model cannot run here.
    """
    start, progress, notes = time.perf_counter(), progress or Steps(), list[str]()
    for option, value, least in (("steps", steps, 0), ("max_tokens", max_tokens, 2)):
        if value is not None and value < least:
            raise RuntimeInputError(f"{option}: {value} is not allowed.", f"It must be at least {least}.")
    path = Path(model)
    alone = against == "onnxruntime" and baseline is None  # a plan that does not run has nothing to be compared with
    subject = _open(path, require_engine=require_engine or alone, notes=notes, progress=progress)
    other, words, checks = _other(subject, against, checkpoint, baseline, progress)
    spec = subject.spec
    given = {"atol": atol, "rtol": rtol, "agreement": agreement}
    widened = spec.dtype == "bfloat16" and not subject.is_plan and against != "onnxruntime"  # see verify.sessions
    tolerances = DEFAULTS["float32" if widened else spec.dtype]
    tolerances = replace(tolerances, **{name: value for name, value in given.items() if value is not None})
    context = max_tokens or searching_context(spec)
    cases = plan_cases(
        spec, steps=steps, max_tokens=min(context, subject.max_tokens or context), thorough=thorough,
        prompts=prompts, max_prefill=subject.max_prefill, max_batch=subject.max_batch,
    )
    with ExitStack() as shown:
        def announce(call: Call) -> None:
            shown.close()
            shown.enter_context(progress.step(f"{call.case}: {call.label}"))

        script = Script(spec, cases, announce, real_text(path.parent, spec.vocab_size))
        records = _compare(subject.runner, other, script, tolerances)
    if not any(record.name.startswith("chosen") for case in records for record in case.agreements):
        notes.append("no context was long enough for a search, or the runner does not show the blocks that it chose")
    return Report(
        model=str(path), against=against, runner=subject.words, other=words, dtype=spec.dtype, atol=tolerances.atol,
        rtol=tolerances.rtol, agreement=tolerances.agreement, state=_STATE,
        checks=(*subject.checks, *checks), cases=records, notes=tuple(notes), seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Subject:
    """What is under test.

    Attributes:
        runner: runs it.
        words: who that is.
        spec: facts about it.
        file: the .onnx, or the one that a plan was built from; None where it is not beside the plan.
        is_plan: whether an engine runs.
        max_tokens, max_prefill, max_batch: limits of an engine.
        checks: on the files.
    """

    runner: Any
    words: str
    spec: ModelSpec
    file: OnnxFile | None
    is_plan: bool = False
    max_tokens: int | None = None
    max_prefill: int | None = None
    max_batch: int | None = None
    checks: tuple[Check, ...] = ()


def _open(path: Path, *, require_engine: bool, notes: list[str], progress: Steps) -> _Subject:
    if path.suffix == ".onnx":
        return _open_onnx(path, progress)
    if path.suffix not in (".plan", ".engine"):
        raise EngineError(f"{path}: neither .onnx nor .plan.", "Name a file that hip-trt export has made.")
    with progress.step(f"Check {path.name}"):
        sidecar = verify_plan(path)
    source = path.with_name(sidecar.model[0].name)
    try:
        from hip_trt.runtime.tensorrt import TensorRTExecutor

        with progress.step(f"Load {path.name}"):
            executor = TensorRTExecutor.load(path)
    except (EnvironmentProblem, EngineError, PluginError) as error:
        if require_engine or not source.is_file():
            raise
        notes.append(
            f"the engine did not run: {error.cause} Its checksum is right, and the model that it was built from, "
            f"{source.name}, was compared in its place"
        )
        subject = _open_onnx(source, progress)
        assert subject.file is not None
        same = subject.file.spec == sidecar.spec
        facts = Check(
            name="plan and model", passed=same,
            detail="the plan is intact and has the model's facts" if same else f"{source.name} has other facts",
        )
        return replace(subject, checks=(facts, *subject.checks))
    file = read_onnx(source) if source.is_file() else None
    return _Subject(
        ExecutorRunner(executor, "engine"), f"{sidecar.flavour} {sidecar.tensorrt_version}", sidecar.spec, file,
        is_plan=True, max_tokens=sidecar.limits.max_seq_len, max_prefill=sidecar.limits.max_prefill,
        max_batch=sidecar.limits.max_batch,
    )


def _open_onnx(path: Path, progress: Steps) -> _Subject:
    file = read_onnx(path)
    with progress.step("Checksum the weights", total=sum(data.stat().st_size for data in file.data)) as advance:
        checks = (check_weights(file, advance), check_attributes(file))
    return _Subject(
        OnnxRunner(file, "model"), "ONNX Runtime, with the function body in the file", file.spec, file, checks=checks
    )


def _other(
    subject: _Subject, against: Against, checkpoint: str | Path | None, baseline: str | Path | None, progress: Steps
) -> tuple[Any, str, tuple[Check, ...]]:
    """The other side, who that is, and what was checked on the way."""
    shown: Shown = getattr(subject.runner, "shown", lambda layer: None)
    if against == "pytorch":
        from hip_trt.verify.pytorch_runner import PyTorchRunner

        if checkpoint is None:
            raise RuntimeInputError(
                "--against pytorch: no checkpoint.", "Name what the model was exported from: --checkpoint MODEL."
            )
        with progress.step("Load the checkpoint"):
            runner = PyTorchRunner(checkpoint, subject.spec, shown)
        return runner, f"{checkpoint} in PyTorch, float32, patched with HiP", ()
    if against == "onnxruntime":
        if baseline is None and not (subject.is_plan and subject.file):
            raise RuntimeInputError(
                "--against onnxruntime: an .onnx runs in ONNX Runtime itself, and there is no other to compare with.",
                "Name another export with --baseline OTHER.onnx, or use --against reference or pytorch.",
            )
        file = read_onnx(baseline) if baseline is not None else subject.file
        assert file is not None
        if file.spec.pool_shape(1) != subject.spec.pool_shape(1) or file.spec.num_layers != subject.spec.num_layers:
            raise RuntimeInputError(f"{file.path}: another model.", "Name an export of the same checkpoint.")
        return OnnxRunner(file, "baseline"), f"{file.path} in ONNX Runtime", ()
    if against != "reference":
        raise RuntimeInputError(
            f"--against {against}: not known.", "It must be one of reference, onnxruntime and pytorch."
        )
    if subject.file is None:
        raise EngineError(
            "--against reference: needs the .onnx that the plan was built from.", "Put it beside the plan."
        )
    from hip_trt.verify.reference_runner import ReferenceRunner

    constants, check = rope_constants(subject.file)
    rope = "RoPE of config.json" if check else "RoPE of the file"
    return (
        ReferenceRunner(subject.file, constants, shown), f"the reference operator in the same graph, {rope}",
        (check,) if check else (),
    )


def _compare(model: Any, other: Any, script: Script, tolerances: Tolerances) -> tuple[CaseRecord, ...]:
    """Run every call on both sides, through Polygraphy's Comparator, and gather what it says by case."""
    seconds: list[tuple[float, float]] = []

    def watched(stream: Iterator[Any]) -> Iterator[Any]:
        for run in stream:
            script.observe(dict(run[0][1][0].items()))
            seconds.append((run[0][1][0].runtime or 0.0, run[1][1][0].runtime or 0.0))
            yield run

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            stream = Comparator.run([model, other], data_loader=script, streaming=True)
            normalized = Comparator.postprocess(watched(stream), Normalize(script.spec, script))
            results = Comparator.compare_accuracy(
                normalized, compare_func=[
                    ValuesCompareFunc(tolerances), ChoicesCompareFunc(tolerances),
                ]
            )
        except PolygraphyException as error:
            raise EngineError(f"{model.name} against {other.name}: {' '.join(str(error).split())[:300]}.") from None
        except HipTrtError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            if type(error).__module__.startswith("onnxruntime"):
                raise EngineError(f"ONNX Runtime failed: {' '.join(str(error).split())[:300]}.") from None
            raise
    pair = (model.name, other.name)
    calls = [
        {**values, **choices} for values, choices in zip(results[0][pair], results[1][pair], strict=True)
    ]
    by_case: dict[str, list[int]] = {}
    for index, call in enumerate(script.calls):
        by_case.setdefault(call.case, []).append(index)
    return tuple(
        _case(case, [script.calls[i] for i in indices], [calls[i] for i in indices], [seconds[i] for i in indices],
              script.spec.num_layers)
        for case, indices in by_case.items()
    )


def _case(
    name: str, calls: list[Call], results: list[dict[str, Any]], seconds: list[tuple[float, float]], layers: int
) -> CaseRecord:
    order = [f"{kind}.{layer}" for layer in range(layers) for kind in _ORDER] + [names.LOGITS]
    outputs, agreements = [], []
    for output in order:
        found = [result[output] for result in results if output in result]
        if found and output.rpartition(".")[0] in LAYER_CHOICES:
            least = min(item.agreement for item in found)
            agreements.append(AgreementRecord(name=output, agreement=least, least=found[0].thresholds.least))
        elif found:
            outputs.append(_output(output, found))
    first = first_call = cause = None
    for call, result in zip(calls, results, strict=True):
        wrong = [output for output in order if output in result and not result[output]]
        if wrong:
            first, first_call = wrong[0], call.label
            near = [output for output in order if output in result and _suspect(result[output])]
            cause = explain(first, set(near), set(result))
            break
    layer = first.rpartition(".")[2] if first and first != names.LOGITS else None
    return CaseRecord(
        name=name, calls=tuple(call.label for call in calls), outputs=tuple(outputs), agreements=tuple(agreements),
        first=first, first_call=first_call, first_layer=int(layer) if layer else None, cause=cause,
        model_seconds=sum(pair[0] for pair in seconds), other_seconds=sum(pair[1] for pair in seconds),
    )


def _output(name: str, found: list[Any]) -> OutputRecord:
    """The worst of an output's results; a plain False is one of another shape."""
    if any(isinstance(item, bool) for item in found):
        infinite = math.inf
        return OutputRecord(name=name, max_abs=infinite, relative=infinite, max_rel=infinite, mean_abs=infinite,
                            limit=0.0, ratio=infinite)

    def worst(of: Callable[[Any], float]) -> float:
        values = [of(item) for item in found]
        return math.nan if any(map(math.isnan, values)) else max(values)

    def ratio(item: Any) -> float:
        return item.max_absdiff / item.thresholds.atol if item.thresholds.atol else math.inf * bool(item.max_absdiff)

    nearest = max(found, key=lambda item: math.inf if math.isnan(item.max_absdiff) else ratio(item))
    return OutputRecord(
        name=name, max_abs=worst(lambda item: item.max_absdiff), max_rel=worst(lambda item: item.max_reldiff),
        relative=worst(lambda item: item.max_absdiff / item.scale if item.scale else 0.0),
        mean_abs=worst(lambda item: item.mean_absdiff), limit=nearest.thresholds.atol, ratio=ratio(nearest),
    )


def _suspect(result: Any) -> bool:
    """Whether an output differs, or comes near to it: one mistake shows in several, not all beyond their tolerance."""
    if not result:
        return True
    return hasattr(result, "max_absdiff") and result.max_absdiff > _NEAR * result.thresholds.atol


def explain(first: str, suspect: set[str], compared: set[str]) -> str:
    """What kind of difference it is, from which outputs of the first layer that differs do.

    Args:
        first: the first output that differs, in the order of computation.
        suspect: outputs that differ, or nearly so.
        compared: all outputs that were compared.
    """
    if first == names.LOGITS:
        return "after the last layer: the final norm or the logits' weights"
    layer = int(first.rpartition(".")[2])
    kinds = {kind for kind in (*LAYER_VALUES, *LAYER_CHOICES) if f"{kind}.{layer}" in suspect}
    projected = kinds & {"query", "key", "value"}
    if projected == {"query", "key"} or (projected == {"key"} and f"query.{layer}" not in compared):
        return f"RoPE (its constants or positions), or the query and key weights of layer {layer}"
    if projected == {"query", "key", "value"} or (len(projected) == 2 and f"query.{layer}" not in compared):
        where = "the embeddings" if layer == 0 else f"the output projection or MLP of layer {layer - 1}"
        return f"what comes into layer {layer}: {where}, or the layer's norm"
    if projected:
        return f"the {' and '.join(sorted(projected))} weights of layer {layer}"
    if "chosen_blocks" in kinds or "nodes" in kinds:
        return f"the mask search of layer {layer}: its attributes, or indices in the function body"
    return f"the attention of layer {layer}: sink, window, scale or causal rule, in its attributes or the function body"
