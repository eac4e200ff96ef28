"""How likely a model finds a text, from logits that come chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hip_trt.errors import RuntimeInputError


class LogLikelihood:
    """Keeps the negative log likelihood of a text's tokens, each given the ones before it.

    Args:
        tokens: the text.
        skip: leave out the likelihoods of the first ``skip`` predictions, as where only those with a long context
            count.

    Raises:
        RuntimeInputError: if nothing is left to predict.
    """

    def __init__(self, tokens: Sequence[int], *, skip: int = 0) -> None:
        if skip < 0 or len(tokens) < skip + 2:
            raise RuntimeInputError(
                f"The text has {len(tokens)} tokens, too few for perplexity with skip {skip}.",
                f"Give {max(skip, 0) + 2} tokens or more.",
            )
        self._tokens = torch.tensor(list(tokens))
        self._skip = skip
        self._losses: list[Tensor] = []

    def add(self, logits: Tensor, start: int) -> None:
        """Add the predictions of consecutive tokens.

        Args:
            logits: [S, vocab_size], those after tokens ``start`` to ``start + S - 1``.
            start: position of the first.
        """
        first = max(start, self._skip)
        targets = self._tokens[first + 1 : start + len(logits) + 1].to(logits.device)
        if len(targets):
            predictions = logits[first - start :][: len(targets)].float()
            losses = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
            self._losses.append(losses.double())

    @property
    def losses(self) -> Tensor:
        """Negative log likelihood of each prediction that was added, in order: [N] float64, in nats, on the CPU."""
        return torch.cat([part.cpu() for part in self._losses])

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood of what was added."""
        return math.exp(float(self.losses.mean()))
