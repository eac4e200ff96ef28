"""The prefill kernels that only Hopper runs: shapes that suit them, beside the grid that every kernel is held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_checks import check, run
from operator_cases import Case, make_inputs
from test_kernels_gpu import library  # noqa: F401  (the fixture)

from hip_trt.config import HipConfig
from hip_trt.library import Library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

BASE = HipConfig.create(mask_k=128, decode_mask_k=64, leaf_branch=4, page_size=64, sink_tokens=32, window_tokens=100)

CONFIGS = {
    "base": BASE,
    "key blocks of 8": BASE.replace(block_k=8, page_size=32),
    "key blocks of 32": BASE.replace(block_k=32),
    "key blocks of 64": BASE.replace(block_k=64, mask_k=256),
    "halving": BASE.replace(branch=2, leaf_branch=2),
    "odd branches": BASE.replace(branch=3, leaf_branch=16),
    "mask per query head": BASE.replace(mask_heads="query"),
    "query blocks of 16, every row": BASE.replace(block_q=16, stride_q=1),
    "query blocks of 32": BASE.replace(block_q=32),
    "query blocks of 128": BASE.replace(block_q=128),
    "no sink, least window": BASE.replace(sink_tokens=0, window_tokens=1),
    "stride over keys": BASE.replace(stride_k=2),  # searched by the portable kernel
}
LENGTHS = {
    "whole": ((0,), (700,)),
    "edges": ((0, 1, 63, 64), (1025, 640, 0, 1)),
    "chunks": ((300, 1500), (129, 260)),
}


def case(name: str, lengths: str, **fields: object) -> Case:
    past, new = LENGTHS[lengths]
    made = Case(past, new, f"{name}, {lengths}", config=CONFIGS[name], heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    return replace(made, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(library: Library, name: str, lengths: str) -> None:  # noqa: F811
    check(library, case(name, lengths), "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 3), (9, 3), (4, 1), (8, 1), (16, 1)], ids=str)
def test_heads(library: Library, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:  # noqa: F811
    check(library, case("base", "chunks", heads=heads, head_dim=head_dim, dtype=dtype), "cuda")


@pytest.mark.parametrize("lengths", LENGTHS)
def test_dense(library: Library, lengths: str) -> None:  # noqa: F811
    check(library, case("base", lengths, dense=True), "cuda")


def test_repeats_and_streams(library: Library) -> None:  # noqa: F811
    """Twenty repeats give the same bits, also while another stream runs the same work."""
    made = case("base", "chunks")
    inputs = make_inputs(made)
    first = run(library, made, inputs, "cuda")
    other = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            busy = (busy @ busy).clamp(-1, 1)
            beside = run(library, made, inputs, "cuda")
        first.assert_same_bits(run(library, made, inputs, "cuda"))
        first.assert_same_bits(beside)
