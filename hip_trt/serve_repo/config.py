"""Triton's ``config.pbtxt``, in protobuf's text format; the schema is ModelConfig in Triton's model_config.proto."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from hip_trt.errors import ConfigError
from hip_trt.offload import Offload
from hip_trt.sidecar import Sidecar, TensorRecord

_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
_OPTIONS = (
    ("stream", "TYPE_BOOL"), ("raw", "TYPE_BOOL"), ("max_tokens", "TYPE_INT32"), ("temperature", "TYPE_FP32"),
    ("top_p", "TYPE_FP32"), ("seed", "TYPE_INT64"),
)
_OFFLOAD = "offload"
_OFFLOAD_FIELD = "offload."
_OFFLOAD_NOTE = """\
# The KV cache is in host memory (docs/offload.md), or on the GPU where "offload" is "false". "offload.FIELD" sets a
# field of hip_trt.offload.Offload: key_cache_mib and value_cache_mib, or key_cache and value_cache, which are shares.
"""


def text_config(name: str, model: str, *, gpu: bool, instances: int, offload: Offload | None = None) -> str:
    """The model that takes text and gives text, through Triton's Python backend.

    Args:
        name: the model's name in Triton.
        model: file name of the plan or .onnx beside model.py.
        gpu: whether it runs on a GPU, the first.
        instances: copies of the model that answer at once.
        offload: keep KV caches in host memory; :func:`read_offload` finds it again.
    """
    inputs = [_tensor("text_input", "TYPE_STRING", [1])]
    inputs += [_tensor(option, kind, [1], optional=True) for option, kind in _OPTIONS]
    where = "kind: KIND_GPU gpus: [ 0 ]" if gpu else "kind: KIND_CPU"
    parameters = {"model": model, **_offload_parameters(offload)}
    note = "" if offload is None else _OFFLOAD_NOTE
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
{note}{"".join(_parameter(key, value) for key, value in parameters.items())}"""


def read_offload(parameters: Mapping[str, str]) -> Offload | None:
    """What a config.pbtxt says about offload, which may have been edited since it was written.

    Args:
        parameters: the text model's, by their keys. ``offload`` is true or false, ``offload.FIELD`` a field of
            :class:`Offload`; others are not looked at.

    Returns:
        How to keep KV caches in host memory; None: on the GPU.

    Raises:
        ConfigError: a parameter is not allowed.
    """
    remedy = "Correct it in config.pbtxt, or write the model again with hip-trt serve-repo."
    switch = parameters.get(_OFFLOAD)
    fields = {
        key.removeprefix(_OFFLOAD_FIELD): value for key, value in parameters.items() if key.startswith(_OFFLOAD_FIELD)
    }
    if switch not in (None, "true", "false"):
        raise ConfigError(f"parameter {_OFFLOAD}: {switch!r} is not allowed; it must be true or false.", remedy)
    if fields and switch is None:
        raise ConfigError(
            f"parameter {_OFFLOAD_FIELD}{next(iter(fields))}: there is no cache to size without the parameter "
            f"{_OFFLOAD}.", remedy
        )
    try:
        offload = Offload.create(**fields)
    except ConfigError as error:
        raise ConfigError(f"parameters {_OFFLOAD_FIELD}*: {error}.", remedy) from None
    return offload if switch == "true" else None


def _offload_parameters(offload: Offload | None) -> dict[str, str]:
    if offload is None:
        return {}
    fields = offload.model_dump(exclude_defaults=True)
    return {_OFFLOAD: "true", **{f"{_OFFLOAD_FIELD}{name}": json.dumps(value) for name, value in fields.items()}}


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}\n"


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
