"""Chains of calls of the operator's version 2, over which implementations are compared with the reference.

A chain's calls follow one another on the same pools: prefill, decode and prefill again, in chunks of any size, with
tokens taken back between. :func:`drive` runs a chain and holds every call to
:func:`hip_trt.reference.operator_v2.hip_attention_v2`.

Queries and keys are small whole numbers, so that prefill's choices are the same everywhere; decode's may differ as
:func:`decode_cases.assert_agrees` allows. Rows of the pool, bounds and codes that are undefined are NaN or noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import decode_cases
import torch
from hypothesis import strategies as st
from torch import Tensor

from hip_trt import operator as names
from hip_trt.config_v2 import HipConfigV2
from hip_trt.reference.operator import select_blocks
from hip_trt.reference.operator_v2 import decode_config, hip_attention_v2

SMALL = HipConfigV2.create(
    mask_k=32, block_q=8, block_k=4, stride_q=2, branch=3, leaf_branch=2, decode_mask_k=32, decode_search_k=64,
    decode_block_k=16, page_size=32, sink_tokens=10, window_tokens=20,
)
"""Small, but for the blocks of decode, which are the smallest that kernels take."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Call = Callable[[dict[str, Tensor]], Outputs]


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        kind: its kind.
        new: valid new tokens of each sequence.
        refresh: the refresh_mask input; 1 for all if empty.
        padding: columns of S beyond the longest of ``new``.
        cut: committed tokens that each sequence loses before; none if empty.
    """

    kind: Literal["prefill", "decode"]
    new: tuple[int, ...]
    refresh: tuple[int, ...] = ()
    padding: int = 0
    cut: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Calls that follow one another.

    Attributes:
        steps: the calls.
        name: shown by pytest.
        config: the operator's attributes.
        heads: query heads and key/value heads.
        head_dim: D, a multiple of 16.
        dense: the operator's attribute.
        nan: call, sequence, row and dimension of a key that is NaN.
        dtype: T.
        seed: of everything random.
    """

    steps: tuple[Step, ...]
    name: str = ""
    config: HipConfigV2 = SMALL
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    dense: bool = False
    nan: tuple[int, int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        return self.name or repr(self)

    @property
    def scale(self) -> float:
        return 0.4 / self.head_dim**0.5


def first_inputs(chain: Chain) -> dict[str, Tensor]:
    """Pools of nothing, and the other inputs that outlast a call."""
    random = torch.Generator().manual_seed(chain.seed)
    batch, config, (_, kv_heads) = len(chain.steps[0].new), chain.config, chain.heads
    slots = -(-max(sum(step.new[b] for step in chain.steps) for b in range(batch)) // config.page_size) + 1
    pages = batch * slots + 3
    pool = torch.full((pages, kv_heads, config.page_size, chain.head_dim), torch.nan, dtype=chain.dtype)
    codes = torch.randint(-(2**31), 2**31, (*pool.shape[:3], chain.head_dim // 16), generator=random).int()
    bounds = pool.new_full(
        (pages, kv_heads, config.page_size // config.decode_block_k, 2, chain.head_dim), torch.nan)
    return {
        "past_key": pool, "past_value": pool.clone(),
        "page_table": torch.randperm(pages, generator=random)[: batch * slots].reshape(batch, slots).int(),
        "past_lengths": torch.zeros(batch, dtype=torch.int32), "past_bounds": bounds, "past_codes": codes,
        "past_blocks": torch.full(
            (batch, config.num_masks(*chain.heads), config.decode_mask_blocks), -1, dtype=torch.int32),
    }


def inputs_of(chain: Chain, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of one of the calls, in the operator's order, after the calls before it left ``state``."""
    step, (query_heads, kv_heads) = chain.steps[index], chain.heads
    random = torch.Generator().manual_seed(chain.seed + 1000 * (index + 1))
    batch, width = len(step.new), max(*step.new, 1) + step.padding
    rows = [torch.randint(-3, 4, (batch, heads, width, chain.head_dim), generator=random).to(chain.dtype)
            for heads in (query_heads, kv_heads, kv_heads)]
    for b, count in enumerate(step.new):
        for tensor in rows:
            tensor[b, :, count:] = torch.nan
    if chain.nan is not None and chain.nan[0] == index:
        rows[1][chain.nan[1], 0, chain.nan[2], chain.nan[3]] = torch.nan
    cut = torch.tensor(step.cut or (0,) * batch, dtype=torch.int32)
    inputs = {
        **state, "query": rows[0], "key": rows[1], "value": rows[2], "past_lengths": state["past_lengths"] - cut,
        "query_lengths": torch.tensor(step.new, dtype=torch.int32),
        "refresh_mask": torch.tensor(step.refresh or (1,) * batch, dtype=torch.int32),
        "call_kind": torch.zeros(names.DECODE if step.kind == "decode" else names.PREFILL, dtype=torch.int32),
    }
    return {name: inputs[name] for name in names.INPUTS_V2}


def drive(chain: Chain, call: Call, *, tolerance: float) -> None:
    """Run a chain by ``call``, each call on what the one before it left, and compare each with the reference."""
    state = first_inputs(chain)
    for index, step in enumerate(chain.steps):
        inputs = inputs_of(chain, index, state)
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        found = call(inputs)
        check(chain, step, given, found, tolerance)
        state = {past: found[index] for index, past in enumerate(names.STATE_V2.values(), 1)} | {
            "page_table": given["page_table"], "past_lengths": given["past_lengths"] + given["query_lengths"],
        }


def check(chain: Chain, step: Step, inputs: dict[str, Tensor], found: Outputs, tolerance: float) -> None:
    """Compare one call with the reference: the state bit for bit."""
    if step.kind == "decode" and chain.nan is None:
        case = decode_cases.Case(
            tuple(inputs["past_lengths"].tolist()), step.new, config=decode_config(chain.config, dense=chain.dense),
            page_size=chain.config.page_size, heads=chain.heads, head_dim=chain.head_dim, dtype=chain.dtype,
            mask_heads=chain.config.mask_heads,
        )
        assert case.scale == chain.scale
        given = {name: tensor for name, tensor in inputs.items() if name != "call_kind"}
        decode_cases.assert_agrees(case, given, found, rtol=tolerance, atol=tolerance)
        return
    expected = reference(chain, inputs)
    for name, tensor, other in zip(names.OUTPUTS_V2[1:5], found[1:5], expected[1:5], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True, msg=name)
    if step.kind == "prefill":
        assert torch.equal(found[5], expected[5]), "present_blocks"
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)


def reference(chain: Chain, inputs: dict[str, Tensor]) -> Outputs:
    return hip_attention_v2(**inputs, config=chain.config, scale=chain.scale, dense=chain.dense)


def chosen_blocks(chain: Chain, inputs: dict[str, Tensor]) -> Tensor:
    """What the reference chooses in a prefill, as the C ABI's chosen_blocks: [B, Hm, ceil(S / block_q), K] int32."""
    config, (batch, masks, _) = chain.config, inputs["past_blocks"].shape
    count = -(-inputs["query"].shape[2] // config.block_q)
    found = torch.full((batch, masks, count, config.mask_blocks), -1, dtype=torch.int32)
    places = iter([
        (b, mask, block) for b, rows in enumerate(inputs["query_lengths"].tolist())
        for block in range(-(-rows // config.block_q)) for mask in range(masks)
    ])

    def select(queries: Tensor, keys: Tensor, positions: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        blocks, kept = select_blocks(queries, keys, positions, **options)  # type: ignore[arg-type]
        window = max(0, int(positions[0]) - config.window_tokens + 1) // config.block_k
        sink = min(-(-config.sink_tokens // config.block_k), window)
        chosen = blocks[(blocks >= sink) & (blocks < window)]
        if not chain.dense:
            found[next(places)][: len(chosen)] = chosen.int()
        return blocks, kept

    hip_attention_v2(**inputs, config=config, scale=chain.scale, dense=chain.dense, select=select)
    return found


def _grid() -> tuple[Chain, ...]:
    def prefill(*new: int, **fields: object) -> Step:
        return Step("prefill", new, **fields)  # type: ignore[arg-type]

    def decode(*new: int, **fields: object) -> Step:
        return Step("decode", new, **fields)  # type: ignore[arg-type]

    turns = (prefill(230, 61, padding=3), decode(1, 1), decode(1, 3, refresh=(0, 0), padding=1), decode(2, 0),
             prefill(9, 70), decode(1, 1, refresh=(0, 0)), decode(1, 1))
    grid = [
        Chain(turns, "prefill, decode, prefill"),
        Chain((prefill(1, 1), decode(1, 1), prefill(120, 1), decode(1, 8)), "from the first token"),
        Chain((prefill(150, 141), prefill(1, 1), prefill(1, 0), decode(1, 1), prefill(1, 1)), "chunks of one token"),
        Chain((prefill(7, 64), prefill(1, 33), prefill(64, 1), prefill(33, 7), decode(1, 1)), "chunks of any size"),
        Chain((prefill(150, 90), decode(1, 1), prefill(0, 3), prefill(0, 1), decode(1, 1, refresh=(0, 0))),
              "idle keeps blocks in prefill"),
        Chain((prefill(0, 0, padding=2), decode(0, 0), prefill(40, 0), decode(0, 0)), "all idle"),
        Chain((prefill(150, 100), prefill(30, 9, cut=(11, 36)), decode(1, 1), decode(4, 1, cut=(3, 1)),
               prefill(20, 1, cut=(20, 9)), decode(1, 1)), "tokens taken back"),
        Chain((prefill(47, 48), decode(1, 1), decode(8, 8), decode(8, 8), prefill(16, 15)),
              "blocks are filled, or not"),
        Chain(turns, "dense", dense=True),
        Chain(turns, "mask per query head", config=SMALL.replace(mask_heads="query")),
        Chain(turns, "value threshold", config=SMALL.replace(value_threshold=0.02)),
        Chain(turns, "one page a block", config=SMALL.replace(page_size=16)),
        Chain(turns, "key blocks larger than decode's",
              config=SMALL.replace(mask_k=64, block_k=32, page_size=64, stride_k=2)),
        Chain(turns, "blocks of 64", config=SMALL.replace(
            decode_mask_k=64, decode_search_k=128, decode_block_k=64, page_size=64)),
        Chain((prefill(20, 30), prefill(150, 120), decode(1, 1), decode(1, 1, refresh=(0, 0)), prefill(3, 0)),
              "NaN key", nan=(0, 1, 25, 3), config=SMALL.replace(mask_k=1024)),
        *(Chain(turns, f"head size {size}, heads {heads}", head_dim=size, heads=heads)
          for size, heads in ((48, (1, 1)), (64, (4, 1)), (80, (6, 2)), (128, (3, 3)), (32, (16, 1)))),
        *(Chain((prefill(*new), decode(1, 1), prefill(*new)), f"{new} rows") for new in ((16, 15), (17, 33), (8, 1))),
    ]
    assert len({chain.name for chain in grid}) == len(grid)
    return tuple(grid)


GRID = _grid()


def named(name: str) -> Chain:
    """The chain of ``GRID`` with this name."""
    return next(chain for chain in GRID if chain.name == name)


def rotated_types(grid: tuple[Chain, ...]) -> list[Chain]:
    """Each chain with one type, in turn."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    return [replace(chain, dtype=types[i % 3], name=f"{chain.name}, {str(types[i % 3])[6:]}")
            for i, chain in enumerate(grid)]


def every_type(grid: tuple[Chain, ...]) -> list[Chain]:
    """Each chain with every type."""
    return [replace(chain, dtype=dtype, name=f"{chain.name}, {str(dtype)[6:]}")
            for chain in grid for dtype in (torch.float16, torch.bfloat16, torch.float32)]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Any small chain of two to four calls, of which the first is a prefill."""
    batch, kv_heads, block_k = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([4, 8, 32]))
    steps = [Step("prefill", tuple(draw(st.lists(st.integers(0, 150), min_size=batch, max_size=batch))))]
    lengths = list(steps[0].new)
    for _ in range(draw(st.integers(1, 3))):
        kind: Literal["prefill", "decode"] = draw(st.sampled_from(["prefill", "decode"]))
        most = 8 if kind == "decode" else draw(st.sampled_from([1, 70]))
        new = draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch))
        cut = [draw(st.integers(0, min(length, 40))) if draw(st.booleans()) else 0 for length in lengths]
        steps.append(Step(
            kind, tuple(new), tuple(draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch))),
            draw(st.integers(0, 8 - max(*new, 1) if kind == "decode" else 2)), tuple(cut),
        ))
        lengths = [length - less + more for length, less, more in zip(lengths, cut, new, strict=True)]
    chosen = 16 * draw(st.integers(1, 3))
    config = SMALL.replace(
        mask_k=block_k * draw(st.integers(1, 6)), block_k=block_k, block_q=draw(st.sampled_from([2, 8, 16])),
        branch=draw(st.integers(2, 4)), leaf_branch=draw(st.integers(2, 4)), decode_mask_k=chosen,
        decode_search_k=chosen + 16 * draw(st.integers(0, 3)), page_size=32 * draw(st.integers(1, 2)),
        sink_tokens=draw(st.integers(0, 24)), window_tokens=draw(st.integers(1, 40)),
        mask_heads=draw(st.sampled_from(["kv", "query"])),
    )
    return Chain(
        tuple(steps), config=config, heads=(kv_heads * draw(st.integers(1, 3)), kv_heads),
        head_dim=draw(st.sampled_from([16, 32])), dense=draw(st.integers(0, 5)) == 0, seed=draw(st.integers(0, 2**16)),
    )
