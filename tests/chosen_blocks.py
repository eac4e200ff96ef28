"""The blocks that the reference chooses, as implementations report them for verification."""

from __future__ import annotations

import torch
from operator_cases import Case
from torch import Tensor

from hip_trt.reference import select_blocks
from hip_trt.reference.cache import append, sequence


def chosen_blocks(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """[B, Hm, ceil(S / block_q), K] int32: ascending, then -1; all -1 for query blocks with no valid row, or dense."""
    config, decode = case.config, inputs["query"].shape[2] == 1
    query_heads, kv_heads = case.heads
    budget = config.decode_mask_blocks if decode else config.mask_blocks
    query_blocks = -(-inputs["query"].shape[2] // config.block_q)
    chosen = torch.full((len(case.past_lengths), case.num_masks, query_blocks, budget), -1, dtype=torch.int32)
    if case.dense:
        return chosen
    pool = append(*(inputs[name] for name in ("past_key", "key", "page_table", "past_lengths", "query_lengths")))
    for b, (past, count) in enumerate(zip(case.past_lengths, case.query_lengths, strict=True)):
        keys = sequence(pool, inputs["page_table"][b], past + count).float()
        for block, first_row in enumerate(range(0, count, config.block_q)):
            rows = torch.arange(first_row, min(first_row + config.block_q, count))
            for mask in range(case.num_masks):
                heads = range(mask * query_heads // case.num_masks, (mask + 1) * query_heads // case.num_masks)
                attended, _ = select_blocks(
                    inputs["query"][b, heads][:, rows].float(), keys[heads[0] * kv_heads // query_heads], past + rows,
                    config=config, decode=decode,
                    past_nodes=inputs["past_nodes"][b, mask].long() if decode and not case.refresh else None,
                )
                window = max(0, past + first_row - config.window_tokens + 1) // config.block_k
                sink = min(-(-config.sink_tokens // config.block_k), window)
                inside = attended[(attended >= sink) & (attended < window)]
                chosen[b, mask, block, : len(inside)] = inside
    return chosen
