"""torch.ops.hip_trt: registration, fake tensors, compile and export; results are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import Case, make_inputs, named, reference
from torch import Tensor

from hip_trt import operator as names
from hip_trt import ops
from hip_trt.errors import ConfigError, HipTrtError, RuntimeInputError
from hip_trt.reference import hip_attention

RAGGED = Case((0, 17, 70), (12, 5, 2), "ragged", new_tokens=14)
CASES = [RAGGED, Case((30, 0), (9, 12), "dense", dense=True),
         *(named(name) for name in ("reuse and search at once", "idle row in decode"))]
STATE = ("past_key", "past_value", "past_nodes")


def attributes(case: Case) -> dict[str, Any]:
    return {**names.attributes(case.config, scale=case.scale), "dense": int(case.dense)}


def arguments(case: Case, **changes: Tensor) -> list[Tensor]:
    inputs = {**make_inputs(case), **changes}
    return [inputs[name] for name in names.INPUTS]


def numbers(case: Case) -> list[Tensor]:
    """The inputs with 0 for NaN, which opcheck does not compare."""
    return [tensor.nan_to_num() if tensor.is_floating_point() else tensor for tensor in arguments(case)]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_reference(case: Case) -> None:
    inputs = arguments(case)
    copies = [tensor.clone() for tensor in inputs]
    actual = torch.ops.hip_trt.attention(*inputs, **attributes(case))
    assert_same(actual, reference(case, make_inputs(case)))
    assert_same(inputs, copies)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_place_writes_state_onto_past(case: Case) -> None:
    inputs = dict(zip(names.INPUTS, arguments(case), strict=True))
    output = torch.ops.hip_trt.attention_(*inputs.values(), **attributes(case))
    assert_same((output, *(inputs[name] for name in STATE)), reference(case, make_inputs(case)))
    for name, tensor in make_inputs(case).items():
        assert name in STATE or inputs[name].equal(tensor) or tensor.isnan().any()


@pytest.mark.parametrize("op", [torch.ops.hip_trt.attention.default, torch.ops.hip_trt.attention_.default], ids=str)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_registration(op: Any, case: Case) -> None:
    inputs = numbers(case)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)  # as models have it
    torch.library.opcheck(op, inputs, attributes(case))


@pytest.mark.parametrize("op", [torch.ops.hip_trt.attention.default, torch.ops.hip_trt.attention_.default], ids=str)
def test_schema_takes_the_names_of_the_operator(op: Any) -> None:
    arguments = op._schema.arguments
    assert tuple(argument.name for argument in arguments if not argument.kwarg_only) == names.INPUTS
    assert {argument.name for argument in arguments if argument.kwarg_only} == set(attributes(CASES[0]))


def test_shapes_and_types_without_data() -> None:
    case = RAGGED
    inputs = [tensor.to("meta") for tensor in arguments(case)]
    results = torch.ops.hip_trt.attention(*inputs, **attributes(case))
    assert [(r.shape, r.dtype) for r in results] == [(r.shape, r.dtype) for r in reference(case, make_inputs(case))]
    assert torch.ops.hip_trt.attention_(*inputs, **attributes(case)).shape == inputs[0].shape


def test_compiles_without_graph_breaks() -> None:
    case = CASES[2]

    def decode(query: Tensor, *rest: Tensor) -> Tensor:
        heads_last = (query * 2).transpose(1, 2).contiguous()  # as models compute it
        return torch.ops.hip_trt.attention_(heads_last.transpose(1, 2), *rest, **attributes(case)) + 1

    inputs = arguments(case)
    output = torch.compile(decode, fullgraph=True)(*inputs)
    eager = arguments(case)
    torch.testing.assert_close(output, decode(*eager))
    assert_same(inputs[1:], eager[1:])


def test_exports_with_dynamic_shapes() -> None:
    case, other = RAGGED, Case((40, 3), (20, 9), new_tokens=23)

    class Attention(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return torch.ops.hip_trt.attention(*inputs, **attributes(case))

    batch, tokens, pages, slots = (torch.export.Dim(name, min=2) for name in ("B", "S", "P", "M"))
    shapes = {
        "query": {0: batch, 2: tokens}, "key": {0: batch, 2: tokens}, "value": {0: batch, 2: tokens},
        "past_key": {0: pages}, "past_value": {0: pages}, "page_table": {0: batch, 1: slots},
        "past_lengths": {0: batch}, "query_lengths": {0: batch}, "past_nodes": {0: batch}, "refresh_mask": None,
    }
    program = torch.export.export(
        Attention(), tuple(arguments(case)), dynamic_shapes=(tuple(shapes[name] for name in names.INPUTS),)
    )
    assert "torch.ops.hip_trt.attention.default" in program.graph_module.code
    assert_same(program.module()(*arguments(other)), reference(other, make_inputs(other)))


def test_backward_is_refused() -> None:
    case = RAGGED
    inputs = arguments(case)
    inputs[0].requires_grad_()
    output = torch.ops.hip_trt.attention(*inputs, **attributes(case))[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda tensor: tensor[0], r"query: shape \[4, 14, 16\] is not allowed. It must have 4 dim"),
        ("query", lambda tensor: tensor[:, :3], r"query: 3 heads is not allowed. It must be a multiple of key's 2"),
        ("key", lambda tensor: tensor[:, :, 1:], r"key: shape \[3, 2, 13, 16\].* must be \[3, 2, 14, 16\]"),
        ("value", lambda tensor: tensor.half(), r"value: type torch.float16.* must be torch.float32"),
        ("past_key", lambda tensor: tensor[:, :, :4], r"past_key: shape .* must be \[\d+, 2, 8, 16\]"),
        ("past_value", lambda tensor: tensor[1:], r"past_value: shape"),
        ("page_table", lambda tensor: tensor[:2], r"page_table: shape \[2, 10\].* must be \[3, 10\]"),
        ("page_table", lambda tensor: tensor.long(), r"page_table: type torch.int64.* must be torch.int32"),
        ("past_lengths", lambda tensor: tensor[:1], r"past_lengths: shape \[1\].* must be \[3\]"),
        ("query_lengths", lambda tensor: tensor[:, None], r"query_lengths: shape"),
        ("past_nodes", lambda tensor: tensor[:, :, :2], r"past_nodes: shape \[3, 2, 2\].* must be \[3, 2, 3\]"),
        ("refresh_mask", lambda tensor: tensor[0], r"refresh_mask: shape \[\].* must be \[1\]"),
    ],
)
def test_misfit_is_named(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    case = RAGGED
    inputs = arguments(case, **{name: change(make_inputs(case)[name])})
    for op in (torch.ops.hip_trt.attention, torch.ops.hip_trt.attention_):
        with pytest.raises(RuntimeInputError, match=message):
            op(*inputs, **attributes(case))


def test_attributes_are_validated() -> None:
    case = RAGGED
    with pytest.raises(ConfigError, match="mask_k: 3 is not allowed"):
        torch.ops.hip_trt.attention(*arguments(case), **{**attributes(case), "mask_k": 3})
    assert issubclass(ConfigError, HipTrtError)


class FakeLibrary:
    """Stands for hip_trt.library.Library: computes with the reference, and takes only what the kernels take."""

    def attention(
        self, *inputs: Tensor, config: Any, scale: float, dense: bool, **present: Tensor
    ) -> tuple[Tensor, ...]:
        assert all(tensor.is_contiguous() for tensor in (*inputs, *present.values()))
        self.present = present
        results = hip_attention(*inputs, config=config, scale=scale, dense=dense)
        for name, result in zip(names.OUTPUTS, results, strict=True):
            present.get(name, result).copy_(result)
        return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_calls_the_library(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    monkeypatch.setattr(ops.library, "load", lambda: library)
    inputs = dict(zip(names.INPUTS, arguments(case), strict=True))
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = reference(case, make_inputs(case))
    assert_same(ops._attention_cuda(*inputs.values(), **attributes(case)), expected)
    assert library.present == {}
    output = ops._attention_cuda_(*inputs.values(), **attributes(case))
    assert_same((output, *(inputs[name] for name in STATE)), expected)
    assert [tensor.data_ptr() for tensor in library.present.values()] == [inputs[name].data_ptr() for name in STATE]
