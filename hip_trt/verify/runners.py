"""Polygraphy runners of what is compared. All take the model graph's inputs and give its outputs, state included.

:class:`polygraphy.backend.onnxrt.OnnxrtRunner` runs an ONNX model. The others are here: the reference, the Hugging Face
model, and any hip-trt executor, which is how plans run.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import ModifyOutputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from torch import Tensor

from hip_trt import operator as names
from hip_trt.onnx_file import OnnxFile
from hip_trt.runtime.executor import Executor
from hip_trt.spec import ModelSpec
from hip_trt.verify.observed import chosen_name, show_layers
from hip_trt.verify.sessions import make_session, widen

Feed = dict[str, Tensor]


class OnnxRunner(OnnxrtRunner):  # type: ignore[misc]
    """Polygraphy's runner over stock ONNX Runtime and the function body in the file, with every layer in sight.

    Args:
        file: the model.
        name: as reports have it.
    """

    def __init__(self, file: OnnxFile, name: str) -> None:
        model, outputs = show_layers(file)
        marked = ModifyOutputs(model, outputs=outputs)
        super().__init__(lambda: make_session(marked(), file.path, file.spec), name=name)
        self._outputs: dict[str, Any] = {}

    def infer(self, feed_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """See Polygraphy's BaseRunner."""
        feed = {name: widen(torch.as_tensor(value)) for name, value in feed_dict.items()}
        self._outputs = super().infer(feed, *args, **kwargs)
        return self._outputs

    def shown(self, layer: int) -> Tensor | None:
        """The blocks that the last call chose; see :data:`hip_trt.verify.choices.Shown`."""
        blocks = self._outputs.get(chosen_name(layer))
        return None if blocks is None else torch.as_tensor(blocks)


class GraphRunner(BaseRunner):  # type: ignore[misc]
    """A runner with the model graph's inputs and outputs; subclasses define :meth:`call`.

    Args:
        spec: facts about the model.
        name: as reports have it.
    """

    def __init__(self, spec: ModelSpec, name: str) -> None:
        super().__init__(name=name)
        self.spec = spec

    def call(self, feed: Feed) -> Feed:
        """One call: all graph outputs, and what there is to see of the layers (:mod:`hip_trt.verify.observed`)."""
        raise NotImplementedError

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See Polygraphy's BaseRunner."""
        spec, metadata = self.spec, TensorMetadata()

        def add(name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
            metadata.add(name, dtype=DataType.from_dtype(dtype, "torch"), shape=shape)

        add(names.INPUT_IDS, torch.int64, (None, None))
        for name, rank in ((names.PAST_LENGTHS, 1), (names.QUERY_LENGTHS, 1), (names.PAGE_TABLE, 2)):
            add(name, torch.int32, (None,) * rank)
        add(names.REFRESH_MASK, torch.int32, (1,))
        for layer in range(spec.num_layers):
            for tensor in names.STATE:
                add(tensor.past(layer), spec.state_dtype(tensor), (None, *spec.state_shape(tensor, 0)[1:]))
        return metadata

    def infer_impl(self, feed_dict: Any) -> OrderedDict[str, Tensor]:
        """See Polygraphy's BaseRunner."""
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = self.call(dict(feed_dict))
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)


class ExecutorRunner(GraphRunner):
    """Runs a hip-trt executor, such as :class:`~hip_trt.runtime.tensorrt.TensorRTExecutor`, as generation runs it.

    The same profiles, contexts and weights as in use, which Polygraphy's TrtRunner would set up in its own way: it
    keeps one profile per activation, and binds no weights. Layers are seen by their keys, values and nodes only.
    """

    def __init__(self, executor: Executor, name: str) -> None:
        super().__init__(executor.spec, name)
        self._executor = executor

    def call(self, feed: Feed) -> Feed:
        device, spec = self._executor.device, self.spec
        inputs = {name: tensor.to(device, copy=True).contiguous() for name, tensor in feed.items()}
        batch, tokens = inputs[names.INPUT_IDS].shape
        logits = torch.empty(
            batch, tokens if spec.logits == "all" else 1, spec.vocab_size, dtype=torch.float32, device=device
        )
        outputs = {names.LOGITS: logits}
        for layer in range(spec.num_layers):
            for tensor in names.STATE:
                past = inputs[tensor.past(layer)]
                outputs[tensor.present(layer)] = past if tensor.paged else torch.empty_like(past)  # pools in place
        self._executor.run(inputs, outputs)
        return {name: tensor.cpu() for name, tensor in outputs.items()}
