"""Lone facts in long contexts: the prompt is read densely, question and answer are decoded.

All questions of a context are asked at once: their rows see the context and their own question, not each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hip_trt.evaluate.retrieval_language import RecallLanguage
from hip_trt.evaluate.retrieval_probes import Probe, synthetic_probe

from .attention import Prompt, Rows, searched
from .case import Case

FACTS = 32
"""In a context, each once."""


def measure(
    model: Any, lengths: Sequence[int], cases: Sequence[Case], *, contexts: int, seed: int = 0,
    say: Callable[[str], None] = print, save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Facts found, by length and case.

    Args:
        model: a recall model, in float32.
        lengths: of contexts with question and answer, in tokens.
        cases: to compare.
        contexts: of each length, with FACTS facts each.
        seed: of everything that is random.
    """
    language = RecallLanguage.of(model.config)
    assert language is not None, "a recall model"
    rows: list[dict[str, Any]] = []
    for length in lengths:
        found = [0] * len(cases)
        for number in range(contexts):
            probe = synthetic_probe(language, length, facts=FACTS, stretch=1, seed=seed + 1000 * number + length)
            prompt = Prompt().read(model, probe.context.tolist())
            for index, case in enumerate(cases):
                found[index] += int(ask(model, prompt, probe, case).sum())
        of = contexts * FACTS
        for case, right in zip(cases, found, strict=True):
            rows.append({"length": length, **case.as_json(), "right": right, "of": of})
            say(f"{length} {case.budget // 64:4d} {case.interval} {case.threshold:g} {right} of {of} "
                f"{case.method.name}")
        save(rows)
    return rows


def ask(model: Any, prompt: Prompt, probe: Probe, case: Case) -> Tensor:
    """Which facts are found, all of the answer's tokens being the likeliest: [facts] bool. Right tokens are fed.

    Where choices are reused, the context's last tokens are decoded too, and the searches of different facts fall on
    different steps, as they would in use.
    """
    lead = case.interval - 1 if case.interval else 1
    start = len(probe.context) - lead
    ends = [[*fact.question, *fact.answer] for fact in probe.facts]
    tokens = [[*probe.context[start:].tolist(), *end[:-1]] for end in ends]
    steps = rows_of_facts(len(tokens), len(tokens[0]), start, case.interval, device=model.device)
    decoding = case.decoding()
    logits = prompt.cut(start).decode(model, [token for fact in tokens for token in fact], steps, decoding)
    answer = torch.tensor([fact.answer for fact in probe.facts], device=model.device)
    likeliest = logits.reshape(len(tokens), len(tokens[0]), -1)[:, -answer.shape[1] :].argmax(-1)
    return (likeliest == answer).all(1)


def rows_of_facts(facts: int, steps: int, prompt: int, interval: int, *, device: Any = "cpu") -> Rows:
    """The steps of several questions after one prompt: fact by fact, each seeing the prompt and its own."""
    fact = torch.arange(facts, device=device).repeat_interleave(steps)
    step = torch.arange(steps, device=device).repeat(facts)
    own = (fact == fact[:, None]) & (step <= step[:, None])
    visible = torch.cat((own.new_ones(len(fact), prompt), own), 1)
    phase = fact % max(interval, 1)
    return Rows(prompt + step, visible, fact * steps + searched(step, interval, phase))
