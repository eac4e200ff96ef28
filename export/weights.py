"""Where an exported model's weights lie: in one file of the model's own, or in the checkpoint's files.

They are copied, one at a time, into a file that every tool reads. Two cases spare the copy, as ONNX refers to weights
by file, offset and length, and a safetensors file is weights one after the other behind a header, so that the graph can
point straight into it. A model in the checkpoint's own folder points at the checkpoint's files as they lie. And where
the user asks for links, so does one in a folder above, and elsewhere the files get hard links in the model's folder,
which take no space: they are the same files under a second name, and stay when the first goes. (Runtimes read files of
the model's folder and below only, and follow no symbolic link that leads out of it. ONNX Runtime and TensorRT take hard
links; the Python package onnx refuses them.) What is stored in another type than the model's, or quantized, or on
another file system, is copied in any case.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor

from hip_trt.export.graph import Trace
from hip_trt.export.int4 import Int4Weight, quantized_parameters, quantized_size, quantizer
from hip_trt.export.stored import Extent, StoredTensor, convert
from hip_trt.files import Staging, sha256
from hip_trt.onnx_file import NAME_DIGITS, WeightsFile

Placement = Literal["copied", "linked", "in place"]

_ALIGNMENT = 4096  # bytes: a page of memory, so that runtimes can map weights


@dataclass(frozen=True)
class WeightsPlan:
    """What becomes of each weight, decided before any work.

    Attributes:
        in_place: parameters that stay in the checkpoint's files, and where.
        files: those files: name in the model's folder, or None for a link, which is named when its checksum is known.
        quantized: parameters that are written in four bits, and their blocks.
        copied: bytes that are copied.
        warning: why files that could stay are copied; empty if none is.
    """

    in_place: Mapping[str, Extent]
    files: Mapping[Path, str | None]
    quantized: Mapping[str, int]
    copied: int
    warning: str = ""

    @property
    def placement(self) -> Placement:
        """What became of most of them."""
        if not self.in_place:
            return "copied"
        return "linked" if None in self.files.values() else "in place"

    @property
    def work(self) -> int:
        """Bytes to read or write: copies, and the checksums of files that stay."""
        return self.copied + sum(path.stat().st_size for path in self.files)


def plan_weights(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, stage: Staging, *,
    link: bool, quantize: bool = False,
) -> WeightsPlan:
    """Decide which weights stay in the checkpoint's files.

    Args:
        tensors: the checkpoint's weights.
        shapes: the parameters that the model has.
        dtype: the model's type.
        stage: where the model is made. Links are made here at once, which shows whether they can be.
        link: whether to link what lies elsewhere.
        quantize: whether to write the weights of linear layers in four bits; then the others are copied beside them.
    """
    quantized = quantized_parameters(shapes) if quantize else {}
    extents = {name: tensors[name].extent for name in shapes}
    stay = {
        name: extent for name, extent in extents.items()
        if extent is not None and extent.dtype == dtype and not quantize
    }
    files: dict[Path, str | None] = {}
    warning = ""
    target = stage.target.resolve()
    for path in {extent.path.resolve(): None for extent in stay.values()}:
        if path.parent == target or (link and path.is_relative_to(target)):
            files[path] = path.relative_to(target).as_posix()
            continue
        if not link:
            continue
        try:
            os.link(path, _link(stage, len(files)))
        except OSError as error:
            warning = f"{path}: it cannot be linked into {stage.target} ({error.strerror}), so its weights are copied."
        else:
            files[path] = None
    stay = {name: extent for name, extent in stay.items() if extent.path.resolve() in files}
    copied = sum(
        quantized_size(shape, quantized[name], dtype) if name in quantized else math.prod(shape) * dtype.itemsize
        for name, shape in shapes.items() if name not in stay
    )
    return WeightsPlan(stay, files, quantized, copied, warning)


def _link(stage: Staging, number: int) -> Path:
    return stage.path / f"link-{number}"


def write_weights(
    plan: WeightsPlan, tensors: Mapping[str, StoredTensor], traced: Trace, dtype: torch.dtype, stage: Staging,
    stem: str, advance: Callable[[int], object],
) -> tuple[WeightsFile, ...]:
    """Give every initializer of the traced graph its value, in a file of the checkpoint or in a new one.

    Returns:
        The files; those without a folder in their name, and not of the checkpoint's folder, are staged.
    """
    records = {path: _settle(stage, stem, path, name, number, advance)
               for number, (path, name) in enumerate(plan.files.items())}
    graph = traced.model.graph
    own = _OwnFile(stage, advance)
    with own, torch.no_grad():
        quantize = quantizer() if plan.quantized else None
        for name, weight in list(traced.weights.items()):
            value, extent = graph.initializers[name], plan.in_place.get(weight.parameter)
            if extent is not None:
                if weight.transposed:
                    value = _transpose_in_graph(graph, value, weight.parameter)
                _refer(value, records[extent.path.resolve()].name, extent.offset, extent.length, stage)
                continue
            tensor = tensors[weight.parameter].load()
            if quantize and weight.transposed and weight.parameter in plan.quantized:
                integers = quantize(tensor, plan.quantized[weight.parameter], dtype)
                packed, scale = _dequantize_in_graph(graph, value, weight.parameter, integers)
                own.add(packed, integers.packed)
                own.add(scale, integers.scale)
                continue
            tensor = convert(tensor, dtype, weight.parameter)
            own.add(value, tensor.t() if weight.transposed else tensor)
    record = own.finish(stem)
    return (*records.values(), *([record] if record else []))


class _OwnFile:
    """The file of the weights that are copied; one weight is in memory at a time."""

    def __init__(self, stage: Staging, advance: Callable[[int], object]) -> None:
        self.stage, self.advance = stage, advance
        self.path, self.digest = stage.path / "weights", hashlib.sha256()
        self.extents: list[tuple[ir.Value, int, int]] = []

    def __enter__(self) -> None:
        self.file = open(self.path, "wb")

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, value: ir.Value, tensor: Tensor) -> None:
        """Write the value of an initializer."""
        content = tensor.contiguous().view(torch.uint8).numpy().data
        padding = bytes(-self.file.tell() % _ALIGNMENT)
        for part in (padding, content):
            self.file.write(part)
            self.digest.update(part)
        self.extents.append((value, self.file.tell() - content.nbytes, content.nbytes))
        self.advance(content.nbytes)

    def finish(self, stem: str) -> WeightsFile | None:
        """Name the file by its checksum, refer the initializers to it, and describe it; None if nothing was written."""
        if not self.extents:
            self.path.unlink()
            return None
        checksum = self.digest.hexdigest()
        record = WeightsFile(name=data_name(stem, checksum), size=self.path.stat().st_size, sha256=checksum)
        self.path.rename(self.stage.path / record.name)
        for value, offset, length in self.extents:
            _refer(value, record.name, offset, length, self.stage)
        return record


def data_name(stem: str, digits: str) -> str:
    """Name of the weights that an export copies."""
    return f"{stem}-{digits[:NAME_DIGITS]}.onnx.data"


def link_name(stem: str, digits: str) -> str:
    """Name of a link to a file of the checkpoint."""
    return f"{stem}-{digits[:NAME_DIGITS]}.safetensors"


def _settle(
    stage: Staging, stem: str, path: Path, name: str | None, number: int, advance: Callable[[int], object]
) -> WeightsFile:
    """Describe a file of the checkpoint, and give its link, if it has one, its final name."""
    status = path.stat()
    checksum = sha256(path, advance)
    if name is None:
        name = link_name(stem, checksum)
        _link(stage, number).rename(stage.path / name)
    return WeightsFile(name=name, size=status.st_size, sha256=checksum, mtime_ns=status.st_mtime_ns)


def _refer(value: ir.Value, location: str, offset: int, length: int, stage: Staging) -> None:
    assert value.shape is not None
    assert value.dtype is not None
    value.const_value = ir.ExternalTensor(
        location, offset, length, value.dtype, shape=value.shape, name=value.name or "", base_dir=stage.path
    )


def _transpose_in_graph(graph: ir.Graph, transposed: ir.Value, parameter: str) -> ir.Value:
    """Replace an initializer by a Transpose of the weight as it is stored, and return that weight's initializer.

    Runtimes transpose it when they load the model, or choose a matrix product that takes it as it is.
    """
    assert transposed.shape is not None
    stored = ir.Value(
        name=parameter, shape=ir.Shape(reversed(transposed.shape.dims)), type=ir.TensorType(transposed.dtype)
    )
    node = ir.Node("", "Transpose", [stored], [ir.AttrInt64s("perm", [1, 0])], num_outputs=1)
    _replace_initializer(graph, transposed, [stored], node, parameter)
    return stored


def _dequantize_in_graph(
    graph: ir.Graph, transposed: ir.Value, parameter: str, weight: Int4Weight
) -> tuple[ir.Value, ir.Value]:
    """Replace an initializer by integers, a scale and a DequantizeLinear, and return the first two."""
    assert transposed.shape is not None
    packed = ir.Value(name=parameter, shape=transposed.shape, type=ir.TensorType(ir.DataType.INT4))
    scale = ir.Value(name=f"{parameter}_scale", shape=ir.Shape(weight.scale.shape), type=transposed.type)
    attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", weight.block)]
    node = ir.Node("", "DequantizeLinear", [packed, scale], attributes, num_outputs=1)
    _replace_initializer(graph, transposed, [packed, scale], node, parameter)
    return packed, scale


def _replace_initializer(graph: ir.Graph, old: ir.Value, new: list[ir.Value], node: ir.Node, parameter: str) -> None:
    """Let a node compute what was an initializer, from others."""
    node.name = f"{parameter.rpartition('.')[0]}/{node.op_type}"
    (output,) = node.outputs
    output.name, output.shape, output.type = f"{node.name}_output_0", old.shape, old.type
    consumers = {usage.node for usage in old.uses()}
    first = next(candidate for candidate in graph if candidate in consumers)
    ir.convenience.replace_all_uses_with(old, output)
    graph.initializers.pop(old.name or "")
    for value in new:
        graph.initializers.add(value)
    graph.insert_before(first, node)
