"""The ONNX function against the reference, in stock ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from operator_cases import GRID, SMALL, Case, attended_blocks, cases, make_inputs, named, reference
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import ExportError
from hip_trt.export.function import OPSET_VERSIONS, add_function, function_proto, strip_function
from hip_trt.operator import DOMAIN, INPUTS, OP_TYPE, OP_VERSION, OUTPUTS, attributes

ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
}
INTEGERS = {"page_table", "past_lengths", "query_lengths", "past_nodes", "refresh_mask", "present_nodes"}
RANKS = {"page_table": 2, "past_lengths": 1, "query_lengths": 1, "past_nodes": 3, "refresh_mask": 1, "present_nodes": 3}


def node_model(
    config: HipConfig, *, scale: float, dense: bool = False, dtype: torch.dtype = torch.float32, opset: int = 20
) -> onnx.ModelProto:
    """A model of one HipAttention node, every dimension dynamic, with its function."""

    def declare(name: str) -> onnx.ValueInfoProto:
        kind = TensorProto.INT32 if name in INTEGERS else ELEMENT_TYPES[dtype]
        return helper.make_tensor_value_info(name, kind, [None] * RANKS.get(name, 4))

    layer = 0 if dense else None
    node = helper.make_node(
        OP_TYPE, INPUTS, OUTPUTS, domain=DOMAIN,
        **attributes(config.replace(dense_layers=(0,)), scale=scale, layer=layer),
    )
    graph = helper.make_graph([node], "node", [declare(name) for name in INPUTS], [declare(name) for name in OUTPUTS])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    add_function(model)
    return model


def make_session(model: onnx.ModelProto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=64)
def session(
    config: HipConfig, scale: float, dense: bool, dtype: torch.dtype, opset: int = 20, optimize: bool = True
) -> onnxruntime.InferenceSession:
    return make_session(node_model(config, scale=scale, dense=dense, dtype=dtype, opset=opset), optimize=optimize)


def run(
    runtime: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run on tensors in place, without copies, into given output tensors or new ones."""
    names = ("query", "past_key", "past_value", "past_nodes")
    output, key, value, nodes = outputs or tuple(torch.empty_like(inputs[name]) for name in names)
    binding = runtime.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in zip(OUTPUTS, (output, key, value, nodes), strict=True):
        binding.bind_output(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    runtime.run_with_iobinding(binding)
    return output, key, value, nodes


def bits(tensor: Tensor) -> Tensor:
    """Equal bits, NaN included, are equal here."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_agrees(case: Case, runtime: onnxruntime.InferenceSession) -> None:
    inputs = make_inputs(case)
    output, key, value, nodes = run(runtime, inputs)
    expected, expected_key, expected_value, expected_nodes = reference(case, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(nodes, expected_nodes)
    assert torch.equal(bits(key), bits(expected_key))
    assert torch.equal(bits(value), bits(expected_value))
    if case.values == "blocks":
        assert torch.equal(attended_blocks(case, output), attended_blocks(case, expected))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case) -> None:
    assert_agrees(case, session(case.config, case.scale, case.dense, case.dtype))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_any_case(case: Case) -> None:
    assert_agrees(case, session(case.config, case.scale, case.dense, case.dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(st.just(SMALL)))
def test_real_numbers(case: Case) -> None:
    """Sums of real products may differ in their last bits: the same examples every time, lest one is a near tie."""
    case = replace(case, dense=False)
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(case.seed)
    for name in ("query", "key", "past_key"):
        inputs[name] += torch.rand(inputs[name].shape, generator=generator)
    output, *_, nodes = run(session(case.config, case.scale, False, case.dtype), inputs)
    expected, *_, expected_nodes = reference(case, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(nodes, expected_nodes)


@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "blocks: prefill"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Arithmetic is float32, so only the last rounding, of the output, may differ."""
    case = replace(named(name), dtype=dtype)
    inputs = make_inputs(case)
    output, key, _, nodes = run(session(case.config, case.scale, case.dense, dtype), inputs)
    expected, expected_key, _, expected_nodes = reference(case, inputs)
    torch.testing.assert_close(output, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(nodes, expected_nodes)
    assert torch.equal(bits(key), bits(expected_key))


@pytest.mark.parametrize("name", ["ragged", "every start level at once"])
def test_pools_may_be_updated_in_place(name: str) -> None:
    case = named(name)
    inputs = make_inputs(case)
    expected, key, value, nodes = reference(case, inputs)
    in_place = (torch.empty_like(inputs["query"]), inputs["past_key"], inputs["past_value"], inputs["past_nodes"])
    output, *_ = run(session(case.config, case.scale, case.dense, case.dtype), inputs, in_place)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(bits(inputs["past_key"]), bits(key))
    assert torch.equal(bits(inputs["past_value"]), bits(value))
    assert torch.equal(inputs["past_nodes"], nodes)


def test_past_pools_are_read_by_nothing_but_the_update() -> None:
    """So that a runtime may write the present pools over them."""
    readers = {(node.op_type, name) for node in function_proto().node for name in node.input if name in INPUTS[3:5]}
    assert readers == {("ScatterND", "past_key"), ("ScatterND", "past_value")}


@pytest.mark.parametrize("name", ["ragged", "every start level at once"])
def test_order_of_pages_changes_no_bit(name: str) -> None:
    case = named(name)
    inputs, runtime = make_inputs(case), session(case.config, case.scale, case.dense, case.dtype)
    order = torch.randperm(inputs["past_key"].shape[0], generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order).to(torch.int32)
    table = inputs["page_table"]
    moved = inputs | {
        "past_key": inputs["past_key"][order], "past_value": inputs["past_value"][order],
        "page_table": torch.where(table < 0, -1, place[table.long()]),
    }
    assert not torch.equal(moved["page_table"], table)
    output, key, _, nodes = run(runtime, inputs)
    moved_output, moved_key, _, moved_nodes = run(runtime, moved)
    assert torch.equal(bits(moved_output), bits(output))
    assert torch.equal(moved_nodes, nodes)
    assert torch.equal(bits(moved_key), bits(key[order]))


def test_reads_no_page_but_those_it_attends_to() -> None:
    """Reused blocks need no search; all other pages lie outside the pool, so that reading one is an error."""
    case = named("blocks: the paper's reuse")
    inputs, table = make_inputs(case), make_inputs(case)["page_table"]
    expected = reference(case, inputs)[0]
    attended = attended_blocks(case, expected).any(dim=2).any(dim=1)  # [B, blocks]
    pages = attended.unflatten(1, (-1, case.config.page_size // case.config.block_k)).any(dim=2)
    used = table[:, : pages.shape[1]]
    assert (~pages & (used >= 0)).any(dim=1).all(), "every sequence has a page that nothing attends to"
    used[~pages] = 1_000_000
    output, *_ = run(session(case.config, case.scale, case.dense, case.dtype), inputs | {"page_table": table})
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", OPSET_VERSIONS)
def test_opset_versions(opset: int) -> None:
    case = named("reuse and search at once")
    model = node_model(case.config, scale=case.scale, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert_agrees(case, make_session(model, optimize=False))


def test_unsupported_opset_is_refused() -> None:
    with pytest.raises(ExportError, match="opset_version: 17 is not supported"):
        node_model(SMALL, scale=1.0, opset=17)


def test_function_is_made_of_standard_operators() -> None:
    def domains(graph: onnx.FunctionProto | onnx.GraphProto) -> set[str]:
        inner = [field.g for node in graph.node for field in node.attribute if field.HasField("g")]
        return {node.domain for node in graph.node}.union(*(domains(body) for body in inner))

    assert domains(function_proto()) == {""}


def test_function_is_added_once_and_stripped_from_a_copy() -> None:
    model = node_model(SMALL, scale=1.0)
    other = helper.make_function("other", "Same", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])],
                                 [helper.make_opsetid("", 20)])
    model.functions.append(other)
    add_function(model)
    assert sorted(function.name for function in model.functions) == [OP_TYPE, "Same"]
    stripped = strip_function(model)
    assert [function.name for function in stripped.functions] == ["Same"]
    assert stripped.graph == model.graph
    assert len(model.functions) == 2
