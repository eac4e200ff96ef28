"""Block-sparse attention over chosen, sink and window blocks (HiP, arXiv 2406.09827, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, positions: Tensor, *, block_k: int, scale: float
) -> Tensor:
    """softmax(scale q.k) v over the tokens of ``blocks`` that are not after the row.

    Args:
        queries: [G, R, D], R rows of the G query heads that share the mask.
        keys, values: [T, D], one key/value head of the sequence.
        blocks: [N] int64, distinct.
        positions: [R] int64, position of each row in the sequence.

    Returns:
        [G, R, D], the type of ``queries``.
    """
    tokens = (blocks[:, None] * block_k + torch.arange(block_k)).flatten()
    tokens = tokens[tokens <= positions[-1]]
    logits = scale * (queries @ keys[tokens].mT)
    logits = logits.masked_fill(tokens > positions[:, None], float("-inf"))
    return logits.softmax(dim=-1) @ values[tokens]
