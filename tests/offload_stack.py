"""Attention layers one after the other over pools of their own: what one layer gives, the next one asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.offload import OffloadedCache


class Stack:
    """Some sequences and the layers that they pass through. Calls wait for nothing, so that work beside them shows.

    Args:
        pools: keys and values of each layer, [P, Hkv, page_size, D].
        batch: B; each sequence has P / B pages, scattered over the pool.
        cache: of the pools, if they are offloaded.

    Attributes:
        pools, cache: as given.
        results: of every call, output of every layer that was called.
    """

    def __init__(
        self, library: Library, pools: Sequence[tuple[Tensor, Tensor]], *, batch: int, query_heads: int,
        config: HipConfig, cache: OffloadedCache | None = None, seed: int = 0,
    ) -> None:
        self._library, self.pools, self._config, self.cache = library, pools, config, cache
        self._device, self._dtype = pools[0][0].device, pools[0][0].dtype
        pages, self._heads, _, self._head_dim = pools[0][0].shape
        self._query_heads = query_heads
        self._generator = torch.Generator(self._device).manual_seed(seed)
        order = torch.randperm(pages, generator=self._generator, device=self._device)
        self._table = order[: pages // batch * batch].view(batch, -1).int()
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=self._device)
        masks = query_heads if config.mask_heads == "query" else self._heads
        self._nodes = [
            torch.full((batch, masks, config.decode_mask_blocks), -1, dtype=torch.int32, device=self._device)
            for _ in pools
        ]
        self._new = [self._rows(1) for _ in pools]  # of decode steps: in the same place every time, to be captured
        self._counts = torch.ones(batch, dtype=torch.int32, device=self._device)
        self._refresh = torch.ones(1, dtype=torch.int32, device=self._device)
        self._outputs = [torch.zeros_like(query) for query, _, _ in self._new]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.results: list[Tensor] = []
        for pair in pools:
            for pool in pair:
                pool.fill_(float("nan"))  # no result may show what was never written

    def prefill(self, counts: Sequence[int], *, chunk: int) -> None:
        """Append random tokens to the sequences, at most ``chunk`` a call."""
        left = list(counts)
        while any(left):
            now = [min(chunk, count) for count in left]
            left = [count - part for count, part in zip(left, now, strict=True)]
            self._append(now, layers=len(self.pools))

    def interrupted_prefill(self, count: int, *, layers: int) -> None:
        """Append to the first layers only: the tokens do not count, and the next call writes over them."""
        self._append([count] * len(self._lengths), layers=layers)

    def decode(self, steps: int, *, layers: int | None = None) -> None:
        """One random token a step; searched from the top every refresh_interval. With ``layers``, the first only, as in
        :meth:`interrupted_prefill`."""
        for step in range(steps):
            self._prepare(step)
            if layers is None and self._graph is not None:
                self._graph.replay()
            else:
                self._run(len(self.pools) if layers is None else layers)
            self._keep(self._outputs[:layers])
            if layers is None:
                self._lengths += 1

    def capture(self) -> None:
        """Decode steps of all layers are replayed from now on. Needs a GPU."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run(len(self.pools))

    def release(self) -> None:
        """Steps are called again."""
        self._graph = None

    def settle(self) -> None:
        """Before a captured step follows a round that was broken off: its replay does not know of that."""
        if self.cache is not None:
            self.cache.forget()

    def _prepare(self, step: int) -> None:
        if self.cache is not None:
            self.cache.prepare(prefill=False)
        for held, rows in zip(self._new, (self._rows(1) for _ in self.pools), strict=True):
            for to, new in zip(held, rows, strict=True):
                to.copy_(new)
        self._refresh.fill_(int(step % self._config.refresh_interval == 0))

    def _run(self, layers: int) -> None:
        before = None
        for layer in range(layers):
            query, key, value = self._new[layer]
            asked = query if before is None else query + before
            before = self._attend(layer, asked, key, value, self._counts, self._outputs[layer])

    def _append(self, counts: Sequence[int], *, layers: int) -> None:
        if self.cache is not None:
            self.cache.prepare(prefill=True)
        rows = [self._rows(max(2, *counts)) for _ in range(layers)]
        lengths = torch.empty_like(self._lengths)
        for row, count in enumerate(counts):
            lengths[row] = count  # not a copy from the host, which would wait
        self._refresh.fill_(1)
        outputs: list[Tensor] = []
        for layer, (query, key, value) in enumerate(rows):
            asked = query + outputs[-1] if outputs else query
            outputs.append(self._attend(layer, asked, key, value, lengths, torch.zeros_like(query), reuse=True))
        self._keep(outputs)
        if layers == len(self.pools):
            self._lengths += lengths

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, counts: Tensor, output: Tensor,
        *, reuse: bool = False,
    ) -> Tensor:
        """``reuse``: overwrite the call's inputs after it, in stream order, as any caller may."""
        keys, values = self.pools[layer]
        inputs = query, key, value, counts, self._table, self._lengths
        if reuse:
            inputs = tuple(tensor.clone() for tensor in inputs)  # type: ignore[assignment]
        query, key, value, counts, table, lengths = inputs
        self._library.attention(
            query, key, value, keys, values, table, lengths, counts, self._nodes[layer], self._refresh,
            config=self._config, scale=self._head_dim**-0.5, output=output, present_key=keys, present_value=values,
            present_nodes=self._nodes[layer],
        )
        if reuse:
            for tensor in inputs:
                tensor.zero_()
        return output

    def _rows(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """A query, a key and a value, [B, heads, tokens, D]."""
        return tuple(  # type: ignore[return-value]
            torch.randn(len(self._lengths), heads, tokens, self._head_dim, generator=self._generator,
                        device=self._device).to(self._dtype)
            for heads in (self._query_heads, self._heads, self._heads)
        )

    def _keep(self, outputs: Sequence[Tensor]) -> None:
        self.results += [output.clone() for output in outputs]


    def committed(self, layer: int) -> list[Tensor]:
        """Keys and values of each sequence, [tokens, Hkv, D]."""
        return [
            pool[pages.long()].transpose(1, 2).flatten(0, 1)[:length]
            for pages, length in zip(self._table, self._lengths.tolist(), strict=True) for pool in self.pools[layer]
        ]


def assert_same(actual: Stack, expected: Stack) -> None:
    """Equal bits in every call and layer, none of them from rows that were never written, and the same rows written."""
    assert len(actual.results) == len(expected.results)
    for index, (one, other) in enumerate(zip(actual.results, expected.results, strict=True)):
        assert not other.isnan().any()
        assert torch.equal(one, other), f"result {index}"
    for layer in range(len(actual.pools)):
        for one, other in zip(actual.committed(layer), expected.committed(layer), strict=True):
            assert torch.equal(one, other), f"rows of layer {layer}"
