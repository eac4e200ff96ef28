"""A synthetic language whose only task is recall: what the small recall model is trained on, and tested with.

A sequence is filler, and in it lines: runs of tokens that stand nowhere else in the sequence. Where a line comes again,
all of it but its first token can be known, by finding the line's first occurrence and reading on there; nothing else
can. Filler resembles text as far as attention is concerned: phrases that come again and again, by Zipf's law, from a
section's topic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST_TOKEN = 0
"""Begins every sequence."""

_PHRASE_TOKENS = 16
_PHRASES_PER_TOPIC = 64
_SECTION_TOKENS = 512


@dataclass(frozen=True)
class RecallLanguage:
    """Sizes of the language; a model's config.json carries them in its field ``recall_language``.

    Token 0 begins a sequence, then come the tokens of lines, then those of filler.

    Attributes:
        line_tokens: tokens of a line.
        line_vocabulary: tokens that lines are made of.
        filler_vocabulary: tokens that filler is made of.
        topics: kinds of sections that filler has.
    """

    line_tokens: int = 8
    line_vocabulary: int = 2047
    filler_vocabulary: int = 1024
    topics: int = 16

    @property
    def vocab_size(self) -> int:
        return 1 + self.line_vocabulary + self.filler_vocabulary

    @property
    def max_lines(self) -> int:
        """Lines in a sequence at most: their tokens are all different."""
        return self.line_vocabulary // self.line_tokens

    def lines(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        """Random lines: [batch, count, line_tokens] int64; within a sequence no token comes twice."""
        order = torch.rand(batch, self.line_vocabulary, generator=generator, device=generator.device).argsort(1)
        return 1 + order[:, : count * self.line_tokens].reshape(batch, count, self.line_tokens)

    def filler(self, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
        """Random filler that begins with the first token of all sequences: [batch, tokens] int64."""
        device = generator.device
        phrases = _phrases(self).to(device)
        sections = -(-(tokens + _PHRASE_TOKENS) // _SECTION_TOKENS)
        per_section = _SECTION_TOKENS // _PHRASE_TOKENS
        topics = torch.randint(self.topics, (batch, sections, 1), generator=generator, device=device)
        choice = torch.multinomial(
            _zipf(_PHRASES_PER_TOPIC).to(device), batch * sections * per_section, replacement=True, generator=generator
        ).view(batch, sections, per_section)
        text = phrases[topics * _PHRASES_PER_TOPIC + choice].reshape(batch, -1)
        # Phrases keep no grid, or a model would know where key blocks begin.
        shift = torch.randint(_PHRASE_TOKENS, (batch, 1), generator=generator, device=device)
        text = text.gather(1, shift + torch.arange(tokens, device=device))
        text[:, 0] = FIRST_TOKEN
        return text

    @classmethod
    def of(cls, model_config: Any) -> RecallLanguage | None:
        """The language that a model was trained on; None for a model of real text."""
        sizes = getattr(model_config, "recall_language", None)
        return None if sizes is None else cls(**sizes)


@functools.cache
def _phrases(language: RecallLanguage) -> Tensor:
    """A language's phrases, always the same: [topics x phrases of a topic, tokens of a phrase]."""
    generator = torch.Generator().manual_seed(0)
    total = language.topics * _PHRASES_PER_TOPIC * _PHRASE_TOKENS
    words = torch.multinomial(_zipf(language.filler_vocabulary), total, replacement=True, generator=generator)
    return 1 + language.line_vocabulary + words.view(-1, _PHRASE_TOKENS)


def _zipf(count: int) -> Tensor:
    return 1 / torch.arange(1, count + 1, dtype=torch.float32)
