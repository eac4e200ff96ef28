"""The C ABI of version 2 (plugins/cuda/hip_attention_v2.h), by ctypes on PyTorch tensors.

:class:`hip_trt.library.Library` is the way to it for everyone else; :class:`DecodeLibrary` calls it as bare as it is,
for tests and benchmarks of the decode kernels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hip_trt.operator import DECODE, INPUTS_V2, OUTPUTS_V2, PREFILL

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""HipTrtDataType."""
_STATUS = ("success", "invalid argument", "unsupported", "workspace too small", "CUDA error")
INPUTS = INPUTS_V2[:-1]
"""All that are tensors to the library; of call_kind it takes the size."""
ANY_CALL = 0
"""HIP_TRT_ANY_CALL; the other kinds are sizes of call_kind."""


class ShapeStruct(ctypes.Structure):
    """HipTrtShape."""

    _fields_ = [
        (name, ctypes.c_int32) for name in (
            "type", "batch", "new_tokens", "num_query_heads", "num_kv_heads", "head_dim", "num_pages",
            "pages_per_sequence",
        )
    ]


class ConfigV2Struct(ctypes.Structure):
    """HipTrtV2Config."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "mask_k", "block_q", "block_k", "stride_q", "stride_k", "branch", "leaf_branch", "decode_mask_k",
            "decode_search_k", "decode_block_k", "page_size", "sink_tokens", "window_tokens", "mask_per_query_head",
            "dense",
        )),
        ("value_threshold", ctypes.c_float), ("scale", ctypes.c_float),
    ]


class ParamsV2Struct(ctypes.Structure):
    """HipTrtV2Params."""

    _fields_ = [
        ("config", ConfigV2Struct), ("shape", ShapeStruct), ("call_kind", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (*INPUTS, *OUTPUTS_V2, "chosen_blocks", "workspace")),
        ("workspace_size", ctypes.c_size_t),
    ]


FUNCTIONS_V2: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("hipTrtV2Validate", ctypes.c_int, (
        ctypes.POINTER(ConfigV2Struct), ctypes.POINTER(ShapeStruct), ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)),
    ("hipTrtV2WorkspaceSize", ctypes.c_int, (
        ctypes.POINTER(ConfigV2Struct), ctypes.POINTER(ShapeStruct), ctypes.c_int, ctypes.POINTER(ctypes.c_size_t))),
    ("hipTrtV2Attention", ctypes.c_int, (ctypes.POINTER(ParamsV2Struct), ctypes.c_void_p)),
)
"""Name, result and arguments of each."""


class DecodeError(Exception):
    """A call was refused or failed; the message says why."""


@dataclass(frozen=True)
class DecodeSettings:
    """What of HipTrtV2Config counts for decode; the defaults are those of docs/decode_version_2.md."""

    mask_k: int = 8192
    search_k: int = 32768
    block: int = 64
    page_size: int = 64
    sink_tokens: int = 64
    window_tokens: int = 512
    mask_per_query_head: bool = False
    dense: bool = False
    value_threshold: float = 0.0
    scale: float = 1.0

    def struct(self) -> ConfigV2Struct:
        """As the library takes it."""
        fields = dict(vars(self))
        decode = {f"decode_{name}": fields.pop(field)
                  for name, field in (("mask_k", "mask_k"), ("search_k", "search_k"), ("block_k", "block"))}
        return ConfigV2Struct(**decode, **fields)


class DecodeLibrary:
    """A library with the entry points of hip_attention_v2.h.

    Args:
        path: of the library file.
    """

    def __init__(self, path: str | Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name, result, arguments in (
            *FUNCTIONS_V2,
            ("hipTrtV2Append", ctypes.c_int, (ctypes.POINTER(ParamsV2Struct), ctypes.c_void_p)),
            ("hipTrtLastCudaError", ctypes.c_char_p, ()),
        ):
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, arguments

    def validate(self, settings: DecodeSettings, shape: dict[str, int]) -> None:
        """Refuse what no kernel computes; shape fields may be left out.

        Raises:
            DecodeError: naming the field, its value and what is allowed.
        """
        message = ctypes.create_string_buffer(512)
        arguments = settings.struct(), ShapeStruct(**shape), DECODE, message, len(message)
        if self._functions.hipTrtV2Validate(*arguments) != 0:
            raise DecodeError(message.value.decode())

    def workspace_size(self, settings: DecodeSettings, query: Tensor, past_key: Tensor, page_table: Tensor) -> int:
        """Bytes that a call on such tensors needs."""
        size = ctypes.c_size_t()
        shape = _shape(query, past_key, page_table)
        self._check(self._functions.hipTrtV2WorkspaceSize(settings.struct(), shape, DECODE, size), settings, shape)
        return size.value

    def decode(self, tensors: dict[str, Tensor], settings: DecodeSettings, workspace: Tensor, stream: int = 0) -> None:
        """Launch a decode call. ``tensors``: all of INPUTS and OUTPUTS_V2, contiguous, on the library's device."""
        shape = _shape(tensors["query"], tensors["past_key"], tensors["page_table"])
        params = ParamsV2Struct(
            config=settings.struct(), shape=shape, call_kind=DECODE, workspace=workspace.data_ptr(),
            workspace_size=workspace.nbytes, **{name: tensors[name].data_ptr() for name in (*INPUTS, *OUTPUTS_V2)},
        )
        self._check(self._functions.hipTrtV2Attention(params, stream), settings, shape)

    def append(self, tensors: dict[str, Tensor], settings: DecodeSettings, stream: int = 0) -> None:
        """Launch what a prefill does to the state. ``tensors``: as :meth:`decode`, as far as state is concerned."""
        shape = _shape(tensors["key"], tensors["past_key"], tensors["page_table"])
        params = ParamsV2Struct(config=settings.struct(), shape=shape, call_kind=PREFILL, **{
            name: tensors[name].data_ptr() for name in (*INPUTS, *OUTPUTS_V2) if name in tensors
        })
        self._check(self._functions.hipTrtV2Append(params, stream), settings, shape)

    def _check(self, status: int, settings: DecodeSettings, shape: ShapeStruct) -> None:
        if status != 0:
            names = [field[0] for field in ShapeStruct._fields_ if field[0] != "new_tokens"]
            self.validate(settings, {name: getattr(shape, name) for name in names})
            error = self._functions.hipTrtLastCudaError().decode() if status == 4 else ""
            raise DecodeError(f"{_STATUS[status]} {error}".strip())


def _shape(query: Tensor, past_key: Tensor, page_table: Tensor) -> ShapeStruct:
    batch, heads, new_tokens, head_dim = query.shape
    pages, kv_heads, _, _ = past_key.shape
    return ShapeStruct(TYPES[query.dtype], batch, new_tokens, heads, kv_heads, head_dim, pages, page_table.shape[1])
