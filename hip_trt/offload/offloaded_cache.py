"""The KV cache of a model in host memory: pools of all layers, and the caches in front of them."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from hip_trt import library as libraries
from hip_trt.errors import RuntimeInputError
from hip_trt.library import Library
from hip_trt.offload import host_memory
from hip_trt.offload.block_caches import BlockCaches, CacheCounts, Landing, Lane, Staging
from hip_trt.offload.host_limits import gib, require_host_memory
from hip_trt.offload.host_memory import Host, HostMemory, warn_once
from hip_trt.offload.settings import Offload
from hip_trt.offload.sizes import CacheSizes, Geometry, cache_sizes
from hip_trt.offload.statistics import OffloadStats, PrefillMeter

_REMEDY = "Use fewer pages: a shorter context (--max-seq-len), or a smaller batch."
_SLOTS_AT_ONCE = 16
"""Pages of each sequence that pass through GPU memory together when sequences are rearranged."""

_NO_COUNTS = CacheCounts(), CacheCounts()


class _Layer:
    """One layer's pools and caches."""

    def __init__(
        self, geometry: Geometry, sizes: CacheSizes, host: Host, library: Library, lane: Lane | None,
        landing: Landing | None, last: bool,
    ) -> None:
        self.geometry = geometry
        self.memory = HostMemory(host, geometry.layer_bytes)
        try:
            self.keys, self.values = _pools(self.memory.device_bytes(), geometry)
            self.caches = BlockCaches(
                library, self.keys, self.values, geometry.config, key_blocks=sizes.keys, value_blocks=sizes.values,
                device=host.device, lane=lane, landing=landing, last_layer=last,
            )
        except BaseException:
            host.synchronize()
            self.memory.close()
            raise

    def copy_rows(self, other: _Layer) -> None:
        """Take the pages of smaller pools, on the host; the caller has waited for the device."""
        mine, theirs, size = self.memory.host_bytes(), other.memory.host_bytes(), other.geometry.pool_bytes
        for to, start in ((0, 0), (self.geometry.value_offset, other.geometry.value_offset)):
            mine[to : to + size].copy_(theirs[start : start + size])

    def close(self) -> None:
        """The caller has waited for the device."""
        self.caches.detach()
        self.memory.close()


class OffloadedCache:
    """Page pools in host memory, and caches of their hot blocks in GPU memory.

    The pools go where resident ones would: as past and present of calls, of graphs and of engines, which are the same.
    Release is by :meth:`close`, by leaving a ``with``, or when the object goes; tensors of the pools must not be used
    after that. Nothing outlives the process.

    Args:
        geometry: sizes of the pools.
        offload: sizes of the caches.
        host: of the device; by default that of ``device``.
        device: the GPU.
        library: whose calls use the caches; by default the installed one.

    Raises:
        RuntimeInputError: host memory does not suffice (said before any is taken), GPU memory does not, or ``device``
            is no GPU.
        EnvironmentProblem: CUDA does not lock host memory.
    """

    def __init__(
        self, geometry: Geometry, offload: Offload, *, device: torch.device, host: Host | None = None,
        library: Library | None = None,
    ) -> None:
        self._host = host_memory.host_for(device) if host is None else host
        self._library = libraries.load() if library is None else library
        self.offload, self.geometry = offload, geometry
        self._lane: Lane | None = None
        self._landing: Landing | None = None
        self._staging: Staging | None = None
        self._stage_in_vain = False
        self._before: list[tuple[CacheCounts, CacheCounts]] = [_NO_COUNTS] * geometry.num_layers
        self._tokens = 0
        self._prefill = PrefillMeter(self._host.device, geometry.config.page_size)
        self._layers: list[_Layer] = []
        self._release = weakref.finalize(self, _close, self._layers, self._host)
        require_host_memory(geometry.num_layers * geometry.layer_bytes, _describe(geometry), _REMEDY)
        sizes = self._sizes(geometry)
        try:
            if geometry.num_layers > 1:
                self._lane = Lane(self._library, self._host.device)
            self._landing = self._allocate_landing(geometry, sizes)
            for index in range(geometry.num_layers):
                self._layers.append(self._layer(index, geometry, sizes))
            self._chain()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [P, Hkv, page_size, D] each, on the device.

        Raises:
            RuntimeInputError: the memory has been released.
        """
        self._check_open()
        return self._layers[layer].keys, self._layers[layer].values

    @property
    def keys(self) -> list[Tensor]:
        """Of all layers."""
        return [self.pools(layer)[0] for layer in range(self.geometry.num_layers)]

    @property
    def values(self) -> list[Tensor]:
        """Of all layers."""
        return [self.pools(layer)[1] for layer in range(self.geometry.num_layers)]

    def prepare(self, *, prefill: bool) -> None:
        """Before a call: give prefill its staging area, or, for a decode step, take it back."""
        self._check_open()
        if prefill and self._staging is None and not self._stage_in_vain:
            self._stage(self._allocate_staging())
        elif not prefill and self._staging is not None and self.offload.release_staging:
            self._host.synchronize()  # a call that was broken off may still be written out from there
            self._stage(None)

    def grow(self, pages: int, slots: int) -> None:
        """Pools of more pages, with the rows of the old ones; addresses change. All layers, or none that matters: where
        one cannot grow, those that have keep their rows, and nothing that was committed is lost.

        Raises:
            RuntimeInputError: as in the constructor.
            EnvironmentProblem: likewise.
        """
        self._check_open()
        if pages <= self.geometry.pages:
            return
        old, new = self.geometry, replace(self.geometry, pages=pages, slots=slots)
        more = old.num_layers * (new.layer_bytes - old.layer_bytes) + old.layer_bytes  # one layer is there twice
        require_host_memory(more, f"{_describe(new)}, grown from {old.pages:,} pages,", _REMEDY)
        sizes = self._sizes(new)
        self._stage(None)
        self._host.synchronize()
        self._landing = self._allocate_landing(new, sizes)
        for index, layer in enumerate(self._layers):
            if layer.geometry.pages >= pages:
                continue  # by an attempt that failed later
            grown = self._layer(index, new, sizes)
            grown.copy_rows(layer)
            self._keep_counts(index)
            self._layers[index] = grown
            layer.close()
        self._chain()
        self.geometry = new

    def forget(self) -> None:
        """Empty the caches: for rows that were written by other means than the operator."""
        self._check_open()
        for layer in self._layers:
            layer.caches.forget()

    def select(self, layer: int, indices: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Rearrange a layer whose page m of sequence b is m x batch + b: sequence i becomes a copy of indices[i].

        In place where their number stays, else in new pools; all rows travel over the bus, some pages at a time.

        Returns:
            The layer's pools.
        """
        self._check_open()
        old, count = self._layers[layer], len(indices)
        slots = old.geometry.pages // batch
        new = old
        if count != batch:
            geometry = replace(old.geometry, batch=count, pages=slots * count)
            require_host_memory(geometry.layer_bytes, f"A layer of {_describe(geometry)}", _REMEDY)
            new = self._layer(layer, geometry, self._sizes(geometry))
            new.caches.set_staging(self._staging)
        for source, target in ((old.keys, new.keys), (old.values, new.values)):
            pages, to = (pool[: slots * number].view(slots, number, *pool.shape[1:])
                         for pool, number in ((source, batch), (target, count)))
            for start in range(0, slots, _SLOTS_AT_ONCE):
                to[start : start + _SLOTS_AT_ONCE] = pages[start : start + _SLOTS_AT_ONCE][:, indices]
        if new is old:
            old.caches.forget()
        else:
            old.caches.forget()  # what has landed is given back
            self._host.synchronize()
            self._keep_counts(layer)
            self._layers[layer], self.geometry = new, new.geometry
            self._chain()
            old.close()
        return self.pools(layer)

    def write(self, layer: int, keys: Tensor, values: Tensor, *, first_page: int = 0) -> None:
        """Copy pages from anywhere into a layer's pools, and empty its caches.

        Args:
            keys, values: [pages, Hkv, page_size, D], on any device.
            first_page: where they go.
        """
        for pool, new in zip(self.pools(layer), (keys, values), strict=True):
            pool[first_page : first_page + len(new)] = new.to(pool.device)
        self._layers[layer].caches.forget()

    def count_tokens(self, tokens: int) -> None:
        """Say that a decode step gave so many, for what is reported per token."""
        self._tokens += tokens

    def count_prefill(self, past_lengths: Tensor, query_lengths: Tensor, slots: int) -> None:
        """Say that a prefill call comes, after :meth:`prepare`, for what is reported of prefill; waits for nothing.

        Args:
            past_lengths, query_lengths: [B] int32, of the call.
            slots: in each row of its page table (M).
        """
        staged = self._staging is not None and len(past_lengths) * slots <= len(self._staging.keys)
        self._prefill.count(past_lengths, query_lengths, staged=staged)

    def stats(self) -> OffloadStats:
        """Counts since the beginning, or :meth:`reset_stats`; waits for the GPU."""
        self._check_open()
        counts = [self._counts(index) for index in range(self.geometry.num_layers)]
        caches = [layer.caches for layer in self._layers]
        keys, values = (
            sum(getattr(cache, name) for cache in caches) * self.geometry.block_bytes
            for name in ("key_blocks", "value_blocks")
        )
        shared = sum(part.nbytes for part in (self._landing, self._staging) if part)
        whole = sum(cache.nbytes for cache in caches) + shared
        return OffloadStats(
            keys=tuple(key for key, _ in counts), values=tuple(value for _, value in counts), tokens=self._tokens,
            block_bytes=self.geometry.block_bytes, key_cache_bytes=keys, value_cache_bytes=values,
            other_gpu_bytes=whole - keys - values, host_bytes=sum(layer.memory.size for layer in self._layers),
            prefill=self._prefill.traffic(2 * self.geometry.page_bytes * self.geometry.num_layers),
        )

    def reset_stats(self) -> None:
        """Count from here on."""
        self._check_open()
        for index, layer in enumerate(self._layers):
            now = layer.caches.counts()
            self._before[index] = _NO_COUNTS[0] - now[0], _NO_COUNTS[1] - now[1]
        self._tokens = 0
        self._prefill = PrefillMeter(self._host.device, self.geometry.config.page_size)

    def close(self) -> None:
        """Wait for the GPU, detach the caches and give all memory back. Nothing happens the second time."""
        self._release()
        self._lane = self._landing = self._staging = None

    def __enter__(self) -> OffloadedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeInputError("The offloaded KV cache has been released.", "Begin with a new one.")

    def _layer(self, index: int, geometry: Geometry, sizes: CacheSizes) -> _Layer:
        last = index == geometry.num_layers - 1
        try:
            return _Layer(geometry, sizes, self._host, self._library, self._lane, self._landing, last)
        except torch.OutOfMemoryError:
            raise self._no_room(geometry, sizes) from None

    def _chain(self) -> None:
        """Each layer fills the caches of the one before."""
        if len(self._layers) > 1:
            for index, layer in enumerate(self._layers):
                layer.caches.follow(self._layers[index - 1].caches)

    def _allocate_landing(self, geometry: Geometry, sizes: CacheSizes) -> Landing | None:
        try:
            blocks = sizes.landing(geometry.num_layers)
            return Landing.allocate(blocks, geometry.block_bytes, self._host.device) if blocks else None
        except torch.OutOfMemoryError:
            raise self._no_room(geometry, sizes) from None

    def _no_room(self, geometry: Geometry, sizes: CacheSizes) -> RuntimeInputError:
        wanted = (sizes.keys + sizes.values) * geometry.block_bytes * geometry.num_layers
        return RuntimeInputError(
            f"offload: caches of {gib(wanted)} do not fit in the memory of {self._host.device}.",
            "Ask for smaller ones (--key-cache-mib, --value-cache-mib, --cache-share).",
        )

    def _sizes(self, geometry: Geometry) -> CacheSizes:
        sizes = cache_sizes(self.offload, geometry)
        for line in sizes.too_small:
            warn_once(line)
        return sizes

    def _allocate_staging(self) -> Staging | None:
        """None where the user wants none, or the GPU has no room: then prefill reads the pools over the bus."""
        geometry, tokens = self.geometry, self.offload.staging_tokens
        pages = geometry.batch * geometry.slots
        if tokens is not None:
            pages = min(pages, -(-tokens // geometry.config.page_size))
        try:
            staging = Staging.allocate(self._layers[0].keys, pages, self._host.device) if pages else None
        except torch.OutOfMemoryError:
            warn_once(
                f"no GPU memory for prefill's staging area of {gib(2 * pages * geometry.page_bytes)}: prefill reads "
                "tokens over the bus, slowly"
            )
            staging = None
        self._stage_in_vain = staging is None
        return staging

    def _stage(self, staging: Staging | None) -> None:
        self._staging = staging
        for layer in self._layers:
            layer.caches.set_staging(staging)

    def _counts(self, index: int) -> tuple[CacheCounts, CacheCounts]:
        """Of a layer, with what it counted before it grew, or less what was counted before a reset."""
        keys, values = self._layers[index].caches.counts()
        return keys + self._before[index][0], values + self._before[index][1]

    def _keep_counts(self, index: int) -> None:
        self._before[index] = self._counts(index)


def _pools(memory: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Key and value pool of a layer within its memory."""
    size = geometry.pool_bytes
    return tuple(  # type: ignore[return-value]
        memory[start : start + size].view(geometry.dtype).view(geometry.pool_shape)
        for start in (0, geometry.value_offset)
    )


def _close(layers: list[_Layer], host: Host) -> None:
    try:
        host.synchronize()
    except RuntimeError as error:  # a kernel has failed; nothing runs any more
        warn_once(str(error))
    while layers:
        layers.pop().close()


def _describe(geometry: Geometry) -> str:
    return (
        f"A KV cache of {geometry.num_layers} layers of {geometry.pages:,} pages of {geometry.config.page_size} tokens"
    )
