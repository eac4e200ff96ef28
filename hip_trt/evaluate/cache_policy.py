"""What a block cache does under a policy, simulated from a trace of its look-ups.

Sizes are in blocks. Where nothing else is said, a cache is fully associative and every block that is missing is placed
at once, by the one read over the bus that serves the look-up too. The shipped cache is filled between steps: a step
reads what it misses where it is, as often as it looks it up, and what was missed is placed from where it landed on the
GPU; only what did not land is read over the bus again, which is not simulated.
"""

from __future__ import annotations

import random as random_numbers
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.cache_trace import Accesses
from hip_trt.offload.block_caches import WAYS, CacheCounts

HIT, PLACED, REPLACED, BYPASSED = range(4)
"""What a look-up met: a block in the cache; a miss placed in an empty slot, in another block's slot, or not at all."""

_FACTORS = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F  # of the hashes, one for each set that a block may be in
_EMPTY = -(1 << 40)  # step of last use of a slot that was never used

Policy = Callable[[list[int], list[int], int, int], bytearray]
"""Blocks looked up, the step of each, the cache's size, a seed: what every look-up met."""


@dataclass(frozen=True)
class Simulation:
    """What happened in a cache, step by step.

    Attributes:
        hits, misses, fills, evictions: [steps] int64, with the meaning of :class:`CacheCounts`. Only of the
            shipped cache, which is filled after the step, are fills counted; rereads are not simulated.
    """

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    fills: NDArray[np.int64]
    evictions: NDArray[np.int64]

    def counts(self, first: int = 0) -> CacheCounts:
        """Of the steps from ``first`` on, together."""
        return CacheCounts(*(int(events[first:].sum())
                             for events in (self.hits, self.misses, self.fills, self.evictions)))


def simulate(policy: str, accesses: Accesses, blocks: int, *, seed: int = 0) -> Simulation:
    """Play a trace to a cache that is empty at first.

    Args:
        policy: one of :data:`POLICIES`.
        accesses: the look-ups.
        blocks: the cache's size; "shipped" has whole sets of WAYS blocks, as many as fit.
        seed: of "random".

    Raises:
        RuntimeInputError: there is no such policy, or the size is negative.
    """
    if policy not in POLICIES:
        raise RuntimeInputError(f"policy: {policy!r} is not known.", f"Give one of {', '.join(POLICIES)}.")
    if blocks < 0:
        raise RuntimeInputError(f"A cache of {blocks} blocks: it must be 0 or more.", "Give a larger one.")
    if policy == "shipped":
        blocks -= blocks % WAYS
    per_step = np.diff(accesses.offsets)
    if blocks:
        steps = np.repeat(np.arange(accesses.steps), per_step).tolist()
        met = np.frombuffer(POLICIES[policy](accesses.blocks.tolist(), steps, blocks, seed), dtype=np.uint8)
    else:
        met = np.full(len(accesses.blocks), BYPASSED, dtype=np.uint8)

    def count(*kinds: int) -> NDArray[np.int64]:
        running = np.concatenate([[0], np.isin(met, kinds).cumsum(dtype=np.int64)])
        return np.diff(running[accesses.offsets])

    fills = count(PLACED, REPLACED) if policy == "shipped" else count()
    return Simulation(count(HIT), count(PLACED, REPLACED, BYPASSED), fills, count(REPLACED))


def least_recently_used(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    met = bytearray(len(blocks))
    held: OrderedDict[int, None] = OrderedDict()
    for i, block in enumerate(blocks):
        if block in held:
            held.move_to_end(block)
            continue
        met[i] = PLACED
        if len(held) == size:
            held.popitem(last=False)
            met[i] = REPLACED
        held[block] = None
    return met


def least_frequently_used(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    """Fewest uses since it was placed; among equals, the least recently used."""
    met = bytearray(len(blocks))
    uses: dict[int, tuple[int, int]] = {}  # count and time of the last
    heap: list[tuple[tuple[int, int], int]] = []  # each block once, with uses as they were or fewer
    for i, block in enumerate(blocks):
        use = uses.get(block)
        if use is not None:
            uses[block] = use[0] + 1, i
            continue
        met[i] = PLACED
        if len(uses) == size:
            while uses[heap[0][1]] != heap[0][0]:
                stale = heappop(heap)[1]
                heappush(heap, (uses[stale], stale))
            del uses[heappop(heap)[1]]
            met[i] = REPLACED
        uses[block] = 1, i
        heappush(heap, ((1, i), block))
    return met


def clock(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    """Second chance: a hand goes round and takes the first block that was not used since it came by last."""
    met = bytearray(len(blocks))
    slots: dict[int, int] = {}
    held: list[int] = []
    used = bytearray(size)
    hand = 0
    for i, block in enumerate(blocks):
        slot = slots.get(block)
        if slot is None:
            met[i] = PLACED
            if len(held) < size:
                slot = len(held)
                held.append(block)
            else:
                while used[hand]:
                    used[hand] = 0
                    hand = (hand + 1) % size
                slot, hand = hand, (hand + 1) % size
                del slots[held[slot]]
                held[slot] = block
                met[i] = REPLACED
            slots[block] = slot
        used[slot] = 1
    return met


def random(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    met = bytearray(len(blocks))
    generator = random_numbers.Random(seed)
    held: list[int] = []
    within: set[int] = set()
    for i, block in enumerate(blocks):
        if block in within:
            continue
        met[i] = PLACED
        if len(held) < size:
            held.append(block)
        else:
            slot = int(generator.random() * size)
            within.remove(held[slot])
            held[slot] = block
            met[i] = REPLACED
        within.add(block)
    return met


def optimum(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    """Belady's: of the blocks held and the one that is missing, the one needed latest goes, or is not placed.

    Nothing reads fewer blocks over the bus. It knows the future, and may replace what the same step has read.
    """
    met = bytearray(len(blocks))
    length = len(blocks)
    next_use = [0] * length
    coming: dict[int, int] = {}
    for i in range(length - 1, -1, -1):
        block = blocks[i]
        next_use[i] = coming.get(block, length + block)  # never: later than all, and each block's own
        coming[block] = i
    held: set[int] = set()
    heap: list[int] = []  # -next use of every block held; past ones, of blocks used since, sink to the bottom
    for i, block in enumerate(blocks):
        later = next_use[i]
        if block not in held:
            if later >= length:
                met[i] = BYPASSED
                continue
            met[i] = PLACED
            if len(held) == size:
                latest = -heap[0]
                if latest <= later:
                    met[i] = BYPASSED
                    continue
                heappop(heap)
                held.remove(blocks[latest] if latest < length else latest - length)
                met[i] = REPLACED
            held.add(block)
        heappush(heap, -later)
        if len(heap) > 4 * size + 1024:
            heap = [use for use in heap if -use > i]
            heapify(heap)
    return met


def sets_of(block: int, sets: int) -> tuple[int, ...]:
    """The sets of a cache of ``sets`` sets in which the shipped cache may put a block."""
    return tuple((block * factor & 0xFFFFFFFF) * sets >> 32 for factor in _FACTORS)


def shipped(blocks: list[int], steps: list[int], size: int, seed: int) -> bytearray:
    """The cache of plugins/cuda/block_cache_fill.cuh, with blocks placed one after the other, after each step.

    Hashes of a block name the sets of WAYS slots that it may be in. Of those slots the least recently used one is
    replaced, unless the step has used it: then the block is not placed. Among equals it is the first way from the one
    that the block names, in the first set.
    """
    met = bytearray(len(blocks))
    sets = size // WAYS
    slots: dict[int, int] = {}
    held = [-1] * (sets * WAYS)
    last_use = [_EMPTY] * (sets * WAYS)

    def place(block: int, step: int) -> int:
        firsts = [number * WAYS for number in sets_of(block, sets)]
        uses = [last_use[first : first + WAYS] for first in firsts]
        oldest = min(map(min, uses))
        if oldest == step:
            return BYPASSED
        turn = block % WAYS
        later, choice = min(
            ((ways[turn:] + ways[:turn]).index(oldest), choice) for choice, ways in enumerate(uses) if oldest in ways
        )
        slot = firsts[choice] + (later + turn) % WAYS
        if oldest != _EMPTY:
            del slots[held[slot]]
        held[slot], last_use[slot], slots[block] = block, step, slot
        return PLACED if oldest == _EMPTY else REPLACED

    missed: list[int] = []  # look-ups of this step
    for i, block in enumerate(blocks):
        step = steps[i]
        slot = slots.get(block)
        if slot is None:
            missed.append(i)
        else:
            last_use[slot] = step
        if i + 1 == len(blocks) or steps[i + 1] != step:
            for first in missed:
                met[first] = BYPASSED if blocks[first] in slots else place(blocks[first], step)
            missed.clear()
    return met


POLICIES: dict[str, Policy] = {
    "shipped": shipped,
    "LRU": least_recently_used,
    "LFU": least_frequently_used,
    "CLOCK": clock,
    "random": random,
    "optimum": optimum,
}
"""By name."""
