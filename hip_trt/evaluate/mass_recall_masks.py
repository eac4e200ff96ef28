"""The blocks that HiP chooses, for query blocks and for single queries of a text, from the shipped mask search: the
reference, or the CUDA library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.reference import select_blocks

NONE = -1


def candidates(config: HipConfig, first: int) -> tuple[int, int]:
    """The blocks that a query block whose first row is at this position can choose from: first, one past the last."""
    window = max(0, first - config.window_tokens + 1) // config.block_k
    return min(-(-config.sink_tokens // config.block_k), window), window


def first_search(config: HipConfig, *, decode: bool) -> int:
    """The lowest position of a first row at which there are more candidates than may be chosen."""
    budget = config.decode_mask_blocks if decode else config.mask_blocks
    return (-(-config.sink_tokens // config.block_k) + budget + 1) * config.block_k + config.window_tokens - 1


class Masks(Protocol):
    """Where chosen blocks come from. Queries are [Hq, T, D], keys [Hkv, T, D]; blocks [..., K] int64, then -1."""

    def prefill(self, queries: Tensor, keys: Tensor, config: HipConfig, query_blocks: Sequence[int]) -> Tensor:
        """Of whole query blocks, by their index: [N, Hm, K]."""

    def decode(
        self, queries: Tensor, keys: Tensor, config: HipConfig, positions: Sequence[int], *, age: int = 0
    ) -> Tensor:
        """Of single queries: [N, Hm, K].

        Args:
            age: 0 to search from the top; otherwise search from the nodes that the query so many tokens before kept, as
                decode steps between two refreshes do.
        """


class ReferenceMasks:
    """From the reference, on whatever device the tensors are."""

    def prefill(self, queries: Tensor, keys: Tensor, config: HipConfig, query_blocks: Sequence[int]) -> Tensor:
        """See :class:`Masks`."""
        chosen = []
        for block in query_blocks:
            first = block * config.block_q
            rows = torch.arange(first, first + config.block_q)
            chosen.append(self._choose(queries, keys, config, rows, decode=False, age=0))
        return torch.stack(chosen)

    def decode(
        self, queries: Tensor, keys: Tensor, config: HipConfig, positions: Sequence[int], *, age: int = 0
    ) -> Tensor:
        """See :class:`Masks`."""
        return torch.stack([
            self._choose(queries, keys, config, torch.tensor([position]), decode=True, age=age)
            for position in positions
        ])

    def _choose(
        self, queries: Tensor, keys: Tensor, config: HipConfig, rows: Tensor, *, decode: bool, age: int
    ) -> Tensor:
        heads, masks = len(keys), config.num_masks(len(queries), len(keys))
        budget = config.decode_mask_blocks if decode else config.mask_blocks
        sink, window = candidates(config, int(rows[0]))
        chosen = []
        with torch.device(queries.device):  # the reference makes its index tensors where the data is
            rows = rows.to(queries.device)
            for mask, group in enumerate(queries.chunk(masks)):
                head, nodes = keys[mask * heads // masks], None
                if age:
                    _, nodes = select_blocks(group[:, rows - age].float(), head.float(), rows - age, config=config,
                                             decode=True)
                blocks, _ = select_blocks(group[:, rows].float(), head.float(), rows, config=config, decode=decode,
                                          past_nodes=nodes)
                inside = blocks[(blocks >= sink) & (blocks < window)]
                chosen.append(torch.cat([inside, torch.full((budget - len(inside),), NONE)]))
            return torch.stack(chosen)


class LibraryMasks:
    """From the CUDA library: all query blocks of a text in one call, all single queries in one batch."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def prefill(self, queries: Tensor, keys: Tensor, config: HipConfig, query_blocks: Sequence[int]) -> Tensor:
        """See :class:`Masks`."""
        tokens, device = queries.shape[1], queries.device
        masks = config.num_masks(len(queries), len(keys))
        pool = _pool(keys, config, filled=False)
        blocks = -(-tokens // config.block_q)
        chosen = torch.full((1, masks, blocks, config.mask_blocks), NONE, dtype=torch.int32, device=device)
        self._call(queries[None], keys[None], pool, config, past=[0], rows=tokens, chosen=chosen)
        return chosen[0, :, list(query_blocks)].transpose(0, 1).long()

    def decode(
        self, queries: Tensor, keys: Tensor, config: HipConfig, positions: Sequence[int], *, age: int = 0
    ) -> Tensor:
        """See :class:`Masks`. Sequences share their pages: each query appends the key that stands there anyway."""
        masks = config.num_masks(len(queries), len(keys))
        pool = _pool(keys, config, filled=True)
        nodes = None
        for back in ([age, 0] if age else [0]):
            at = [position - back for position in positions]
            shape = (len(at), masks, 1, config.decode_mask_blocks)
            chosen = torch.full(shape, NONE, dtype=torch.int32, device=queries.device)
            query, key = (tensor[:, at, None].transpose(0, 1) for tensor in (queries, keys))
            nodes = self._call(query, key, pool, config, past=at, rows=1, chosen=chosen, nodes=nodes)
        return chosen[:, :, 0].long()

    def _call(
        self, query: Tensor, key: Tensor, pool: Tensor, config: HipConfig, *, past: list[int], rows: int,
        chosen: Tensor, nodes: Tensor | None = None,
    ) -> Tensor:
        """One call of the operator on sequences that share the pool's pages in order; its present_nodes."""
        batch, masks, device = len(past), chosen.shape[1], query.device

        def integers(*shape: int, value: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        query, key = query.contiguous(), key.contiguous()
        _, _, _, present_nodes = self._library.attention(
            query, key, key, pool, pool.clone(),
            torch.arange(len(pool), dtype=torch.int32, device=device).repeat(batch, 1),
            torch.tensor(past, dtype=torch.int32, device=device), integers(batch, value=rows),
            integers(batch, masks, config.decode_mask_blocks, value=NONE) if nodes is None else nodes,
            integers(1, value=nodes is None), config=config, scale=1.0, present_key=pool, chosen_blocks=chosen,
        )
        return present_nodes


def _pool(keys: Tensor, config: HipConfig, *, filled: bool) -> Tensor:
    """Keys in pages, in order: [P, Hkv, page_size, D]; zeros where not filled."""
    heads, tokens, size = keys.shape
    pages = -(-tokens // config.page_size)
    rows = keys.new_zeros(heads, pages, config.page_size, size)
    if filled:
        rows.flatten(1, 2)[:, :tokens] = keys
    return rows.transpose(0, 1).contiguous()
