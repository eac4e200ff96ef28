"""What the kernels of decode, version 2, are held to, wherever they run: tests/gpu compiled, test_decode_kernels.py
emulated."""

from __future__ import annotations

from dataclasses import replace

import decode_cases
import torch
from decode_cases import GRID, Case, Outputs, make_inputs
from kernel_checks import Guarded, same_bits
from torch import Tensor

from hip_trt.decode_library import DecodeLibrary, DecodeSettings
from hip_trt.reference.decode import DecodeConfig
from hip_trt.reference.decode_state import write_state

TYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
ROUNDING = 4e-3
"""Of the second stage's scores: weights of codes are float16."""
PAST = ("past_key", "past_value", "past_bounds", "past_codes", "past_blocks")
BLOCK = 16
"""The smallest block that kernels take."""


def wide(case: Case, **changes: object) -> Case:
    """A case of blocks of 4, in blocks of 16: all lengths but those of new rows are four times as long."""
    config, times = case.config, BLOCK // case.config.block
    grown = DecodeConfig(
        mask_k=times * config.mask_k, search_k=times * config.search_k, block=BLOCK,
        sink_tokens=times * config.sink_tokens, window_tokens=max(1, times * (config.window_tokens - 1)),
        value_threshold=config.value_threshold,
    )
    return replace(
        case, config=grown, page_size=times * case.page_size,
        past_lengths=tuple(times * past for past in case.past_lengths), **changes,
    )


def settings(case: Case, **changes: object) -> DecodeSettings:
    config = case.config
    return replace(DecodeSettings(
        mask_k=config.mask_k, search_k=config.search_k, block=config.block, page_size=case.page_size,
        sink_tokens=config.sink_tokens, window_tokens=config.window_tokens,
        mask_per_query_head=case.mask_heads == "query", scale=case.scale, value_threshold=config.value_threshold,
    ), **changes)


def run(
    library: DecodeLibrary, case: Case, inputs: dict[str, Tensor], device: str, *, alias: bool = False,
    **changes: object,
) -> Outputs:
    """One call with every result poisoned before and guarded on both sides; ``alias`` writes onto the past tensors."""
    here = {name: Guarded(tensor.to(device)) for name, tensor in inputs.items()}
    there = {name.replace("past", "present"): here[name] if alias else Guarded.poisoned(inputs[name], device)
             for name in PAST}
    there["output"] = Guarded.poisoned(inputs["query"], device)
    tensors = {name: guarded.tensor for name, guarded in {**here, **there}.items()}
    with_changes = settings(case, **changes)
    size = library.workspace_size(with_changes, *(inputs[name] for name in ("query", "past_key", "page_table")))
    workspace = Guarded(torch.full((size,), 255, dtype=torch.uint8, device=device))
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    library.decode(tensors, with_changes, workspace.tensor, stream)
    if device == "cuda":
        torch.cuda.synchronize()
    for name, guarded in [*here.items(), *there.items(), ("workspace", workspace)]:
        assert guarded.intact(), f"{name}: written out of bounds"
    for name, guarded in here.items():
        unchanged = same_bits(guarded.tensor.cpu(), inputs[name])
        assert unchanged or (alias and name in PAST), f"{name}: an input was changed"
    order = ("output", "present_key", "present_value", "present_bounds", "present_codes", "present_blocks")
    return tuple(there[name].tensor.cpu() for name in order)


def assert_agrees(case: Case, inputs: dict[str, Tensor], found: Outputs) -> None:
    """With the reference, within rounding of the case's type."""
    tolerance, rounding = TOLERANCES[case.dtype], decode_cases.ROUNDING
    decode_cases.ROUNDING = ROUNDING
    try:
        decode_cases.assert_agrees(case, inputs, found, rtol=tolerance, atol=tolerance)
    finally:
        decode_cases.ROUNDING = rounding


def check(library: DecodeLibrary, case: Case, device: str, *, alias: bool = False) -> Outputs:
    inputs = make_inputs(case)
    found = run(library, case, inputs, device, alias=alias)
    assert_agrees(case, inputs, found)
    return found


def rewrite_state(inputs: dict[str, Tensor]) -> None:
    """Bounds and codes anew, after keys were changed."""
    past = inputs["past_lengths"]
    inputs["past_bounds"], inputs["past_codes"] = write_state(
        inputs["past_key"], inputs["past_bounds"], inputs["past_codes"], inputs["page_table"], torch.zeros_like(past),
        past,
    )


def _kernel_grid() -> tuple[Case, ...]:
    """Cases for what kernels get wrong and simpler implementations do not."""
    config = DecodeConfig(mask_k=64, search_k=192, block=BLOCK, sink_tokens=20, window_tokens=70)
    long = Case((900, 1203), (1, 1), config=config, page_size=32, heads=(4, 1))
    full = DecodeConfig(mask_k=256, search_k=1024, block=64, sink_tokens=64, window_tokens=130)
    many = DecodeConfig(mask_k=48, search_k=96, block=BLOCK, sink_tokens=16, window_tokens=20)
    grid = [
        *(replace(long, head_dim=size, heads=(2, 1), query_lengths=(1, 3), name=f"head size {size}")
          for size in (16, 64, 80, 112, 128, 256)),
        *(replace(long, heads=heads, head_dim=64, name=f"heads {heads}")
          for heads in ((1, 1), (3, 1), (5, 1), (8, 1), (12, 1), (16, 1), (16, 4))),
        *(replace(long, heads=heads, head_dim=64, query_lengths=(rows, 2), name=f"{rows} rows, heads {heads}")
          for heads, rows in (((4, 1), 2), ((4, 1), 3), ((4, 1), 5), ((4, 1), 8), ((16, 1), 7), ((6, 2), 4))),
        replace(long, heads=(6, 2), head_dim=64, mask_heads="query", query_lengths=(5, 1), name="masks of query heads"),
        replace(long, head_dim=64, config=replace(config, block=32), name="blocks of 32"),
        Case((3000, 2111), (1, 2), "blocks of 64", config=full, page_size=64, heads=(4, 1), head_dim=128),
        Case((2047, 2048, 2049), (1, 1, 1), "block is filled, or not", config=full, page_size=128, heads=(2, 1),
             head_dim=64),
        Case((3000, 100, 2111, 640), (1, 1, 0, 1), "ragged", config=full, page_size=64, heads=(4, 2), head_dim=64,
             values="real"),
        *(replace(long, heads=heads, head_dim=64, values="real", name=f"real numbers, heads {heads}")
          for heads in ((1, 1), (4, 1), (8, 1), (9, 1))),
        Case((2000, 2111), (2, 1), "reuse", config=full, page_size=64, heads=(4, 2), head_dim=64, blocks="kept",
             refresh=(0, 0)),
        Case((2000, 2111), (2, 1), "reuse of anything", config=full, page_size=64, heads=(4, 2), head_dim=64,
             blocks="any", refresh=(0, 1)),
        *(replace(long, heads=heads, head_dim=64, query_lengths=rows, name=f"threshold, {rows} rows, heads {heads}",
                  mask_heads=masks, config=replace(config, value_threshold=threshold))
          for heads, rows, masks, threshold in (((4, 1), (1, 3), "kv", 0.02), ((16, 1), (5, 2), "kv", 0.06),
                                                ((6, 2), (8, 1), "query", 0.02))),
        replace(long, heads=(4, 2), head_dim=128, values="real", blocks="kept", refresh=(0, 0), name="threshold, reuse",
                config=replace(config, block=64, mask_k=256, search_k=256, value_threshold=0.01), page_size=64),
        Case((20000,), (1,), "more scores than shared memory holds", config=many, page_size=64, heads=(1, 1)),
        Case((260,) * 20, (1,) * 20, "more sequences than multiprocessors", config=many, page_size=32, heads=(4, 2),
             head_dim=64),
    ]
    assert len({case.name for case in grid}) == len(grid)
    return tuple(grid)


KERNEL_GRID = _kernel_grid()
WIDE_GRID = tuple(wide(case) for case in GRID)
"""The grid of every implementation, in blocks that kernels take."""
OFF_BY_ONE = tuple(
    replace(wide(case), past_lengths=tuple(max(0, 4 * past + by) for past in case.past_lengths),
            name=f"{case.name}, {by:+}")
    for case in GRID for by in (-1, 1, 7)
    if case.name in ("long", "candidates just fit, or not", "candidates of one stage, or two", "ragged")
)


def rotated_types(grid: tuple[Case, ...]) -> list[Case]:
    """Each case with one type, in turn."""
    return [replace(case, dtype=TYPES[i % 3], name=f"{case.name}, {str(TYPES[i % 3])[6:]}")
            for i, case in enumerate(grid)]


def every_type(grid: tuple[Case, ...]) -> list[Case]:
    """Each case with every type."""
    return [replace(case, dtype=dtype, name=f"{case.name}, {str(dtype)[6:]}") for case in grid for dtype in TYPES]
