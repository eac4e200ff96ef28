"""Triton's ``config.pbtxt``, in protobuf's text format; the schema is ModelConfig in Triton's model_config.proto."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from hip_trt.sidecar import Sidecar, TensorRecord

_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
_OPTIONS = (
    ("stream", "TYPE_BOOL"), ("raw", "TYPE_BOOL"), ("max_tokens", "TYPE_INT32"), ("temperature", "TYPE_FP32"),
    ("top_p", "TYPE_FP32"), ("seed", "TYPE_INT64"),
)


def text_config(name: str, model: str, *, gpu: bool, instances: int) -> str:
    """The model that takes text and gives text, through Triton's Python backend.

    Args:
        name: the model's name in Triton.
        model: file name of the plan or .onnx beside model.py.
        gpu: whether it runs on a GPU, the first.
        instances: copies of the model that answer at once.
    """
    inputs = [_tensor("text_input", "TYPE_STRING", [1])]
    inputs += [_tensor(option, kind, [1], optional=True) for option, kind in _OPTIONS]
    where = "kind: KIND_GPU gpus: [ 0 ]" if gpu else "kind: KIND_CPU"
    return f"""\
# Text in, text out: model.py runs {model} with hip-trt's runtime, which keeps the KV cache.
# With "stream" there is a response for each piece of text, else one with all of it.
name: {_quote(name)}
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input {_list(inputs)}
output {_list([_tensor("text_output", "TYPE_STRING", [1])])}
instance_group [ {{ count: {instances} {where} }} ]
parameters {{ key: "model" value {{ string_value: {_quote(model)} }} }}
"""


def engine_config(name: str, sidecar: Sidecar, library: str) -> str:
    """The bare engine, through Triton's TensorRT backend: the client brings the KV cache and takes it back.

    Args:
        name: the model's name in Triton.
        sidecar: the plan's description.
        library: file name of the plugin library beside the plan.
    """
    profiles = ", ".join(_quote(str(index)) for index in range(len(sidecar.profiles)))
    return f"""\
# The engine itself. All state is input and output: page pools, page table, lengths, nodes (docs/operator.md). Keep the
# pools in CUDA shared memory; sent over the network they would dwarf the answer. Start Triton with
#   --backend-config=tensorrt,plugins=REPOSITORY/{name}/1/{library}
name: {_quote(name)}
platform: "tensorrt_plan"
default_model_filename: {_quote(sidecar.plan.name)}
max_batch_size: 0
input {_list(_records(sidecar.inputs))}
output {_list(_records(sidecar.outputs))}
instance_group [ {{ count: 1 kind: KIND_GPU gpus: [ 0 ] profile: [ {profiles} ] }} ]
"""


def _records(tensors: Iterable[TensorRecord]) -> list[str]:
    return [_tensor(tensor.name, _TYPES[tensor.dtype], tensor.shape) for tensor in tensors]


def _tensor(name: str, kind: str, dims: Sequence[int], *, optional: bool = False) -> str:
    more = " optional: true" if optional else ""
    return f"{{ name: {_quote(name)} data_type: {kind} dims: [ {', '.join(map(str, dims))} ]{more} }}"


def _list(items: Sequence[str]) -> str:
    return "[\n  " + ",\n  ".join(items) + "\n]"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
