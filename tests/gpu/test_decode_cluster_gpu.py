"""The cluster kernel of single-token calls on a GPU: the emulated grid again, and what only a GPU can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clusters import LLAMA, NEEDS_CLUSTERS
from decode_cluster_cases import DECODE_GRID, LARGE, decode_case
from kernel_checks import check, run
from operator_cases import Case, make_inputs
from test_kernels_gpu import library  # noqa: F401  (the fixture)
from torch import Tensor

from hip_trt.library import Library
from hip_trt.reference import select_blocks, sparse_attention

pytestmark = NEEDS_CLUSTERS


def llama(past: tuple[int, ...], new: tuple[int, ...], name: str, **fields: object) -> Case:
    case = Case(past, new, name, config=LLAMA, heads=(32, 8), head_dim=128, dtype=torch.bfloat16, new_tokens=1)
    return replace(case, **fields)  # type: ignore[arg-type]


REPEATED = [
    llama((30000, 700), (1, 1), "search"),
    llama((30000, 700), (1, 1), "reuse", nodes="kept", refresh=False),
    llama((9000,) * 16, (1,) * 16, "sixteen sequences", heads=(8, 8)),
    decode_case("ragged"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", DECODE_GRID, ids=str)
def test_agrees_with_reference(library: Library, case: Case, dtype: torch.dtype) -> None:  # noqa: F811
    check(library, replace(case, dtype=dtype, seed=torch.seed() % 2**16), "cuda", alias=dtype == torch.float16)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9, 17, 33, 64])
def test_every_cluster_size(library: Library, batch: int) -> None:  # noqa: F811
    """Larger batches get smaller clusters, down to one thread block, and then several rounds of them."""
    lengths = tuple(9000 - 100 * b for b in range(batch))
    check(library, Case(lengths, (1,) * batch, config=LARGE, heads=(8, 4), head_dim=64, dtype=torch.float16,
                        new_tokens=1, nodes="mixed", refresh=False), "cuda")


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_repeats_give_the_same_bits(library: Library, case: Case) -> None:  # noqa: F811
    inputs = make_inputs(case)
    first = run(library, case, inputs, "cuda")
    for _ in range(19):
        first.assert_same_bits(run(library, case, inputs, "cuda"))


def test_two_streams_at_once(library: Library) -> None:  # noqa: F811
    cases = REPEATED[:2]
    alone = [_Call(library, case)().clone() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    calls = [_Call(library, case) for case in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                call()
    torch.cuda.synchronize()
    for call, expected in zip(calls, alone, strict=True):
        assert torch.equal(call.output, expected)


def test_one_graph_searches_and_reuses(library: Library) -> None:  # noqa: F811
    """The mask is refreshed or not by a number in GPU memory."""
    call = _Call(library, llama((30000, 20000), (1, 1), "graph", nodes="kept"))
    expected = []
    for refresh in (1, 0):
        call.inputs["refresh_mask"].fill_(refresh)
        expected.append(call().clone())
    assert not torch.equal(*expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for refresh in (0, 1, 1, 0):
        call.inputs["refresh_mask"].fill_(refresh)
        call.output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(call.output, expected[1 - refresh])


def test_a_million_tokens(library: Library) -> None:  # noqa: F811
    past = (1 << 20) - 1
    case = Case((past,), (1,), config=LLAMA, heads=(4, 1), head_dim=128, dtype=torch.bfloat16, new_tokens=1)
    inputs = make_inputs(case)
    results = run(library, case, inputs, "cuda", alias=True)
    pages = inputs["page_table"][0, : -(-past // LLAMA.page_size)].long()
    rows = [torch.cat([inputs[f"past_{name}"][pages, 0].flatten(0, 1)[:past], inputs[name][0, 0]]).float()
            for name in ("key", "value")]
    query = inputs["query"][0].float()
    positions = torch.tensor([past])
    blocks, kept = select_blocks(query, rows[0], positions, config=LLAMA, decode=True)
    assert kept is not None
    assert torch.equal(results.present_nodes[0, 0].long(), kept)
    output = sparse_attention(query.double(), rows[0].double(), rows[1].double(), blocks, positions,
                              block_k=LLAMA.block_k, scale=case.scale)
    assert (results.output[0].double() - output).norm() / output.norm() < 1e-2


class _Call:
    """One call on tensors that stay where they are, results beside the inputs."""

    def __init__(self, plugin: Library, case: Case) -> None:
        self.inputs = {name: tensor.cuda() for name, tensor in make_inputs(case).items()}
        self.output = torch.empty_like(self.inputs["query"])
        self._plugin, self._case = plugin, case
        self._nodes = torch.empty_like(self.inputs["past_nodes"])
        self._workspace = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")

    def __call__(self) -> Tensor:
        self._plugin.attention(
            **self.inputs, config=self._case.config, scale=self._case.scale, output=self.output,
            present_key=self.inputs["past_key"], present_value=self.inputs["past_value"], present_nodes=self._nodes,
            workspace=self._workspace,
        )
        return self.output
