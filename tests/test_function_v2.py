"""The ONNX function of version 2 against the reference, in stock ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from onnx import TensorProto, helper
from test_function import ELEMENT_TYPES, make_session
from test_function_decode import INTEGERS, RANKS
from torch import Tensor
from v2_chains import GRID, Chain, Outputs, chains, drive, first_inputs, inputs_of, named

from hip_trt.config_v2 import HipConfigV2
from hip_trt.export.function import OPSET_VERSIONS
from hip_trt.export.function_v2 import function_v2_proto
from hip_trt.operator import DOMAIN, INPUTS_V2, OP_TYPE, OP_VERSION_V2, OUTPUTS_V2, STATE_V2, attributes_v2


def node_model(
    config: HipConfigV2, *, scale: float, dense: bool = False, dtype: torch.dtype = torch.float32, opset: int = 20,
    kind: int | None = None, domain: str = DOMAIN,
) -> onnx.ModelProto:
    """A model of one node, every dimension dynamic but, where ``kind`` is given, call_kind's."""

    def declare(name: str) -> onnx.ValueInfoProto:
        if name == "call_kind":
            return helper.make_tensor_value_info(name, TensorProto.INT32, [kind])
        element = TensorProto.INT32 if name in INTEGERS else ELEMENT_TYPES[dtype]
        return helper.make_tensor_value_info(name, element, [None] * RANKS.get(name, 4))

    node = helper.make_node(
        OP_TYPE, INPUTS_V2, OUTPUTS_V2, domain=domain,
        **{**attributes_v2(config, scale=scale), "dense": int(dense)},
    )
    graph = helper.make_graph(
        [node], "node", [declare(name) for name in INPUTS_V2], [declare(name) for name in OUTPUTS_V2])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(domain, OP_VERSION_V2)]
    function = function_v2_proto(opset)
    function.domain = domain
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[function])


@lru_cache(maxsize=64)
def session(config: HipConfigV2, scale: float, dense: bool, dtype: torch.dtype) -> onnxruntime.InferenceSession:
    return make_session(node_model(config, scale=scale, dense=dense, dtype=dtype))


def run(
    runtime: onnxruntime.InferenceSession, inputs: dict[str, Tensor], *, alias: bool = False
) -> Outputs:
    """Run on tensors in place, without copies; ``alias`` binds present state to past."""
    found = tuple(
        inputs[STATE_V2[name]] if alias and name in STATE_V2 else torch.empty_like(inputs[STATE_V2.get(name, "query")])
        for name in OUTPUTS_V2
    )
    binding = runtime.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in zip(OUTPUTS_V2, found, strict=True):
        binding.bind_output(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    runtime.run_with_iobinding(binding)
    return found[0], found[1], found[2], found[3], found[4], found[5]


def check(chain: Chain, *, alias: bool = False) -> None:
    runtime = session(chain.config, chain.scale, chain.dense, chain.dtype)
    tolerance = 1e-5 if chain.dtype == torch.float32 else torch.finfo(chain.dtype).eps
    drive(chain, lambda inputs: run(runtime, inputs, alias=alias), tolerance=tolerance)


@pytest.mark.parametrize("chain", GRID, ids=str)
def test_grid(chain: Chain) -> None:
    check(chain)


@settings(max_examples=25, deadline=None)
@given(chains())
def test_any_chain(chain: Chain) -> None:
    check(chain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(replace(named("prefill, decode, prefill"), dtype=dtype))


@pytest.mark.parametrize("name", ["prefill, decode, prefill", "idle keeps blocks in prefill"])
def test_present_on_past(name: str) -> None:
    check(named(name), alias=True)


@pytest.mark.parametrize("opset", OPSET_VERSIONS)
def test_opset_versions(opset: int) -> None:
    chain = named("chunks of one token")
    # In a domain of its own, as onnx's checker may know version 1 by its schema, and takes a node for it.
    model = node_model(chain.config, scale=chain.scale, opset=opset, domain="test")
    onnx.checker.check_model(model, full_check=True)
    runtime = make_session(model, optimize=False)
    drive(chain, lambda inputs: run(runtime, inputs), tolerance=1e-5)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_known_kind_leaves_one_branch(kind: int, tmp_path: str) -> None:
    """What a profile fixes, a runtime folds: no If on the kind is left, and prefill's Scan only in prefill."""
    chain = named("prefill, decode, prefill")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    onnxruntime.InferenceSession(
        node_model(chain.config, scale=chain.scale, kind=kind).SerializeToString(), options,
        providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert nodes.count("Scan") == (kind == 1)
    branches = [output for node in onnx.load(options.optimized_model_filepath).graph.node if node.op_type == "If"
                for output in node.output]
    assert "output" not in branches


def test_values_of_call_kind_do_not_count() -> None:
    chain = named("prefill, decode, prefill")
    inputs = inputs_of(chain, 0, first_inputs(chain))
    runtime = session(chain.config, chain.scale, chain.dense, chain.dtype)
    expected = run(runtime, inputs)
    inputs["call_kind"].fill_(2)
    for tensor, other in zip(run(runtime, inputs), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
