"""Simpler ways to choose key blocks, beside HiP: none at all, random ones, and the best ones by looking at all of them.

They attend as HiP does: each query block and mask head to sink, window and as many chosen key blocks. Only the choice
differs. Written for a study: every score is computed, and the pruning is a mask on dense attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hip_trt.config import HipConfig
from hip_trt.huggingface import HipCache
from hip_trt.huggingface.cache import HipLayer

Method = Literal["none", "random", "exact"]
"""How blocks between sink and window are chosen. "exact" scores every block as HiP scores a representative."""

ROWS = 512
"""Query rows whose scores are held at once."""


class BaselineCache(HipCache):
    """For one sequence in a patched model: a KV cache whose layers choose key blocks by ``method``.

    Args:
        model_config: the model's.
        config: budget and block sizes; the tree's shape does not matter.
        method: how to choose.
        prompt: tokens that HiP prefills, after which each token is a query block of its own, with decode_mask_k; None
            uses the method for query blocks of block_q everywhere, with mask_k. No call may cross the prompt's end.
        max_tokens: as for :class:`HipCache`.
        seed: of "random".
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: HipConfig, method: Method, *, prompt: int | None = None,
        max_tokens: int = 0, seed: int = 0,
    ) -> None:
        super().__init__(model_config, config, max_tokens=max_tokens)
        self.layers = [
            _BaselineLayer(config, layer, method, prompt=prompt, max_tokens=max_tokens, seed=seed)
            for layer in range(model_config.num_hidden_layers)
        ]


class _BaselineLayer(HipLayer):
    def __init__(
        self, config: HipConfig, layer: int, method: Method, *, prompt: int | None, max_tokens: int, seed: int
    ) -> None:
        super().__init__(config, layer, max_tokens=max_tokens)
        self._method, self._prompt, self._seed = method, prompt, seed + layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        first, tokens = self._columns, query.shape[2]
        if self._prompt is not None and first + tokens <= self._prompt:
            return super().attend(query, key, value, valid, scale)
        assert query.shape[0] == 1, "one sequence"
        assert valid is None, "no padding"
        assert self._prompt is None or first >= self._prompt, "no call across the prompt's end"
        if not self.is_initialized:
            self._allocate(key, self.config.num_masks(query.shape[1], key.shape[1]))
        self._reserve(first + tokens, key)
        write_rows(self, key, value, first)
        self._columns += tokens
        keys, values = (pool.transpose(0, 1).flatten(1, 2)[:, : self._columns] for pool in (self.keys, self.values))
        decode = self._prompt is not None
        generator = torch.Generator(query.device).manual_seed(self._seed * 1_000_003 + first)
        return torch.cat([
            masked_attention(
                query[0, :, start : start + ROWS], keys, values, first + start, scale, config=self.config,
                method=self._method, decode=decode, generator=generator,
            ) for start in range(0, tokens, ROWS)
        ], dim=1)[None]


def write_rows(layer: HipLayer, key: Tensor, value: Tensor, first: int) -> None:
    """Put keys and values of one sequence into a layer's pages.

    Args:
        layer: with room for them.
        key, value: [1, Hkv, S, D].
        first: position of the first row.
    """
    positions = first + torch.arange(key.shape[2], device=key.device)
    pages = layer.page_table[0].long()[positions // layer.config.page_size]
    rows = positions % layer.config.page_size
    layer.keys[pages, :, rows] = key[0].transpose(0, 1)
    layer.values[pages, :, rows] = value[0].transpose(0, 1)


def masked_attention(
    query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float, *, config: HipConfig, method: Method,
    decode: bool, generator: torch.Generator | None = None,
) -> Tensor:
    """Attention of consecutive rows to sink, window and chosen blocks.

    Args:
        query: [Hq, R, D], of rows that begin a query block.
        keys, values: [Hkv, T, D], T beyond the last row.
        first: position of the first row.
        scale: factor on q.k.
        config: block sizes and budgets.
        method: how to choose.
        decode: each row is a query block of its own, with decode_mask_k.
        generator: of "random".

    Returns:
        [Hq, R, D].
    """
    heads, rows = query.shape[:2]
    attended = choose(query, keys, first, config=config, method=method, decode=decode, generator=generator)
    group = torch.arange(rows, device=query.device) // (1 if decode else config.block_q)
    tokens = torch.arange(keys.shape[1], device=query.device)
    mask = attended.repeat_interleave(heads // len(attended), 0)[:, group][..., tokens // config.block_k]
    mask &= tokens <= (first + torch.arange(rows, device=query.device))[:, None]
    repeats = heads // len(keys)
    keys, values = (tensor.repeat_interleave(repeats, 0)[None] for tensor in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], keys, values, attn_mask=mask[None], scale=scale
    )[0]


def choose(
    query: Tensor, keys: Tensor, first: int, *, config: HipConfig, method: Method, decode: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Key blocks that each query block attends to.

    Args: as :func:`masked_attention`.

    Returns:
        [Hm, query blocks, key blocks] bool.
    """
    rows, device = query.shape[1], query.device
    block_q = 1 if decode else config.block_q
    starts = torch.arange(0, rows, block_q, device=device)
    p_first = first + starts
    p_last = (p_first + block_q - 1).clamp(max=first + rows - 1)
    window = (p_first - config.window_tokens + 1).clamp(min=0) // config.block_k
    sink = window.clamp(max=-(-config.sink_tokens // config.block_k))
    blocks = torch.arange(-(-keys.shape[1] // config.block_k), device=device)
    candidate = (blocks >= sink[:, None]) & (blocks < window[:, None])
    always = (blocks < sink[:, None]) | ((blocks >= window[:, None]) & (blocks <= (p_last // config.block_k)[:, None]))
    masks = config.num_masks(query.shape[0], keys.shape[0])
    if method == "none":
        return always.expand(masks, -1, -1)
    if method == "random":
        scores = torch.rand((masks, *candidate.shape), device=device, generator=generator)
    else:
        scores = _scores(query, keys, starts, block_q, masks, len(blocks), config)
    scores = scores.masked_fill(~candidate, float("-inf"))
    budget = min(config.decode_mask_blocks if decode else config.mask_blocks, len(blocks))
    best = scores.topk(budget, dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return always | (chosen & candidate)


def _scores(
    query: Tensor, keys: Tensor, starts: Tensor, block_q: int, masks: int, blocks: int, config: HipConfig
) -> Tensor:
    """Score of every key block, as the search scores a representative: [Hm, query blocks, key blocks] float32."""
    last = (starts + block_q - 1).clamp(max=query.shape[1] - 1)
    back = torch.arange(0, block_q, config.stride_q, device=query.device)
    sampled = last[:, None] - back  # rows before the block's first repeat it: the largest score stays what it is
    sampled = torch.maximum(sampled, last[:, None] - (last - starts)[:, None] // config.stride_q * config.stride_q)
    queries = query[:, sampled.flatten()].reshape(masks, -1, query.shape[-1]).float()  # [Hm, G N rows, D]
    per_mask = keys.repeat_interleave(masks // len(keys), 0).float()
    padding = blocks * config.block_k - keys.shape[1]
    strided = torch.arange(0, config.block_k, config.stride_k, device=query.device)
    scores = []
    for mask in range(masks):  # one at a time: the scores of all keys are large
        products = queries[mask] @ per_mask[mask].mT
        products = torch.nn.functional.pad(products, (0, padding), value=float("-inf"))
        products = products.reshape(-1, *sampled.shape, blocks, config.block_k)[..., strided]
        scores.append(products.amax(dim=(0, 2, 4)))
    return torch.stack(scores)
