"""Run an exported model graph step by step, with all of its state in sight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.export.function import strip_function
from hip_trt.onnx_file import read_onnx
from hip_trt.reference import hip_attention


class HipAttention(OpRun):  # type: ignore[misc]
    """The operator for onnx's own interpreter, computed by the oracle."""

    op_domain = names.DOMAIN

    def _run(self, *inputs: np.ndarray[Any, Any], **attributes: Any) -> tuple[np.ndarray[Any, Any], ...]:
        scale, dense = attributes.pop("scale"), bool(attributes.pop("dense"))
        config = HipConfig.create(**attributes)
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        return tuple(value.numpy() for value in hip_attention(*tensors, config=config, scale=scale, dense=dense))


class GraphRunner:
    """A pool of pages and the nodes of a batch, and a model that works on them.

    Args:
        path: an exported .onnx file.
        page_table: [B, M] page numbers.
        oracle: run in onnx's interpreter with the reference operator, and not in ONNX Runtime with the function.
    """

    def __init__(self, path: Path, page_table: Sequence[Sequence[int]], *, oracle: bool = False) -> None:
        file = read_onnx(path)
        self.spec = spec = file.spec
        self.page_table = np.array(page_table, np.int32)
        batch, pages = len(page_table), int(self.page_table.max()) + 1
        dtype = np.float16 if spec.dtype == "float16" else np.float32
        # What no sequence has committed is undefined: make it hurt.
        self.state: dict[str, np.ndarray[Any, Any]] = {}
        for layer in range(spec.num_layers):
            for tensor in names.STATE:
                count, fill = (pages, np.nan) if tensor.paged else (batch, names.NOTHING)
                kind = np.int32 if tensor.integers else dtype
                self.state[tensor.past(layer)] = np.full(spec.state_shape(tensor, count), fill, kind)
        self.lengths = np.zeros(batch, np.int32)
        self._evaluator: Any
        if oracle:
            model = strip_function(onnx.load(path))
            self._evaluator = ReferenceEvaluator(model, new_ops=[HipAttention])
        else:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 2
            self._evaluator = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def step(self, rows: Sequence[Sequence[int]], *, refresh: bool = True) -> np.ndarray[Any, Any]:
        """Append tokens to each sequence (none: an idle row) and return the logits."""
        spec, width = self.spec, max(1, *map(len, rows))
        counts = np.array([len(row) for row in rows], np.int32)
        feeds = {
            names.INPUT_IDS: np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64),
            names.PAST_LENGTHS: self.lengths, names.QUERY_LENGTHS: counts, names.PAGE_TABLE: self.page_table,
            names.REFRESH_MASK: np.array([refresh], np.int32), **self.state,
        }
        outputs = [names.LOGITS, *(tensor.present(layer) for layer in range(spec.num_layers) for tensor in names.STATE)]
        logits, *present = self._evaluator.run(outputs, feeds)
        self.state = dict(zip(self.state, present, strict=True))
        self.lengths = self.lengths + counts
        return np.asarray(logits)
