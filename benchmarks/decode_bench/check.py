"""A call's results against the contract in float64, on a sample of sequences and heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decode_bench.layer import Layer
from decode_bench.work import candidates

MOST_ERROR = 1e-2
"""Relative, of the output given the blocks that were chosen."""
ROUNDING = 1e-2
"""Of the second stage's scores: a block may be missing if its score is no more above the worst chosen one's."""


@dataclass
class Found:
    """What was compared.

    Attributes:
        error: largest relative error of an output row.
        other: chosen blocks that float64 would not have chosen.
        chosen: chosen blocks.
        problems: what is wrong beyond rounding.
    """

    error: float = 0.0
    other: int = 0
    chosen: int = 0
    problems: tuple[str, ...] = ()


def check(layer: Layer) -> Found:
    """Compare the last call of a layer: first and last sequence, first and last key/value head."""
    found = Found()
    batch, heads = layer.tensors["page_table"].shape[0], layer.geometry.kv_heads
    for b in sorted({0, batch - 1}):
        for head in sorted({0, heads - 1}):
            _check_head(layer, b, head, found)
    if not found.error < MOST_ERROR:
        found.problems += (f"relative error {found.error:.1e}",)
    return found


def _check_head(layer: Layer, b: int, head: int, found: Found) -> None:
    tensors, settings, block = layer.tensors, layer.settings, layer.settings.block
    past, rows, dim = int(tensors["past_lengths"][b]), tensors["query"].shape[2], layer.geometry.head_dim
    first, last = candidates(settings, past)
    pages, group = tensors["page_table"][b].long(), layer.geometry.group
    queries = tensors["query"][b, head * group : (head + 1) * group].double()
    chosen = tensors["present_blocks"][b, head].long()
    bounds = tensors["present_bounds"][pages, head].reshape(-1, 2, dim)[first:last]
    codes = tensors["present_codes"][pages, head].reshape(-1, block, dim // 16)[first:last]
    _check_state(layer, pages, head, first, last, bounds, codes, found)
    kept, blocks = settings.mask_k // block, torch.arange(first, last, device="cuda")
    if last - first > kept:
        if bool(tensors["refresh_mask"][b]):
            scores = _scores(queries[:, 0], bounds.double(), codes, settings.search_k // block, settings.scale)
            _check_choice(scores, chosen - first, kept, found)
            blocks = chosen
        else:
            # What was chosen before, and the two newest candidates.
            blocks = torch.unique(torch.cat([chosen, blocks[-2:]]))
    tokens = torch.cat([
        torch.arange(first * block, device="cuda"),
        (blocks[:, None] * block + torch.arange(block, device="cuda")).flatten(),
        torch.arange(last * block, past + rows, device="cuda"),
    ])
    where = pages[tokens // settings.page_size], head, tokens % settings.page_size
    keys, values = (tensors[f"present_{name}"][where].double() for name in ("key", "value"))
    logits = settings.scale * (queries @ keys.mT)
    positions = past + torch.arange(rows, device="cuda")
    expected = logits.masked_fill(tokens > positions[:, None], float("-inf")).softmax(-1) @ values
    output = tensors["output"][b, head * group : (head + 1) * group].double()
    error = float(((output - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    found.error = max(found.error, error if error == error else float("inf"))


def _scores(query: Tensor, bounds: Tensor, codes: Tensor, searched: int, scale: float) -> Tensor:
    """Of all candidates in the second stage, -inf where the first stage dropped them."""
    low, high = bounds.unbind(1)
    first = (query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT).amax(0)
    kept = first.topk(min(searched, len(first))).indices.sort().values
    words = codes[kept].long()
    shifts = 2 * torch.arange(16, device=codes.device)
    numbers = (words[..., None] >> shifts & 3).flatten(-2)
    keys = low[kept, None] + numbers * (high - low)[kept, None] / 3
    sums = (scale * torch.einsum("gd,ntd->gnt", query, keys)).logsumexp(-1)
    result = torch.full_like(first, float("-inf"))
    result[kept] = (sums - sums.logsumexp(1, keepdim=True)).amax(0)
    return result


def _check_choice(scores: Tensor, chosen: Tensor, kept: int, found: Found) -> None:
    if len(chosen) != kept or bool((chosen < 0).any()) or bool((chosen[1:] <= chosen[:-1]).any()) or bool(
            (chosen >= len(scores)).any()):
        found.problems += ("chosen blocks are not ascending candidates",)
        return
    best = scores.topk(kept).indices
    missing = best[~torch.isin(best, chosen)]
    found.chosen += kept
    found.other += len(missing)
    worst = scores[chosen].min()
    # A block at the border of the first stage may be dropped by float32's rounding: one of them is no problem.
    if len(missing) > 1 and bool((scores[missing] > worst + ROUNDING).any()):
        found.problems += (f"{len(missing)} better blocks are missing",)


def _check_state(
    layer: Layer, pages: Tensor, head: int, first: int, last: int, bounds: Tensor, codes: Tensor, found: Found
) -> None:
    """Bounds and codes of some candidates, exactly."""
    if last == first:
        return
    block, dim, page = layer.settings.block, layer.geometry.head_dim, layer.settings.page_size
    some = torch.randint(last - first, (64,), device="cuda")
    tokens = (some + first)[:, None] * block + torch.arange(block, device="cuda")
    keys = layer.tensors["present_key"][pages[tokens // page], head, tokens % page].float()
    low, high = keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)
    extent, above = high - low, 6 * (keys - low)
    numbers = ((above >= extent).long() + (above >= 3 * extent) + (above >= 5 * extent)).masked_fill(extent == 0, 0)
    words = (numbers.reshape(64, block, dim // 16, 16) << 2 * torch.arange(16, device="cuda")).sum(-1).int()
    if not torch.equal(bounds[some].float(), torch.cat([low, high], 1)):
        found.problems += ("bounds",)
    if not torch.equal(codes[some], words):
        found.problems += ("codes",)
