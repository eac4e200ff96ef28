"""Exporter."""

from hip_trt.export.schema import register

register()
