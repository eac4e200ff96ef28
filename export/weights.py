"""Where an exported model's weights lie: in the checkpoint's own files, or in one of the model's own.

ONNX refers to weights by file, offset and length, and a safetensors file is weights one after the other behind a
header: so the graph can point straight into it. Runtimes read files of the model's folder and below only, and follow no
link that leads out of it. So a checkpoint within that folder is pointed at as it lies, and another one on the same file
system gets hard links in that folder, which take no space: they are the same files under a second name, and stay when
the first goes. (ONNX Runtime and TensorRT take hard links; the Python package onnx refuses them.) What is stored in
another type than the model's, or quantized, or on another file system, is copied, one weight at a time.
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

from hip_trt.export.graph import Trace
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
        copied: bytes that are copied.
        warning: why files that could stay are copied; empty if none is.
    """

    in_place: Mapping[str, Extent]
    files: Mapping[Path, str | None]
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
    copy: bool,
) -> WeightsPlan:
    """Decide which weights stay in the checkpoint's files.

    Args:
        tensors: the checkpoint's weights.
        shapes: the parameters that the model has.
        dtype: the model's type.
        stage: where the model is made. Links are made here at once, which shows whether they can be.
        copy: whether to copy everything.
    """
    extents = {name: tensors[name].extent for name in shapes}
    stay = {
        name: extent for name, extent in extents.items() if extent is not None and extent.dtype == dtype and not copy
    }
    files: dict[Path, str | None] = {}
    warning = ""
    target = stage.target.resolve()
    for path in {extent.path.resolve(): None for extent in stay.values()}:
        if path.is_relative_to(target):
            files[path] = path.relative_to(target).as_posix()
            continue
        try:
            os.link(path, _link(stage, len(files)))
        except OSError as error:
            warning = f"{path}: it cannot be linked into {stage.target} ({error.strerror}), so its weights are copied."
        else:
            files[path] = None
    stay = {name: extent for name, extent in stay.items() if extent.path.resolve() in files}
    copied = sum(math.prod(shape) for name, shape in shapes.items() if name not in stay) * dtype.itemsize
    return WeightsPlan(stay, files, copied, warning)


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
    copied: dict[str, tuple[int, int]] = {}
    digest, temporary = hashlib.sha256(), stage.path / "weights"
    with open(temporary, "wb") as file, torch.no_grad():
        for name, weight in list(traced.weights.items()):
            extent = plan.in_place.get(weight.parameter)
            if extent is not None:
                value = traced.model.graph.initializers[name]
                if weight.transposed:
                    value = _transpose_in_graph(traced.model.graph, value, weight.parameter)
                _refer(value, records[extent.path.resolve()].name, extent.offset, extent.length, stage)
                continue
            tensor = convert(tensors[weight.parameter].load(), dtype, weight.parameter)
            if weight.transposed:
                tensor = tensor.t()
            content = tensor.contiguous().view(torch.uint8).numpy().data
            padding = bytes(-file.tell() % _ALIGNMENT)
            for part in (padding, content):
                file.write(part)
                digest.update(part)
            copied[name] = file.tell() - content.nbytes, content.nbytes
            advance(content.nbytes)
    if not copied:
        temporary.unlink()
        return tuple(records.values())
    own = WeightsFile(
        name=data_name(stem, digest.hexdigest()), size=temporary.stat().st_size, sha256=digest.hexdigest()
    )
    temporary.rename(stage.path / own.name)
    for name, (offset, length) in copied.items():
        _refer(traced.model.graph.initializers[name], own.name, offset, length, stage)
    return (*records.values(), own)


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
    assert transposed.name is not None
    stored = ir.Value(
        name=parameter, shape=ir.Shape(reversed(transposed.shape.dims)), type=ir.TensorType(transposed.dtype)
    )
    name = f"{parameter.rpartition('.')[0]}/Transpose"
    node = ir.Node(
        "", "Transpose", [stored], [ir.AttrInt64s("perm", [1, 0])], name=name,
        outputs=[ir.Value(name=f"{name}_output_0", shape=transposed.shape, type=transposed.type)],
    )
    consumers = {usage.node for usage in transposed.uses()}
    first = next(node for node in graph if node in consumers)
    ir.convenience.replace_all_uses_with(transposed, node.outputs[0])
    graph.initializers.pop(transposed.name)
    graph.initializers.add(stored)
    graph.insert_before(first, node)
    return stored
