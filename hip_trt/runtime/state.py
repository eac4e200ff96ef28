"""The state of a batch of sequences: page table, lengths, and what the layers keep. Every tensor is a graph input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hip_trt.errors import RuntimeInputError
from hip_trt.offload import Geometry, Offload, OffloadedCache
from hip_trt.operator import KEY, NOTHING, STATE, VALUE, StateTensor
from hip_trt.runtime.pages import NO_PAGE, PageAllocator, check_page_table, pages_for
from hip_trt.spec import ModelSpec


class KVState:
    """What the layers keep of B sequences (:data:`hip_trt.operator.STATE`), on one device.

    Pages are handed out as sequences grow (:meth:`reserve`), unless the caller supplies a page table
    (:meth:`set_page_table`) and so manages pages itself. Sequences may share the full pages of a common prefix.

    Args:
        spec: the model.
        device: where the tensors live.
        batch: B.
        max_seq_len: most tokens per sequence; rounded up to whole pages.
        pages: P, pages in each layer's pool; by default, enough for every sequence to reach max_seq_len.
        offload: keep the pools in host memory, served by so much of the device's; None: on the device.

    Attributes:
        offloaded: the key and value pools in host memory, with what their caches count; None without ``offload``.
        layers: of each layer, its tensors. Rows of pools that no sequence has committed are undefined.
        page_table: [B, M] int32.
        past_lengths: [B] int32, the device's copy of :attr:`lengths`.

    Raises:
        RuntimeInputError: if the pools do not fit in memory, or ``device`` is no GPU to offload.
        EnvironmentProblem: if host memory cannot be locked.
    """

    def __init__(
        self, spec: ModelSpec, device: torch.device, *, batch: int, max_seq_len: int, pages: int | None = None,
        offload: Offload | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("max_seq_len", max_seq_len), ("pages", 1 if pages is None else pages)):
            if value < 1:
                raise RuntimeInputError(f"{name}: {value} is not allowed.", "It must be at least 1.")
        self.page_size = spec.hip.page_size
        slots = pages_for(max_seq_len, self.page_size)
        pages = batch * slots if pages is None else pages
        self.offloaded: OffloadedCache | None = None
        if offload:
            self.offloaded = OffloadedCache(
                Geometry(
                    spec.num_layers, spec.num_key_value_heads, spec.num_masks, spec.head_dim, spec.torch_dtype, batch,
                    pages, slots, spec.hip,
                ),
                offload, device=device,
            )
        self.layers = _allocate(spec, batch, pages, device, self.offloaded)
        self.page_table = torch.full((batch, slots), NO_PAGE, dtype=torch.int32, device=device)
        self.past_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._lengths = [0] * batch
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        self.num_pages = pages
        self._allocator: PageAllocator | None = PageAllocator(pages)

    @property
    def batch(self) -> int:
        """B, sequences."""
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def max_seq_len(self) -> int:
        """Most tokens that a sequence's page slots can hold."""
        return self.page_table.shape[1] * self.page_size

    @property
    def bytes(self) -> int:
        """Memory of the pools."""
        return sum(layer[tensor].nbytes for layer in self.layers for tensor in STATE if tensor.paged)

    def tensors(self, tensor: StateTensor) -> list[Tensor]:
        """One tensor of the state, of each layer."""
        return [layer[tensor] for layer in self.layers]

    def pages(self, row: int) -> tuple[int, ...]:
        """The pages of one sequence, in order."""
        return tuple(self._rows[row])

    def set_page_table(self, table: Sequence[Sequence[int]] | Tensor, lengths: Sequence[int] | None = None) -> None:
        """Take a page table from the caller, who manages pages from now on.

        It is checked here, once, and never in a call.

        Args:
            table: [B, up to M] integers, -1 where none.
            lengths: committed tokens of each sequence, whose keys and values are where the table says; by default the
                present :attr:`lengths`.

        Raises:
            RuntimeInputError: see :func:`check_page_table`.
        """
        rows = table.tolist() if isinstance(table, Tensor) else [list(row) for row in table]
        slots = self.page_table.shape[1]
        if len(rows) != self.batch or any(len(row) > slots for row in rows):
            shape = f"[{len(rows)}, {max((len(row) for row in rows), default=0)}]"
            raise RuntimeInputError(
                f"page_table: shape {shape} does not fit.", f"It must have {self.batch} rows of at most {slots} slots."
            )
        lengths = self._lengths if lengths is None else list(lengths)
        if len(lengths) != self.batch or any(not 0 <= length <= self.max_seq_len for length in lengths):
            raise RuntimeInputError(
                f"lengths: {lengths} do not fit.", f"Give {self.batch} lengths of 0 to {self.max_seq_len} tokens."
            )
        check_page_table(rows, lengths, pages=self.num_pages, page_size=self.page_size)
        self._allocator = None
        self._lengths = lengths
        self.past_lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self._rows = [[page for page in row if page != NO_PAGE] for row in rows]
        if self.offloaded:
            self.offloaded.forget()  # the caller may have written the pages by any means
        self._write_table(range(self.batch))

    def reserve(self, wanted: Sequence[int]) -> None:
        """Make sure that each sequence has pages for ``wanted[b]`` tokens in all; changes nothing if one cannot.

        Raises:
            RuntimeInputError: naming the sequence, the tokens wanted and the tokens available.
        """
        missing = []
        for row, (tokens, held) in enumerate(zip(wanted, self._rows, strict=True)):
            if tokens > self.max_seq_len:
                raise _too_long(row, tokens, self.max_seq_len, "Raise max_seq_len")
            missing.append(max(0, pages_for(tokens, self.page_size) - len(held)))
        if not any(missing):
            return
        available = self._allocator.available if self._allocator else 0
        for row, count in enumerate(missing):
            if count > available:
                remedy = "Raise the number of pages" if self._allocator else "Add pages to its row of the page table"
                raise _too_long(row, wanted[row], (len(self._rows[row]) + available) * self.page_size, remedy)
            available -= count
        assert self._allocator is not None
        for row, count in enumerate(missing):
            self._rows[row] += self._allocator.allocate(count)
        self._write_table(row for row, count in enumerate(missing) if count)

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Commit ``counts[i]`` tokens that a call has written to sequence ``rows[i]``."""
        for row, count in zip(rows, counts, strict=True):
            self._lengths[row] += count
        self.past_lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32))

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a sequence from ``length`` on, and what layers keep of it but pages.

        A page that is then only partly filled, and shared, is copied, so that the other sequences keep theirs.
        """
        if length >= self._lengths[row]:
            return
        held = self._rows[row]
        keep = pages_for(length, self.page_size)
        if self._allocator is None:
            lengths = [length if index == row else old for index, old in enumerate(self._lengths)]
            check_page_table(self._rows, lengths, pages=self.num_pages, page_size=self.page_size)
        else:
            if length % self.page_size and self._allocator.holders(held[keep - 1]) > 1:
                self._own_page(row, keep - 1)
            self._allocator.release(held[keep:])
            del held[keep:]
            self._write_table([row])
        self._lengths[row] = length
        self.past_lengths[row] = length
        for layer in self.layers:
            for tensor in STATE:
                if not tensor.paged:
                    layer[tensor][row] = NOTHING

    def share_prefix(self, row: int, source: int, tokens: int) -> int:
        """Begin an empty sequence with the full pages of another one's first tokens, without computing them again.

        Args:
            row: the empty sequence.
            source: the sequence that has the prefix.
            tokens: length of the common prefix.

        Returns:
            Tokens shared: ``tokens``, at most what ``source`` has committed, rounded down to whole pages.

        Raises:
            RuntimeInputError: if the sequence is not empty, or if the caller manages the page table.
        """
        if self._allocator is None:
            raise RuntimeInputError("share_prefix: the caller supplies the page table.", "Share pages in that table.")
        if self._lengths[row]:
            raise RuntimeInputError(
                f"share_prefix: sequence {row} has {self._lengths[row]} tokens already.", "Truncate it to 0 first."
            )
        count = min(tokens, self._lengths[source]) // self.page_size
        shared = self._rows[source][:count]
        self._allocator.share(shared)
        self._allocator.release(self._rows[row])
        self._rows[row] = list(shared)
        self._lengths[row] = count * self.page_size
        self.past_lengths[row] = self._lengths[row]
        self._write_table([row])
        return self._lengths[row]

    def close(self) -> None:
        """Give host memory back now; it goes with the object else. Calls cannot use the state any more."""
        if self.offloaded:
            self.offloaded.close()
            self.layers = []

    def _own_page(self, row: int, slot: int) -> None:
        """Replace a shared page of the sequence by a copy of its own."""
        assert self._allocator is not None
        held = self._rows[row]
        if not self._allocator.available:
            raise RuntimeInputError(
                f"sequence {row}: no page is free for a copy of the shared page in slot {slot}.",
                "Raise the number of pages, or free a sequence.",
            )
        (copy,) = self._allocator.allocate(1)
        for layer in self.layers:
            for tensor in STATE:
                if tensor.paged:
                    layer[tensor][copy] = layer[tensor][held[slot]]
        if self.offloaded:
            self.offloaded.forget()  # what was cached of the page before
        self._allocator.release([held[slot]])
        held[slot] = copy

    def _write_table(self, rows: Iterable[int]) -> None:
        slots = self.page_table.shape[1]
        for row in rows:
            held = self._rows[row]
            self.page_table[row] = torch.tensor(held + [NO_PAGE] * (slots - len(held)), dtype=torch.int32)


def _allocate(
    spec: ModelSpec, batch: int, pages: int, device: torch.device, offloaded: OffloadedCache | None
) -> list[dict[StateTensor, Tensor]]:
    def layer(index: int, device: torch.device) -> dict[StateTensor, Tensor]:
        made = dict(zip((KEY, VALUE), offloaded.pools(index), strict=True)) if offloaded else {}
        for tensor in STATE:
            if tensor in made:
                continue
            shape, dtype = spec.state_shape(tensor, pages if tensor.paged else batch), spec.state_dtype(tensor)
            if tensor.paged:
                made[tensor] = torch.empty(shape, dtype=dtype, device=device)
            else:
                made[tensor] = torch.full(shape, NOTHING, dtype=dtype, device=device)
        return made

    try:
        return [layer(index, device) for index in range(spec.num_layers)]
    except (RuntimeError, MemoryError):  # torch raises RuntimeError, and its subclass OutOfMemoryError on CUDA
        size = sum(tensor.nbytes for tensor in layer(0, torch.device("meta")).values())
        raise RuntimeInputError(
            f"A KV cache of {pages} pages of {spec.hip.page_size} tokens takes "
            f"{spec.num_layers * size / 2**30:.1f} GiB, which do not fit in the memory of {device}.",
            "Lower max_seq_len (--max-seq-len) or the batch.",
        ) from None


def _too_long(row: int, wanted: int, available: int, remedy: str) -> RuntimeInputError:
    return RuntimeInputError(
        f"sequence {row}: {wanted} tokens wanted, but the KV cache has room for {available}.",
        f"{remedy} (--max-seq-len), shorten the prompt, or generate fewer tokens (--max-new-tokens).",
    )
