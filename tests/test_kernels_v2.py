"""The CUDA kernels behind the C ABI of version 2, emulated on the CPU, over whole chains of calls."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_v2_checks import check_chain, run
from v2_chains import GRID, SMALL, Chain, chains, first_inputs, inputs_of, named, rotated_types

from hip_trt import operator as names
from hip_trt.errors import ConfigError, RuntimeInputError
from hip_trt.library import Shape

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the kernels are emulated with a C++ compiler")

LLAMA = Shape(torch.bfloat16, 32, 8, 128)


@pytest.fixture(scope="module")
def library() -> emulated.EmulatedLibrary:
    return emulated.EmulatedLibrary(emulated.build())


@pytest.mark.parametrize("chain", rotated_types(GRID), ids=str)
def test_agrees_with_reference(library: emulated.EmulatedLibrary, chain: Chain) -> None:
    check_chain(library, chain, "cpu")


@pytest.mark.parametrize("chain", rotated_types(GRID[:9]), ids=str)
def test_present_on_past(library: emulated.EmulatedLibrary, chain: Chain) -> None:
    check_chain(library, chain, "cpu", alias=True)


@settings(max_examples=40, deadline=None)
@given(chains(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.booleans())
def test_agrees_with_reference_on_any_chain(
    library: emulated.EmulatedLibrary, chain: Chain, dtype: torch.dtype, alias: bool
) -> None:
    check_chain(library, replace(chain, dtype=dtype), "cpu", alias=alias)


def test_a_chunk_of_one_token_is_prefill(library: emulated.EmulatedLibrary) -> None:
    """It attends to mask_k tokens in key blocks, and keeps nothing; a decode call of the same row does."""
    chain = named("chunks of one token")
    state = dict(zip(names.STATE_V2.values(), run(
        library, chain, inputs_of(chain, 0, first_inputs(chain)), "cpu").outputs[1:], strict=True))
    state |= {name: first_inputs(chain)[name] for name in ("page_table",)}
    state["past_lengths"] = torch.tensor(chain.steps[0].new, dtype=torch.int32)
    inputs = inputs_of(chain, 1, state)
    prefill = run(library, chain, inputs, "cpu")
    decode = run(library, chain, {**inputs, "call_kind": torch.zeros(2, dtype=torch.int32)}, "cpu", chosen=False)
    assert prefill.chosen_blocks is not None
    assert prefill.chosen_blocks.shape[-1] == SMALL.mask_blocks
    assert (prefill.chosen_blocks >= 0).all()
    assert (prefill.outputs[5] == -1).all()
    assert (decode.outputs[5] >= 0).all()
    assert not torch.equal(prefill.outputs[0], decode.outputs[0])


@pytest.mark.parametrize(("fields", "kind", "message"), [
    ({"decode_block_k": 8}, 0, "decode_block_k: 8 is not allowed; it must be 16 to 64"),
    ({"page_size": 48, "decode_block_k": 32}, 1, "page_size: 48 is not allowed; it must be a multiple of decode_block"),
    ({"mask_k": 30}, 1, "mask_k: 30 is not allowed; it must be a multiple of block_k (4)"),
    ({"decode_mask_k": 24}, 2, "decode_mask_k: 24 is not allowed; it must be a multiple of decode_block_k (16)"),
    ({"mask_k": 1 << 20}, 0, "mask_k: 1048576 is not supported; with block_k 4"),
])
def test_refuses_configurations(
    library: emulated.EmulatedLibrary, fields: dict[str, int], kind: int, message: str
) -> None:
    library.validate_v2(SMALL, LLAMA, kind=kind)
    with pytest.raises(ConfigError) as error:
        library.validate_v2(SMALL.model_copy(update=fields), LLAMA, kind=kind)
    assert error.value.cause.startswith(message)


@pytest.mark.parametrize(("fields", "kind", "message"), [
    ({"new_tokens": 9}, names.DECODE, "new_tokens: 9 is not allowed; it must be 0 to 8"),
    ({"head_dim": 72}, names.DECODE, "head_dim: 72 is not supported; it must be a multiple of 16"),
    ({"head_dim": 72}, names.PREFILL, "head_dim: 72 is not supported; it must be a multiple of 16"),
    ({"head_dim": 256}, names.PREFILL, "head_dim: 256 is not supported; it must be a multiple of 8, at most 128"),
    ({"head_dim": 256}, 0, "head_dim: 256 is not supported; it must be a multiple of 8, at most 128"),
])
def test_refuses_shapes(library: emulated.EmulatedLibrary, fields: dict[str, int], kind: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        library.validate_v2(SMALL, replace(LLAMA, **fields), kind=kind)
    assert error.value.cause.startswith(message)
    library.validate_v2(SMALL, replace(LLAMA, new_tokens=9), kind=names.PREFILL)
    library.validate_v2(SMALL, replace(LLAMA, head_dim=256), kind=names.DECODE)


@pytest.mark.parametrize("kind", [0, names.PREFILL, names.DECODE])
def test_workspace_is_enough_for_smaller_calls(library: emulated.EmulatedLibrary, kind: int) -> None:
    large = replace(LLAMA, batch=4, new_tokens=8, num_pages=64, pages_per_sequence=32)
    size = library.workspace_size_v2(SMALL, large, kind=kind)
    assert size % 256 == 0
    for smaller in ({"batch": 1}, {"new_tokens": 1}, {"num_pages": 1}, {"pages_per_sequence": 1}):
        assert library.workspace_size_v2(SMALL, replace(large, **smaller), kind=kind) <= size
    both = library.workspace_size_v2(SMALL, large)
    assert both >= size
    with pytest.raises(ConfigError, match="a size is 0"):
        library.workspace_size_v2(SMALL, LLAMA, kind=kind)


@pytest.mark.parametrize(("changes", "message"), [
    ({"call_kind": torch.zeros(3, dtype=torch.int32)}, r"call_kind: shape \[3\] does not fit; it must be \[1\]"),
    ({"past_bounds": torch.zeros(1)}, r"past_bounds: shape \[1\] does not fit; it must be \["),
    ({"past_codes": torch.zeros(1, dtype=torch.int32)}, r"past_codes: shape \[1\] does not fit"),
    ({"past_blocks": torch.zeros(2, 2, 3, dtype=torch.int32)}, r"past_blocks: shape .* must be \[2, 2, 2\]"),
    ({"refresh_mask": torch.zeros(1, dtype=torch.int32)}, r"refresh_mask: shape \[1\] does not fit; it must be \[2\]"),
    ({"refresh_mask": torch.zeros(2)}, "refresh_mask: torch.float32 on cpu"),
    ({"chosen_blocks": torch.zeros(1), "call_kind": torch.zeros(2, dtype=torch.int32), "rows": 8},
     "chosen_blocks: a decode call has none"),
])
def test_misfit_is_named(
    library: emulated.EmulatedLibrary, changes: dict[str, torch.Tensor | int], message: str
) -> None:
    chain = named("prefill, decode, prefill")
    inputs = {**inputs_of(chain, 0, first_inputs(chain)), **changes}
    rows = inputs.pop("rows", None)
    if rows:
        inputs |= {name: inputs[name][:, :, :rows].contiguous() for name in ("query", "key", "value")}
    with pytest.raises(RuntimeInputError, match=message):
        library.attention_v2(**inputs, config=chain.config, scale=1.0)
