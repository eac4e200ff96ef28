"""A decode call of the operator's next version, token by token, in Python's numbers: slow and independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from decode_cases import Case
from torch import Tensor

Row = list[float]


@dataclass(frozen=True)
class BlockByHand:
    """A full block's state: bounds by dimension, and a code for each token and dimension."""

    low: Row
    high: Row
    codes: list[list[int]]

    @classmethod
    def of(cls, keys: list[Row]) -> BlockByHand:
        low, high = [], []
        for column in zip(*keys, strict=True):
            broken = any(math.isnan(number) for number in column)
            low.append(math.nan if broken else min(column))
            high.append(math.nan if broken else max(column))
        return cls(low, high, [[code(*of) for of in zip(key, low, high, strict=True)] for key in keys])

    def key(self, token: int) -> Row:
        """What the codes of a token stand for."""
        return [a + c * (b - a) / 3 for a, b, c in zip(self.low, self.high, self.codes[token], strict=True)]

    def words(self, token: int) -> list[int]:
        """A token's codes, sixteen to a signed word of 32 bits."""
        words = []
        for first in range(0, len(self.low), 16):
            bits = "".join(f"{number:02b}" for number in reversed(self.codes[token][first : first + 16]))
            words.append(int(bits, 2) - (1 << 32 if bits[0] == "1" else 0))
        return words

    def bound(self, query: Row) -> float:
        return sum(larger(q * a, q * b) for q, a, b in zip(query, self.low, self.high, strict=True))


def larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def code(key: float, low: float, high: float) -> int:
    a, r = np.float32(key) - np.float32(low), np.float32(high) - np.float32(low)
    six, three, five = np.float32(6), np.float32(3), np.float32(5)
    return 0 if r == 0 else int(six * a >= r) + int(six * a >= three * r) + int(six * a >= five * r)


def dot(query: Row, key: Row) -> float:
    return sum(q * k for q, k in zip(query, key, strict=True))


def log_sum(numbers: list[float]) -> float:
    if any(math.isnan(number) for number in numbers):
        return math.nan
    return math.log(math.fsum(math.exp(number) for number in numbers)) if numbers else -math.inf


def first_of_all(score: float) -> float:
    return math.inf if math.isnan(score) else score


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda block: (-scores[block], block))[:count])


class CallByHand:
    """One sequence and mask head of a call.

    Attributes:
        first, last: candidates.
        scores: of the second stage, by block of the first, where a search took place.
        blocks: attended between sink and window.
        present: what present_blocks holds.
    """

    def __init__(self, case: Case, inputs: dict[str, Tensor], b: int, mask: int) -> None:
        self.case, self.config = case, case.config
        per_mask, self.past = case.heads[0] // case.num_masks, case.past_lengths[b]
        self.heads = range(mask * per_mask, (mask + 1) * per_mask)
        kv = self.heads[0] // (case.heads[0] // case.heads[1])
        count = case.query_lengths[b]
        self.queries = [[inputs["query"][b, head, row].tolist() for row in range(count)] for head in self.heads]
        self.keys, self.values = (
            [inputs[f"past_{name}"][int(inputs["page_table"][b, t // case.page_size]), kv, t % case.page_size].tolist()
             for t in range(self.past)] + [inputs[name][b, kv, row].tolist() for row in range(count)]
            for name in ("key", "value")
        )
        block = self.config.block
        self.last = 0
        while (self.last + 1) * block <= self.past - self.config.window_tokens + 1:
            self.last += 1
        self.first = 0
        while self.first * block < self.config.sink_tokens and self.first < self.last:
            self.first += 1
        self.pruned = not self.config.dense and self.last - self.first > self.config.mask_k // block
        self.scores: dict[int, float] = {}
        past_blocks = inputs["past_blocks"][b, mask].tolist()
        if not self.pruned:
            self.blocks, self.present = list(range(self.first, self.last)), [-1] * len(past_blocks)
        elif int(inputs["refresh_mask"][b]) or past_blocks[0] < 0:
            self.blocks = self.present = self.search()
        else:
            reused = {block for block in past_blocks if self.first <= block < self.last}
            self.blocks, self.present = sorted(reused | {self.last - 2, self.last - 1}), past_blocks

    def state(self, block: int) -> BlockByHand:
        size = self.config.block
        return BlockByHand.of(self.keys[block * size : (block + 1) * size])

    def search(self) -> list[int]:
        queries = [of_head[0] for of_head in self.queries]
        states = {block: self.state(block) for block in range(self.first, self.last)}
        bounds = {
            block: max(first_of_all(state.bound(query)) for query in queries) for block, state in states.items()
        }
        left = best(bounds, self.config.search_k // self.config.block)
        self.scores = dict.fromkeys(left, -math.inf)
        for query in queries:
            sums = {
                block: first_of_all(log_sum([
                    self.case.scale * dot(query, states[block].key(t)) for t in range(self.config.block)
                ])) for block in left
            }
            everything = log_sum([number for number in sums.values() if number < math.inf])
            for block, number in sums.items():
                share = math.inf if number == math.inf else number - everything
                self.scores[block] = max(self.scores[block], share)
        return best(self.scores, self.config.mask_k // self.config.block)

    def weights(self, head: int, row: int, tokens: list[int]) -> dict[int, float]:
        """The softmax of one row over those of the tokens that it sees."""
        logits = {
            t: self.case.scale * dot(self.queries[head][row], self.keys[t]) for t in tokens if t <= self.past + row
        }
        total = log_sum(list(logits.values()))
        return {t: math.exp(logit - total) for t, logit in logits.items()}

    def output(self, blocks: list[int]) -> list[list[Row]]:
        """[G][S][D], were these blocks attended to."""
        size, rows = self.config.block, range(len(self.queries[0]))
        chosen = [block * size + t for block in blocks for t in range(size)]
        tokens = [*range(self.first * size), *chosen, *range(self.last * size, len(self.keys))]
        everything = [[self.weights(head, row, tokens) for row in rows] for head in range(len(self.heads))]
        if self.pruned:
            threshold = self.config.value_threshold
            small = {t for t in chosen if all(row[t] < threshold for head in everything for row in head)}
            tokens = [t for t in tokens if t not in small]
        result = []
        for head in range(len(self.heads)):
            result.append([
                [sum(weight * self.values[t][d] for t, weight in weights.items()) for d in range(self.case.head_dim)]
                for weights in (self.weights(head, row, tokens) for row in rows)
            ])
        return result
