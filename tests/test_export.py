"""Exported models: what the files hold, and that they compute what Hugging Face's own model computes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint, save_gguf, tiny_llama
from graph_runner import GraphRunner
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import CheckpointError, ConfigError, ExportError
from hip_trt.export import ExportedModel, export_onnx, graph, onnx_export
from hip_trt.export.families import FAMILIES
from hip_trt.export.layers import LayerNames, Pattern, repeat_layers
from hip_trt.spec import METADATA_KEY, ModelSpec

SPARSE = HipConfig.create(
    mask_k=32, decode_mask_k=16, block_q=8, block_k=4, stride_q=2, branch=2, leaf_branch=2, page_size=8, sink_tokens=4,
    window_tokens=8,
)
DENSE = SPARSE.replace(mask_k=512, decode_mask_k=512)
PAGES = 12

Exporter = Callable[..., ExportedModel]
Array = np.ndarray[Any, Any]


def copy_of(traced: graph.Trace) -> graph.Trace:
    """A trace to be filled with weights, which changes it."""
    return graph.Trace(traced.model.clone(), traced.weights)


@pytest.fixture(scope="session")
def traced_export(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportedModel, graph.Trace]:
    """:func:`dense_model`, and the graph that its export traced."""
    traces: list[graph.Trace] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "trace", lambda *args, **options: traces.append(graph.trace(*args, **options))
                      or copy_of(traces[0]))
        return export_onnx(tiny_folder, tmp_path_factory.mktemp("dense"), config=DENSE, link_weights=True), traces[0]


@pytest.fixture(scope="session")
def dense_model(traced_export: tuple[ExportedModel, graph.Trace]) -> ExportedModel:
    """The tiny checkpoint, its weights linked, with a budget that no prompt here exceeds."""
    return traced_export[0]


@pytest.fixture(scope="session")
def sparse_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """The tiny checkpoint, its weights copied, pruned, layer 0 dense, with logits of all tokens."""
    return export_onnx(
        tiny_folder, tmp_path_factory.mktemp("sparse") / "sparse.onnx", config=SPARSE.replace(dense_layers=[0]),
        logits="all",
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_logits(model: LlamaForCausalLM, prompt: list[int]) -> Array:
    """Hugging Face's own, of every token: [S, V]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].float().numpy()


def table(batch: int = 1, first: int = 0) -> list[list[int]]:
    return [[first + row * PAGES + page for page in range(PAGES)] for row in range(batch)]


# What the files hold


def test_files(dense_model: ExportedModel, tiny_folder: Path) -> None:
    folder = dense_model.path.parent
    assert dense_model.path.name == "model.onnx"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in dense_model.files)
    assert {"config.json", "generation_config.json", "hip_config.yaml", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja"} < {path.name for path in dense_model.files}
    (data,) = dense_model.data
    assert re.fullmatch(r"model-[0-9a-f]{12}\.safetensors", data.name)
    assert data.samefile(tiny_folder / "model.safetensors")
    assert dense_model.path.stat().st_size < 1_000_000
    assert HipConfig.from_yaml(folder / "hip_config.yaml") == DENSE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("grüße")["input_ids"]) == "grüße"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 257
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert dense_model.warnings == ()


def test_spec(dense_model: ExportedModel, tiny_folder: Path) -> None:
    model = onnx.load(dense_model.path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert ModelSpec.model_validate_json(metadata[METADATA_KEY]) == dense_model.spec
    assert dense_model.spec == ModelSpec(
        model_type="llama", source=tiny_folder.name, num_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=512, dtype="float32", logits="last", hip=DENSE,
        hip_trt_version=dense_model.spec.hip_trt_version,
    )


def test_inputs_and_outputs(dense_model: ExportedModel, sparse_model: ExportedModel) -> None:
    def signature(values: Any) -> dict[str, tuple[int, list[int | str]]]:
        return {
            value.name: (value.type.tensor_type.elem_type,
                         [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
            for value in values
        }

    graph = onnx.load(dense_model.path, load_external_data=False).graph
    integer, real = TensorProto.INT32, TensorProto.FLOAT
    inputs: dict[str, Any] = {
        "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        "past_lengths": (integer, ["batch_size"]),
        "query_lengths": (integer, ["batch_size"]),
        "page_table": (integer, ["batch_size", "pages_per_sequence"]),
        "refresh_mask": (integer, [1]),
    }
    outputs: dict[str, Any] = {"logits": (real, ["batch_size", 1, VOCABULARY])}
    for layer in range(2):
        pool, nodes = (real, ["num_pages", 2, 8, 8]), (integer, ["batch_size", 2, 128])
        inputs |= {names.KEY.past(layer): pool, names.VALUE.past(layer): pool,
                   names.NODES.past(layer): nodes}
        outputs |= {names.KEY.present(layer): pool, names.VALUE.present(layer): pool,
                    names.NODES.present(layer): nodes}
    assert list(signature(graph.input).items()) == list(inputs.items())
    assert list(signature(graph.output).items()) == list(outputs.items())
    graph = onnx.load(sparse_model.path, load_external_data=False).graph
    assert signature(graph.output)["logits"] == (real, ["batch_size", "sequence_length", VOCABULARY])


def test_graph_is_clean(sparse_model: ExportedModel) -> None:
    onnx.checker.check_model(sparse_model.path, full_check=True)
    model = onnx.load(sparse_model.path, load_external_data=False)
    graph = model.graph
    attention = [node for node in graph.node if node.op_type == names.OP_TYPE]
    assert [node.name for node in attention] == [f"model.layers.{layer}.self_attn/HipAttention" for layer in (0, 1)]
    for layer, node in enumerate(attention):
        values = {field.name: onnx.helper.get_attribute_value(field) for field in node.attribute}
        expected = names.attributes(sparse_model.spec.hip, scale=np.float32(8**-0.5), layer=layer)
        assert values == {**expected, "mask_heads": b"kv"}
        assert values["dense"] == (layer == 0)
    used = Counter(name for node in graph.node for name in node.input)
    assert all(used[value.name] for value in graph.input)
    assert all(used[value.name] for value in graph.initializer)
    produced = Counter(name for node in graph.node for name in node.output)
    assert max(produced.values()) == 1
    kinds = [value.type.tensor_type.elem_type for value in graph.value_info]
    assert len(kinds) > 50
    assert TensorProto.DOUBLE not in kinds
    assert TensorProto.DOUBLE not in [value.data_type for value in graph.initializer]
    operators = {node.op_type for node in graph.node}
    assert not operators & {"Identity", "Constant", "CastLike", "Dropout"}
    assert [function.name for function in model.functions] == [names.OP_TYPE]
    assert re.fullmatch(r"[\w./]+", "".join(node.name for node in graph.node))
    assert b"site-packages" not in sparse_model.path.read_bytes()
    assert b"export/graph.py" not in sparse_model.path.read_bytes()


def test_copied_weights(sparse_model: ExportedModel, tiny_folder: Path) -> None:
    parameters = dict(LlamaForCausalLM.from_pretrained(tiny_folder).named_parameters())
    (data,) = sparse_model.data
    assert re.fullmatch(r"sparse-[0-9a-f]{12}\.onnx\.data", data.name)
    assert sparse_model.placement == "copied"
    model = onnx.load(sparse_model.path, load_external_data=False)
    external = [value for value in model.graph.initializer if uses_external_data(value)]
    assert len(external) == len(parameters)
    for value in external:
        info = ExternalDataInfo(value)
        assert info.location == data.name
        assert info.offset % 4096 == 0
    for value in onnx.load(sparse_model.path).graph.initializer:
        name = value.name.removesuffix("_transposed")
        if name in parameters:
            content = numpy_helper.to_array(value)
            np.testing.assert_array_equal(content.T if name != value.name else content, parameters[name].detach())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_rules(tmp_path: Path, dtype: str) -> None:
    """Norms and rotary angles in float32, all else in the model's type, as Hugging Face has it."""
    model = tiny_llama(num_hidden_layers=1)
    exported = export_onnx(save_checkpoint(tmp_path / "model", model), tmp_path, config=SPARSE, dtype=dtype)
    onnx.checker.check_model(exported.path, full_check=True)
    graph = onnx.load(exported.path, load_external_data=False).graph
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.BFLOAT16
    values = (*graph.value_info, *graph.initializer)
    types = {v.name: v.data_type if isinstance(v, TensorProto) else v.type.tensor_type.elem_type for v in values}
    for node in graph.node:
        match node.op_type:
            case "Pow" | "ReduceMean" | "Sqrt" | "Reciprocal" | "Sin" | "Cos":
                assert types[node.input[0]] == TensorProto.FLOAT
            case "MatMul" | "Sigmoid" | "HipAttention":
                assert {types[name] for name in node.input[:2]} <= {kind}
    assert types["model.rotary_emb.inv_freq"] == TensorProto.FLOAT
    assert {value.data_type for value in graph.initializer if value.name.endswith(("weight", "transposed"))} == {kind}
    assert next(v for v in graph.output if v.name == "logits").type.tensor_type.elem_type == TensorProto.FLOAT
    if dtype == "float16":
        prompt = tokens(40)
        logits = GraphRunner(exported.path, table()).step([prompt])
        assert np.abs(logits[0, 0] - expected_logits(model, prompt)[-1]).max() < 0.15


def test_copied_layers_equal_traced_ones() -> None:
    config, hip = tiny_llama(num_hidden_layers=5, attention_bias=True).config, SPARSE.replace(dense_layers=[1, 3])
    family = FAMILIES["LlamaForCausalLM"]
    constants = graph.buffers(family, config)
    copied = graph.trace(family, config, hip, dtype=torch.float16, logits="last", constants=constants, max_context=512)
    whole = graph._trace(graph._Request(family, config, hip, torch.float16, "last", constants, 512), 5)
    assert copied.weights == whole.weights

    def proto(traced: graph.Trace) -> onnx.GraphProto:
        for name in traced.weights:  # protocol buffers want a value
            traced.model.graph.initializers[name].const_value = ir.tensor(np.zeros(1, np.float16), name=name)
        return ir.serde.serialize_model(traced.model).graph

    def nodes(made: onnx.GraphProto) -> list[tuple[Any, ...]]:
        values = {tensor.name: tensor.raw_data for tensor in made.initializer if tensor.name.startswith("constant")}
        return [
            (node.name, node.op_type, [values.get(name, name) for name in node.input], list(node.output),
             sorted(field.SerializeToString() for field in node.attribute))
            for node in made.node
        ]

    one, other = proto(copied), proto(whole)
    assert nodes(one) == nodes(other)
    assert list(one.input) == list(other.input)
    assert list(one.output) == list(other.output)


def test_all_layers_are_traced_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    empty = graph.Trace(ir.Model(ir.Graph((), (), nodes=()), ir_version=10), {})
    monkeypatch.setattr(graph, "_trace", lambda *args: traced.append(args[-1]) or empty)
    config = tiny_llama(num_hidden_layers=5).config
    family = FAMILIES["LlamaForCausalLM"]
    graph.trace(family, config, SPARSE, dtype=torch.float16, logits="last", constants={}, max_context=512)
    assert traced == [3, 5]


def test_layers_that_differ_are_not_copied() -> None:
    """A third layer with other settings, another operator, or input from elsewhere than its predecessor."""
    def model(*, axis: int = -1, operator: str = "Relu", source: str = "model.layers.1/Add") -> ir.Model:
        text = """<ir_version: 10, opset_import: ["" : 20]>
            g (float[2, 2] x) => (float[2, 2] y) {
                "model.layers.0/Softmax" = Softmax <axis = -1> (x)
                "model.layers.0/Add" = Relu ("model.layers.0/Softmax")
                "model.layers.1/Softmax" = Softmax <axis = -1> ("model.layers.0/Add")
                "model.layers.1/Add" = Relu ("model.layers.1/Softmax")
                "model.layers.2/Softmax" = Softmax <axis = AXIS> ("SOURCE")
                "model.layers.2/Add" = OPERATOR ("model.layers.2/Softmax")
                y = Neg ("model.layers.2/Add")
            }""".replace("AXIS", str(axis)).replace("OPERATOR", operator).replace("SOURCE", source)
        made = ir.from_onnx_text(text)
        for node in made.graph:
            node.name = node.outputs[0].name
        return made

    names, pattern = LayerNames("model.layers"), Pattern(1, 1)
    assert repeat_layers(model().graph, names, pattern, 5, ()) is True
    for changed in ({"axis": 0}, {"operator": "Sigmoid"}, {"source": "model.layers.0/Add"}, {"source": "x"}):
        made = model(**changed)
        assert repeat_layers(made.graph, names, pattern, 5, ()) is False
        assert len(list(made.graph)) == 7


# What it computes


@pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 9, 16, 17, 63, 64, 65, 95])
def test_equals_hugging_face(dense_model: ExportedModel, tiny_folder: Path, count: int) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    logits = GraphRunner(dense_model.path, table()).step([tokens(count)])
    np.testing.assert_allclose(logits[0], expected_logits(model, tokens(count))[-1:], rtol=0, atol=1e-3)


def test_decoding_equals_hugging_face(dense_model: ExportedModel, tiny_folder: Path) -> None:
    model, prompt = LlamaForCausalLM.from_pretrained(tiny_folder), tokens(20)
    runner = GraphRunner(dense_model.path, table())
    logits = runner.step([prompt])
    for _ in range(12):
        np.testing.assert_allclose(logits[0], expected_logits(model, prompt)[-1:], rtol=0, atol=1e-3)
        prompt.append(int(logits.argmax()))
        logits = runner.step([prompt[-1:]], refresh=False)


def test_function_equals_oracle(sparse_model: ExportedModel) -> None:
    """Prompt in two chunks, then decoded tokens, searched and from reused nodes, in a ragged batch with an idle row."""
    runners = [GraphRunner(sparse_model.path, table(3), oracle=oracle) for oracle in (False, True)]
    for rows, refresh in (
        ([tokens(50, 1), tokens(23, 2), []], True), ([tokens(9, 3), tokens(31, 4), tokens(60, 5)], True),
        ([[1], [2], [3]], True), ([[4], [], [6]], False), ([[7], [8], [9]], False),
    ):
        logits, expected = (runner.step(rows, refresh=refresh) for runner in runners)
        for row, given in enumerate(rows):
            np.testing.assert_allclose(logits[row, : len(given)], expected[row, : len(given)], rtol=0, atol=1e-3)
        nodes = [runner.state[names.NODES.past(1)] for runner in runners]
        np.testing.assert_array_equal(*nodes)
    assert (nodes[0] >= 0).any()
    assert (runners[0].state[names.NODES.past(0)] == -1).all()


def test_pruning_prunes(sparse_model: ExportedModel, tiny_folder: Path) -> None:
    """The budgets of this file are small enough to tell pruned from dense."""
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    logits = GraphRunner(sparse_model.path, table()).step([tokens(90)])[0]
    difference = np.abs(logits - expected_logits(model, tokens(90))).max(axis=1)
    assert difference[:40].max() < 1e-3
    assert difference[60:].max() > 0.1


@pytest.mark.parametrize("split", [1, 8, 33, 63])
def test_chunked_prompt_equals_whole(dense_model: ExportedModel, split: int) -> None:
    prompt = tokens(64)
    whole, chunked = (GraphRunner(dense_model.path, table()) for _ in range(2))
    expected = whole.step([prompt])
    chunked.step([prompt[:split]])
    np.testing.assert_allclose(chunked.step([prompt[split:]]), expected, rtol=0, atol=1e-4)
    for name, pool in whole.state.items():
        np.testing.assert_allclose(chunked.state[name], pool, rtol=0, atol=1e-4)


def test_chunks_of_whole_blocks_choose_alike(sparse_model: ExportedModel) -> None:
    prompt = tokens(88)
    whole, chunked = (GraphRunner(sparse_model.path, table()) for _ in range(2))
    expected = whole.step([prompt])
    logits = np.concatenate([chunked.step([prompt[:40]]), chunked.step([prompt[40:]])], axis=1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_rows_of_a_ragged_batch_equal_each_alone(sparse_model: ExportedModel) -> None:
    rows = [tokens(77, 1), tokens(1, 2), tokens(40, 3), []]
    together = GraphRunner(sparse_model.path, table(4))
    first, second = together.step(rows), together.step([[1], [2], [3], [4]])
    for row, prompt in enumerate(rows):
        alone = GraphRunner(sparse_model.path, table())
        if prompt:
            np.testing.assert_allclose(first[row, : len(prompt)], alone.step([prompt])[0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(second[row], alone.step([[row + 1]])[0], rtol=0, atol=1e-3)


def test_pages_may_lie_anywhere(sparse_model: ExportedModel) -> None:
    straight = GraphRunner(sparse_model.path, table(2))
    order = np.random.default_rng(0).permutation(2 * PAGES + 3)[: 2 * PAGES].reshape(2, PAGES)
    shuffled = GraphRunner(sparse_model.path, order.tolist())
    for rows in ([tokens(70, 1), tokens(33, 2)], [[1], [2]]):
        np.testing.assert_array_equal(straight.step(rows), shuffled.step(rows))


def test_shared_prefix_pages(sparse_model: ExportedModel) -> None:
    prefix, tails = tokens(48, 1), [tokens(20, 2), tokens(9, 3)]  # six full pages
    shared = GraphRunner(sparse_model.path, [list(range(PAGES)), [*range(6), *range(PAGES, PAGES + 6)]])
    shared.step([prefix, []])
    shared.lengths[1] = len(prefix)
    logits = shared.step(tails)
    for row, tail in enumerate(tails):
        alone = GraphRunner(sparse_model.path, table())
        alone.step([prefix])
        np.testing.assert_allclose(logits[row, : len(tail)], alone.step([tail])[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rope", "fields"), [
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32}, {"attention_bias": True, "tie_word_embeddings": True}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
     {"mlp_bias": True, "head_dim": 16, "num_key_value_heads": 4, "hidden_act": "gelu"}),
], ids=["llama3", "yarn"])
def test_variants_equal_hugging_face(tmp_path: Path, rope: dict[str, Any], fields: dict[str, Any]) -> None:
    model = tiny_llama(num_hidden_layers=1, rope_parameters={"rope_theta": 1000.0, **rope}, **fields)
    exported = export_onnx(save_checkpoint(tmp_path / "model", model), tmp_path, config=DENSE)
    prompt = tokens(90)
    logits = GraphRunner(exported.path, table()).step([prompt])
    expected = expected_logits(model, prompt)[-1:]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-3)
    plain = tiny_llama(num_hidden_layers=1, **fields)
    assert np.abs(expected_logits(plain, prompt)[-1:] - expected).max() > 0.01  # the variant matters here


def test_gguf(tmp_path: Path) -> None:
    """With RoPE's frequencies divided by what the file says, which are Llama 3's own."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}
    model, plain = tiny_llama(num_hidden_layers=1, rope_parameters=rope), tiny_llama(num_hidden_layers=1)
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert factors.max() > 4
    path = save_gguf(tmp_path / "tiny.gguf", plain, extra={"rope_freqs.weight": factors.numpy()})
    exported = export_onnx(path, tmp_path / "out.onnx", config=DENSE, dtype="float32")
    assert exported.spec.source == "Tiny"
    assert "token ids only" in exported.warnings[0]  # this file has no tokenizer
    logits = GraphRunner(exported.path, table()).step([tokens(90)])
    np.testing.assert_allclose(logits[0], expected_logits(model, tokens(90))[-1:], rtol=0, atol=1e-3)


# How it is written


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, traced_export: tuple[ExportedModel, graph.Trace]) -> Exporter:
    """export_onnx with a graph that is there already, for tests of what happens around it."""
    monkeypatch.setattr(onnx_export, "trace", lambda *args, **options: copy_of(traced_export[1]))
    return lambda *args, **options: export_onnx(*args, **{"config": SPARSE, **options})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_an_export(quick: Exporter, tiny_folder: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", tiny_llama(seed=1))
    (other / "chat_template.jinja").unlink()
    out = tmp_path / "out"
    first = quick(tiny_folder, out)
    again = quick(tiny_folder, out)
    assert again.data == first.data
    second = quick(other, out)
    assert second.data != first.data
    assert names_in(out) == sorted(path.name for path in second.files)  # no old weights, no old chat template
    assert "chat_template.jinja" not in names_in(out)


def test_models_that_share_a_folder(quick: Exporter, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = quick(tiny_folder, out / "a.onnx"), quick(tiny_folder, out / "b.onnx", config=DENSE)
    assert set(names_in(out)) == {path.name for path in (*first.files, *second.files)}
    assert HipConfig.from_yaml(out / "a.hip_config.yaml") == SPARSE
    assert HipConfig.from_yaml(out / "b.hip_config.yaml") == DENSE
    other = save_checkpoint(tmp_path / "other", tiny_llama(rms_norm_eps=1e-5))
    before = names_in(out)
    with pytest.raises(ExportError, match=r"holds [ab]\.onnx, exported from another checkpoint"):
        quick(other, out / "c.onnx")
    assert names_in(out) == before


def test_files_of_others_are_not_overwritten(quick: Exporter, tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    tokenizer = Path(shutil.copytree(tiny_folder, tmp_path / "tokenizer"))
    (tokenizer / "model.safetensors").unlink()
    for folder, what in ((checkpoint, "model.safetensors"), (tokenizer, "tokenizer.json")):
        before = names_in(folder)
        with pytest.raises(ExportError, match=rf"holds a {what} that hip-trt did not write"):
            quick(tiny_folder, folder)
        assert names_in(folder) == before


@pytest.mark.parametrize("step", ["trace", "write_weights", "_serialize"])
def test_failed_export_leaves_the_older_one(
    quick: Exporter, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    exported = quick(tiny_folder, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_export, step, fail)
    with pytest.raises(ExportError, match="No space left"):
        quick(tiny_folder, tmp_path, config=DENSE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ExportError, match="No space left"):
        quick(tiny_folder, tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    assert exported.path.is_file()


def test_space_is_checked_first(
    quick: Exporter, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000, 5_000))
    monkeypatch.setattr(onnx_export, "trace", None)
    with pytest.raises(ExportError, match=r"MB are needed, and 5\.0 kB are free"):
        quick(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_export(dense_model: ExportedModel, tiny_folder: Path, tmp_path: Path) -> None:
    """Killed while it writes weights: the older export stays, and the next one clears what is left."""
    program = """
import sys, time
from hip_trt.export import export_onnx, onnx_export

def write(plan, tensors, traced, dtype, stage, stem, advance):
    (stage.path / "weights").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)

onnx_export.trace = lambda *args, **options: None
onnx_export.write_weights = write
export_onnx(sys.argv[1], sys.argv[2])
"""
    processes = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        out = Path(shutil.copytree(dense_model.path.parent, tmp_path / number.name))
        command = [sys.executable, "-c", program, tiny_folder, out]
        processes[number] = out, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    before = names_in(dense_model.path.parent)
    for number, (out, process) in processes.items():
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == (143 if number == signal.SIGTERM else -9)
        left = [name for name in names_in(out) if name not in before]
        assert len(left) == (number == signal.SIGKILL)
        assert all(name.startswith(".") for name in left)
        GraphRunner(out / "model.onnx", table()).step([[1, 2, 3]])
        with pytest.raises(CheckpointError):  # any next export, even one that fails
            export_onnx("/no/such/folder", out)
        assert names_in(out) == before


@pytest.mark.parametrize(("options", "words"), [
    ({"dtype": "float64"}, r"dtype: 'float64' is not allowed; it must be one of float16, bfloat16, float32"),
    ({"logits": "first"}, r"logits: 'first' is not allowed; it must be one of last, all"),
    ({"config": SPARSE.replace(dense_layers=[0, 2])}, r"dense_layers: 2 is not allowed; the model has layers 0 to 1"),
])
def test_bad_arguments(tiny_folder: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ExportError, ConfigError), match=words):
        export_onnx(tiny_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folder_in_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    for out in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(ExportError, match="a folder stands where"):
            export_onnx(tiny_folder, out)
    assert names_in(tmp_path) == ["model.onnx"]


def test_warnings(quick: Exporter, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exported = quick(folder, tmp_path / "out")
    assert len(exported.warnings) == 2
    assert "q_norm.weight" in exported.warnings[0]
    assert "inv_freq" not in exported.warnings[0]
    assert "tokenizer.json" in exported.warnings[1]
    assert "tokenizer_config.json" not in names_in(tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning"]


# The sample model


@pytest.fixture(scope="session")
def sample_export(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    config = HipConfig.create(mask_k=8192, decode_mask_k=8192)
    return export_onnx(sample_model, tmp_path_factory.mktemp("sample"), config=config, dtype="float32")


@pytest.fixture(scope="session")
def sample_reference(sample_model: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(sample_model.parent, gguf_file=sample_model.name, dtype=torch.float32)
    return model.eval()


@pytest.mark.sample
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sample_equals_hugging_face(sample_export: ExportedModel, sample_reference: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sample_export.path.parent)
    text = " ".join(Path(__file__).with_name(name).read_text() for name in ("test_export.py", "test_checkpoint.py"))
    ids = tokenizer(text)["input_ids"]
    pages = [list(range(2048 // 64))]
    runner = GraphRunner(sample_export.path, pages)
    for count in (1, 7, 64, 500, 2000):
        runner.lengths = np.zeros(1, np.int32)
        logits = runner.step([ids[:count]])
        expected = expected_logits(sample_reference, ids[:count])[-1]
        assert np.abs(logits[0, 0] - expected).max() < 1e-3, count


@pytest.mark.sample
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sample_decodes_the_same_tokens(sample_export: ExportedModel, sample_reference: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sample_export.path.parent)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    expected = sample_reference.generate(
        torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )[0, len(prompt):].tolist()
    runner = GraphRunner(sample_export.path, [list(range(4))])
    logits, found = runner.step([prompt]), []
    for _ in range(32):
        if not set(found) & {2}:
            logits[..., 2] = -np.inf  # as min_new_tokens does
        found.append(int(logits.argmax()))
        logits = runner.step([found[-1:]], refresh=len(found) % 8 == 0)
    assert found == expected
    assert "Paris" in tokenizer.decode(found)
