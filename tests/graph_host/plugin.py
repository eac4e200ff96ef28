"""The TensorRT plugin in this process, driven through TensorRT's interfaces by plugins/tests/plugin_session.cpp.

A layer lives as in TensorRT: :meth:`Plugin.layer` is what the ONNX parser makes of a node, :meth:`Layer.configure` the
build of an engine, :meth:`Layer.attach` the layer of an execution context, saved and loaded in between, and
:class:`AttachedLayer` runs on PyTorch's tensors.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hip_trt import operator as names

_TYPES = {  # nvinfer1::DataType
    torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bool: 4, torch.int64: 8, torch.bfloat16: 7,
}
_TORCH_TYPES = {number: dtype for dtype, number in _TYPES.items()}
_INPUTS, _OUTPUTS = len(names.INPUTS), len(names.OUTPUTS)


class _Tensor(ctypes.Structure):
    """SessionTensor."""

    _fields_ = [("type", c_int32), ("rank", c_int32), ("sizes", c_int64 * 8)]


class _Attribute(ctypes.Structure):
    """SessionAttribute."""

    _fields_ = [("name", c_char_p), ("text", c_char_p), ("integer", c_int32), ("real", c_float), ("is_real", c_int32)]


class PluginFailure(Exception):
    """What the plugin refused or logged, and every check of its answers that failed."""


@dataclass(frozen=True)
class TensorShape:
    """Type and shape of a tensor.

    Attributes:
        dtype: one that TensorRT has too.
        sizes: -1 where dynamic.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorShape:
        return cls(tensor.dtype, tuple(tensor.shape))


def _structs(shapes: Sequence[TensorShape]) -> Any:
    assert len(shapes) == _INPUTS
    return (_Tensor * _INPUTS)(*(
        _Tensor(_TYPES[shape.dtype], len(shape.sizes), (c_int64 * 8)(*shape.sizes)) for shape in shapes
    ))


class Plugin:
    """A plugin library, loaded as TensorRT loads it. One at a time in a process; layers keep it loaded.

    Args:
        session: the library of plugin_session.cpp.
        library: the plugin library. Whoever calls its C ABI from the same file shares its state.
        tensorrt: TensorRT library whose plugin registry loads it; None: no TensorRT.

    Raises:
        PluginFailure: it cannot be loaded.
    """

    def __init__(self, session: Path, library: Path, tensorrt: Path | None = None) -> None:
        functions = ctypes.CDLL(str(session))
        tensors = POINTER(_Tensor)
        for name, result, arguments in (
            ("pluginSessionErrors", c_char_p, ()),
            ("pluginSessionOpen", c_void_p, (c_char_p, c_char_p)),
            ("pluginSessionClose", None, (c_void_p,)),
            ("pluginLayerCreate", c_void_p, (c_void_p, c_char_p, POINTER(_Attribute), c_int32)),
            ("pluginLayerOutputs", c_int32, (c_void_p, tensors, tensors)),
            ("pluginLayerConfigure", c_size_t, (c_void_p, tensors, tensors, tensors)),
            ("pluginLayerAttach", c_void_p, (c_void_p,)),
            ("pluginLayerResize", c_int32, (c_void_p, tensors)),
            ("pluginLayerEnqueue", c_int32, (c_void_p, POINTER(c_void_p), POINTER(c_void_p), c_void_p, c_void_p)),
            ("pluginLayerDestroy", None, (c_void_p,)),
        ):
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
        self.functions = functions
        self.session, self.library = session, library
        handle = functions.pluginSessionOpen(str(library).encode(), str(tensorrt).encode() if tensorrt else None)
        self.handle = self.check(handle, f"load {library}")
        self._close = weakref.finalize(self, functions.pluginSessionClose, handle)

    def check(self, result: Any, what: str) -> Any:
        """The result of a function that returns a handle or a size.

        Raises:
            PluginFailure: it is null, or something was logged.
        """
        errors = self.functions.pluginSessionErrors().decode(errors="replace").strip()
        if errors or not result:
            raise PluginFailure(f"{what}: {errors or 'failed'}")
        return result

    def layer(self, name: str, attributes: Mapping[str, int | float | str]) -> Layer:
        """What TensorRT's parser makes of a HipAttention node.

        Args:
            name: the node's.
            attributes: all of the node's attributes.
        """
        values = (_Attribute * len(attributes))(*(_attribute(key, value) for key, value in attributes.items()))
        handle = self.functions.pluginLayerCreate(self.handle, name.encode(), values, len(values))
        return Layer(self, self.check(handle, f"create {name}"), name)

    def close(self) -> None:
        """Unload the library; its layers must be gone."""
        self._close()


def _attribute(name: str, value: int | float | str) -> _Attribute:
    if isinstance(value, str):
        return _Attribute(name.encode(), value.encode(), 0, 0.0, 0)
    if isinstance(value, float):
        return _Attribute(name.encode(), None, 0, value, 1)
    return _Attribute(name.encode(), None, value, 0.0, 0)


class Layer:
    """A layer of a network."""

    def __init__(self, plugin: Plugin, handle: int, name: str) -> None:
        self.plugin, self.handle, self.name = plugin, handle, name
        weakref.finalize(self, plugin.functions.pluginLayerDestroy, handle)

    def outputs(self, inputs: Sequence[TensorShape]) -> list[TensorShape]:
        """Types and shapes of the outputs for such inputs, by the plugin's word.

        Raises:
            PluginFailure: it refuses them.
        """
        found = (_Tensor * _OUTPUTS)()
        status = self.plugin.functions.pluginLayerOutputs(self.handle, _structs(inputs), found)
        self.plugin.check(status == 0, f"{self.name}: outputs")
        return [TensorShape(_TORCH_TYPES[one.type], tuple(one.sizes[: one.rank])) for one in found]

    def configure(self, smallest: Sequence[TensorShape], largest: Sequence[TensorShape]) -> int:
        """Take part in the build of an engine, for one optimization profile. Sizes that differ are dynamic.

        Returns:
            Bytes of workspace that calls of the profile need.

        Raises:
            PluginFailure: no kernel computes it.
        """
        dynamic = [
            TensorShape(most.dtype, tuple(b if a == b else -1 for a, b in zip(least.sizes, most.sizes, strict=True)))
            for least, most in zip(smallest, largest, strict=True)
        ]
        size = self.plugin.functions.pluginLayerConfigure(
            self.handle, *(_structs(shapes) for shapes in (dynamic, smallest, largest))
        )
        return int(self.plugin.check(size, f"{self.name}: configure"))

    def attach(self) -> AttachedLayer:
        """The layer of a new execution context of the engine."""
        handle = self.plugin.functions.pluginLayerAttach(self.handle)
        return AttachedLayer(self.plugin, self.plugin.check(handle, f"{self.name}: attach"), self.name)


class AttachedLayer:
    """A layer of an execution context."""

    def __init__(self, plugin: Plugin, handle: int, name: str) -> None:
        self.plugin, self.name = plugin, name
        self._handle = handle
        self._enqueue = plugin.functions.pluginLayerEnqueue
        weakref.finalize(self, plugin.functions.pluginLayerDestroy, handle)

    def resize(self, inputs: Sequence[TensorShape]) -> None:
        """Sizes of calls from now on.

        Raises:
            PluginFailure: the plugin refuses them.
        """
        status = self.plugin.functions.pluginLayerResize(self._handle, _structs(inputs))
        self.plugin.check(status == 0, f"{self.name}: shapes")

    def enqueue(
        self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Order the layer on a stream.

        Args:
            inputs, outputs: addresses, in the operator's order; memory is contiguous.
            workspace: address of as many bytes as :meth:`Layer.configure` said.
            stream: cudaStream_t.

        Raises:
            PluginFailure: the plugin's own failure.
        """
        status = self._enqueue(
            self._handle, (c_void_p * _INPUTS)(*inputs), (c_void_p * _OUTPUTS)(*outputs), workspace, stream
        )
        if status != 0:
            self.plugin.check(False, f"{self.name}: enqueue")
