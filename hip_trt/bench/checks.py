"""Outputs compared with the reference before anything is timed, on the GPU, on a sample of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt.bench.geometry import Geometry
from hip_trt.config import HipConfig
from hip_trt.reference import select_blocks, sparse_attention

MOST_ERROR = 1e-2
"""Relative, of bfloat16 output against float32 on the same blocks."""
LEAST_AGREEMENT = 0.98
"""Share of chosen blocks that the reference chooses too: scores that differ by rounding alone may swap a block."""


class CheckError(Exception):
    """An output is not what the reference says."""


@dataclass
class Comparison:
    """What was compared so far.

    Attributes:
        rows: query rows, over all heads.
        error: largest relative error of a query block's output, given the blocks that were chosen.
        chosen, agreed: blocks chosen, and how many of them the reference chose too.
    """

    rows: int = 0
    error: float = 0.0
    chosen: int = 0
    agreed: int = 0

    def add(self, output: Tensor, expected: Tensor) -> None:
        """Compare an output, [G, R, D], with float32."""
        error = float((output.float() - expected).norm() / expected.norm())
        self.rows += output.shape[0] * output.shape[1]
        self.error = max(self.error, error if error == error else float("inf"))

    def agree(self, chosen: Tensor, expected: Tensor) -> None:
        """Compare chosen blocks, both 1-dimensional and distinct."""
        if len(chosen) != len(expected):
            self.error = float("inf")
        self.chosen += len(expected)
        self.agreed += int(torch.isin(chosen, expected).sum())

    def as_json(self) -> dict[str, float | int]:
        """For a report."""
        return {"rows": self.rows, "error": self.error, "chosen_blocks": self.chosen, "agreed_blocks": self.agreed}

    def require(self, what: str) -> None:
        """Refuse what is beyond rounding.

        Raises:
            CheckError: naming ``what``.
        """
        if self.rows == 0 or not self.error < MOST_ERROR:
            raise CheckError(f"{what}: relative error {self.error:.2e} over {self.rows} rows, above {MOST_ERROR}")
        if self.agreed < LEAST_AGREEMENT * self.chosen:
            raise CheckError(f"{what}: {self.agreed} of {self.chosen} chosen blocks agree with the reference")


def compare_block(
    comparison: Comparison, output: Tensor, queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, first: int,
    *, config: HipConfig, geometry: Geometry, decode: bool = False, past_nodes: Tensor | None = None,
) -> None:
    """Compare one query block of one mask head.

    Args:
        output, queries: [G, R, D], rows at positions ``first`` and following.
        keys, values: [T, D] float32, of its key/value head.
        chosen: [K] int32, the blocks that the kernel chose, then -1.
        past_nodes: [Kd], nodes that the kernel started from, or None.
    """
    device = queries.device
    with torch.device(device):  # the reference makes its index tensors where the data is
        positions = torch.arange(first, first + queries.shape[1])
        reference, _ = select_blocks(queries.float(), keys, positions, config=config, decode=decode,
                                     past_nodes=None if past_nodes is None else past_nodes.long())
        window = max(0, first - config.window_tokens + 1) // config.block_k
        sink = min(-(-config.sink_tokens // config.block_k), window)
        inside = (reference >= sink) & (reference < window)
        kept = chosen[chosen >= 0].long()
        comparison.agree(kept, reference[inside])
        blocks = torch.cat([reference[reference < sink], kept, reference[reference >= window]])
        comparison.add(output, sparse_attention(queries.float(), keys, values, blocks, positions,
                                                block_k=config.block_k, scale=geometry.scale))


def compare_dense(output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, *, rows: int = 16) -> float:
    """Relative error of the last ``rows`` rows of the first and last head of the last sequence, against float32.

    Args:
        output, query: [B, Hq, S, D].
        key, value: [B, Hkv, T, D]; the last query stands at position T - 1.
    """
    group, rows = query.shape[1] // key.shape[1], min(rows, query.shape[2])
    worst = 0.0
    for head in (0, query.shape[1] - 1):
        k, v = key[-1, head // group].float(), value[-1, head // group].float()
        logits = scale * (query[-1, head, -rows:].float() @ k.mT)
        tokens = torch.arange(len(k), device=k.device)
        logits = logits.masked_fill(tokens > tokens[-rows:, None], float("-inf"))
        expected = logits.softmax(-1) @ v
        worst = max(worst, float((output[-1, head, -rows:].float() - expected).norm() / expected.norm()))
    return worst


def sampled_blocks(count: int, *, random: int = 4) -> Sequence[int]:
    """The first query block, the last ones, and some between, other ones in each run."""
    between = torch.randint(count, (random,)).tolist()
    return sorted({0, count - 1, max(0, count - 2), *between})
