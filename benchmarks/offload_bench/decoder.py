"""Decode steps of a model of Llama-3.1-8B's geometry: all its matrix products, and HipAttention over recorded rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from hip_trt.config import HipConfig
from hip_trt.library import Library
from offload_bench.recorded import Recording

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
SCALE = 0.5 * 64**-0.5  # rows of 64 stand twice in rows of 128


@dataclass(frozen=True)
class Weights:
    """One layer's, random."""

    attention_in: Tensor
    attention_out: Tensor
    feed_forward_in: Tensor
    feed_forward_out: Tensor

    @classmethod
    def random(cls, device: torch.device) -> Weights:
        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=torch.bfloat16, device=device).mul_(columns**-0.5)

        return cls(matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), matrix(HIDDEN, HEADS * HEAD_DIM),
                   matrix(2 * FEED_FORWARD, HIDDEN), matrix(HIDDEN, FEED_FORWARD))


class Decoder:
    """One sequence, decoded token by token from rows that were recorded, in a captured CUDA graph.

    Args:
        pools: keys and values of each layer, [P, Hkv, page_size, D]: resident, or in host memory with caches attached.
        weights: of each layer.
        tokens: committed before the first step.
    """

    def __init__(
        self, library: Library, config: HipConfig, recording: Recording, pools: list[tuple[Tensor, Tensor]],
        weights: list[Weights], page_table: Tensor, tokens: int,
    ) -> None:
        self._library, self._config, self._pools, self._weights = library, config, pools, weights
        device, layers = page_table.device, len(pools)
        self._table = page_table
        self._queries, self._keys, self._values = _steps(recording, layers, tokens)
        self._start = tokens
        self._query, self._key, self._value = (rows[0].clone() for rows in (self._queries, self._keys, self._values))
        self._length = torch.zeros(1, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self._refresh = torch.ones(1, dtype=torch.int32, device=device)
        self._nodes = torch.full((layers, 1, KV_HEADS, config.decode_mask_blocks), -1, dtype=torch.int32, device=device)
        self._workspace = torch.empty(1 << 26, dtype=torch.uint8, device=device)
        self._hidden = torch.randn(1, HIDDEN, dtype=torch.bfloat16, device=device)
        self.output = torch.empty(layers, 1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
        self.restart()
        self._run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self.restart()

    @property
    def steps(self) -> int:
        """How many tokens can be decoded."""
        return len(self._queries)

    @property
    def nodes(self) -> Tensor:
        """[layers, 1, Hkv, Kd]: what the last search kept."""
        return self._nodes

    def restart(self) -> None:
        """Back to the first step."""
        self._step = 0
        self._nodes.fill_(-1)
        self._length.fill_(self._start)

    def step(self, *, refresh: bool) -> None:
        """Decode a token; starts work and waits for nothing."""
        for to, rows in ((self._query, self._queries), (self._key, self._keys), (self._value, self._values)):
            to.copy_(rows[self._step])
        self._refresh.fill_(int(refresh))
        self._graph.replay()
        self._length += 1
        self._step += 1

    def _run(self) -> None:
        hidden = self._hidden
        for layer, weights in enumerate(self._weights):
            linear(rms_norm(hidden, (HIDDEN,)), weights.attention_in)  # its place is taken by the recorded rows
            keys, values = self._pools[layer]
            self._library.attention(
                self._query[layer], self._key[layer], self._value[layer], keys, values, self._table, self._length,
                self._one, self._nodes[layer], self._refresh, config=self._config, scale=SCALE,
                output=self.output[layer], present_key=keys, present_value=values, present_nodes=self._nodes[layer],
                workspace=self._workspace,
            )
            hidden = hidden + linear(self.output[layer].view(1, -1), weights.attention_out)
            gate, up = linear(rms_norm(hidden, (HIDDEN,)), weights.feed_forward_in).chunk(2, -1)
            hidden = hidden + linear(silu(gate) * up, weights.feed_forward_out)


def _steps(recording: Recording, layers: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [steps, layers, 1, Hq, 1, D], keys and values [steps, layers, 1, Hkv, 1, D]."""
    queries = torch.stack(
        [recording.layer_queries(layer, KV_HEADS, HEADS // KV_HEADS) for layer in range(layers)], 1
    )
    rows = (torch.stack(
        [recording.rows(name, layer, KV_HEADS, start, start + recording.steps).transpose(0, 1)
         for layer in range(layers)], 1
    ) for name in ("keys", "values"))
    keys, values = (part[:, :, None, :, None].contiguous() for part in rows)
    return queries[:, :, None, :, None].contiguous(), keys, values


def fill_pools(
    recording: Recording, layer: int, pools: tuple[Tensor, Tensor], page_table: Tensor, tokens: int
) -> None:
    """Write rows [0, tokens) of the recording to a layer's pools on the GPU; pages after them are NaN."""
    for pool, name in zip(pools, ("keys", "values"), strict=True):
        page_size = pool.shape[2]
        rows = recording.rows(name, layer, KV_HEADS, 0, tokens)
        whole = -(-tokens // page_size)
        padded = rows.new_full((KV_HEADS, whole * page_size, HEAD_DIM), float("nan"))
        padded[:, :tokens] = rows
        pages = padded.view(KV_HEADS, whole, page_size, HEAD_DIM).transpose(0, 1).contiguous()
        pool[page_table[0, :whole].long()] = pages
        pool[page_table[0, whole:].long()] = float("nan")
