"""A batch of sequences on one executor: prefill in chunks, decode with the refresh schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt.errors import RuntimeInputError
from hip_trt.offload import Offload
from hip_trt.runtime.executor import Executor
from hip_trt.runtime.pages import pages_for
from hip_trt.runtime.state import KVState

DEFAULT_PREFILL_CHUNK = 512
"""New tokens per prefill call where the executor sets no limit: enough for efficient products, little memory."""


@dataclass(frozen=True)
class Chunk:
    """What one prefill call computed.

    Attributes:
        rows: the sequences that took part.
        starts: position of each one's first new token.
        counts: new tokens of each.
        logits: [len(rows), 1 or S, vocab_size] float32, see ModelSpec.logits; valid until the next call.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    logits: Tensor

    def last(self) -> Tensor:
        """Logits after the last new token of each sequence: [len(rows), vocab_size]."""
        if self.logits.shape[1] == 1:
            return self.logits[:, 0]
        return self.logits[torch.arange(len(self.rows)), torch.tensor(self.counts) - 1]


class Session:
    """Sequences and their state, and the calls that extend them.

    Args:
        executor: runs the model graph.
        batch: B, sequences.
        max_seq_len: most tokens per sequence, prompt and generated together.
        pages: pages in each layer's pool; by default enough for B sequences of max_seq_len.
        prefill_chunk: most new tokens per sequence and prefill call, rounded down to a multiple of block_q, so that
            query blocks are the same for every chunk size; by default 512, or what the executor allows.
        refresh_interval: decode steps from one search from the top to the next; by default the model's.
        offload: keep the KV cache in host memory, served by so much of the GPU's; None: on the GPU. Results are the
            same bits. :meth:`close` gives the memory back; it goes with the object else.

    Attributes:
        state: the KV cache, and what else the layers keep.
        tokens: committed token ids of each sequence.
        refreshed: whether the last decode step searched from the top.

    Raises:
        RuntimeInputError: if a size is beyond the executor's limits, memory does not suffice, or the executor does not
            run on a GPU and so has nothing to offload.
        EnvironmentProblem: if host memory cannot be locked.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        batch: int = 1,
        max_seq_len: int,
        pages: int | None = None,
        prefill_chunk: int | None = None,
        refresh_interval: int | None = None,
        offload: Offload | None = None,
    ) -> None:
        spec, limits = executor.spec, executor.limits
        for name, value, limit in (
            ("batch", batch, limits.max_batch),
            ("max_seq_len", max_seq_len, limits.max_seq_len),
            ("prefill_chunk", prefill_chunk, limits.max_prefill),
        ):
            if value is not None and limit is not None and value > limit:
                raise RuntimeInputError(
                    f"{name}: {value} is more than the engine allows ({limit}).",
                    "Ask for less, or build the engine with larger limits.",
                )
        if refresh_interval is not None and refresh_interval < 1:
            raise RuntimeInputError(f"refresh_interval: {refresh_interval} is not allowed.", "It must be at least 1.")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise RuntimeInputError(f"prefill_chunk: {prefill_chunk} is not allowed.", "It must be at least 1.")
        wanted = batch * pages_for(max_seq_len, spec.hip.page_size) if pages is None else pages
        if limits.max_pages is not None and wanted > limits.max_pages:
            raise RuntimeInputError(
                f"pages: {wanted} are more than the engine allows ({limits.max_pages}).",
                "Lower max_seq_len or the batch, or build the engine with larger limits.",
            )
        self.executor = executor
        self.state = KVState(
            spec, executor.device, batch=batch, max_seq_len=max_seq_len, pages=pages, offload=offload
        )
        if offload:
            executor.forget_calls()
        chunk = prefill_chunk or limits.max_prefill or DEFAULT_PREFILL_CHUNK
        self._chunk = max(chunk // spec.hip.block_q * spec.hip.block_q, min(chunk, spec.hip.block_q))
        self._refresh_interval = refresh_interval or spec.hip.refresh_interval
        self._steps_since_refresh = 0
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.refreshed = False
        # Decode steps use the same buffers every time, so that an executor can keep a binding or a CUDA graph.
        device = executor.device
        self._input_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._query_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._refresh_mask = torch.zeros(1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(batch, 1, spec.vocab_size, dtype=torch.float32, device=device)
        self._decode = self._graph(
            self._input_ids, self.state.page_table, self.state.past_lengths, self._query_lengths, self.state.layers,
            self._logits,
        )

    @property
    def batch(self) -> int:
        """B, sequences."""
        return self.state.batch

    def reserve(self, wanted: Sequence[int]) -> None:
        """Make sure that each sequence can reach ``wanted[b]`` tokens; see :meth:`KVState.reserve`."""
        self.state.reserve(wanted)

    def prefill(self, tokens: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """Append tokens to each sequence, chunk by chunk; each chunk is computed when it is asked for.

        Only sequences that still have tokens to append take part in a call.

        Args:
            tokens: [B] lists of token ids, any of them empty.

        Raises:
            RuntimeInputError: before anything is computed, for a token id outside the vocabulary, or if the KV cache
                has too little room.
        """
        vocab_size = self.executor.spec.vocab_size
        for row, ids in enumerate(tokens):
            for index, token in enumerate(ids):
                if not 0 <= token < vocab_size:
                    raise RuntimeInputError(
                        f"sequence {row}, token {index}: id {token} is not in the model's vocabulary of {vocab_size}.",
                        "Use the tokenizer that belongs to the model.",
                    )
        self.reserve([length + len(new) for length, new in zip(self.state.lengths, tokens, strict=True)])
        return self._prefill_chunks(tokens)

    def append(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each sequence, see :meth:`prefill`.

        Returns:
            [B, vocab_size] float32, logits after each sequence's last token; NaN where no token was appended.
        """
        logits = torch.full((self.batch, self.executor.spec.vocab_size), float("nan"), device=self.executor.device)
        for chunk in self.prefill(tokens):
            logits[list(chunk.rows)] = chunk.last()
        return logits

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Append one token to each sequence: a decode step.

        Args:
            tokens: [B] token ids; None where the sequence is idle.

        Returns:
            [B, vocab_size] float32, logits after the new token, undefined for idle sequences; valid until the next
            step.
        """
        rows = [row for row, token in enumerate(tokens) if token is not None]
        lengths = self.state.lengths
        self.reserve([length + (token is not None) for length, token in zip(lengths, tokens, strict=True)])
        self.refreshed = self._steps_since_refresh == 0
        self._steps_since_refresh = (self._steps_since_refresh + 1) % self._refresh_interval
        self._input_ids.copy_(torch.tensor([[token or 0] for token in tokens]))
        self._query_lengths.copy_(torch.tensor([token is not None for token in tokens], dtype=torch.int32))
        self._refresh_mask.fill_(int(self.refreshed))
        if self.state.offloaded:
            self.state.offloaded.prepare(prefill=False)
            self.state.offloaded.count_tokens(len(rows))
        self.executor.run(*self._decode)
        self.state.advance(rows, [1] * len(rows))
        for row in rows:
            self.tokens[row].append(tokens[row])  # type: ignore[arg-type]
        return self._logits[:, 0]

    def truncate(self, row: int, length: int) -> None:
        """Forget a sequence's tokens from ``length`` on."""
        self.state.truncate(row, length)
        del self.tokens[row][length:]

    def share_prefix(self, row: int, source: int, tokens: int) -> int:
        """Begin an empty sequence with the first tokens of another one; see :meth:`KVState.share_prefix`.

        Returns:
            Tokens shared: a multiple of page_size, and of block_q where that is larger, so that the rest is computed in
            the same query blocks as without sharing.
        """
        block_q = self.executor.spec.hip.block_q
        aligned = min(tokens, self.state.lengths[source]) // block_q * block_q
        page_size = self.state.page_size
        while aligned % page_size:
            aligned -= block_q
        shared = self.state.share_prefix(row, source, aligned)
        self.tokens[row] = self.tokens[source][:shared]
        return shared

    def close(self) -> None:
        """Give host memory back; nothing happens where there is none. No call can be made any more."""
        if self.state.offloaded and not self.state.offloaded.closed:
            self.state.close()
            self._decode = {}, {}
            self.executor.forget_calls()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefill_chunks(self, tokens: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        state, spec, device = self.state, self.executor.spec, self.executor.device
        done = [0] * self.batch
        while rows := [row for row in range(self.batch) if done[row] < len(tokens[row])]:
            parts = [list(tokens[row][done[row] : done[row] + self._chunk]) for row in rows]
            counts = [len(part) for part in parts]
            # A call of one column is a decode step, with other budgets: pad, so that prompts of any length and any
            # split are prefilled alike.
            width = max(2 if self._chunk > 1 else 1, *counts)
            index = torch.tensor(rows, device=device)
            layers = [
                {tensor: kept if tensor.paged else kept[index] for tensor, kept in layer.items()}
                for layer in state.layers
            ]
            logits = torch.empty(
                len(rows), width if spec.logits == "all" else 1, spec.vocab_size, dtype=torch.float32, device=device
            )
            self._refresh_mask.fill_(1)
            page_table, past_lengths = state.page_table[index], state.past_lengths[index]
            query_lengths = torch.tensor(counts, dtype=torch.int32, device=device)
            if state.offloaded:
                state.offloaded.prepare(prefill=True)
                if width > 1:
                    state.offloaded.count_prefill(past_lengths, query_lengths, page_table.shape[1])
            self.executor.run(*self._graph(
                torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device),
                page_table, past_lengths, query_lengths, layers, logits,
            ))
            for layer, new in zip(state.layers, layers, strict=True):
                for tensor, kept in layer.items():
                    if not tensor.paged:
                        kept[index] = new[tensor]
            self._steps_since_refresh = 0
            starts = tuple(state.lengths[row] for row in rows)
            state.advance(rows, counts)
            for row, part in zip(rows, parts, strict=True):
                self.tokens[row] += part
                done[row] += len(part)
            yield Chunk(tuple(rows), starts, tuple(counts), logits)

    def _graph(
        self,
        input_ids: Tensor,
        page_table: Tensor,
        past_lengths: Tensor,
        query_lengths: Tensor,
        layers: list[dict[names.StateTensor, Tensor]],
        logits: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs of a call; the layers' state is updated in place."""
        inputs = {
            names.INPUT_IDS: input_ids,
            names.PAST_LENGTHS: past_lengths,
            names.QUERY_LENGTHS: query_lengths,
            names.PAGE_TABLE: page_table,
            names.REFRESH_MASK: self._refresh_mask,
        }
        outputs = {names.LOGITS: logits}
        for index, layer in enumerate(layers):
            for tensor, kept in layer.items():
                inputs[tensor.past(index)] = outputs[tensor.present(index)] = kept
        return inputs, outputs
