"""A Triton Inference Server model for the Python backend: text in, text out, through hip-trt's runtime.

`hip-trt serve-repo` copies this file into the repository that it writes. Triton's Python must have hip_trt installed,
and the TensorRT that built the plan. A model instance answers one request after the other; more instances answer more
at once, each with its own copy of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton brings it

import hip_trt
from hip_trt.errors import HipTrtError
from hip_trt.offload import OffloadStats
from hip_trt.serve_repo.config import read_offload

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What Triton's Python backend calls; inputs and outputs are those of config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model that stands beside this file, as the parameters of config.pbtxt say."""
        given = json.loads(args["model_config"])["parameters"]
        parameters = {key: value.get("string_value", "") for key, value in given.items()}
        folder = Path(args["model_repository"], args["model_version"])
        try:
            self._generator = hip_trt.load(folder / parameters["model"], offload=read_offload(parameters))
        except HipTrtError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> None:
        """Answer each request: piece by piece if it asks for a stream, else at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                pieces = self._pieces(request, sender)
                for text in pieces if _input(request, "stream") else ["".join(pieces)]:
                    sender.send(_response(text))
            except Exception as error:  # an error without an answer would keep the client waiting for good
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
                sender.send(response, flags=_FINAL)
            else:
                sender.send(flags=_FINAL)

    def _pieces(self, request: Any, sender: Any) -> Iterator[str]:
        prompt = _input(request, "text_input").decode()
        generator = self._generator
        if not _input(request, "raw") and getattr(generator.tokenizer, "chat_template", None):
            prompt = generator.encode_chat([{"role": "user", "content": prompt}])
        options = {name: _input(request, name) for name in ("temperature", "top_p")}
        steps = generator.stream(
            [prompt], max_new_tokens=_input(request, "max_tokens"), seed=_input(request, "seed"), **options
        )
        with closing(steps):  # host memory of an answer that is broken off is given back before the next begins
            for step in steps:
                if sender.is_cancelled():
                    break
                if step.texts[0]:
                    yield step.texts[0]
            _log(steps.offload_stats)


def _input(request: Any, name: str) -> Any:
    """The value of an input of one element; None where the request leaves it out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()[0]


def _response(text: str) -> Any:
    tensor = pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))
    return pb_utils.InferenceResponse(output_tensors=[tensor])


def _log(stats: OffloadStats | None) -> None:
    """Say in Triton's verbose log what the caches did for an answer; one line, without the single layers."""
    if stats is not None:
        totals = {key: value for key, value in stats.to_json().items() if key != "layers"}
        pb_utils.Logger.log_verbose(f"hip-trt offload: {json.dumps(totals)}")
