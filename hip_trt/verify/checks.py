"""What the files themselves say, before anything runs: checksums of weights, attributes, RoPE's constants."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hip_trt import operator as names
from hip_trt.files import sha256
from hip_trt.onnx_file import OnnxFile
from hip_trt.verify.observed import layer_of
from hip_trt.verify.report import Check


def check_weights(file: OnnxFile, advance: Callable[[int], object] = lambda count: None) -> Check:
    """Whether the weights' files are what they were at the export."""
    name = "weights' checksums"
    unknown = [path.name for path in file.data if path not in file.checksums]
    for path, record in file.checksums.items():
        if sha256(path, advance) != record.sha256:
            return Check(name=name, passed=False, detail=f"{path.name} is not the file that was exported")
    detail = f"{len(file.checksums)} of {len(file.data)} files as exported"
    return Check(name=name, passed=True, detail=f"{detail}; no checksum of {unknown[0]}" if unknown else detail)


def check_attributes(file: OnnxFile) -> Check:
    """Whether every HipAttention node computes what the model's facts say."""
    name, spec = "attention attributes", file.spec
    nodes = file.attention_nodes
    layers = sorted(layer_of(node) for node in nodes)
    if layers != list(range(spec.num_layers)):
        return Check(name=name, passed=False, detail=f"{len(nodes)} HipAttention nodes for {spec.num_layers} layers")
    scales = {attribute.f for node in nodes for attribute in node.attribute if attribute.name == "scale"}
    for node in nodes:
        layer, found = layer_of(node), {item.name: _value(item) for item in node.attribute}
        expected = names.attributes(spec.hip, scale=found.get("scale", 0.0), layer=layer)
        wrong = [field for field, value in expected.items() if found.get(field) != value]
        if wrong:
            field = wrong[0]
            return Check(
                name=name, passed=False,
                detail=f"layer {layer}: {field} is {found.get(field)}, and the model's facts say {expected[field]}",
            )
    more = "" if len(scales) == 1 else f"; {len(scales)} different scales"
    return Check(name=name, passed=True, detail=f"{len(nodes)} nodes as the model's facts say{more}")


def rope_constants(file: OnnxFile) -> tuple[dict[str, np.ndarray[Any, Any]], Check | None]:
    """RoPE's frequencies as the config.json beside the model has them, by initializer, and how the file's compare.

    None for the check where there is no config.json, or no such constant in the graph.
    """
    from hip_trt.export.families import find_family
    from hip_trt.export.graph import buffers

    path = file.path.with_name("config.json")
    stored = {tensor.name: tensor for tensor in file.model.graph.initializer if tensor.name.endswith("inv_freq")}
    if not path.is_file() or not stored:
        return {}, None
    fields = json.loads(path.read_text(encoding="utf-8"))
    family = find_family(fields, str(path))
    values = buffers(family, family.config_class.from_dict(fields), file.spec.max_position_embeddings)
    expected = {
        name: values[name].numpy().astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        for name, tensor in stored.items() if name in values
    }
    detail = f"{len(expected)} tables as in config.json"
    for name in list(expected):
        found = _array(stored[name], file)
        if found.shape == expected[name].shape and np.allclose(found, expected[name], rtol=1e-6, atol=0):
            continue
        if found.shape == expected[name].shape and _own_factors(expected[name] / found):
            detail = f"{name}: divided as in a GGUF file with factors of its own, which were taken as they are"
            del expected[name]
            continue
        detail = f"{name}: {_difference(found, expected[name])}"
        return expected, Check(name="RoPE constants", passed=False, detail=detail)
    return expected, Check(name="RoPE constants", passed=True, detail=detail)


def _own_factors(divisors: np.ndarray[Any, Any]) -> bool:
    """Whether divisors look like a GGUF file's rope_freqs: 1 for fast frequencies, one larger value for slow ones."""
    rising = bool(np.all(np.diff(divisors) >= -1e-5)) and abs(float(divisors[0]) - 1) < 1e-5
    return rising and int(np.isclose(divisors, divisors[-1], rtol=1e-4).sum()) >= max(2, len(divisors) // 8)


def _difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> str:
    if found.shape != expected.shape:
        return f"{list(found.shape)} values, and {list(expected.shape)} by config.json"
    worst = int(np.abs(found / expected - 1).argmax())
    return f"value {worst} is {found[worst]:.6g}, and {expected[worst]:.6g} by config.json"


def _array(tensor: onnx.TensorProto, file: OnnxFile) -> np.ndarray[Any, Any]:
    return np.asarray(numpy_helper.to_array(tensor, str(file.path.parent)))


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value
