"""The reference of version 2: how its kinds of call fit together. What each computes, other tests say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from v2_chains import SMALL, Chain, Step, first_inputs, inputs_of, named, reference

from hip_trt.operator import STATE_V2
from hip_trt.reference import hip_attention

TURNS = named("prefill, decode, prefill")


def after(chain: Chain, calls: int) -> dict[str, Tensor]:
    """The state that a chain's first calls leave."""
    state = first_inputs(chain)
    for index in range(calls):
        inputs = inputs_of(chain, index, state)
        state = dict(zip(STATE_V2.values(), reference(chain, inputs)[1:], strict=True)) | {
            "page_table": inputs["page_table"], "past_lengths": inputs["past_lengths"] + inputs["query_lengths"]}
    return state


def test_prefill_is_version_1() -> None:
    inputs = inputs_of(TURNS, 0, first_inputs(TURNS))
    output, key, value, *_ = reference(TURNS, inputs)
    given = {name: inputs[name] for name in (
        "query", "key", "value", "past_key", "past_value", "page_table", "past_lengths", "query_lengths")}
    nodes = torch.full((2, 2, TURNS.config.decode_mask_blocks), -1, dtype=torch.int32)
    expected = hip_attention(**given, past_nodes=nodes, refresh_mask=torch.ones(1, dtype=torch.int32),
                             config=TURNS.config, scale=TURNS.scale)
    for tensor, other in zip((output, key, value), expected, strict=False):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


def test_a_chunk_of_one_token_is_the_row_of_a_longer_one() -> None:
    """Where query blocks are single rows."""
    config = SMALL.replace(block_q=1, stride_q=1)
    chain = Chain((Step("prefill", (150,)), Step("prefill", (2,))), config=config)
    inputs = inputs_of(chain, 1, after(chain, 1))
    both = reference(chain, inputs)[0]
    one = {**inputs, "query_lengths": torch.tensor([1], dtype=torch.int32),
           **{name: inputs[name][:, :, :1] for name in ("query", "key", "value")}}
    torch.testing.assert_close(reference(chain, one)[0], both[:, :, :1])
    as_decode = reference(chain, {**one, "call_kind": torch.zeros(2, dtype=torch.int32)})[0]
    assert not torch.allclose(as_decode, both[:, :, :1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [(100, 1, 49), (7, 64, 79), (149, 1)], ids=str)
def test_chunks_leave_the_state_of_one_call(sizes: tuple[int, ...]) -> None:
    whole = Chain((Step("prefill", (150,)),))
    rows = inputs_of(whole, 0, first_inputs(whole))
    once = reference(whole, rows)
    state, begin = first_inputs(whole), 0
    for size in sizes:
        inputs = {**rows, **state, "query_lengths": torch.tensor([size], dtype=torch.int32),
                  **{name: rows[name][:, :, begin : begin + size] for name in ("query", "key", "value")}}
        found = reference(whole, inputs)
        begin += size
        state = dict(zip(STATE_V2.values(), found[1:], strict=True)) | {
            "page_table": rows["page_table"], "past_lengths": torch.tensor([begin], dtype=torch.int32)}
    for tensor, other in zip(list(state.values())[:5], once[1:], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


def test_kinds_agree_where_everything_is_attended() -> None:
    chain = Chain((Step("prefill", (90, 70)), Step("decode", (3, 1))),
                  config=SMALL.replace(mask_k=4096, decode_mask_k=4096, decode_search_k=4096))
    inputs = inputs_of(chain, 1, after(chain, 1))
    prefill = reference(chain, {**inputs, "call_kind": torch.zeros(1, dtype=torch.int32)})
    for tensor, other in zip(reference(chain, inputs), prefill, strict=True):
        torch.testing.assert_close(tensor, other, equal_nan=True)


def test_idle_sequences_keep_blocks_in_both_kinds() -> None:
    chain = named("idle keeps blocks in prefill")
    state = after(chain, 2)
    assert (state["past_blocks"][0] >= 0).all()
    prefill = reference(chain, inputs_of(chain, 2, state))[5]
    assert torch.equal(prefill[0], state["past_blocks"][0])
    assert (prefill[1] == -1).all()
