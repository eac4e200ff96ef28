"""Weights of an exported model, made again from its checkpoint: so that an .onnx of some 600 KB can travel alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import Tensor

from hip_trt.files import sha256
from hip_trt.onnx_file import WEIGHTS_FILES, WEIGHTS_KEY

_TRANSPOSED = "_transposed"  # ends the names of linear layers' weights, see hip_trt.export.graph


def restore_weights(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write the file of weights beside an .onnx whose export copied them, unless it is there.

    Args:
        path: the .onnx file.
        parameters: of the checkpoint, by transformers' names, on the CPU in the model's type.

    Raises:
        ValueError: the file is not, bit for bit, the one that the export wrote.
    """
    model = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    (record,) = WEIGHTS_FILES.validate_json(metadata[WEIGHTS_KEY])
    target = path.with_name(record.name)
    if target.is_file():
        return
    made = target.with_name(f"{target.name}.new")
    with open(made, "wb") as file:
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                value = parameters[tensor.name.removesuffix(_TRANSPOSED)]
                value = value.t() if tensor.name.endswith(_TRANSPOSED) else value
                file.seek(ExternalDataInfo(tensor).offset or 0)
                file.write(value.contiguous().view(torch.uint8).numpy().data)
    if sha256(made) != record.sha256:
        raise ValueError(f"{path}: {made} has another checksum than the weights of the export")
    made.replace(target)
