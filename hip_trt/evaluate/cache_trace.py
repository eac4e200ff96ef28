"""Which blocks of the KV cache decode steps read, recorded from a real model on real text.

One dense forward pass gives the queries and keys of every position, as teacher-forced decoding would; decode steps are
then replayed on them with the reference's search. Contexts beyond the model's own are laid together from stretches of
text, each with the keys of its own pass, so that positions stay within what the model was trained for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.attention_states import visit_layers
from hip_trt.reference import select_blocks


@dataclass(frozen=True)
class LayerStates:
    """What a layer's attention saw, after RoPE.

    Attributes:
        queries: [Hq, N, D], of the last N positions of the context.
        keys: [Hkv, T, D], of all of them.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Accesses:
    """Look-ups in one block cache, in order.

    Attributes:
        blocks: [N] int32, blocks of the layer's pool.
        offsets: [steps + 1] int64; step i makes look-ups [offsets[i], offsets[i + 1]).
    """

    blocks: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def from_steps(cls, steps: Iterable[Sequence[int] | NDArray[np.integer[Any]]]) -> Accesses:
        """One sequence of blocks a step."""
        arrays = [np.asarray(step, dtype=np.int32) for step in steps]
        lengths = np.array([0, *(len(array) for array in arrays)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int32), *arrays]), lengths.cumsum())

    @property
    def steps(self) -> int:
        return len(self.offsets) - 1

    def step(self, index: int) -> NDArray[np.int32]:
        return self.blocks[self.offsets[index] : self.offsets[index + 1]]

    def distinct(self) -> NDArray[np.int64]:
        """Different blocks that each step reads: [steps]."""
        return np.array([len(np.unique(self.step(i))) for i in range(self.steps)], dtype=np.int64)


@dataclass(frozen=True)
class Trace:
    """What the decode steps of one sequence read in one layer.

    Attributes:
        keys: key blocks that are scored, level by level, then those that are attended; head after head.
        values: value blocks that are attended.
        pool_blocks: blocks in a pool that holds just this sequence: the size of a full cache.
    """

    keys: Accesses
    values: Accesses
    pool_blocks: int

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        np.savez_compressed(
            path, key_blocks=self.keys.blocks, key_offsets=self.keys.offsets, value_blocks=self.values.blocks,
            value_offsets=self.values.offsets, pool_blocks=np.int64(self.pool_blocks),
        )

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what :meth:`save` wrote.

        Raises:
            RuntimeInputError: there is no such file, or it is not a trace.
        """
        try:
            with np.load(path) as file:
                return cls(Accesses(file["key_blocks"], file["key_offsets"]),
                           Accesses(file["value_blocks"], file["value_offsets"]), int(file["pool_blocks"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise RuntimeInputError(f"{path}: not a trace: {error}.", "Record it again.") from None


class _WatchedKeys:
    """Keys of a head, for the reference, that remember which blocks were read.

    Attributes:
        reads: blocks of each read, in order.
    """

    def __init__(self, keys: Tensor, block_k: int) -> None:
        self._keys, self._block_k = keys, block_k
        self.reads: list[Tensor] = []

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """Args: tokens: [N, block_k / stride_k], as block_scores reads them."""
        self.reads.append(tokens[:, 0] // self._block_k)
        return self._keys[tokens]


def replay(
    states: LayerStates, config: HipConfig, *, refresh_interval: int | None = None, page_table: Tensor | None = None
) -> Trace:
    """Decode the last N tokens of a context with the reference's search, and record what it reads.

    Args:
        states: of one layer; the first query is the first decode step's.
        config: pruning.
        refresh_interval: decode steps from one search from the top to the next; by default the config's.
        page_table: [M] int, pages of the sequence; by default in order.

    Returns:
        The trace, of N steps.
    """
    interval = config.refresh_interval if refresh_interval is None else refresh_interval
    query_heads, steps, _ = states.queries.shape
    heads, tokens, _ = states.keys.shape
    masks = config.num_masks(query_heads, heads)
    pages = -(-tokens // config.page_size)
    table = torch.arange(pages) if page_table is None else page_table.long()
    per_page = config.page_size // config.block_k
    no_nodes = torch.full((config.decode_mask_blocks,), -1)
    nodes = [no_nodes] * masks
    keys: list[NDArray[np.int32]] = []
    values: list[NDArray[np.int32]] = []
    for step in range(steps):
        positions = torch.tensor([tokens - steps + step])
        scored: list[Tensor] = []
        attended: list[Tensor] = []
        for mask, queries in enumerate(states.queries[:, step : step + 1].chunk(masks)):
            head = mask * heads // masks
            watched = _WatchedKeys(states.keys[head], config.block_k)
            blocks, kept = select_blocks(
                queries, cast(Tensor, watched), positions, config=config, decode=True,
                past_nodes=nodes[mask] if step % interval else None,
            )
            nodes[mask] = no_nodes if kept is None else kept

            def in_pool(blocks: Tensor, head: int = head) -> Tensor:
                return (table[blocks // per_page] * heads + head) * per_page + blocks % per_page

            attended.append(in_pool(blocks))
            scored += [*map(in_pool, watched.reads), attended[-1]]
        keys.append(torch.cat(scored).int().numpy())
        values.append(torch.cat(attended).int().numpy())
    return Trace(Accesses.from_steps(keys), Accesses.from_steps(values), pages * per_page * heads)


def capture(
    model: Any, stretches: Sequence[Sequence[int]], layers: Sequence[int], *, steps: int, drop: int = 0,
    progress: Any = None,
) -> dict[int, LayerStates]:
    """Queries and keys of a context made of several stretches of text, side by side.

    Args:
        model: a transformers causal language model.
        stretches: token ids, each stretch within the model's context. The last one's end is decoded.
        layers: whose states are wanted.
        steps: N, decode steps.
        drop: first tokens of every stretch but the first that are left out: models pile attention on a text's first
            token, which a real context has once.
        progress: called with the number of each finished stretch.

    Returns:
        By layer.

    Raises:
        RuntimeInputError: the last stretch is no longer than the decode steps, a stretch is beyond the model's context,
            or there is no such layer.
    """
    context, depth = model.config.max_position_embeddings, model.config.num_hidden_layers
    longest, last = max(map(len, stretches)), len(stretches[-1])
    if longest > context:
        raise RuntimeInputError(f"A stretch of {longest} tokens is beyond the model's {context}.", "Give shorter ones.")
    if steps >= last:
        raise RuntimeInputError(f"{steps} decode steps need more than {last} tokens.", "Give a longer stretch.")
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise RuntimeInputError(f"layers: {list(layers)} is not allowed.", f"Give some of 0 to {depth - 1}.")
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    queries: dict[int, Tensor] = {}

    def visit(layer: int, every_query: Tensor, every_key: Tensor, scale: float) -> None:
        if layer in keys:
            queries[layer] = every_query[:, -steps:].float()
            keys[layer].append(every_key[:, drop if keys[layer] else 0 :].float())

    for number, stretch in enumerate(stretches):
        visit_layers(model, stretch, visit, layers=max(layers) + 1)
        if progress is not None:
            progress(number)
    return {layer: LayerStates(queries[layer], torch.cat(keys[layer], dim=1)) for layer in layers}
