"""torch.ops.hip_trt, version 2: registration, fake tensors, compile and export; results are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from v2_chains import Chain, first_inputs, inputs_of, named, reference

from hip_trt import operator as names
from hip_trt import ops
from hip_trt.errors import ConfigError, RuntimeInputError
from hip_trt.reference.operator_v2 import hip_attention_v2

STATE = tuple(names.STATE_V2.values())
OPS = [torch.ops.hip_trt.attention_v2.default, torch.ops.hip_trt.attention_v2_.default]
CALLS = [
    ("prefill, decode, prefill", 0), ("prefill, decode, prefill", 2), ("dense", 3), ("idle keeps blocks in prefill", 2),
]
each_call = pytest.mark.parametrize(("name", "index"), CALLS, ids=lambda value: str(value))


def attributes(chain: Chain) -> dict[str, Any]:
    return {**names.attributes_v2(chain.config, scale=chain.scale), "dense": int(chain.dense)}


def arguments(chain: Chain, index: int, **changes: Tensor) -> list[Tensor]:
    """Of a call of a chain, after the calls before it."""
    state = first_inputs(chain)
    for before in range(index):
        inputs = inputs_of(chain, before, state)
        state = dict(zip(STATE, reference(chain, inputs)[1:], strict=True)) | {
            "page_table": inputs["page_table"], "past_lengths": inputs["past_lengths"] + inputs["query_lengths"]}
    return list({**inputs_of(chain, index, state), **changes}.values())


def expected(chain: Chain, index: int) -> tuple[Tensor, ...]:
    return reference(chain, dict(zip(names.INPUTS_V2, arguments(chain, index), strict=True)))


def assert_same(actual: Any, other: Any) -> None:
    torch.testing.assert_close(actual, other, atol=0, rtol=0, equal_nan=True)


@each_call
def test_attention_is_the_reference(name: str, index: int) -> None:
    chain = named(name)
    inputs = arguments(chain, index)
    copies = [tensor.clone() for tensor in inputs]
    found = torch.ops.hip_trt.attention_v2(*inputs, **attributes(chain))
    assert_same(found, expected(chain, index))
    assert_same(inputs, copies)
    assert not {tensor.data_ptr() for tensor in found} & {tensor.data_ptr() for tensor in inputs}


@each_call
def test_attention_in_place_writes_state_onto_past(name: str, index: int) -> None:
    chain = named(name)
    inputs = dict(zip(names.INPUTS_V2, arguments(chain, index), strict=True))
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    output = torch.ops.hip_trt.attention_v2_(*inputs.values(), **attributes(chain))
    assert_same((output, *(inputs[name] for name in STATE)), expected(chain, index))
    for other in inputs.keys() - STATE:
        assert_same(inputs[other], before[other])


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize(("name", "index"), CALLS[1:3])
def test_registration(op: Any, name: str, index: int) -> None:
    chain = named(name)
    # 0 for NaN, which opcheck does not compare.
    inputs = [tensor.nan_to_num() if tensor.is_floating_point() else tensor for tensor in arguments(chain, index)]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)  # as models have it
    torch.library.opcheck(op, inputs, attributes(chain))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_schema_takes_the_names_of_the_operator(op: Any) -> None:
    arguments = op._schema.arguments
    assert tuple(argument.name for argument in arguments if not argument.kwarg_only) == names.INPUTS_V2
    given = attributes(named("dense"))
    assert {argument.name for argument in arguments if argument.kwarg_only} == set(given)


def test_shapes_and_types_without_data() -> None:
    chain = named("prefill, decode, prefill")
    inputs = [tensor.to("meta") for tensor in arguments(chain, 0)]
    results = torch.ops.hip_trt.attention_v2(*inputs, **attributes(chain))
    assert [(r.shape, r.dtype) for r in results] == [(r.shape, r.dtype) for r in expected(chain, 0)]
    assert torch.ops.hip_trt.attention_v2_(*inputs, **attributes(chain)).shape == inputs[0].shape


def test_compiles_without_graph_breaks() -> None:
    chain = named("prefill, decode, prefill")

    def decode(query: Tensor, *rest: Tensor) -> Tensor:
        return torch.ops.hip_trt.attention_v2_(query * 2, *rest, **attributes(chain)) + 1

    inputs, eager = arguments(chain, 2), arguments(chain, 2)
    torch.testing.assert_close(torch.compile(decode, fullgraph=True)(*inputs), decode(*eager), equal_nan=True)
    assert_same(inputs[1:], eager[1:])


def test_exports_with_dynamic_shapes() -> None:
    chain = named("prefill, decode, prefill")

    class Attention(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return torch.ops.hip_trt.attention_v2(*inputs, **attributes(chain))

    batch, tokens, pages, slots = (torch.export.Dim(name, min=2) for name in ("B", "S", "P", "M"))
    rows = {0: batch, 2: tokens}
    shapes = {
        "query": rows, "key": rows, "value": rows, "page_table": {0: batch, 1: slots}, "call_kind": None,
        **{name: {0: batch} for name in ("past_lengths", "query_lengths", "past_blocks", "refresh_mask")},
        **{name: {0: pages} for name in STATE[:4]},
    }
    program = torch.export.export(
        Attention(), tuple(arguments(chain, 0)), dynamic_shapes=(tuple(shapes[name] for name in names.INPUTS_V2),)
    )
    assert "torch.ops.hip_trt.attention_v2.default" in program.graph_module.code
    assert_same(program.module()(*arguments(chain, 4)), expected(chain, 4))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda tensor: tensor[0], r"query: shape .* is not allowed. It must have 4 dim"),
        ("query", lambda tensor: tensor[:, :3], r"query: 3 heads is not allowed. It must be a multiple of key's 2"),
        ("query", lambda tensor: tensor[..., :8], r"query: head size 8 is not allowed. It must be a multiple of 16"),
        ("key", lambda tensor: tensor[:, :, 1:], r"key: shape .* must be \[2, 2, 233, 16\]"),
        ("past_bounds", lambda tensor: tensor[:, :, 1:], r"past_bounds: shape .* must be \[\d+, 2, 2, 2, 16\]"),
        ("past_bounds", lambda tensor: tensor.half(), r"past_bounds: type torch.float16.* must be torch.float32"),
        ("past_codes", lambda tensor: tensor[..., :0], r"past_codes: shape .* must be \[\d+, 2, 32, 1\]"),
        ("past_codes", lambda tensor: tensor.long(), r"past_codes: type torch.int64.* must be torch.int32"),
        ("past_blocks", lambda tensor: tensor[:, :, :1], r"past_blocks: shape .* must be \[2, 2, 2\]"),
        ("refresh_mask", lambda tensor: tensor[:1], r"refresh_mask: shape \[1\].* must be \[2\]"),
        ("call_kind", lambda tensor: tensor.repeat(3), r"call_kind: shape \[3\].* must be \[1\] for prefill"),
        ("call_kind", lambda tensor: tensor.repeat(2), r"query: 233 new tokens is not allowed. A decode call has"),
    ],
)
def test_misfit_is_named(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    chain = named("prefill, decode, prefill")
    inputs = dict(zip(names.INPUTS_V2, arguments(chain, 0), strict=True))
    inputs[name] = change(inputs[name])
    for op in (torch.ops.hip_trt.attention_v2, torch.ops.hip_trt.attention_v2_):
        with pytest.raises(RuntimeInputError, match=message):
            op(*inputs.values(), **attributes(chain))


def test_attributes_are_validated() -> None:
    chain = named("dense")
    with pytest.raises(ConfigError, match="decode_mask_k: 3 is not allowed"):
        torch.ops.hip_trt.attention_v2(*arguments(chain, 0), **{**attributes(chain), "decode_mask_k": 3})


class FakeLibrary:
    """Stands for hip_trt.library.Library: computes with the reference, and takes only what the kernels take."""

    def attention_v2(
        self, *inputs: Tensor, config: Any, scale: float, dense: bool, **present: Tensor
    ) -> tuple[Tensor, ...]:
        assert all(tensor.is_contiguous() for tensor in (*inputs, *present.values()))
        self.present = present
        results = hip_attention_v2(*inputs, config=config, scale=scale, dense=dense)
        for name, result in zip(names.OUTPUTS_V2, results, strict=True):
            present.get(name, result).copy_(result)
        return results


@each_call
def test_cuda_calls_the_library(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library, chain = FakeLibrary(), named(name)
    monkeypatch.setattr(ops.library, "load", lambda: library)
    inputs = dict(zip(names.INPUTS_V2, arguments(chain, index), strict=True))
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(ops._attention_v2_cuda(*inputs.values(), **attributes(chain)), expected(chain, index))
    assert library.present == {}
    output = ops._attention_v2_cuda_(*inputs.values(), **attributes(chain))
    assert_same((output, *(inputs[name] for name in STATE)), expected(chain, index))
    assert [tensor.data_ptr() for tensor in library.present.values()] == [inputs[name].data_ptr() for name in STATE]
