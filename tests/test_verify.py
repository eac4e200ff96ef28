"""``hip-trt verify`` on a tiny model: it passes, and fails for everything that can be wrong in a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, helper, numpy_helper
from tiny_export import SPARSE, export_tiny
from tiny_plan import write_plan
from typer.testing import CliRunner

pytest.importorskip("polygraphy")

from polygraphy.comparator import IterationResult

from hip_trt import operator as names
from hip_trt.cli.app import app
from hip_trt.errors import HipTrtError
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.onnxruntime import OrtExecutor
from hip_trt.sidecar import FileRecord
from hip_trt.spec import METADATA_KEY, ModelSpec
from hip_trt.tensorrt_flavour import installed
from hip_trt.verify import Report, verify
from hip_trt.verify.compare import Tolerances, ValuesCompareFunc
from hip_trt.verify.comparison import explain
from hip_trt.verify.inputs import Case, Script, plan_cases

INV_FREQ = "model.rotary_emb.inv_freq"
V_PROJ = "model.layers.1.self_attn.v_proj.weight_transposed"


EVERY_CASE = {
    "test_agrees_with_the_reference", "test_agrees_with_the_checkpoint", "test_an_executor_is_compared_like_an_engine",
}


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short and a long context suffice most tests; and threads do not pay for tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.node.name not in EVERY_CASE:
        def few(*arguments: Any, **options: Any) -> tuple[Case, ...]:
            cases = plan_cases(*arguments, **options)
            return tuple(case for case in cases if case.name.startswith(("short", "long context", "prompt")))

        monkeypatch.setattr("hip_trt.verify.comparison.plan_cases", few)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("verify"), dtype="float32")


@pytest.fixture
def mutated(exported: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """A copy of the model, changed, whose metadata knows no checksums."""

    def mutate(change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(exported)
        change(model)
        for entry in list(model.metadata_props):
            if entry.key == "hip_trt_weights":
                model.metadata_props.remove(entry)
        shutil.copy(exported.with_name("config.json"), tmp_path)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return mutate


def set_weight(name: str, change: Callable[[np.ndarray], None]) -> Callable[[onnx.ModelProto], None]:
    def mutate(model: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return mutate


def first_layers(report: Report) -> set[int | None]:
    return {case.first_layer for case in report.cases if not case.agrees}


def check(report: Report, name: str) -> bool:
    return next(check.passed for check in report.checks if check.name == name)


def test_agrees_with_the_reference(exported: Path) -> None:
    report = verify(exported, against="reference")
    assert report.agrees
    assert [case.name for case in report.cases] == [
        "short", "prefill, decode", "block edge", "ragged batch", "long context"
    ]
    for case in report.cases:
        compared = {record.name for record in case.outputs}
        kinds = ("query", "key", "value", "attended")
        assert compared == {"logits"} | {f"{kind}.{layer}" for kind in kinds for layer in (0, 1)}
    long = next(case for case in report.cases if case.name == "long context")
    assert {record.name for record in long.agreements} == {"chosen_blocks.0", "chosen_blocks.1", "nodes.0", "nodes.1"}
    assert long.calls[1:] == ("decode 1, searched", "decode 2, reused")


def test_agrees_with_the_checkpoint(exported: Path) -> None:
    report = verify(exported, against="pytorch", checkpoint=exported.parent / "checkpoint", thorough=True, steps=1)
    assert report.agrees
    assert len(report.cases) == 12


def test_a_float16_export_agrees_within_its_rounding(tmp_path: Path) -> None:
    path = export_tiny(tmp_path, dtype="float16", logits="all")
    report = verify(path, against="pytorch", checkpoint=tmp_path / "checkpoint", steps=1)
    assert report.agrees
    assert max(record.max_abs for case in report.cases for record in case.outputs) > 1e-4  # there is some to forgive


def test_errors_are_relative_to_the_largest_value() -> None:
    compare = ValuesCompareFunc(Tolerances(atol=0.0, rtol=0.05, agreement=1.0))
    outputs = [IterationResult(OrderedDict({"key.1": np.array([10.0, value])})) for value in (0.5, 0.9, 1.1)]
    assert [bool(compare(outputs[0], other)["key.1"]) for other in outputs] == [True, True, False]


@pytest.mark.parametrize("weight", [V_PROJ, "model.layers.1.mlp.down_proj.weight_transposed"])
def test_one_altered_weight_is_found_against_the_checkpoint(exported: Path, mutated, weight: str) -> None:
    def raise_one(values: np.ndarray) -> None:
        values[3, 5] += 8.0

    path = mutated(set_weight(weight, raise_one))
    report = verify(path, against="pytorch", checkpoint=exported.parent / "checkpoint", steps=1)
    assert not report.agrees
    assert all(not case.agrees for case in report.cases)
    if weight == V_PROJ:
        assert first_layers(report) == {1}
        assert {case.first for case in report.cases} == {"value.1"}
        assert all("value weights of layer 1" in (case.cause or "") for case in report.cases)
    else:
        assert first_layers(report) == {None}
        assert all("after the last layer" in (case.cause or "") for case in report.cases)


@pytest.mark.parametrize("against", ["reference", "pytorch"])
def test_an_altered_rope_constant_is_found(exported: Path, mutated, against: str) -> None:
    def scale(values: np.ndarray) -> None:
        values[1] *= 1.5

    path = mutated(set_weight(INV_FREQ, scale))
    report = verify(path, against=against, checkpoint=exported.parent / "checkpoint", steps=1)
    assert 0 in first_layers(report)
    worst = next(case for case in report.cases if case.name == "long context")
    assert worst.first in ("query.0", "key.0")
    assert "RoPE" in (worst.cause or "")
    if against == "reference":
        assert not check(report, "RoPE constants")


def test_rope_factors_of_a_gguf_file_are_no_difference(exported: Path, mutated) -> None:
    def slow_down(values: np.ndarray) -> None:
        values[2:] /= 8

    report = verify(mutated(set_weight(INV_FREQ, slow_down)), against="reference", steps=1)
    assert report.agrees


@pytest.mark.parametrize(("field", "value"), [("window_tokens", 12), ("scale", 0.1), ("decode_mask_k", 16)])
def test_an_altered_attribute_is_found(exported: Path, mutated, field: str, value: float) -> None:
    def mutate(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == names.OP_TYPE and "1" in node.output[3])
        (attribute,) = (attribute for attribute in node.attribute if attribute.name == field)
        attribute.CopyFrom(helper.make_attribute(field, value))

    if field == "decode_mask_k":  # its past_nodes do not fit then, so the shapes of the graph forbid it
        report = None
        with pytest.raises(HipTrtError):
            verify(mutated(mutate), against="pytorch", checkpoint=exported.parent / "checkpoint", steps=1)
        return
    report = verify(mutated(mutate), against="pytorch", checkpoint=exported.parent / "checkpoint", steps=1)
    assert first_layers(report) == {1}
    assert check(report, "attention attributes") is (field == "scale")


def body_of(node: onnx.NodeProto) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH)


def test_an_altered_mask_index_is_found(mutated) -> None:
    def lower_the_best(model: onnx.ModelProto) -> None:
        """Every index that the search's TopK gives is one too low."""
        scan = next(node for node in model.functions[0].node if node.op_type == "Scan")
        level = body_of(next(node for node in body_of(scan).node if node.op_type == "Loop"))
        place = next(index for index, node in enumerate(level.node) if node.op_type == "TopK")
        best = level.node[place].output[1]
        gather = next(node for node in level.node if node.op_type == "GatherElements" and best in node.input)
        gather.input[list(gather.input).index(best)] = "lowered"
        for offset, node in enumerate((
            helper.make_node("Constant", [], ["one"], value_int=1), helper.make_node("Sub", ["one", "one"], ["zero"]),
            helper.make_node("Sub", [best, "one"], ["below"]), helper.make_node("Max", ["below", "zero"], ["lowered"]),
        )):
            level.node.insert(place + 1 + offset, node)

    report = verify(mutated(lower_the_best), against="reference", steps=1)
    assert {case.first for case in report.cases if not case.agrees} == {"chosen_blocks.0"}
    assert any("mask search of layer 0" in (case.cause or "") for case in report.cases)


def test_altered_data_is_found_by_its_checksum(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported.parent, tmp_path / "copy")
    (data,) = (tmp_path / "copy").glob("*.data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    report = verify(tmp_path / "copy" / "model.onnx", against="reference", steps=0)
    assert not check(report, "weights' checksums")
    assert not report.agrees


def test_two_exports_are_compared(exported: Path, mutated) -> None:
    assert verify(exported, against="onnxruntime", baseline=exported, steps=1).agrees

    def raise_all(values: np.ndarray) -> None:
        values += 0.1

    report = verify(mutated(set_weight(V_PROJ, raise_all)), against="onnxruntime", baseline=exported, steps=1)
    assert first_layers(report) == {1}


def test_a_plan_without_its_gpu_says_so_and_compares_its_model(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(exported.parent, folder)
    spec = read_onnx(exported).spec
    plan = write_plan(folder, spec, model=(FileRecord.of(folder / "model.onnx"),))
    report = verify(plan, against="reference", steps=0)
    assert report.agrees
    assert any("the engine did not run" in note for note in report.notes)
    assert CliRunner().invoke(app, ["verify", str(plan), "--require-engine"]).exit_code == 2
    other = write_plan(folder, spec.model_copy(update={"source": "other"}), model=(FileRecord.of(exported),))
    assert not check(verify(other, against="reference", steps=0), "plan and model")


def test_an_executor_is_compared_like_an_engine(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The way of a plan on a GPU, with ONNX Runtime in TensorRT's place."""
    folder = tmp_path / "plan"
    shutil.copytree(exported.parent, folder)
    spec = read_onnx(exported).spec
    plan = write_plan(folder, spec, model=(FileRecord.of(folder / "model.onnx"),))
    monkeypatch.setattr(
        "hip_trt.runtime.tensorrt.TensorRTExecutor.load", lambda path: OrtExecutor(path.with_name("model.onnx"))
    )
    report = verify(plan, against="pytorch", checkpoint=folder / "checkpoint", steps=1)
    assert report.agrees
    assert {record.name for record in report.cases[0].outputs} == {"logits", "key.0", "key.1", "value.0", "value.1"}
    assert max(case.outputs[0].max_abs for case in report.cases) > 0
    assert verify(plan, against="onnxruntime", steps=1).agrees


def test_exit_codes_table_and_json(exported: Path, mutated, tmp_path: Path) -> None:
    run = CliRunner().invoke
    good = run(app, ["verify", str(exported), "--steps", "1", "--json", str(tmp_path / "report.json")])
    assert good.exit_code == 0, good.output
    assert "both agree" in good.output
    assert Report.model_validate_json((tmp_path / "report.json").read_text()).agrees

    def scale(values: np.ndarray) -> None:
        values *= 1.5

    bad = run(app, ["verify", str(mutated(set_weight(INV_FREQ, scale))), "--steps", "1"])
    assert bad.exit_code == 1
    assert "first to differ" in bad.output
    assert "RoPE" in bad.output
    wrong = run(app, ["verify", str(exported), "--steps", "0", "--json", "-", "--atol", "0", "--rtol", "0"])
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["atol"] == 0
    missing = run(app, ["verify", str(tmp_path / "none.onnx")])
    assert missing.exit_code == 2
    assert missing.stderr.count("\n") == 1
    for options in (["--against", "pytorch"], ["--against", "onnxruntime"], ["--against", "guess"]):
        assert run(app, ["verify", str(exported), *options]).exit_code == 2


def test_prompts_replace_random_tokens(exported: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nThe end\n")
    options = ["--prompts", str(prompts), "--steps", "1", "--json", "-"]
    result = CliRunner().invoke(app, ["verify", str(exported), *options])
    assert result.exit_code == 0, result.output
    calls = {case["name"]: case["calls"][0] for case in json.loads(result.stdout)["cases"]}
    assert calls["prompt 1"] == "prefill 16"
    assert calls["prompt 2"] == "prefill 7"


@pytest.mark.parametrize("int4", [False, True])
def test_bfloat16_is_verified_in_float32(tmp_path: Path, int4: bool) -> None:
    """ONNX Runtime has no bfloat16 kernels for CPUs; the file's weights are bfloat16 all the same."""
    path = export_tiny(tmp_path, dtype="bfloat16", **({"quantize": "int4"} if int4 else {}))
    report = verify(path, against="reference", steps=1)
    assert report.agrees
    assert report.rtol == 1e-3  # float32's: neither side rounds
    if not int4:
        report = verify(path, against="pytorch", checkpoint=tmp_path / "checkpoint", steps=1)
        assert report.agrees


def test_an_altered_bfloat16_weight_is_found(tmp_path: Path) -> None:
    path = export_tiny(tmp_path, dtype="bfloat16")
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == V_PROJ)
    values = numpy_helper.to_array(tensor).copy()
    values[:, 0] *= -3
    tensor.CopyFrom(numpy_helper.from_array(values, V_PROJ))
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "other" / "checkpoint")
    shutil.copy(path.with_name("config.json"), tmp_path / "other")
    onnx.save(model, tmp_path / "other" / "model.onnx")
    report = verify(
        tmp_path / "other" / "model.onnx", against="pytorch", checkpoint=tmp_path / "checkpoint", steps=1
    )
    assert first_layers(report) == {1}


def test_long_contexts_are_varied_copies_of_real_keys(exported: Path) -> None:
    spec = read_onnx(exported).spec
    cases = [case for case in plan_cases(spec, steps=0, max_tokens=200) if case.name in ("short", "long context")]
    script = Script(spec, cases)
    feeds = iter(script)
    next(feeds)
    key, torch_random = names.KEY.present(0), torch.Generator().manual_seed(3)
    real = {
        name: torch.randn(spec.pool_shape(1), generator=torch_random)
        for layer in range(spec.num_layers)
        for name in (names.KEY.present(layer), names.VALUE.present(layer))
    }
    script.observe({
        **real, names.LOGITS: torch.zeros(1, 1, spec.vocab_size),
        **{names.NODES.present(layer): script.feed[names.NODES.past(layer)]
           for layer in range(spec.num_layers)},
    })
    feed = next(feeds)
    pool, size = feed[names.KEY.past(0)], spec.hip.page_size
    token = torch.arange(cases[1].past[0])
    found = pool[feed[names.PAGE_TABLE][0, token // size].long(), :, token % size]
    expected = real[key][0, :, token % cases[0].new[0]].transpose(0, 1)
    apart = (found - expected).std() / expected.std()
    assert 0.2 < float(apart) < 0.3
    assert len(found.flatten(1).unique(dim=0)) == len(token)  # no two tokens the same


def test_cases_reach_searches_and_stay_within_an_engine(exported: Path) -> None:
    spec = ModelSpec.model_validate_json(
        next(entry.value for entry in onnx.load(exported, load_external_data=False).metadata_props
             if entry.key == METADATA_KEY)
    )
    for case in plan_cases(spec, steps=4, max_tokens=40, max_prefill=8, max_batch=2, thorough=True):
        assert len(case.past) == len(case.new) <= 2
        assert all(new <= 8 for new in case.new)
        assert all(past + new + case.steps <= 40 for past, new in zip(case.past, case.new, strict=True))
    assert SPARSE.mask_k + SPARSE.sink_tokens + SPARSE.window_tokens < 40


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["logits"], "final norm"), (["query.3", "key.3", "attended.3"], "RoPE"),
        (["query.3", "key.3", "value.3"], "MLP of layer 2"), (["query.0", "key.0", "value.0"], "embeddings"),
        (["value.2", "query.3"], "value weights of layer 2"), (["chosen_blocks.1", "attended.1"], "mask search"),
        (["attended.1", "logits"], "sink, window, scale"),
    ],
)
def test_causes(wrong: list[str], words: str) -> None:
    compared = {f"{kind}.{layer}" for kind in ("query", "key", "value", "attended") for layer in range(4)}
    assert words in explain(wrong[0], set(wrong), compared)


def test_polygraphy_with_the_plugin() -> None:
    """``python -m hip_trt.polygraphy`` runs Polygraphy in a process whose TensorRT has the plugin."""
    if "tensorrt-rtx" not in installed():
        pytest.skip("needs the extra tensorrt-rtx")
    program = (
        "import sys; sys.argv = ['polygraphy', '--version']\n"
        "from hip_trt.polygraphy import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "import tensorrt_rtx\n"
        "assert tensorrt_rtx.get_plugin_registry().get_creator('HipAttention', '1', '') is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Polygraphy" in done.stdout


def test_polygraphy_without_tensorrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hip_trt.polygraphy.installed", lambda: ("tensorrt",))
    monkeypatch.setattr("hip_trt.tensorrt_flavour.installed", lambda: ())
    from hip_trt.polygraphy import main

    assert main() == 1
    assert "tensorrt is not installed. Install it: pip install 'hip-trt[tensorrt]'" in capsys.readouterr().err
