"""Long contexts with facts in them, and questions that only those facts answer.

A fact is a line of tokens that stands in the context once, or every few tokens over a stretch of it. Its question is
the line's beginning, asked when the context has ended; its answer is the rest of the line. So no instruction has to be
understood: small models can do it, and what fails is finding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.models import encode
from hip_trt.evaluate.retrieval_language import RecallLanguage
from hip_trt.evaluate.texts import Text

QUESTION_TOKENS = 2
"""Tokens of a synthetic line that are its question."""
_REPEAT_EVERY = 16
"""Tokens from one occurrence of a synthetic line to the next, where it stands over a stretch: each key block of 16 then
holds each of its tokens."""
_ASKED_WORDS, _ANSWERED_WORDS = 8, 2
_WORDS = (
    "apple", "arrow", "autumn", "basket", "bridge", "bronze", "butter", "candle", "carpet", "castle", "cherry", "cloud",
    "coffee", "copper", "cotton", "desert", "diamond", "dragon", "eagle", "engine", "feather", "fire", "flower",
    "forest", "garden", "glass", "gold", "hammer", "honey", "ice", "iron", "island", "jacket", "kitchen", "ladder",
    "lemon", "letter", "lion", "marble", "meadow", "mirror", "moon", "mountain", "needle", "ocean", "orange", "palace",
    "paper", "pearl", "pepper", "piano", "pocket", "rabbit", "ribbon", "river", "rocket", "salt", "shadow", "silver",
    "snow", "spider", "spring", "star", "steel", "stone", "storm", "sugar", "summer", "table", "temple", "thunder",
    "tiger", "tower", "train", "turtle", "valley", "velvet", "violin", "water", "whale", "wheel", "window", "winter",
    "wolf", "wood", "wool",
)


@dataclass(frozen=True)
class Fact:
    """A question and where its answer stands.

    Attributes:
        depth: of the part of the context that it stands in, from 0, the beginning, to 1, the end.
        start: position of its line's first token; of the first occurrence where there are several.
        question: token ids that are asked.
        answer: token ids that are right.
    """

    depth: float
    start: int
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """A context and its facts.

    Attributes:
        context: [T] int64.
        facts: questions of one length, answers of one length.
        candidates: [N] int64, token ids of which the model is to find the right one likeliest; other tokens of answers
            (commas) are given. None: of all.
    """

    context: Tensor
    facts: tuple[Fact, ...]
    candidates: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Of context, question and answer together."""
        return len(self.context) + len(self.facts[0].question) + len(self.facts[0].answer)


def synthetic_probe(language: RecallLanguage, tokens: int, *, facts: int, stretch: int, seed: int) -> Probe:
    """Facts in the language that the small recall model knows.

    Args:
        language: the model's.
        tokens: of the context with question and answer.
        facts: one in each of so many equal parts of the context, somewhere in its middle half.
        stretch: tokens over which a fact is repeated, every 16 tokens; less than 32: it stands there once.
        seed: of everything that is random.

    Raises:
        RuntimeInputError: so many facts, or so long a stretch, do not fit.
    """
    length, width = tokens - language.line_tokens, language.line_tokens
    copies = max(1, stretch // _REPEAT_EVERY)
    part, room = length // facts, (copies - 1) * _REPEAT_EVERY + width
    if facts > language.max_lines or part // 2 < room:
        raise RuntimeInputError(
            f"{facts} facts of {room} tokens do not fit into a context of {length} tokens.",
            "Ask for fewer facts, a shorter stretch or a longer context.",
        )
    generator = torch.Generator().manual_seed(seed)
    lines = language.lines(1, facts, generator)[0]
    context = language.filler(1, length, generator)[0]
    found = []
    for number, line in enumerate(lines):
        offset = int(torch.randint(part // 2 - room + 1, (1,), generator=generator))
        start = max(1, number * part + part // 4 + offset)
        for copy in range(copies):
            at = start + copy * _REPEAT_EVERY
            context[at : at + width] = line
        ids = tuple(line.tolist())
        found.append(Fact((number + 0.5) / facts, start, ids[:QUESTION_TOKENS], ids[QUESTION_TOKENS:]))
    return Probe(context, tuple(found))


def text_probe(tokenizer: Any, text: Text, tokens: int, *, facts: int, seed: int) -> Probe:
    """Facts in a real text: random words in a row. The first eight are asked, the next two are the answer, to be
    found likelier than all words of other answers.

    Questions that must be understood ("the code of the harbour is") fail in small models under dense attention too, as
    soon as several facts are alike; and at some thousand tokens they begin a new line rather than go on with the words.
    Which word would come, they still know.

    Args:
        tokenizer: of transformers.
        text: the filler; a random stretch of it is used.
        tokens: of the context with question and answer.
        facts: one near the middle of each of so many equal parts of the context, where a line of the text ends.
        seed: of everything that is random.

    Raises:
        RuntimeInputError: the text is too short, the facts do not fit, or the tokenizer knows too few words.
    """
    chance = random.Random(seed)
    words = [word for word in _WORDS if len(_ids(tokenizer, f" {word}")) == 1]
    each = _ASKED_WORDS + _ANSWERED_WORDS
    if len(words) < each * facts:
        raise RuntimeInputError(
            f"{facts} facts need {each * facts} words, and the tokenizer has {len(words)} of one token.",
            "Ask for fewer facts.",
        )
    chance.shuffle(words)
    stop = _ids(tokenizer, ".\n")
    lines = []
    for number in range(facts):
        mine = words[each * number : each * (number + 1)]
        asked, answered = ", ".join(mine[:_ASKED_WORDS]), ", ".join(mine[_ASKED_WORDS:])
        lines.append((_ids(tokenizer, f"\nThe words are {asked},"), _ids(tokenizer, f" {answered}")))
    question, answer = map(len, lines[0])
    length = tokens - question - answer - facts * (question + answer + len(stop))
    part = length // facts
    if part < 2 * question:
        raise RuntimeInputError(f"{facts} facts do not fit into {tokens} tokens.", "Ask for fewer facts.")
    filler = _stretch(tokenizer, text, length, chance)
    ends = [index + 1 for index, ids in enumerate(filler) if "\n" in tokenizer.decode([ids])]
    context: list[int] = []
    found, used = [], 0
    for number, (beginning, ending) in enumerate(lines):
        middle = int((number + 0.5) * part)
        near = [end for end in ends if abs(end - middle) <= part // 4]
        cut = min(near, key=lambda end: abs(end - middle), default=middle)
        context += filler[used:cut]
        found.append(Fact((number + 0.5) / facts, len(context), tuple(beginning), tuple(ending)))
        context += [*beginning, *ending, *stop]
        used = cut
    context += filler[used:]
    answers = [word for number in range(facts) for word in words[each * number + _ASKED_WORDS : each * (number + 1)]]
    candidates = sorted(_ids(tokenizer, f" {word}")[0] for word in answers)
    return Probe(torch.tensor(context), tuple(found), torch.tensor(candidates))


def _stretch(tokenizer: Any, text: Text, count: int, chance: random.Random) -> list[int]:
    """Tokens of a random stretch of a text, from the beginning of a line on."""
    content = text.content
    spare = max(0, len(content) - 8 * count)  # characters: what is left is longer than asked for, in most languages
    begin = content.find("\n", chance.randrange(spare + 1)) + 1
    return encode(tokenizer, content[begin:], count, text.name)


def _ids(tokenizer: Any, content: str) -> list[int]:
    ids: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    return ids
