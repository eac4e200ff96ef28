"""A transformers Cache over paged pools: the state of the operator, and the schedule of mask searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from hip_trt import operator, ops  # noqa: F401  (importing ops registers torch.ops.hip_trt)
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.offload import Geometry, Offload, OffloadedCache


class HipCache(Cache):  # type: ignore[misc]
    """KV cache and tree nodes of a batch, one :class:`HipLayer` per decoder layer. A patched model makes its own.

    Args:
        model_config: the model's.
        config: how attention is pruned.
        max_tokens: tokens per sequence to allocate at once; by default, pages are added as sequences grow.
        offload: keep the pages in host memory, served by so much of the GPU's; None: on the GPU. Growing takes long
            there: give ``max_tokens`` where it is known.
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: HipConfig, *, max_tokens: int = 0, offload: Offload | None = None
    ) -> None:
        number = model_config.num_hidden_layers
        self._host_pools = _HostPools(config, offload, number) if offload else None
        super().__init__(
            layers=[HipLayer(config, layer, max_tokens=max_tokens, host_pools=self._host_pools)
                    for layer in range(number)]
        )

    @property
    def in_host_memory(self) -> bool:
        """Whether the cache is offloaded."""
        return self._host_pools is not None

    @property
    def offloaded(self) -> OffloadedCache | None:
        """The pages in host memory, with what their caches count; None before the first call, or without offload."""
        return self._host_pools.cache if self._host_pools else None

    def close(self) -> None:
        """Give host memory back now; it goes with the object else. The cache cannot be used any more."""
        if self._host_pools:
            self._host_pools.close()
            for layer in self.layers:
                layer.drop_pools()


@dataclass
class _HostPools:
    """Pools in host memory that the layers of a cache share; made by the first layer that is called.

    Attributes:
        cache: None until then.
        closed: no call may use it any more.
    """

    config: HipConfig
    offload: Offload
    num_layers: int
    cache: OffloadedCache | None = None
    closed: bool = False

    def reserve(self, key: Tensor, num_masks: int, slots: int) -> None:
        """Have room for so many pages a sequence, in all layers, before the first of them writes.

        Args:
            key: [B, Hkv, S, D], for its type, device and sizes.
        """
        if self.closed:
            raise RuntimeInputError("cache: its host memory has been released.", "Begin with a new cache.")
        batch, kv_heads, _, head_dim = key.shape
        if self.cache is None:
            geometry = Geometry(
                self.num_layers, kv_heads, num_masks, head_dim, key.dtype, batch, batch * slots, slots, self.config
            )
            self.cache = OffloadedCache(geometry, self.offload, device=key.device)
        else:
            self.cache.grow(batch * slots, slots)

    def begin(self, layer: int, tokens: int, past_lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's pools for a call. They may have moved since the last one, as another layer has made them grow.

        Args:
            tokens: of the call's shape (S).
            past_lengths, counts: [B] int32.
        """
        assert self.cache is not None
        self.cache.prepare(prefill=tokens > 1)
        if layer == 0 and tokens == 1:
            self.cache.count_tokens(len(counts))
        elif layer == 0:
            self.cache.count_prefill(past_lengths, counts, self.cache.geometry.slots)
        return self.cache.pools(layer)

    def __deepcopy__(self, memo: Any) -> _HostPools:
        raise RuntimeInputError(
            "cache: a cache in host memory cannot be copied.",
            "Compute the prefix again, or leave offload out.",
        )

    def close(self) -> None:
        self.closed = True
        if self.cache is not None:
            self.cache.close()


class HipLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's pages, lengths and nodes. The operator itself writes the new rows, in :meth:`attend`.

    Page m of sequence b is m x B + b, so that pools grow at their end.

    Attributes:
        keys, values: [P, Hkv, page_size, D], the page pools.
        page_table: [B, M] int32.
        lengths: [B] int32, committed tokens, padding not counted.
        nodes: [B, Hm, Kd] int32, see :func:`hip_trt.reference.hip_attention`.
    """

    lengths: Tensor
    nodes: Tensor
    page_table: Tensor
    is_initialized: bool
    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, config: HipConfig, layer: int, *, max_tokens: int = 0, host_pools: _HostPools | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._host_pools = host_pools
        self._layer = layer
        self._min_slots = -(-max_tokens // config.page_size)
        self._columns = 0  # tokens seen, padding included: an upper bound of lengths that the host knows
        self._steps = 0  # decode steps since the last search from the top

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Append the new tokens and attend. Searches from the top at the first of refresh_interval decode steps.

        Args:
            query: [B, Hq, S, D], after RoPE.
            key, value: [B, Hkv, S, D], keys after RoPE.
            valid: [B, S] bool, False for padding, on any side; None: all are valid.
            scale: factor on q.k.

        Returns:
            [B, Hq, S, D]; padding rows are 0.
        """
        batch, query_heads, tokens = query.shape[:3]
        if not self.is_initialized:
            self._allocate(key, self.config.num_masks(query_heads, key.shape[1]))
        if self.lengths.shape[0] != batch:
            raise RuntimeInputError(
                f"cache: the cache holds {self.lengths.shape[0]} sequences, the call has {batch}.",
                "Use a new cache for another batch.",
            )
        self._reserve(self._columns + tokens, key)
        if tokens > 1:
            self._steps = 0
        refresh = torch.full((1,), int(self._steps == 0), dtype=torch.int32, device=query.device)
        order = None
        if valid is None:
            counts = torch.full_like(self.lengths, tokens)
        else:
            counts = valid.sum(dim=1, dtype=torch.int32)
            if tokens > 1:  # the operator takes padding on the right
                order = valid.logical_not().argsort(dim=1, stable=True)[:, None, :, None]
                query, key, value = (tensor.gather(2, order.expand_as(tensor)) for tensor in (query, key, value))
        if self._host_pools:
            self.keys, self.values = self._host_pools.begin(self._layer, tokens, self.lengths, counts)
        output: Tensor = torch.ops.hip_trt.attention_(
            query, key, value, self.keys, self.values, self.page_table, self.lengths, counts, self.nodes, refresh,
            **operator.attributes(self.config, scale=scale, layer=self._layer),
        )
        if order is not None:
            output = torch.zeros_like(output).scatter(2, order.expand_as(output), output)
        self.lengths = self.lengths + counts
        self._columns += tokens
        if tokens == 1:
            self._steps = (self._steps + 1) % self.config.refresh_interval
        return output

    def _allocate(self, key: Tensor, num_masks: int) -> None:
        batch, kv_heads, _, head_dim = key.shape
        self.keys, self.values = (key.new_empty((0, kv_heads, self.config.page_size, head_dim)) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=key.device)
        self.nodes = torch.full(
            (batch, num_masks, self.config.decode_mask_blocks), -1, dtype=torch.int32, device=key.device
        )
        self._lay_out_pages(batch, 0)
        self.is_initialized = True

    def _reserve(self, tokens: int, key: Tensor) -> None:
        """Make room for this many tokens per sequence; for more than asked, to grow seldom: an eighth, or half where
        growing means to lock host memory."""
        held, needed = self.page_table.shape[1], -(-tokens // self.config.page_size)
        if needed <= held:
            return
        batch = self.lengths.shape[0]
        slots = max(needed, self._min_slots, held + held // (2 if self._host_pools else 8))
        if self._host_pools:
            self._host_pools.reserve(key, self.nodes.shape[1], slots)
            self._lay_out_pages(batch, slots)
            return
        new = self.keys.new_empty(((slots - held) * batch, *self.keys.shape[1:]))
        self.keys, self.values = torch.cat([self.keys, new]), torch.cat([self.values, new])
        self._lay_out_pages(batch, slots)

    def _lay_out_pages(self, batch: int, slots: int) -> None:
        device = self.keys.device
        sequences = torch.arange(batch, dtype=torch.int32, device=device)
        self.page_table = sequences[:, None] + batch * torch.arange(slots, dtype=torch.int32, device=device)

    def drop_pools(self) -> None:
        """Their memory is given back: no tensor of it may stay."""
        self.keys = self.values = torch.empty(0)

    # The interface of a transformers cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: shapes are known in :meth:`attend`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: :meth:`attend` stores them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of an attention mask after the next call, and the first one's index."""
        return self._columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self._columns

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the pages stay."""
        self._columns = self._steps = 0
        if self.is_initialized:
            self.lengths, self.nodes = torch.zeros_like(self.lengths), torch.full_like(self.nodes, -1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes a copy of sequence beam_idx[b]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.lengths.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.lengths.device)
        pages = self.page_table[indices].t().flatten()
        if self._host_pools and self._host_pools.cache:
            self.keys, self.values = self._host_pools.cache.select(self._layer, indices, len(self.lengths))
        else:
            self.keys, self.values = self.keys[pages], self.values[pages]
        self.lengths, self.nodes = self.lengths[indices], self.nodes[indices]
        self._lay_out_pages(len(indices), self.page_table.shape[1])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: tokens cannot be taken back (assisted generation)."""
        raise RuntimeInputError(
            "crop: a HipCache cannot take tokens back.", "Generate without assistant_model or prompt lookup."
        )
