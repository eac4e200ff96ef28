"""The C ABI of decode, version 2 (plugins/cuda/hip_decode.h), by ctypes on PyTorch tensors.

It stands alone, so that a benchmark can load this file on a machine without the package. :mod:`hip_trt.library` will
take it in when version 2 replaces version 1.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATUS = ("success", "invalid argument", "unsupported", "workspace too small", "CUDA error")
INPUTS = (
    "query", "key", "value", "past_key", "past_value", "past_bounds", "past_codes", "page_table", "past_lengths",
    "query_lengths", "past_blocks", "refresh_mask",
)
OUTPUTS = ("output", "present_key", "present_value", "present_bounds", "present_codes", "present_blocks")
STATE = ("key", "value", "bounds", "codes")


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "mask_k", "search_k", "block", "page_size", "sink_tokens", "window_tokens", "mask_per_query_head", "dense",
        )),
        ("value_threshold", ctypes.c_float), ("scale", ctypes.c_float),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32) for name in (
            "type", "batch", "new_tokens", "num_query_heads", "num_kv_heads", "head_dim", "num_pages",
            "pages_per_sequence",
        )
    ]


class _Params(ctypes.Structure):
    _fields_ = [
        ("config", _Config), ("shape", _Shape),
        *((name, ctypes.c_void_p) for name in (*INPUTS, *OUTPUTS, "workspace")),
        ("workspace_size", ctypes.c_size_t),
    ]


class DecodeError(Exception):
    """A call was refused or failed; the message says why."""


@dataclass(frozen=True)
class DecodeSettings:
    """HipTrtDecodeConfig; the defaults are those of docs/decode_version_2.md."""

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

    def struct(self) -> _Config:
        """As the library takes it."""
        return _Config(*(getattr(self, field[0]) for field in _Config._fields_))


class DecodeLibrary:
    """A library with the entry points of hip_decode.h.

    Args:
        path: of the library file.
    """

    def __init__(self, path: str | Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("hipTrtDecodeValidate", ctypes.c_int, (
                ctypes.POINTER(_Config), ctypes.POINTER(_Shape), ctypes.c_char_p, ctypes.c_size_t)),
            ("hipTrtDecodeWorkspace", ctypes.c_int, (
                ctypes.POINTER(_Config), ctypes.POINTER(_Shape), ctypes.POINTER(ctypes.c_size_t))),
            ("hipTrtDecode", ctypes.c_int, (ctypes.POINTER(_Params), ctypes.c_void_p)),
            ("hipTrtDecodeAppend", ctypes.c_int, (ctypes.POINTER(_Params), ctypes.c_void_p)),
            ("hipTrtDecodeLastCudaError", ctypes.c_char_p, ()),
        ):
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, arguments

    def validate(self, settings: DecodeSettings, shape: dict[str, int]) -> None:
        """Refuse what no kernel computes; shape fields may be left out.

        Raises:
            DecodeError: naming the field, its value and what is allowed.
        """
        message = ctypes.create_string_buffer(512)
        if self._functions.hipTrtDecodeValidate(settings.struct(), _Shape(**shape), message, len(message)) != 0:
            raise DecodeError(message.value.decode())

    def workspace_size(self, settings: DecodeSettings, query: Tensor, past_key: Tensor, page_table: Tensor) -> int:
        """Bytes that a call on such tensors needs."""
        size = ctypes.c_size_t()
        shape = _shape(query, past_key, page_table)
        self._check(self._functions.hipTrtDecodeWorkspace(settings.struct(), shape, size), settings, shape)
        return size.value

    def decode(self, tensors: dict[str, Tensor], settings: DecodeSettings, workspace: Tensor, stream: int = 0) -> None:
        """Launch a decode call. ``tensors``: all of INPUTS and OUTPUTS, contiguous, on the library's device."""
        shape = _shape(tensors["query"], tensors["past_key"], tensors["page_table"])
        params = _Params(
            config=settings.struct(), shape=shape, workspace=workspace.data_ptr(), workspace_size=workspace.nbytes,
            **{name: tensors[name].data_ptr() for name in (*INPUTS, *OUTPUTS)},
        )
        self._check(self._functions.hipTrtDecode(params, stream), settings, shape)

    def append(self, tensors: dict[str, Tensor], settings: DecodeSettings, stream: int = 0) -> None:
        """Launch the append of a prompt's chunk. ``tensors``: as :meth:`decode`, as far as state is concerned."""
        shape = _shape(tensors["key"], tensors["past_key"], tensors["page_table"])
        params = _Params(config=settings.struct(), shape=shape, **{
            name: tensors[name].data_ptr() for name in (*INPUTS, *OUTPUTS) if name in tensors
        })
        self._check(self._functions.hipTrtDecodeAppend(params, stream), settings, shape)

    def _check(self, status: int, settings: DecodeSettings, shape: _Shape) -> None:
        if status != 0:
            names = [field[0] for field in _Shape._fields_ if field[0] != "new_tokens"]
            self.validate(settings, {name: getattr(shape, name) for name in names})
            error = self._functions.hipTrtDecodeLastCudaError().decode() if status == 4 else ""
            raise DecodeError(f"{_STATUS[status]} {error}".strip())


def _shape(query: Tensor, past_key: Tensor, page_table: Tensor) -> _Shape:
    batch, heads, new_tokens, head_dim = query.shape
    pages, kv_heads, _, _ = past_key.shape
    return _Shape(_TYPES[query.dtype], batch, new_tokens, heads, kv_heads, head_dim, pages, page_table.shape[1])
