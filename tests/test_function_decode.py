"""The ONNX function body of the next version's decode call against the reference, in stock ONNX Runtime on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from decode_cases import GRID, PRUNED, SMALL, Case, Outputs, assert_agrees, cases, make_inputs, named, reference
from hypothesis import given, settings
from onnx import TensorProto, helper
from onnxscript import build_function
from test_function import ELEMENT_TYPES, make_session

from hip_trt.export.function import OPSET_VERSIONS
from hip_trt.export.function_decode import FLOAT_ATTRIBUTES, INT_ATTRIBUTES, decode_call
from hip_trt.reference.decode import DecodeConfig
from hip_trt.reference.decode_state import write_state

INPUTS = tuple(inspect.signature(decode_call).parameters)[1:]
OUTPUTS = ("output", "present_key", "present_value", "present_bounds", "present_codes", "present_blocks")
RANKS = {
    "page_table": 2, "past_lengths": 1, "query_lengths": 1, "refresh_mask": 1, "past_bounds": 5, "present_bounds": 5,
    "past_blocks": 3, "present_blocks": 3,
}
INTEGERS = {
    "page_table", "past_lengths", "query_lengths", "past_codes", "past_blocks", "refresh_mask", "present_codes",
    "present_blocks",
}


@cache
def function_proto(opset: int = 20) -> onnx.FunctionProto:
    """The decode call as a function of its own."""
    inputs = [ir.val(name, ir.DataType.INT32 if name in INTEGERS else None) for name in INPUTS]
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in INT_ATTRIBUTES]
    attributes += [ir.Attr(name, ir.AttributeType.FLOAT, None) for name in FLOAT_ATTRIBUTES]
    function = build_function(
        decode_call, inputs, domain="test", name="Decode", attributes=attributes, opset_imports={"": opset}
    )
    for value, name in zip(function.outputs, OUTPUTS, strict=True):
        value.name = name
    return ir.serde.serialize_function(function)


def node_model(config: DecodeConfig, *, page_size: int, scale: float, dtype: torch.dtype, opset: int = 20) -> (
    onnx.ModelProto
):
    """A model of one decode call, every dimension dynamic."""

    def declare(name: str) -> onnx.ValueInfoProto:
        kind = TensorProto.INT32 if name in INTEGERS else ELEMENT_TYPES[dtype]
        return helper.make_tensor_value_info(name, kind, [None] * RANKS.get(name, 4))

    node = helper.make_node(
        "Decode", INPUTS, OUTPUTS, domain="test", decode_mask_k=config.mask_k, decode_search_k=config.search_k,
        decode_block_k=config.block, page_size=page_size, sink_tokens=config.sink_tokens,
        window_tokens=config.window_tokens, value_threshold=config.value_threshold, scale=scale,
        dense=int(config.dense),
    )
    graph = helper.make_graph([node], "node", [declare(name) for name in INPUTS], [declare(name) for name in OUTPUTS])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("test", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[function_proto(opset)])


@lru_cache(maxsize=64)
def session(config: DecodeConfig, page_size: int, scale: float, dtype: torch.dtype) -> onnxruntime.InferenceSession:
    return make_session(node_model(config, page_size=page_size, scale=scale, dtype=dtype))


def run(
    runtime: onnxruntime.InferenceSession, inputs: Mapping[str, torch.Tensor], outputs: Outputs | None = None
) -> Outputs:
    """Run on tensors in place, without copies, into given output tensors or new ones."""
    names = ("query", "past_key", "past_value", "past_bounds", "past_codes", "past_blocks")
    found = outputs or tuple(torch.empty_like(inputs[name]) for name in names)
    binding = runtime.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in zip(OUTPUTS, found, strict=True):
        binding.bind_output(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    runtime.run_with_iobinding(binding)
    return found


def check(case: Case, inputs: dict[str, torch.Tensor] | None = None) -> Outputs:
    """Arithmetic is float32, so in half precision only the last rounding, of the output, may differ."""
    inputs = inputs or make_inputs(case)
    found = run(session(case.config, case.page_size, case.scale, case.dtype), inputs)
    rtol = 1e-5 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps
    assert_agrees(case, inputs, found, rtol=rtol, atol=1e-5)
    return found


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case) -> None:
    check(case)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_any_case(case: Case) -> None:
    check(case)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases("real"))
def test_real_numbers(case: Case) -> None:
    """The first stage's sums may differ in their last bits: the same examples every time, lest one is a near tie."""
    check(case)


@pytest.mark.parametrize("values", ["whole", "real"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "reuse and search", "threshold"])
def test_half_precision(name: str, dtype: torch.dtype, values: str) -> None:
    check(replace(named(name), dtype=dtype, values=values))


def test_large_scores() -> None:
    """Whose exponentials no float32 holds."""
    inputs = make_inputs(named("long"))
    inputs["query"] *= 40
    check(named("long"), inputs)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["past_key", "query"])
def test_numbers_that_are_none(name: str, number: float) -> None:
    """NaN shows, and chooses as in the reference; an infinite key is no fault."""
    case = replace(named("eight rows"), config=replace(SMALL, search_k=64))
    inputs = make_inputs(case)
    if name == "query":
        inputs["query"][0, 1, 0, 3] = number
    else:
        for block in (6, 19):
            inputs["past_key"][inputs["page_table"][0, block // 2], 1, block % 2 * 4 + 1, 3] = number
        past = inputs["past_lengths"]
        inputs["past_bounds"], inputs["past_codes"] = write_state(
            inputs["past_key"], inputs["past_bounds"], inputs["past_codes"], inputs["page_table"],
            torch.zeros_like(past), past,
        )
    found = run(session(case.config, case.page_size, case.scale, case.dtype), inputs)
    expected = reference(case, inputs)
    first, last = case.config.candidates(150)
    assert all(first <= block < last for block in found[-1][0].flatten().tolist())
    if number != number:
        assert torch.equal(found[-1], expected[-1])
        torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        assert found[0][0].isnan().any()
        assert found[0][1].isfinite().all()


def check_state(case: Case, inputs: dict[str, torch.Tensor]) -> Outputs:
    found = run(session(case.config, case.page_size, case.scale, case.dtype), inputs)
    for tensor, other in zip(found[1:5], reference(case, inputs)[1:5], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
    return found


def test_a_new_key_that_is_not_a_number_is_in_the_bounds() -> None:
    case = named("eight rows")
    inputs = make_inputs(case)
    inputs["key"][:, 0, 1, 2] = torch.nan
    bounds = check_state(case, inputs)[3]
    assert bounds[inputs["page_table"][0, 151 // 8], 0, 151 % 8 // 4, :, 2].isnan().all()


def test_equal_scores_prefer_the_lower_index() -> None:
    """All keys are equal, so all scores are, in both stages; +0 and -0 too."""
    case = Case((150,), (1,))
    inputs = make_inputs(case)
    for name in ("past_key", "past_bounds", "past_codes"):
        inputs[name].zero_()
    inputs["past_bounds"][:, :, ::2] = -0.0
    assert check(case, inputs)[-1][0].tolist() == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("config", [SMALL, PRUNED])
def test_pools_may_be_updated_in_place(config: DecodeConfig) -> None:
    case = replace(named("ragged"), config=config)
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    in_place = (torch.empty_like(inputs["query"]), *(
        inputs[name] for name in ("past_key", "past_value", "past_bounds", "past_codes", "past_blocks")))
    run(session(case.config, case.page_size, case.scale, case.dtype), inputs, in_place)
    for tensor, other in zip(in_place[1:], expected[1:], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(in_place[0], expected[0], rtol=1e-5, atol=1e-5)


def test_past_pools_are_read_by_nothing_but_the_update() -> None:
    """So that a runtime may write the present pools over them."""
    pools = {"past_key", "past_value", "past_bounds", "past_codes"}
    readers = {(node.op_type, name) for node in function_proto().node for name in node.input if name in pools}
    readers -= {("CastLike", "past_bounds"), ("Shape", "past_codes")}  # of its type and shape alone
    assert readers == {("ScatterND", name) for name in pools}


@pytest.mark.parametrize("name", ["reuse", "candidates just fit, or not, with blocks"])
def test_reads_no_state_where_nothing_is_searched(name: str) -> None:
    """Nor any page of a sequence that is idle."""
    case = named(name)
    case = replace(case, query_lengths=(*case.query_lengths[:-1], 0))
    inputs = make_inputs(case)
    inputs["page_table"][-1] = -1
    expected = reference(case, inputs)[0]
    inputs["past_bounds"].fill_(torch.nan)
    output = run(session(case.config, case.page_size, case.scale, case.dtype), inputs)[0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", OPSET_VERSIONS)
def test_opset_versions(opset: int) -> None:
    case = named("reuse and search")
    model = node_model(case.config, page_size=8, scale=case.scale, dtype=case.dtype, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    inputs = make_inputs(case)
    assert_agrees(case, inputs, run(make_session(model, optimize=False), inputs), rtol=1e-5, atol=1e-5)


def test_of_the_sizes_of_a_model() -> None:
    """Blocks of 64 and 1100 tokens."""
    config = DecodeConfig(mask_k=256, search_k=512, value_threshold=1e-4)
    check(Case((1700, 1000), (1, 8), config=config, page_size=128, heads=(4, 2), head_dim=64, values="real"))
