"""Perplexity of the end of long texts, decoded: every row chooses its own blocks, in every layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hip_trt.evaluate.likelihood import LogLikelihood
from hip_trt.evaluate.perplexity import Setting, compared
from hip_trt.evaluate.rope_scaling import scaled

from .attention import Prompt, Rows
from .case import Case
from .selection import DENSE

TOKENS, DECODED = 16_384, 2_048
"""Of a stretch of text; those at its end that are decoded, after the others were read densely."""
SHARES = (0.25, 0.125, 0.06)
"""Budgets, of the candidates at the end."""


def budget_of(share: float) -> int:
    """A share of the candidates at the end, in tokens: whole blocks of 64."""
    candidates = int(Rows.of_text(TOKENS - DECODED, DECODED).candidates(64)[-1].sum())
    return 64 * round(share * candidates)


def measure(
    model: Any, texts: Mapping[str, Sequence[Sequence[int]]], cases: Sequence[Case], *, scaling: str = "yarn",
    say: Callable[[str], None] = print, save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    go_on: Callable[[], bool] = lambda: True,
) -> list[dict[str, Any]]:
    """Decode the end of all stretches of all texts in all ways.

    Args:
        model: of transformers, in float32.
        texts: stretches of TOKENS tokens, by the text's name.
        cases: what to measure; dense comes by itself.
        scaling: of RoPE, beyond the model's context.
        say: is told of each row.
        save: gets the rows so far.
        go_on: asked before each row.
    """
    prompt, rows = TOKENS - DECODED, []
    setting = Setting(TOKENS, prompt, prompt, scaling, TOKENS / model.config.max_position_embeddings)
    with scaled(model, setting.scaling if setting.factor > 1 else "none", setting.factor):
        read = {name: [Prompt().read(model, tokens[:prompt]) for tokens in texts[name]] for name in texts}

        def losses(name: str, case: Case) -> tuple[Tensor, list[int]]:
            decoding = case.decoding()
            steps = Rows.of_text(prompt, DECODED, interval=case.interval, device=model.device)
            found = []
            for tokens, beginning in zip(texts[name], read[name], strict=True):
                likelihood = LogLikelihood(tokens, skip=prompt)
                likelihood.add(beginning.decode(model, tokens[prompt:], steps, decoding), prompt)
                found.append(likelihood.losses)
            return torch.cat(found), decoding.values

        dense = {name: losses(name, Case(DENSE, 0))[0] for name in texts}
        for case in cases:
            if not go_on():
                break
            since, results, values = time.monotonic(), {}, [0, 0]
            for name in texts:
                sparse, seen = losses(name, case)
                values = [a + b for a, b in zip(values, seen, strict=True)]
                result = compared(sparse, dense[name], setting, prompt)
                results[name] = {key: result[key] for key in ("perplexity", "dense", "change", "error")}
            worst = max(results, key=lambda name: float(results[name]["change"]))
            row = {**case.as_json(), "texts": results, "worst": results[worst]["change"], "worst_text": worst,
                   "stretches": {name: len(read[name]) for name in texts},
                   "mean": sum(result["change"] for result in results.values()) / len(results),
                   "values_read": values[1] / values[0] if values[0] else None}
            rows.append(row)
            changes = " ".join(f"{name} {result['change']:+.2f}" for name, result in results.items())
            say(f"{row['mean']:+7.3f} {case.budget // 64:4d} {case.interval} {case.threshold:g} {case.method.name}: "
                f"{changes} ({time.monotonic() - since:.1f} s)")
            save(rows)
    return rows
