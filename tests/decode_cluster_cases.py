"""Single-token calls that the cluster kernel computes (plugins/cuda/decode_cluster.cuh), each for one thing it can get
wrong: emulated in test_decode_cluster.py, on a GPU in gpu/test_decode_cluster_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from operator_cases import Case

from hip_trt.config import HipConfig

BASE = HipConfig.create(
    mask_k=128, decode_mask_k=64, block_k=16, branch=3, leaf_branch=4, page_size=32, sink_tokens=20, window_tokens=50,
)
"""Four blocks chosen; 1,500 tokens reach level 2."""

PAPER = BASE.replace(branch=2, leaf_branch=2, reuse_level=0)
LARGE = BASE.replace(decode_mask_k=512, branch=4, leaf_branch=16)


def _case(name: str, *past: int, dtype: torch.dtype = torch.float16, **fields: object) -> Case:
    counts = tuple(0 if length < 0 else 1 for length in past)
    defaults: dict[str, object] = {"config": BASE, "heads": (4, 2), "head_dim": 64}
    return Case(tuple(abs(length) for length in past), counts, name, new_tokens=1, dtype=dtype,
                **{**defaults, **fields})  # type: ignore[arg-type]


def _grid() -> tuple[Case, ...]:
    """Lengths below zero are those of idle rows."""
    reuse = {"nodes": "kept", "refresh": False}
    blocks = {8: BASE.replace(block_k=8, decode_mask_k=40, page_size=24),
              32: BASE.replace(block_k=32, decode_mask_k=96),
              64: BASE.replace(block_k=64, decode_mask_k=192, page_size=64),
              128: BASE.replace(block_k=128, decode_mask_k=256, page_size=128)}
    grid = [
        _case("head_dim 128, bfloat16", 1500, 900, heads=(4, 1), head_dim=128, dtype=torch.bfloat16),
        _case("first tokens", 0, 15, 40),
        _case("ragged", 700, -300, 5000, 90),
        _case("reuse", 700, -300, 2500, **reuse),
        _case("reuse and search at once", 700, 2500, 1800, nodes="mixed", refresh=False),
        _case("the paper's tree", 700, -300, 2500, config=PAPER),
        _case("the paper's reuse", 700, 2500, config=PAPER, nodes="mixed", refresh=False),
        _case("mask per query head", 700, 2500, heads=(6, 2), config=BASE.replace(mask_heads="query")),
        _case("mask per query head, reuse", 2500, heads=(6, 2), config=BASE.replace(mask_heads="query"), **reuse),
        *(_case(f"key blocks of {size}", 700, 27 * size, 28 * size - 1, config=config, dtype=torch.bfloat16)
          for size, config in blocks.items()),
        *(_case(f"key blocks of {size}, reuse", 2600, config=config, **reuse) for size, config in blocks.items()),
        *(_case(f"{group} query heads on one", 1500, heads=(group, 1)) for group in (1, 3, 7, 8, 9, 12, 16)),
        _case("16 query heads on one, head_dim 128", 1500, heads=(16, 1), head_dim=128, dtype=torch.bfloat16),
        _case("dense", 1500, 777, dense=True, **reuse),
        _case("budget of one block", 3000, config=BASE.replace(decode_mask_k=16, branch=2, leaf_branch=2)),
        _case("budget covers everything", 3000, config=BASE.replace(decode_mask_k=4096)),
        *(_case(f"branch {branch}, leaf_branch {leaf}", 3000, config=BASE.replace(branch=branch, leaf_branch=leaf))
          for branch, leaf in ((2, 2), (2, 16), (16, 2), (5, 7), (16, 16))),
        _case("shared pages", 3000, 2000, shared_pages=10),
        _case("no sink", 1500, config=BASE.replace(sink_tokens=0)),
        _case("window of one token", 1500, config=BASE.replace(window_tokens=1)),
        _case("pages of three blocks", 1500, config=BASE.replace(page_size=48)),
        _case("more than a table in shared memory", 20000, config=BASE.replace(page_size=16), heads=(1, 1)),
        _case("512 candidates", 9000, config=LARGE, heads=(4, 1), head_dim=128, dtype=torch.bfloat16),
        _case("512 candidates, reuse", 9000, config=LARGE, heads=(4, 1), head_dim=128, **reuse),
        _case("512 candidates, five sequences", 9000, 8000, 7000, 6000, 300, config=LARGE, heads=(2, 1)),
    ]
    # Around block, window and search edges, where a length of one more or less changes what is chosen.
    grid += [_case(f"after {past}", past, heads=(2, 1), nodes="kept", refresh=past % 2 == 0)
             for past in (15, 16, 31, 32, 49, 50, 51, 65, 66, 146, 147, 148, 149, 150, 159, 160, 255, 256, 263, 264)]
    assert len({case.name for case in grid}) == len(grid)
    return tuple(replace(case, seed=seed) for seed, case in enumerate(grid))


DECODE_GRID = _grid()


def decode_case(name: str) -> Case:
    """The case of ``DECODE_GRID`` with this name."""
    return next(case for case in DECODE_GRID if case.name == name)
