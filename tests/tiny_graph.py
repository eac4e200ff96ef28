"""A tiny exported model, made in milliseconds: the model graph's inputs and outputs around real HipAttention nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.export.function import add_function
from hip_trt.spec import METADATA_KEY, ModelSpec

HIP = HipConfig.create(mask_k=64, decode_mask_k=32, block_k=16, page_size=16, sink_tokens=16, window_tokens=32)


def tiny_spec(layers: int = 2, head_dim: int = 64, hip: HipConfig = HIP) -> ModelSpec:
    return ModelSpec(
        model_type="llama", source="tiny", num_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, vocab_size=32, max_position_embeddings=256, dtype="float16", logits="all", hip=hip,
        hip_trt_version="0.1.0",
    )


def tiny_model(spec: ModelSpec) -> onnx.ModelProto:
    """Embedding, attention with a residual per layer, and logits; random weights."""
    graph = _Graph(spec)
    hidden = graph.add("Gather", [graph.weight("embedding.weight", spec.vocab_size, graph.width), names.INPUT_IDS])
    for layer in range(spec.num_layers):
        hidden = graph.add("Add", [hidden, graph.attention(layer, hidden)])
    logits = graph.add("MatMul", [hidden, graph.weight("lm_head.weight", graph.width, spec.vocab_size)])
    graph.add("Cast", [logits], names.LOGITS, to=TensorProto.FLOAT)
    return graph.model()


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Save with weights as external data, ``path``.data."""
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    return path


class _Graph:
    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.width = spec, spec.num_attention_heads * spec.head_dim
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.standard_normal(shape).astype(np.float16) / 16
        self.initializers.append(numpy_helper.from_array(values.astype(np.float16), name))
        return name

    def shape(self, *sizes: int) -> str:
        name = f"shape_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{len(self.nodes)}", **attributes))
        return output

    def attention(self, layer: int, hidden: str) -> str:
        spec = self.spec
        heads = {"q": spec.num_attention_heads, "k": spec.num_key_value_heads, "v": spec.num_key_value_heads}
        projected = []
        for name, count in heads.items():
            weight = self.weight(f"layers.{layer}.{name}_proj.weight", self.width, count * spec.head_dim)
            rows = self.add("Reshape", [self.add("MatMul", [hidden, weight]), self.shape(0, 0, count, spec.head_dim)])
            projected.append(self.add("Transpose", [rows], perm=[0, 2, 1, 3]))
        attended = f"attended.{layer}"
        self.nodes.append(helper.make_node(
            names.OP_TYPE,
            [
                *projected,
                *({tensor.past_input: tensor.past(layer) for tensor in names.STATE}.get(name, name)
                  for name in names.INPUTS[3:]),
            ],
            [attended, *(tensor.present(layer) for tensor in names.STATE)],
            name=f"attention.{layer}", domain=names.DOMAIN,
            **names.attributes(spec.hip, scale=spec.head_dim**-0.5, layer=layer),
        ))
        rows = self.add("Transpose", [attended], perm=[0, 2, 1, 3])
        return self.add("Reshape", [rows, self.shape(0, 0, self.width)])

    def model(self) -> onnx.ModelProto:
        spec, tensor = self.spec, helper.make_tensor_value_info
        inputs = [
            tensor(names.INPUT_IDS, TensorProto.INT64, ["batch", "sequence"]),
            tensor(names.PAST_LENGTHS, TensorProto.INT32, ["batch"]),
            tensor(names.QUERY_LENGTHS, TensorProto.INT32, ["batch"]),
            tensor(names.PAGE_TABLE, TensorProto.INT32, ["batch", "slots"]),
            tensor(names.REFRESH_MASK, TensorProto.INT32, [1]),
        ]
        outputs = [tensor(names.LOGITS, TensorProto.FLOAT, ["batch", "sequence", spec.vocab_size])]
        for layer in range(spec.num_layers):
            for kept in names.STATE:
                kind = TensorProto.INT32 if kept.integers else TensorProto.FLOAT16
                shape = ["pages" if kept.paged else "batch", *spec.state_shape(kept, 0)[1:]]
                inputs.append(tensor(kept.past(layer), kind, shape))
                outputs.append(tensor(kept.present(layer), kind, shape))
        model = helper.make_model(
            helper.make_graph(self.nodes, "tiny", inputs, outputs, self.initializers),
            opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
        )
        add_function(model)
        helper.set_model_props(model, {METADATA_KEY: spec.model_dump_json()})
        return model
