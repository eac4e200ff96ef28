"""The exporter: from a checkpoint to ONNX (:func:`export_onnx`) and to a TensorRT engine (:mod:`.engine`).

Importing it registers ``HipAttention`` with onnx, so that its checker and shape inference know the operator.
"""

from hip_trt.export.schema import register

register()

from hip_trt.export.onnx_export import ExportedModel, export_onnx  # noqa: E402  (after the operator is registered)

__all__ = ["ExportedModel", "export_onnx"]
