"""ONNX Runtime sessions over models in memory, whose weights stay in their files."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort

from hip_trt.errors import EngineError, EnvironmentProblem
from hip_trt.spec import ModelSpec


def make_session(model: onnx.ModelProto, path: Path, spec: ModelSpec) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        model: without weights.
        path: the file that it comes from; its weights are beside it.
        spec: facts about it.

    Raises:
        EngineError: if ONNX Runtime refuses the model.
        EnvironmentProblem: if it has no kernels for the model's type.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # as OrtExecutor has it
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        cause = " ".join(str(error).split()).rstrip(".")[:300]
        if spec.dtype == "bfloat16":
            raise EnvironmentProblem(
                f"{path}: ONNX Runtime {ort.__version__} has no CPU kernels for bfloat16.",
                "Verify an export in float32 or float16 (--dtype), or the plan on a GPU.",
            ) from None
        raise EngineError(f"{path}: ONNX Runtime cannot load it: {cause}.", "Export it again.") from None
