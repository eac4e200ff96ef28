"""A conversation over pools of pages, call by call: with caches or without, every bit of it must be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.library import Library

CONFIG = HipConfig.create(
    mask_k=64, decode_mask_k=64, block_q=16, block_k=16, stride_q=4, branch=3, leaf_branch=4, page_size=32,
    sink_tokens=20, window_tokens=50, refresh_interval=4,
)


@dataclass
class Conversation:
    """Some sequences and their pools.

    Attributes:
        key_pool, value_pool: [P, Hkv, page_size, D]; NaN where nothing was written, which no result may show.
        page_table: [B, M] int32.
        lengths: [B] int32, committed tokens.
        nodes: [B, Hm, Kd] int32.
        results: output and nodes of every call.
    """

    library: Library
    config: HipConfig
    query_heads: int
    key_pool: Tensor
    value_pool: Tensor
    page_table: Tensor
    lengths: Tensor
    nodes: Tensor
    results: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(
        cls, library: Library, key_pool: Tensor, value_pool: Tensor, *, batch: int, slots: int, query_heads: int,
        config: HipConfig = CONFIG, seed: int = 0,
    ) -> Conversation:
        """Empty sequences of up to ``slots`` pages each, scattered over the pool."""
        device = key_pool.device
        for pool in (key_pool, value_pool):
            pool.fill_(float("nan"))
        order = torch.randperm(len(key_pool), generator=torch.Generator().manual_seed(seed))
        masks = query_heads if config.mask_heads == "query" else key_pool.shape[1]
        return cls(
            library, config, query_heads, key_pool, value_pool,
            order[: batch * slots].view(batch, slots).int().to(device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.full((batch, masks, config.decode_mask_blocks), -1, dtype=torch.int32, device=device),
        )

    def call(self, counts: Sequence[int], *, refresh: bool = True, padding: int = 0) -> None:
        """Append ``counts`` tokens to the sequences and attend."""
        batch, new = len(counts), max(counts) + padding
        _, heads, _, head_dim = self.key_pool.shape
        device = self.lengths.device
        generator = torch.Generator().manual_seed(len(self.results))

        def random(number: int) -> Tensor:
            return torch.randn(batch, number, new, head_dim, generator=generator).to(self.key_pool.dtype).to(device)

        query, key, value = random(self.query_heads), random(heads), random(heads)
        lengths = torch.tensor(counts, dtype=torch.int32, device=device)
        output, _, _, self.nodes = self.library.attention(
            query, key, value, self.key_pool, self.value_pool, self.page_table, self.lengths, lengths, self.nodes,
            torch.tensor([int(refresh)], dtype=torch.int32, device=device), config=self.config,
            scale=head_dim**-0.5, present_key=self.key_pool, present_value=self.value_pool,
        )
        assert not output.isnan().any()
        self.lengths = self.lengths + lengths
        self.results += [output.cpu(), self.nodes.cpu()]

    def decode(self, steps: int, *, idle: int | None = None) -> None:
        """One token a step for every sequence but ``idle``, searched from the top every refresh_interval steps."""
        for step in range(steps):
            self.call([int(b != idle) for b in range(len(self.lengths))],
                      refresh=step % self.config.refresh_interval == 0)

    def hand_over_pages(self) -> None:
        """Sequences begin anew, each on the pages of the one before it."""
        self.page_table = self.page_table.roll(1, 0).contiguous()
        self.lengths = torch.zeros_like(self.lengths)
        self.nodes = torch.full_like(self.nodes, -1)

    def play(self, prompts: Sequence[int], steps: int) -> list[Tensor]:
        """Prompts, decode steps, a second turn, more steps, and all of it again on pages that were used before."""
        for _ in range(2):
            self.call(prompts)
            self.decode(steps)
            self.call([17 + b for b in range(len(prompts))], padding=3)
            self.decode(steps, idle=0 if len(prompts) > 1 else None)
            self.hand_over_pages()
        return self.results


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bits, call by call."""
    assert len(actual) == len(expected)
    for call, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), f"call {call // 2}"
