"""What the kernels behind the C ABI are held to, wherever they run: tests/gpu compiled, test_kernels.py emulated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from chosen_blocks import chosen_blocks
from operator_cases import SMALL, Case, make_inputs, reference
from torch import Tensor

from hip_trt.library import Library
from hip_trt.reference.cache import append

TYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest ‖output - reference‖ / ‖reference‖, the reference computed in float64."""

GUARD = 64
"""Elements before and after every result that the kernels must leave alone."""


@dataclass
class Results:
    """What one call wrote, on the CPU."""

    output: Tensor
    present_key: Tensor
    present_value: Tensor
    present_nodes: Tensor
    chosen_blocks: Tensor

    def assert_same_bits(self, other: Results) -> None:
        for name, tensor in vars(self).items():
            assert same_bits(tensor, getattr(other, name)), name


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal, where NaN equals the same NaN and 0 does not equal -0."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def run(
    library: Library, case: Case, inputs: dict[str, Tensor], device: str, *, alias: bool = False, chosen: bool = True
) -> Results:
    """One call with every result poisoned before and guarded on both sides; ``alias`` writes onto the past tensors."""
    config, new_tokens = case.config, inputs["query"].shape[2]
    budget = config.decode_mask_blocks if new_tokens == 1 else config.mask_blocks
    shape = (len(case.past_lengths), case.num_masks, -(-new_tokens // config.block_q), budget)
    here = {name: Guarded(tensor.to(device)) for name, tensor in inputs.items()}
    past = ("past_key", "past_value", "past_nodes")
    there = {name.replace("past", "present"): here[name] if alias else Guarded.poisoned(inputs[name], device)
             for name in past}
    there["output"] = Guarded.poisoned(inputs["query"], device)
    there["chosen_blocks"] = Guarded.poisoned(torch.empty(shape, dtype=torch.int32), device)
    results = {name: guarded.tensor for name, guarded in there.items()}
    library.attention(
        **{name: guarded.tensor for name, guarded in here.items()}, config=config, scale=case.scale, dense=case.dense,
        **(results if chosen else {name: tensor for name, tensor in results.items() if name != "chosen_blocks"}),
    )
    for name, guarded in [*here.items(), *there.items()]:
        assert guarded.intact(), f"{name}: written out of bounds"
    for name, guarded in here.items():
        unchanged = same_bits(guarded.tensor.cpu(), inputs[name])
        assert unchanged or (alias and name in past), f"{name}: an input was changed"
    return Results(**{name: tensor.cpu() for name, tensor in results.items()})


def check(library: Library, case: Case, device: str, *, alias: bool = False, chosen: bool = True) -> Results:
    """Compare one call with the reference; ``chosen`` is False where a library does not tell the chosen blocks."""
    inputs = make_inputs(case)
    results = run(library, case, inputs, device, alias=alias, chosen=chosen)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    output, _, _, present_nodes = reference(case, exact)
    assert not chosen or torch.equal(results.chosen_blocks, chosen_blocks(case, inputs)), "chosen_blocks"
    assert torch.equal(results.present_nodes, present_nodes), "present_nodes"
    where = [inputs[name] for name in ("page_table", "past_lengths", "query_lengths")]
    assert same_bits(results.present_key, append(inputs["past_key"], inputs["key"], *where)), "present_key"
    assert same_bits(results.present_value, append(inputs["past_value"], inputs["value"], *where)), "present_value"
    check_output(case, results.output, output)
    return results


def check_output(case: Case, output: Tensor, expected: Tensor) -> None:
    """Hold an output to the tolerance of its type, each sequence for itself, and its padding to 0."""
    for b, count in enumerate(case.query_lengths):
        assert not output[b, :, count:].any(), f"sequence {b}: padding is not 0"
        error = (output[b].double() - expected[b]).norm() / expected[b].norm() if count else torch.tensor(0.0)
        assert error < TOLERANCES[output.dtype], f"sequence {b}: relative error {float(error)}"


class Guarded:
    """A copy of a tensor with elements around it that must not change."""

    def __init__(self, tensor: Tensor) -> None:
        flat = tensor.contiguous().flatten()
        self.buffer = torch.cat([flat.new_full((GUARD,), 99), flat, flat.new_full((GUARD,), 99)])
        self.tensor = self.buffer[GUARD : GUARD + len(flat)].view(tensor.shape)

    @classmethod
    def poisoned(cls, like: Tensor, device: str) -> Guarded:
        return cls(torch.full(like.shape, float("nan") if like.is_floating_point() else -7, dtype=like.dtype,
                              device=device))

    def intact(self) -> bool:
        return bool((self.buffer[:GUARD] == 99).all() and (self.buffer[-GUARD:] == 99).all())


def _grid() -> tuple[Case, ...]:
    """Cases for what kernels get wrong and simpler implementations do not."""
    wide = SMALL.replace(decode_mask_k=64, window_tokens=150, sink_tokens=10)
    many = SMALL.replace(mask_k=400, decode_mask_k=400, block_k=2, branch=2, leaf_branch=16)
    grid = [
        *(Case((250, 33), (41, 9), f"head_dim {size}", head_dim=size) for size in (8, 32, 64, 80, 96, 128)),
        *(Case((250, 33), (1, 1), f"head_dim {size}, decode", head_dim=size) for size in (8, 64, 96, 128)),
        Case((150,), (60,), "sixteen query heads on one", heads=(16, 1)),
        Case((250, 70), (1, 1), "sixteen query heads on one, decode", heads=(16, 1)),
        Case((250, 70), (1, 1), "sixteen masks, decode", heads=(16, 1), config=SMALL.replace(mask_heads="query")),
        Case((0, 90), (60, 33), "sixteen masks", heads=(16, 1), config=SMALL.replace(mask_heads="query")),
        Case((200,), (50,), "more sampled rows than fit at once", heads=(16, 1),
             config=SMALL.replace(block_q=16, stride_q=1)),
        Case((130, 0), (33, 140), "query blocks of 128 rows", config=SMALL.replace(block_q=128, stride_q=16)),
        Case((60, 200), (37, 40), "query blocks of one row, one warp", heads=(16, 1),
             config=SMALL.replace(block_q=1, stride_q=1)),
        *(Case((70 * size // 4,), (9,), f"key blocks of {size}, stride {stride}", heads=(2, 1),
               config=SMALL.replace(mask_k=2 * size, decode_mask_k=size, block_k=size, page_size=size,
                                    stride_k=stride))
          for size, stride in ((16, 1), (32, 1), (64, 1), (64, 64), (128, 1), (128, 4))),
        Case((2000,), (1,), "key blocks of 128, decode", heads=(2, 1),
             config=SMALL.replace(mask_k=128, decode_mask_k=256, block_k=128, page_size=256)),
        Case((9000, 700), (3, 2), "more candidates than shared memory holds", heads=(2, 1), config=many),
        Case((9000, 700), (1, 1), "more candidates than shared memory holds, decode", heads=(2, 1), config=many),
        Case((9000, 7100), (1, 1), "more candidates than shared memory holds, reuse", heads=(2, 1), config=many,
             nodes="kept", refresh=False),
        *(Case((900,), (count,), f"more chosen than score above zero, {count} new", heads=(2, 1),
               config=many.replace(mask_k=600, decode_mask_k=600, block_q=1, stride_q=1, stride_k=2,
                                   mask_heads="query")) for count in (1, 2)),
        *(Case((24, 25, 27, 28, 29), (1,) * 5, f"reuse of level {level} where candidates just fit", nodes="kept",
               refresh=False, config=SMALL.replace(reuse_level=level)) for level in (0, 1)),
        Case((700, 3, 100, 20), (1, 1, 0, 1), "split, some with nothing", config=wide),
        Case((700, 500, 64, 65), (1, 1, 1, 1), "split, reused nodes", config=wide, nodes="kept", refresh=False),
        Case((4500, 4095, 4096), (1, 1, 1), "dense decode, every split", dense=True, heads=(2, 1)),
        Case((4500,), (7,), "dense chunk", dense=True, heads=(2, 1)),
        Case((400, 0), (1, 1), "decode, everything attended", config=wide.replace(decode_mask_k=1024)),
        *(Case((900, 610), (1, 1), f"branch {branch}, leaf_branch {leaf}, decode", nodes="mixed", refresh=False,
               config=SMALL.replace(branch=branch, leaf_branch=leaf))
          for branch, leaf in ((2, 2), (2, 16), (16, 2), (5, 7), (16, 16))),
        *(Case((900,), (9,), f"branch {branch}, leaf_branch {leaf}",
               config=SMALL.replace(branch=branch, leaf_branch=leaf))
          for branch, leaf in ((2, 2), (2, 16), (16, 2), (5, 7), (16, 16))),
    ]
    assert len({case.name for case in grid}) == len(grid)
    return tuple(grid)


KERNEL_GRID = _grid()


def rotated_types(grid: tuple[Case, ...]) -> list[Case]:
    """Each case with one type, in turn."""
    return [replace(case, dtype=TYPES[i % 3], name=f"{case.name}, {str(TYPES[i % 3])[6:]}")
            for i, case in enumerate(grid)]


def every_type(grid: tuple[Case, ...]) -> list[Case]:
    """Each case with every type."""
    return [replace(case, dtype=dtype, name=f"{case.name}, {str(dtype)[6:]}") for case in grid for dtype in TYPES]


def renumber_pages(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same call with the pages elsewhere in the pool."""
    pages = len(inputs["past_key"])
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    table = inputs["page_table"]
    moved = torch.where(table < 0, table, order.argsort()[table.clamp(min=0)].int())
    return {**inputs, "page_table": moved, "past_key": inputs["past_key"][order],
            "past_value": inputs["past_value"][order]}
