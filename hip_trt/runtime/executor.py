"""The one thing a runtime must do for the generator: run the model graph once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hip_trt.spec import ModelSpec


@dataclass(frozen=True)
class Limits:
    """Largest shapes that an executor accepts; None is no limit.

    Attributes:
        max_batch: sequences per call.
        max_prefill: new tokens per sequence and call; longer prompts are split.
        max_seq_len: tokens per sequence, prompt and generated together.
        max_pages: pages in the pool.
    """

    max_batch: int | None = None
    max_prefill: int | None = None
    max_seq_len: int | None = None
    max_pages: int | None = None


class Executor(Protocol):
    """Runs one exported model. The caller owns every tensor, state included."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs must live."""
        ...

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run the graph once, and return when outputs are written (or, on a GPU, ordered on its current stream).

        Args:
            inputs: every graph input by its name in :mod:`hip_trt.operator`, contiguous, on ``device``.
            outputs: every graph output, allocated by the caller. A present pool may be the very tensor of its past
                pool; so may present nodes.
        """
        ...

    def forget_calls(self) -> None:
        """Drop what was kept of earlier calls, such as captured graphs: pools in host memory have come or gone, and new
        ones may have the addresses of old ones, but other caches."""
        ...
