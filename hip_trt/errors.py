"""Errors that a user can act on.

Every mistake that a user can make raises a :class:`HipTrtError`. Its text names the cause; ``remedy`` says what to do
about it. The command line prints both on one line and exits with a non-zero status, with no stack trace.
"""

from __future__ import annotations


class HipTrtError(Exception):
    """A failure with a known cause.

    Args:
        cause: what is wrong, naming the file, field or value.
        remedy: what the user can do about it; empty if nothing can be done.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy


class ConfigError(HipTrtError):
    """A HipConfig field has a value that is not allowed."""


class CheckpointError(HipTrtError):
    """A checkpoint is missing, damaged, or of a family that cannot be exported."""


class ExportError(HipTrtError):
    """The ONNX model could not be made or written."""


class EngineError(HipTrtError):
    """An engine could not be built, read or loaded."""


class PluginError(HipTrtError):
    """The plugin library is missing, or of another version."""


class RuntimeInputError(HipTrtError):
    """A request does not fit the model or its KV cache: lengths, pages, batch."""


class EnvironmentProblem(HipTrtError):
    """A package, library or device that the request needs is not there."""
