"""Triton Inference Server: write a model repository around an exported model."""

from hip_trt.serve_repo.repository import Repository, write_repository

__all__ = ["Repository", "write_repository"]
