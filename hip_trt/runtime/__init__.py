"""Runs exported models: a generator that owns the state, over executors that run the graph.

Example:
    >>> import hip_trt
    >>> generator = hip_trt.load("build/model.onnx")                  # doctest: +SKIP
    >>> for step in generator.stream("Once upon a time"):             # doctest: +SKIP
    ...     print(step.texts[0], end="", flush=True)
"""

from hip_trt.runtime.executor import Executor, Limits
from hip_trt.runtime.generator import Chat, Generation, Generator, Stats, Step, Stream
from hip_trt.runtime.loading import load
from hip_trt.runtime.session import Chunk, Session
from hip_trt.runtime.state import KVState

__all__ = [
    "Chat", "Chunk", "Executor", "Generation", "Generator", "KVState", "Limits", "Session", "Stats", "Step", "Stream",
    "load",
]
