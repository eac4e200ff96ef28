"""The operator schema: what onnx's checker and shape inference say about models that hold HipAttention."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, defs, helper

from hip_trt.config import HipConfig
from hip_trt.export.function import add_function, strip_function
from hip_trt.export.schema import register
from hip_trt.operator import DOMAIN, INPUTS, OP_TYPE, OP_VERSION, OUTPUTS, attributes

CONFIG = HipConfig.create(page_size=32, decode_mask_k=48)

Dims = list[Any]
SHAPES: dict[str, Dims] = {
    "query": ["batch", 8, "new", 64], "key": ["batch", 2, "new", 64], "value": ["batch", 2, "new", 64],
    "past_key": ["pages", 2, 32, 64], "past_value": ["pages", 2, 32, 64], "page_table": ["batch", "slots"],
    "past_lengths": ["batch"], "query_lengths": ["batch"], "past_nodes": ["batch", 2, 3], "refresh_mask": [1],
}
INFERRED: dict[str, Dims] = {
    "output": SHAPES["query"], "present_key": SHAPES["past_key"], "present_value": SHAPES["past_value"],
    "present_nodes": SHAPES["past_nodes"],
}


def make_model(
    shapes: dict[str, Dims] | None = None, *, config: HipConfig = CONFIG, element: int = TensorProto.FLOAT16,
    elements: dict[str, int] | None = None, without: str = "", function: bool = False, declare: bool = True,
    **changes: Any,
) -> onnx.ModelProto:
    """One node; outputs are of unknown sizes, or of unknown type and rank where they are not declared.

    ``without`` leaves one attribute out, ``changes`` sets others.
    """
    inputs = []
    for name, dims in (SHAPES | (shapes or {})).items():
        kind = element if len(SHAPES[name]) == 4 else TensorProto.INT32
        inputs.append(helper.make_tensor_value_info(name, (elements or {}).get(name, kind), dims))
    fields = attributes(config, scale=0.125) | changes
    fields.pop(without, None)
    node = helper.make_node(OP_TYPE, INPUTS, OUTPUTS, domain=DOMAIN, **fields)
    outputs = [onnx.ValueInfoProto(name=name) for name in OUTPUTS]
    if declare:
        kinds = dict.fromkeys(OUTPUTS, element) | {"present_nodes": TensorProto.INT32}
        outputs = [helper.make_tensor_value_info(name, kinds[name], [None] * len(INFERRED[name])) for name in OUTPUTS]
    graph = helper.make_graph([node], "node", inputs, outputs)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if function:
        add_function(model)
    return model


def infer(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def described(value: onnx.ValueInfoProto) -> tuple[int, Dims]:
    kind = value.type.tensor_type
    return kind.elem_type, [dim.dim_value or dim.dim_param or None for dim in kind.shape.dim]


@pytest.mark.parametrize("function", [False, True], ids=["node alone", "with its function"])
@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_types_and_shapes_are_inferred(element: int, function: bool) -> None:
    model = infer(make_model(element=element, function=function, declare=False))
    onnx.checker.check_model(model, full_check=True)
    types = dict.fromkeys(OUTPUTS, element) | {"present_nodes": TensorProto.INT32}
    assert {value.name: described(value) for value in model.graph.output} == {
        name: (types[name], dims) for name, dims in INFERRED.items()
    }


def test_stripped_model_is_checked_as_before() -> None:
    model = strip_function(make_model(function=True))
    assert not model.functions
    onnx.checker.check_model(infer(model), full_check=True)


def test_attributes_and_other_inputs_fill_in_what_is_unknown() -> None:
    unknown: dict[str, Dims] = {
        "query": [None, "heads", "new", None], "past_key": [None] * 4, "past_value": ["pages", None, None, None],
        "past_nodes": [None] * 3,
    }
    outputs = {value.name: described(value)[1] for value in infer(make_model(unknown)).graph.output}
    assert outputs == {
        "output": ["batch", "heads", "new", 64], "present_key": ["pages", 2, 32, 64],
        "present_value": ["pages", 2, 32, 64], "present_nodes": ["batch", 2, 3],
    }


def test_mask_heads_tell_how_many_masks_there_are() -> None:
    model = infer(make_model({"past_nodes": [None] * 3}, config=CONFIG.replace(mask_heads="query")))
    assert described(model.graph.output[3])[1] == ["batch", 8, 3]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": ["batch", 8, 64]}, r"query must have 4 dimensions, \[B, Hq, S, D\], and has 3"),
        ({"query": ["batch", 7, "new", 64]}, "query has 7 heads, not a multiple of key's 2"),
        ({"key": ["batch", 2, "new", 32]}, "D is 64, but 32 in key"),
        ({"value": ["batch", 4, "new", 64]}, "Hkv is 2, but 4 in value"),
        ({"past_key": ["pages", 2, 16, 64]}, "page_size is 32, but 16 in past_key"),
        ({"past_nodes": ["batch", 2, 4]}, "Kd is 3, but 4 in past_nodes"),
        ({"past_nodes": ["batch", 8, 3]}, 'Hm is 8, but 2 in mask_heads "kv"'),
        ({"refresh_mask": [2]}, "one is 1, but 2 in refresh_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("function", [False, True], ids=["node alone", "with its function"])
def test_contradicting_sizes_are_refused(shapes: dict[str, Dims], message: str, function: bool) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match=message):
        infer(make_model(shapes, function=function))


@pytest.mark.parametrize("name", sorted(attributes(CONFIG, scale=1.0)))
def test_every_attribute_is_required(name: str) -> None:
    with pytest.raises(onnx.checker.ValidationError, match=name):
        onnx.checker.check_model(make_model(without=name))


def test_attributes_are_validated_as_the_config_is() -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match="mask_k: 1000 is not allowed; it must be a multiple"):
        infer(make_model(mask_k=1000))


def test_unknown_attribute_is_refused() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="mask_q"):
        onnx.checker.check_model(make_model(mask_q=1))


@pytest.mark.parametrize(
    "elements", [{"query": TensorProto.DOUBLE}, {"key": TensorProto.FLOAT}, {"page_table": TensorProto.INT64}], ids=str
)
def test_wrong_types_are_refused(elements: dict[str, int]) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError):
        infer(make_model(elements=elements))


def test_schema_is_documented() -> None:
    schema = defs.get_schema(OP_TYPE, OP_VERSION, DOMAIN)
    assert [item.name for item in schema.inputs] == list(INPUTS)
    assert [item.name for item in schema.outputs] == list(OUTPUTS)
    assert all(item.description for item in [*schema.inputs, *schema.outputs, *schema.attributes.values()])
    assert set(schema.attributes) == set(attributes(CONFIG, scale=1.0))


def test_registration_may_be_repeated() -> None:
    register()
    register()
    assert defs.has(OP_TYPE, DOMAIN)
