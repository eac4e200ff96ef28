"""Runs an exported .onnx in stock ONNX Runtime, on the CPU, reading and writing the caller's tensors in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from onnx import TensorProto
from torch import Tensor

from hip_trt import operator as names
from hip_trt.errors import EngineError, EnvironmentProblem
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.executor import Limits
from hip_trt.spec import ModelSpec

_ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
}
_KEPT_BINDINGS = 4
"""Bindings kept for reuse: decode steps of a few sessions. Each holds some hundred small objects."""

_Binding = tuple[ort.IOBinding, list[tuple[Tensor, Tensor]]]


class OrtExecutor:
    """An :class:`~hip_trt.runtime.executor.Executor` over ONNX Runtime.

    Args:
        path: model.onnx, with its weights beside it.
        threads: threads per operator; by default ONNX Runtime's choice, the physical cores.

    Raises:
        EngineError: if the file or its weights are missing or damaged, or the file is no hip-trt model.
        EnvironmentProblem: if this build of ONNX Runtime has no kernels for the model's type.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        path = Path(path)
        self.path = path
        self.spec = read_onnx(path).spec
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures come as exceptions; do not print them as well
        # Multiply weights of four bits with activations as they are; by default it rounds those to eight bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise _load_error(path, self.spec, error) from None
        self._bindings: OrderedDict[tuple[Any, ...], _Binding] = OrderedDict()

    @property
    def limits(self) -> Limits:
        """None: every dimension is dynamic."""
        return Limits()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`.

        Raises:
            EngineError: if ONNX Runtime fails.
        """
        binding, copies = self._binding(inputs, outputs)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"{self.path}: ONNX Runtime failed: {_one_line(error)}.") from None
        for target, source in copies:
            target.copy_(source)

    def forget_calls(self) -> None:
        """See :class:`~hip_trt.runtime.executor.Executor`."""
        self._bindings.clear()

    def _binding(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Binding:
        """A binding of these addresses and shapes; decode steps, which repeat them, get the same one again."""
        key = tuple((tensor.data_ptr(), tensor.shape) for tensor in (*inputs.values(), *outputs.values()))
        found = self._bindings.get(key)
        if found is not None:
            self._bindings.move_to_end(key)
            return found
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, "cpu", 0, _ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        copies: list[tuple[Tensor, Tensor]] = []
        pools = _shareable(self.spec.num_layers)
        addresses = {tensor.data_ptr(): name for name, tensor in inputs.items()}
        for name, tensor in outputs.items():
            shared = addresses.get(tensor.data_ptr())
            if shared is not None and pools.get(name) != shared:
                # Only the page pools are read and written by one node, which then copies nothing. Any other input may
                # still be read after its output was written.
                copies.append((tensor, torch.empty_like(tensor)))
                tensor = copies[-1][1]
            binding.bind_output(name, "cpu", 0, _ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        self._bindings[key] = binding, copies
        if len(self._bindings) > _KEPT_BINDINGS:
            self._bindings.popitem(last=False)
        return binding, copies


def _shareable(layers: int) -> dict[str, str]:
    """Outputs that may have the buffer of an input, and of which."""
    return {
        tensor.present(layer): tensor.past(layer)
        for layer in range(layers) for tensor in (names.KEY, names.VALUE)
    }


def _load_error(path: Path, spec: ModelSpec, error: Exception) -> EngineError | EnvironmentProblem:
    if type(error).__name__ == "NotImplemented" and spec.dtype != "float32":
        return EnvironmentProblem(
            f"{path}: ONNX Runtime {ort.__version__} has no CPU kernels for {spec.dtype}: {_one_line(error)}.",
            "Export with --dtype float32 or float16 for ONNX Runtime.",
        )
    return EngineError(
        f"{path}: ONNX Runtime cannot load it: {_one_line(error)}.", "Export it again with `hip-trt export`."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
