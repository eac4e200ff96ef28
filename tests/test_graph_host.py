"""The graph host on the CPU, with the plugin on emulated kernels: exported graph, plugin and runtime together."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import emulated
import graph_host_report
import numpy as np
import onnx
import pytest
import torch
from graph_host import GraphExecutor, Plugin, PluginFailure, UnsupportedGraph
from graph_host.agreement import HOST, OFFLOADED, PATCHED, REFERENCE, failures, logit_errors, measure
from graph_host.graph import compute, ordinary
from graph_host.plugin import AttachedLayer, TensorShape
from graph_host.torch_ops import OPS
from graph_host.weights import restore_weights
from offload_host import emulate, nothing_left
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from plugin_host import (
    build_emulated,
    build_session,
    find_host,
    tensorrt_headers,
    tensorrt_libraries,
    tensorrt_name,
)
from tiny_export import save_tiny_checkpoint
from transformers import AutoModelForCausalLM

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.evaluate.texts import manual
from hip_trt.export import export_onnx
from hip_trt.offload import Offload
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime import Generator, Session
from hip_trt.runtime.executor import Limits
from hip_trt.runtime.onnxruntime import OrtExecutor
from hip_trt.spec import METADATA_KEY

CPU = torch.device("cpu")
HIP = HipConfig.create(
    mask_k=32, decode_mask_k=16, block_q=8, block_k=8, stride_q=4, page_size=16, sink_tokens=8, window_tokens=16,
    branch=2, leaf_branch=2, refresh_interval=8,
)
LIMITS = Limits(max_batch=3, max_prefill=64, max_seq_len=256)
PROMPT = [(7 * i * i + 3 * i) % 250 for i in range(150)]
ATOL = {"float32": 3e-4, "float16": 0.05}
"""Of logits around 10: the rounding of sums in another order."""


@pytest.fixture(scope="module")
def plugin() -> Iterator[Plugin]:
    if emulated.compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    include = tensorrt_headers(find_host())
    _, library = build_emulated(include)
    plugin = Plugin(build_session(include), library)
    yield plugin
    gc.collect()  # layers go before the library
    plugin.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Llama by its type, whose kernels have caches in 16 bits; its checkpoint is beside it."""
    made: dict[str, Path] = {}

    def export(dtype: str) -> Path:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            checkpoint = save_tiny_checkpoint(folder / "checkpoint", head_dim=64, initializer_range=0.2)
            made[dtype] = export_onnx(checkpoint, folder / "model.onnx", config=HIP, logits="all", dtype=dtype).path
        return made[dtype]

    return export


@pytest.fixture
def host(plugin: Plugin) -> Callable[[Path], GraphExecutor]:
    return lambda path: GraphExecutor(path, plugin, device=CPU, limits=LIMITS, poison=True)


def changed(path: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A changed copy of an .onnx, on the same weights."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    copy = path.with_name(f"{name}.onnx")
    copy.write_bytes(model.SerializeToString())
    return copy


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == names.OP_TYPE]


def set_attributes(**values: int) -> Callable[[onnx.ModelProto], None]:
    """In every HipAttention node; the metadata stays."""
    def change(model: onnx.ModelProto) -> None:
        for node in attention_nodes(model):
            for attribute in node.attribute:
                attribute.i = values.get(attribute.name, attribute.i)

    return change


def with_reuse_level(path: Path, level: int) -> Path:
    """What an export with this reuse level would be."""
    def change(model: onnx.ModelProto) -> None:
        set_attributes(reuse_level=level)(model)
        spec = read_onnx(path).spec
        spec = spec.model_copy(update={"hip": spec.hip.replace(reuse_level=level)})
        (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
        entry.value = spec.model_dump_json()

    return changed(path, f"reuse_{level}", change)


# The graph, against ONNX Runtime


def test_logits_of_every_token(host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path]) -> None:
    """Chunks of any size, a ragged batch, idle rows, a shared prefix, tokens taken back."""
    path = exported("float32")

    def converse(executor: Any) -> list[torch.Tensor]:
        results = []
        with Session(executor, batch=3, max_seq_len=256, prefill_chunk=24) as session:
            for tokens in ([PROMPT[:70], PROMPT[20:31], []], [[5], [], PROMPT[100:140]]):
                for chunk in session.prefill(tokens):
                    results += [chunk.logits[row, :count].clone() for row, count in enumerate(chunk.counts)]
            for step in range(7):
                rows = [row for row in range(3) if (step + row) % 3 or row == 0]
                logits = session.step([step + row if row in rows else None for row in range(3)])
                results.append(logits[rows].clone())
            session.truncate(1, 5)
            session.truncate(2, 0)
            assert session.share_prefix(2, 0, 50) == 48
            results.append(session.append([[], [9], [1, 2]])[1:].clone())
            results.append(session.step([3, 4, 5]).clone())
        return results

    found, expected = converse(host(path)), converse(OrtExecutor(path, threads=1))
    assert len(found) == len(expected) > 14
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL["float32"], rtol=0)


def test_generates_as_onnx_runtime(host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path]) -> None:
    """A batch, prompts in chunks, a hundred decode steps."""
    path = exported("float32")
    found, expected = (
        Generator(executor, max_seq_len=256, prefill_chunk=40).generate(
            [PROMPT[:100], PROMPT[30:45]], max_new_tokens=100, do_sample=False
        ) for executor in (host(path), OrtExecutor(path, threads=1))
    )
    assert found == expected
    assert len({*found[0].tokens}) > 10


def test_state_in_place_and_apart(
    host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session's pools and nodes are the plugin's past and present; other buffers get the same, and past stays."""
    calls: list[tuple[list[int], list[int]]] = []
    enqueue = AttachedLayer.enqueue

    def recorded(layer: AttachedLayer, inputs: list[int], outputs: list[int], workspace: int, stream: int) -> None:
        calls.append((inputs, outputs))
        enqueue(layer, inputs, outputs, workspace, stream)

    monkeypatch.setattr(AttachedLayer, "enqueue", recorded)
    executor = host(exported("float32"))
    with Session(executor, max_seq_len=64) as session:
        session.append([PROMPT[:30]])
        past = {name: tensor.clone() for name, tensor in session._decode[0].items()}
        expected = session.step([3])[0].clone()
        state = session.state
        assert len(calls) == 4
        for layer, (inputs, outputs) in enumerate(calls):
            assert inputs[3] == outputs[1] == state.layers[layer % 2][names.KEY].data_ptr()
            assert inputs[4] == outputs[2] == state.layers[layer % 2][names.VALUE].data_ptr()
            assert inputs[8] == outputs[3]
        calls.clear()
        inputs = {
            **past, names.INPUT_IDS: torch.tensor([[3]]), names.REFRESH_MASK: torch.ones(1, dtype=torch.int32),
            names.QUERY_LENGTHS: torch.ones(1, dtype=torch.int32),
        }
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        apart = {name: torch.empty_like(tensor) for name, tensor in session._decode[1].items()}
        executor.run(inputs, apart)
        assert not {address for given, _ in calls for address in given} & {a for _, made in calls for a in made[1:]}
        assert apart[names.LOGITS][0, 0].equal(expected)
        written = state.past_lengths[0]
        pages = state.pages(0)
        for layer in range(2):
            for tensor in (names.KEY, names.VALUE):
                found, session_has = (
                    pool[list(pages)].transpose(1, 2).flatten(0, 1)[:written]
                    for pool in (apart[tensor.present(layer)], state.layers[layer][tensor])
                )
                assert found.equal(session_has)
        assert all(torch.equal(inputs[name].nan_to_num(), before[name].nan_to_num()) for name in inputs)


# The graph host, a patched model and the reference: what the GPU's report measures


def checkpoint(path: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent / "checkpoint", dtype=getattr(torch, dtype)).eval()


@pytest.mark.parametrize(("dtype", "reuse_level"), [("float32", 0), ("float32", 1), ("float16", 1)])
def test_agrees(
    host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path], dtype: str, reuse_level: int
) -> None:
    path = with_reuse_level(exported(dtype), reuse_level)
    prompt, count = (PROMPT, 33) if dtype == "float32" else (PROMPT[:90], 3)  # those kernels are slow here
    result = measure(host(path), checkpoint(path, dtype), prompt, count, offload=None)
    assert (result["hip"]["reuse_level"], result["hip"]["refresh_interval"]) == (reuse_level, 8)
    assert [*result["tokens"]] == [REFERENCE, HOST, PATCHED]
    assert all(len(tokens) == count for tokens in result["tokens"].values())
    assert not failures(result, logits=ATOL[dtype])
    assert max(result["errors"][HOST]["max_abs"]) > 0  # it is not the reference that computes there


def test_reuse_levels_differ(host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path]) -> None:
    """So agreement at each of them says something."""
    path = exported("float32")
    tokens = PROMPT[:20]

    def logits(level: int) -> torch.Tensor:
        with Session(host(with_reuse_level(path, level)), max_seq_len=256) as session:
            session.append([PROMPT])
            return torch.stack([session.step([token])[0].clone() for token in tokens])

    assert (logits(0) - logits(1)).abs().max() > 100 * ATOL["float32"]


def test_offloaded(
    host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches are the library's that the plugin runs on; the same kernels are behind all three here."""
    fake = emulate(monkeypatch, emulated.EmulatedLibrary(emulated.build()))
    path = exported("float16")
    with nothing_left(fake):
        result = measure(
            host(path), checkpoint(path, "float16"), PROMPT, 9, offload=Offload(key_cache=0.4, value_cache=0.4)
        )
        gc.collect()
    assert not failures(result, logits=ATOL["float16"])
    assert {f"{HOST}{OFFLOADED}", f"{PATCHED}{OFFLOADED}"} < {*result["tokens"]}
    for part in ("keys", "values"):
        assert result["offload"][part]["hits"] > 0
        assert result["offload"][part]["misses"] > 0
    assert fake.waits


def test_failures_are_named() -> None:
    good = torch.randn(4, 9)
    bad = good.clone()
    bad[2, 5] += 9
    result: dict[str, Any] = {
        "dtype": "float32",
        "tokens": {REFERENCE: [1, 2, 3], HOST: [1, 2, 3], PATCHED: [1, 5, 3], f"{HOST}{OFFLOADED}": [1, 2, 4]},
        "errors": {HOST: logit_errors(bad, good), PATCHED: logit_errors(good + torch.nan, good)},
        "offload": {"same_bits": False, "steps_with_other_bits": 2},
    }
    assert failures(result, logits=0.1) == [
        "patched model: token 1 is not the reference's",
        "graph host, offloaded: token 2 is not the reference's",
        "graph host, offloaded: the tokens are not those of the resident cache",
        f"graph host: 1 steps, the worst 2: a logit is off by {(bad - good).max():.2g}",
        "patched model: 4 steps, the worst 0: a logit is off by nan",
        "offloaded: 2 steps have other bits than resident",
    ]
    # In 16 bits step 2 of the graph host may go another way, as its error is large, but not as an offloaded run alone.
    found = failures({**result, "dtype": "float16"}, logits=0.1)
    assert "graph host, offloaded: token 2 is not the reference's" not in found
    assert found[0] == "patched model: token 1 is not the reference's"
    assert "graph host, offloaded: the tokens are not those of the resident cache" in found
    errors = logit_errors(bad, good)
    assert errors["same_argmax"] == [1, 1, 0, 1]
    assert errors["kl"][2] > errors["kl"][1] == 0


def test_report(tmp_path: Path) -> None:
    """Tables and findings from what was measured; a way that leaves the reference's tokens is named."""
    logits = torch.randn(3, 9)
    errors = logit_errors(logits + 1e-3 * torch.randn(3, 9), logits)
    counts = {"hits": 5, "misses": 2}
    result = {
        "dtype": "float16", "hip": HIP.model_dump(mode="json"), "prompt_tokens": 7, "count": 3, "between": errors,
        "tokens": {REFERENCE: [1, 2, 3], HOST: [1, 2, 3], PATCHED: [1, 2, 4], f"{HOST}{OFFLOADED}": [1, 2, 3]},
        "errors": {HOST: errors, PATCHED: errors, f"{HOST}{OFFLOADED}": errors},
        "offload": {"same_bits": True, "steps_with_other_bits": 0, "host_bytes": 3 << 20, "key_cache_bytes": 1 << 20,
                    "value_cache_bytes": 1 << 19, "keys": counts, "values": counts},
    }
    options = graph_host_report._options(["--models", "m", "--sample", "s.gguf", "--session", "s.so"])
    report = graph_host_report._report({"some model": result}, options, manual(), {"gpu": "none"})
    report.write(tmp_path, {"": partial(graph_host_report.plot, {"some model": result})})
    assert json.loads((tmp_path / "graph_host.json").read_text())["data"]["some model"]["tokens"] == result["tokens"]
    page = (tmp_path / "graph_host.md").read_text()
    for part in (
        "some model: the same 3 greedy tokens after 7 by reference, graph host, graph host, offloaded; patched model "
        f"leaves them at step 2, where the reference's first token leads by {errors['margin'][2]:.1e}",
        "| some model | 1 | 8 | patched model | 2 of 3 |", "| some model | the same | 3.0 | 1.5 | 5 hits, 2 misses |",
        f"| 1 | {errors['max_abs'][1]:.1e} | {errors['max_rel'][1]:.1e} |", "prompt 2000 tokens of Python's language",
    ):
        assert part in page
    found = graph_host_report.earlier(tmp_path, report.parameters)
    assert found == {"some model": {**json.loads(json.dumps(result)), "measured_on": {"gpu": "none"}}}
    assert not graph_host_report.earlier(tmp_path, {**report.parameters, "steps": 4})
    assert not graph_host_report.earlier(tmp_path / "absent", report.parameters)
    found["another"] = {**result, "measured_on": {"date": "yesterday", "library_sha256": "abc"}}
    both = graph_host_report._report(found, options, manual(), {"gpu": "none"})
    assert "another was measured on yesterday, with the library abc." in both.markdown()
    assert "some model was measured" not in both.markdown()


# A file that is not what it was


def change_weight(model: onnx.ModelProto) -> None:
    (norm,) = (tensor for tensor in model.graph.initializer if tensor.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.full(tuple(norm.dims), 1.01, np.float32), norm.name))


def change_rope(model: onnx.ModelProto) -> None:
    (frequencies,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("inv_freq"))
    values = numpy_helper.to_array(frequencies).copy()
    values[3] *= 1.01
    frequencies.CopyFrom(numpy_helper.from_array(values, frequencies.name))


def swap_layers(model: onnx.ModelProto) -> None:
    """Layer 0 works on layer 1's keys and values, and the other way round."""
    first, second = attention_nodes(model)
    for index in (3, 4):
        first.input[index], second.input[index] = second.input[index], first.input[index]


@pytest.mark.parametrize("change", [
    change_weight, change_rope, swap_layers, set_attributes(window_tokens=40), set_attributes(sink_tokens=0),
    set_attributes(decode_mask_k=16, mask_k=16), set_attributes(stride_q=1), set_attributes(dense=1),
], ids=["weight", "rope", "layers", "window", "sink", "budget", "stride", "dense"])
def test_altered_file_is_noticed(
    host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path], change: Callable[[onnx.ModelProto], None]
) -> None:
    """What is in the file is what runs: nothing comes from the metadata, or from elsewhere."""
    def logits(path: Path) -> torch.Tensor:
        executor = host(path)
        with Session(executor, max_seq_len=160) as session:
            parts = [chunk.logits[0, : chunk.counts[0]] for chunk in session.prefill([PROMPT[:120]])]
            return torch.cat([*parts, *(session.step([7]).clone() for _ in range(2))])

    path = exported("float32")
    difference = (logits(changed(path, "altered", change)) - logits(path)).abs().max()
    assert difference > 10 * ATOL["float32"]


def test_unknown_nodes_are_refused(host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path]) -> None:
    path = exported("float32")

    def rename(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "HardSigmoid"

    def decorate(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMul")
        node.attribute.append(helper.make_attribute("transA", 1))

    def read_state(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Neg")
        node.input[0] = names.KEY.past(1)

    for change, message in (
        (rename, "the operator HardSigmoid is not in graph_host/torch_ops.py"),
        (decorate, "MatMul's attribute transA is not in graph_host/torch_ops.py"),
        (read_state, "Neg reads past_key_values.1.key, which is written in place"),
    ):
        with pytest.raises(UnsupportedGraph, match=message):
            host(changed(path, "refused", change))


def test_plugin_refuses(
    plugin: Plugin, host: Callable[[Path], GraphExecutor], exported: Callable[[str], Path]
) -> None:
    path = exported("float32")
    with pytest.raises(PluginFailure, match=r"HipAttention \(.*\): branch: 1 is not allowed"):
        host(changed(path, "refused", set_attributes(branch=1)))
    with pytest.raises(PluginFailure, match="page_size is 32"):
        host(changed(path, "refused", set_attributes(page_size=32)))
    layer = plugin.layer("some layer", names.attributes(HIP, scale=1.0))
    wrong = [TensorShape(torch.float32, (1,))] * len(names.INPUTS)
    with pytest.raises(PluginFailure, match=r"HipAttention \(some layer\): page_table: float32 is not allowed"):
        layer.outputs(wrong)
    executor = host(path)  # after failures all is well
    assert Generator(executor, max_seq_len=64).generate([[1, 2]], max_new_tokens=2)
    del layer


def test_weights_are_restored(exported: Callable[[str], Path], tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        path = exported(dtype)
        (data,) = read_onnx(path).data
        folder = tmp_path / dtype
        folder.mkdir()
        alone = folder / path.name
        alone.write_bytes(path.read_bytes())
        parameters = checkpoint(path, dtype).state_dict()
        wrong = {**parameters, "model.norm.weight": parameters["model.norm.weight"] * 1.5}
        with pytest.raises(ValueError, match="another checksum"):
            restore_weights(alone, wrong)
        restore_weights(alone, parameters)
        assert (folder / data.name).read_bytes() == data.read_bytes()


@pytest.mark.parametrize("tensorrt", tensorrt_libraries()[1:], ids=tensorrt_name)
def test_loaded_by_a_real_registry(plugin: Plugin, exported: Callable[[str], Path], tensorrt: Path) -> None:
    """In a process of its own, as each loads the library once."""
    program = """
import gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from graph_host import GraphExecutor, Plugin
from hip_trt.runtime import Generator
plugin = Plugin(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
executor = GraphExecutor(sys.argv[5], plugin, device=torch.device("cpu"))
print(list(Generator(executor, max_seq_len=64).generate([[5, 6, 7]], max_new_tokens=9, do_sample=False)[0].tokens))
del executor
gc.collect()
plugin.close()
"""
    path = exported("float32")
    arguments = [Path(__file__).parent, plugin.session, plugin.library, tensorrt, path]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = Generator(OrtExecutor(path, threads=1), max_seq_len=64).generate(
        [[5, 6, 7]], max_new_tokens=9, do_sample=False
    )
    assert done.stdout.splitlines()[-1] == str(list(expected[0].tokens))


# Operators, against onnx's own interpreter


def _random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _integers(*values: Any) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


_ONE, _TWO = _random(2, 3, 4), _random(3, 1)
OPERATORS: tuple[tuple[str, list[Any], dict[str, Any]], ...] = (
    *((name, [_ONE, _TWO], {}) for name in ("Add", "Sub", "Mul", "Div")),
    ("Div", [_integers(7, -7, 7), _integers(2, 2, -2)], {}),
    *((name, [_ONE], {}) for name in ("Neg", "Sigmoid", "Cos", "Sin", "Reciprocal")),
    ("Sqrt", [abs(_ONE)], {}),
    ("Pow", [_ONE, np.float32(2)], {}),
    ("MatMul", [_ONE, _random(4, 5)], {}),
    ("Cast", [_ONE * 5], {"to": TensorProto.INT64}), ("Cast", [_ONE * 5], {"to": TensorProto.FLOAT16}),
    ("Cast", [_integers(3, -2)], {"to": TensorProto.FLOAT}),
    ("Clip", [_integers(-3, 0, 9), np.int64(0)], {}), ("Clip", [_ONE, None, np.float32(0.5)], {}), ("Clip", [_ONE], {}),
    ("Concat", [_ONE, _ONE[:, :1]], {"axis": 1}), ("Concat", [_ONE, _ONE], {"axis": -1}),
    ("Expand", [_TWO, _integers(2, 1, 4)], {}), ("Expand", [_ONE, _integers(1, 1)], {}),
    ("Gather", [_ONE, _integers([0, -1], [1, 0])], {"axis": 0}), ("Gather", [_ONE, np.int64(-2)], {"axis": 1}),
    ("Gather", [_ONE, _integers(3, 0)], {"axis": -1}),
    ("GatherElements", [_ONE, _integers(*[[[0, -1, 1, 0]], [[2, 2, 0, -3]]])], {"axis": 1}),
    ("Range", [np.int64(2), np.int64(11), np.int64(3)], {}),
    ("Range", [np.float32(1), np.float32(2), np.float32(0.25)], {}),
    ("ReduceMean", [_ONE, _integers(-1)], {"keepdims": 1}), ("ReduceMean", [_ONE, _integers(0, 2)], {"keepdims": 0}),
    ("ReduceMean", [_ONE], {"keepdims": 0}), ("ReduceMean", [_ONE], {"noop_with_empty_axes": 1}),
    ("Reshape", [_ONE, _integers(0, -1)], {}), ("Reshape", [_ONE, _integers(4, 3, 2)], {"allowzero": 1}),
    ("Shape", [_ONE], {}), ("Shape", [_ONE], {"start": 1}), ("Shape", [_ONE], {"start": -2, "end": -1}),
    ("Slice", [_ONE, _integers(1), _integers(2**62), _integers(2)], {}),
    ("Slice", [_ONE, _integers(-3, 0), _integers(-1, 9), _integers(-1, 1), _integers(1, 2)], {}),
    ("Slice", [_ONE, _integers(1), _integers(2)], {}),
    ("Split", [_random(2, 7), _integers(3, 4)], {"axis": 1}),
    ("Split", [_random(2, 7)], {"axis": -1, "num_outputs": 3}),
    ("Squeeze", [_random(1, 3, 1), _integers(-1)], {}), ("Squeeze", [_random(1, 3, 1)], {}),
    ("Transpose", [_ONE], {"perm": [1, 2, 0]}), ("Transpose", [_ONE], {}),
    ("Unsqueeze", [_ONE, _integers(0, -1)], {}), ("Unsqueeze", [_ONE, _integers(3, 1)], {}),
)


def test_every_operator_is_tested() -> None:
    assert {name for name, _, _ in OPERATORS} == {*OPS}


@pytest.mark.parametrize(("name", "inputs", "attributes"), OPERATORS, ids=[case[0] for case in OPERATORS])
def test_operator(name: str, inputs: list[Any], attributes: Mapping[str, Any]) -> None:
    given = {f"input_{i}": np.asarray(value) for i, value in enumerate(inputs) if value is not None}
    outputs = {"Split": attributes.get("num_outputs", 2)}.get(name, 1)
    node = helper.make_node(
        name, ["" if value is None else f"input_{i}" for i, value in enumerate(inputs)],
        [f"output_{i}" for i in range(outputs)], **attributes,
    )
    graph = helper.make_graph(
        [node], name,
        [helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
         for key, value in given.items()],
        [helper.make_tensor_value_info(output, TensorProto.UNDEFINED, None) for output in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    expected = ReferenceEvaluator(model).run(None, given)
    found = compute(ordinary(node), {key: torch.from_numpy(value.copy()) for key, value in given.items()})
    for output, value in zip(node.output, expected, strict=True):
        assert found[output].numpy().dtype == value.dtype
        np.testing.assert_allclose(found[output].numpy(), value, rtol=1e-6, atol=1e-7)


def test_steps_that_slicing_cannot() -> None:
    node = helper.make_node("Slice", ["data", "starts", "ends", "axes", "steps"], ["sliced"])
    known = {"data": torch.arange(5), "starts": torch.tensor([4]), "ends": torch.tensor([0]),
             "axes": torch.tensor([0]), "steps": torch.tensor([-1])}
    with pytest.raises(NotImplementedError, match="step -1"):
        compute(ordinary(node), known)
