"""Decode steps over a known text, many at once, with the very kernels and schedule of step-by-step decoding.

Decoding a known text is slow only because each step waits for the one before it. Layer by layer it need not: once a
layer has the keys and values of all tokens of a stretch in its pages, the decode steps of that stretch differ in
nothing but their lengths. So they become one single-token call whose batch are the steps: all rows read the same pages,
each up to its own length, and each writes its own row again, with the bits that stand there already. Steps that search
from the top go first; the steps after them take the nodes that those kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hip_trt import operator
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.baselines import write_rows
from hip_trt.huggingface import HipCache
from hip_trt.huggingface.cache import HipLayer

ROWS = 1024
"""Steps in one call of the operator: bounds its workspace."""


class TeacherForcedCache(HipCache):
    """For one sequence in a patched model: what comes after the prompt is decoded, however many tokens a call brings.

    The result is that of one call per token: the first decode step and every refresh_interval-th after it search from
    the top. Calls after the prompt must bring a multiple of refresh_interval tokens, except for the last one.

    Args:
        model_config: the model's.
        config: pruning, with the refresh interval.
        prompt: tokens that are prefilled; calls must not cross its end.
        max_tokens: as for :class:`HipCache`.
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: HipConfig, *, prompt: int, max_tokens: int = 0
    ) -> None:
        super().__init__(model_config, config, max_tokens=max_tokens)
        self.layers = [
            _TeacherForcedLayer(config, layer, prompt=prompt, max_tokens=max_tokens)
            for layer in range(model_config.num_hidden_layers)
        ]


class _TeacherForcedLayer(HipLayer):
    def __init__(self, config: HipConfig, layer: int, *, prompt: int, max_tokens: int) -> None:
        super().__init__(config, layer, max_tokens=max_tokens)
        self._prompt = prompt

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        first, tokens = self._columns, query.shape[2]
        if first + tokens <= self._prompt:
            return super().attend(query, key, value, valid, scale)
        if first < self._prompt or query.shape[0] != 1 or valid is not None:
            raise RuntimeInputError(
                f"input_ids: teacher-forced decoding takes one sequence, and no call across the prompt's end at "
                f"{self._prompt}.", "Split the call there.",
            )
        if (first - self._prompt) % self.config.refresh_interval:
            raise RuntimeInputError(
                f"input_ids: a call begins {first - self._prompt} tokens after the prompt, within an interval of "
                f"{self.config.refresh_interval}.", "Bring a multiple of refresh_interval tokens a call.",
            )
        if not self.is_initialized:
            self._allocate(key, self.config.num_masks(query.shape[1], key.shape[1]))
        self._reserve(first + tokens, key)
        write_rows(self, key, value, first)  # where the steps' own calls will write them again
        self._columns += tokens
        self.lengths = self.lengths + tokens
        return self._decode(query, key, value, first, scale)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, first: int, scale: float) -> Tensor:
        """All steps of a stretch: [1, Hq, S, D].

        A step whose search begins below reuse_level, or that attends to everything, keeps no nodes; the next one then
        searches from the top, as in step-by-step decoding.
        """
        steps = query.shape[2]
        by_step = [tensor[0].transpose(0, 1)[:, :, None] for tensor in (query, key, value)]  # [S, H, 1, D]
        output = torch.empty_like(by_step[0])
        nodes = self.nodes.new_full((steps, *self.nodes.shape[1:]), -1)

        def run(rows: Tensor, *, refresh: bool) -> None:
            for part in torch.split(rows, ROWS) if len(rows) else ():
                kept = nodes[part].contiguous()
                output[part] = torch.ops.hip_trt.attention_(
                    *(tensor[part].contiguous() for tensor in by_step), self.keys, self.values,
                    self.page_table.expand(len(part), -1).contiguous(), (first + part).int(),
                    torch.ones_like(part, dtype=torch.int32), kept,
                    torch.full((1,), int(refresh), dtype=torch.int32, device=query.device),
                    **operator.attributes(self.config, scale=scale, layer=self._layer),
                )
                nodes[part] = kept

        every = torch.arange(steps, device=query.device)
        if self._layer in self.config.dense_layers:
            run(every, refresh=True)
            return output[:, :, 0].transpose(0, 1)[None]
        interval = self.config.refresh_interval
        source = torch.full((-(-steps // interval),), steps, device=query.device)  # step of each interval that searches
        searching = every[::interval]
        while len(searching):
            run(searching, refresh=True)
            found = nodes[searching].flatten(1).amax(1) >= 0
            source[searching[found] // interval] = searching[found]
            later = searching[~found] + 1
            searching = later[(later < steps) & (later % interval != 0)]
        source = source[every // interval]
        reusing = every[every > source]
        nodes[reusing] = nodes[source[reusing]]
        run(reusing, refresh=False)
        self.nodes = nodes[-1:].contiguous()
        return output[:, :, 0].transpose(0, 1)[None]


def stretches(tokens: int, prompt: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Calls that feed a text to a model: [start, end), none across the prompt's end, none of one token if it can be.

    Args:
        tokens: of the text.
        prompt: of them, prefilled.
        chunk: tokens in a call; a multiple of the refresh interval and of block_q.
    """
    for begin, end in ((0, prompt), (prompt, tokens)):
        while begin < end:
            stop = begin + chunk
            if stop >= end - 1:  # one token by itself would be a decode step
                stop = end
            yield begin, stop
            begin = stop
