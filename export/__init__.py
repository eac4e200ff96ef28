"""The exporter: from a checkpoint to ONNX (:func:`export_onnx`), and from ONNX to a plan (:func:`build_engine`).

Importing it registers ``HipAttention`` with onnx, so that its checker and shape inference know the operator.
"""

from hip_trt.export.schema import register

register()

from hip_trt.export.engine import build_engine  # noqa: E402  (after the operator is registered)
from hip_trt.export.families import Family, register_family  # noqa: E402
from hip_trt.export.onnx_export import ExportedModel, export_onnx  # noqa: E402

__all__ = ["ExportedModel", "Family", "build_engine", "export_onnx", "register_family"]
