"""Block caches of one layer: GPU memory in front of pools in host memory."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError
from hip_trt.library import Library

WAYS = 32
"""HIP_TRT_CACHE_WAYS: blocks among which the least recently used one is replaced."""

_MISSED_HEADER = 2
"""HIP_TRT_CACHE_MISSED_HEADER: numbers before the list of missed blocks."""

_EVENTS_AT = 2
"""HIP_TRT_OFFLOAD_EVENTS_AT: numbers before the events in a layer's counters."""


class _BlockCacheStruct(ctypes.Structure):
    """HipTrtBlockCache."""

    _fields_ = [("rows", ctypes.c_void_p), ("owners", ctypes.c_void_p), ("slots", ctypes.c_void_p),
                ("missed", ctypes.c_void_p), ("blocks", ctypes.c_int32), ("pool_blocks", ctypes.c_int32)]


class _LandingStruct(ctypes.Structure):
    """HipTrtLanding."""

    _fields_ = [("rows", ctypes.c_void_p), ("tickets", ctypes.c_void_p), ("blocks", ctypes.c_int32)]


class _OffloadStruct(ctypes.Structure):
    """HipTrtOffload."""

    _fields_ = [
        ("key_pool", ctypes.c_void_p), ("value_pool", ctypes.c_void_p), ("keys", _BlockCacheStruct),
        ("values", _BlockCacheStruct), ("landing", _LandingStruct), ("fills", ctypes.c_void_p),
        ("filled_later", ctypes.c_int32), ("counters", ctypes.c_void_p),
        ("staging_keys", ctypes.c_void_p), ("staging_values", ctypes.c_void_p), ("staging_table", ctypes.c_void_p),
        ("staging_pages", ctypes.c_int32), ("last_layer", ctypes.c_int32), ("lane", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class CacheCounts:
    """What happened in one cache, in blocks.

    Attributes:
        hits: found in GPU memory by the step that needed them.
        misses: read over the bus by the step that needed them.
        fills: copied to the cache after the step that missed them.
        evictions: fills that replaced another block.
        rereads: fills that read the block over the bus once more, as it had not landed in GPU memory.
    """

    hits: int = 0
    misses: int = 0
    fills: int = 0
    evictions: int = 0
    rereads: int = 0

    @property
    def lookups(self) -> int:
        return self.hits + self.misses

    @property
    def transfers(self) -> int:
        """Blocks read over the bus."""
        return self.misses + self.rereads

    @property
    def hit_ratio(self) -> float:
        """Hits per lookup; 1 if there was none."""
        return self.hits / self.lookups if self.lookups else 1.0

    def __sub__(self, earlier: CacheCounts) -> CacheCounts:
        return CacheCounts(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Staging:
    """GPU memory that prefill attends from; layers share it, as one runs after the other.

    Attributes:
        keys, values: [pages, Hkv, page_size, D].
        table: [4, pages] int32, page tables and lengths of the call.
    """

    keys: Tensor
    values: Tensor
    table: Tensor

    @classmethod
    def allocate(cls, pool: Tensor, pages: int, device: torch.device) -> Staging:
        """For pools like ``pool`` and calls of at most ``pages`` slots in their page tables (B times M)."""
        shape = (pages, *pool.shape[1:])
        keys, values = (torch.empty(shape, dtype=pool.dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.empty(4, pages, dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.table.nbytes


@dataclass(frozen=True)
class Landing:
    """GPU memory where decode steps leave what they read over the bus until it is placed in a cache; shared by layers,
    as one runs after the other, and no larger than what one of them may miss at once.

    Attributes:
        rows: [blocks, bytes of a block] uint8; ``blocks`` is a power of two.
        tickets: [2] int32.
    """

    rows: Tensor
    tickets: Tensor

    @classmethod
    def allocate(cls, blocks: int, block_bytes: int, device: torch.device) -> Landing:
        """For at most ``blocks`` (1 or more) at once, rounded down."""
        whole = 1 << blocks.bit_length() - 1
        return cls(torch.empty(whole, block_bytes, dtype=torch.uint8, device=device),
                   torch.zeros(2, dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.tickets.nbytes


class Lane:
    """A stream beside that of the calls, for what may wait: writing prefill's rows to the pools.

    Args:
        library: whose calls shall use it.
        device: the GPU.

    Raises:
        PluginError: the GPU refused.
    """

    def __init__(self, library: Library, device: torch.device) -> None:
        self.handle = library.create_offload_lane(device)
        self.close = weakref.finalize(self, library.destroy_offload_lane, self.handle)
        """Wait for what runs there and release it; nothing may be attached to it any more."""


class BlockCaches:
    """The caches of one layer's pools, attached until :meth:`detach`.

    Args:
        library: whose calls shall use them.
        key_pool, value_pool: [P, Hkv, page_size, D], what calls pass as both past and present.
        config: gives the size of a block.
        key_blocks, value_blocks: sizes, in blocks of ``config.block_k`` rows; rounded down to a multiple of WAYS, and
            to no more than the pool.
        device: the GPU.
        staging: shared by layers; None: prefill reads the pools over the bus.
        lane: shared by layers; None: what a call leaves to be done runs in its stream.
        landing: shared by layers that are called in turn; None: what is missed is read over the bus twice, by the step
            and to be placed in a cache.
        last_layer: no layer comes after this one: its calls wait for the lane.

    A decode step of these pools ends with filling these caches, unless :meth:`follow` has another layer do it.

    Raises:
        ConfigError: a size is negative.
    """

    def __init__(
        self,
        library: Library,
        key_pool: Tensor,
        value_pool: Tensor,
        config: HipConfig,
        *,
        key_blocks: int,
        value_blocks: int,
        device: torch.device,
        staging: Staging | None = None,
        lane: Lane | None = None,
        landing: Landing | None = None,
        last_layer: bool = False,
    ) -> None:
        if min(key_blocks, value_blocks) < 0:
            raise ConfigError(f"cache of {min(key_blocks, value_blocks)} blocks: it must be 0 or more.")
        pages, heads, page_size, head_dim = key_pool.shape
        in_pool = pages * heads * page_size // config.block_k
        self.block_bytes = config.block_k * head_dim * key_pool.element_size()
        self.key_pool, self.value_pool = key_pool, value_pool
        self.staging: Staging | None = None
        self._fills: Tensor | None = None
        self._filled_later = False
        self._library, self._lane, self._landing, self._last_layer = library, lane, landing, last_layer
        self._counters = torch.zeros(_EVENTS_AT + 2 * len(fields(CacheCounts)), dtype=torch.int64, device=device)
        self._memory = [
            self._allocate(min(blocks, -(-in_pool // WAYS) * WAYS), in_pool, device)
            for blocks in (key_blocks, value_blocks)
        ]
        keys, values = (
            _BlockCacheStruct(*(tensor.data_ptr() if len(tensors[1]) else None for tensor in tensors), len(tensors[1]),
                              in_pool)
            for tensors in self._memory
        )
        self._caches = keys, values
        self.set_staging(staging)

    def _allocate(self, blocks: int, in_pool: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, owners, slots by block, and missed blocks."""
        blocks -= blocks % WAYS
        return (torch.empty(blocks, self.block_bytes, dtype=torch.uint8, device=device),
                torch.zeros(blocks, dtype=torch.int64, device=device),
                torch.zeros(in_pool if blocks else 0, dtype=torch.int32, device=device),
                torch.zeros(_MISSED_HEADER + 2 * blocks if blocks else 0, dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        """GPU memory of both caches; what layers share is not counted."""
        return self._counters.nbytes + sum(tensor.nbytes for cache in self._memory for tensor in cache)

    @property
    def key_blocks(self) -> int:
        return len(self._memory[0][1])

    @property
    def value_blocks(self) -> int:
        return len(self._memory[1][1])

    def counts(self) -> tuple[CacheCounts, CacheCounts]:
        """Of keys and of values, since the caches were made; waits for the GPU."""
        numbers = [int(number) for number in self._counters[_EVENTS_AT:].tolist()]
        half = len(numbers) // 2
        return CacheCounts(*numbers[:half]), CacheCounts(*numbers[half:])

    def set_staging(self, staging: Staging | None) -> None:
        """Have prefill attend from other GPU memory, or from the pools, from now on; the caches stay as they are."""
        self.staging = staging
        self._attach()

    def follow(self, before: BlockCaches) -> None:
        """Fill the caches of the layer that is called before this one, on the way: of the first layer, the last one.
        That costs no time; both have the same config and shape."""
        self._fills, before._filled_later = before.key_pool, True
        before._attach()
        self._attach()

    def _attach(self) -> None:
        staging = self.staging
        self._library.attach_offload(_OffloadStruct(
            self.key_pool.data_ptr(), self.value_pool.data_ptr(), *self._caches,
            _LandingStruct(self._landing.rows.data_ptr(), self._landing.tickets.data_ptr(), len(self._landing.rows))
            if self._landing else _LandingStruct(None, None, 0),
            None if self._fills is None else self._fills.data_ptr(), int(self._filled_later), self._counters.data_ptr(),
            *((staging.keys.data_ptr(), staging.values.data_ptr(), staging.table.data_ptr(), len(staging.keys))
              if staging else (None, None, None, 0)),
            int(self._last_layer), None if self._lane is None else self._lane.handle,
        ))

    def forget(self) -> None:
        """Empty both caches: for rows that were written by other means than the operator."""
        self._library.forget_offload(self.key_pool)

    def detach(self) -> None:
        """Calls from now on use the pools as plain memory. Call before the pools or this object go away."""
        self._library.detach_offload(self.key_pool)

    def __enter__(self) -> BlockCaches:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

