"""From logits to tokens, with transformers' logits processors, in the order in which its generate() applies them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from hip_trt.errors import RuntimeInputError

_UNSUPPORTED = {
    "num_beams": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    "stop_strings": None,
}
"""Fields of GenerationConfig that change what is generated and are not implemented, with their neutral values."""


class Sampler:
    """Chooses the next token of each sequence.

    Greedy, unless the config's do_sample is set. Fields that are absent take transformers' defaults for generate().

    Args:
        config: temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty,
            no_repeat_ngram_size, min_new_tokens, bad_words_ids, sequence_bias, suppress_tokens, renormalize_logits.
        prompt_lengths: tokens of each sequence before the first sampled one.
        stop_tokens: ids that min_new_tokens holds back.
        seed: of the random draws; None draws differently every time.
        device: where logits are.

    Raises:
        RuntimeInputError: for a field with a value that transformers refuses, or that is not implemented.
    """

    def __init__(
        self,
        config: GenerationConfig,
        *,
        prompt_lengths: Sequence[int],
        stop_tokens: Sequence[int],
        seed: int | None,
        device: torch.device,
    ) -> None:
        for field, neutral in _UNSUPPORTED.items():
            value = getattr(config, field, None)
            if value is not None and value != neutral:
                raise RuntimeInputError(f"{field}: {value!r} is not supported.", f"Leave it out, or at {neutral!r}.")
        self._sample = bool(config.do_sample)
        self._random = torch.Generator(device)
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)
        self._device = device
        try:
            self._by_history = [_history_processors(config, length, stop_tokens, device) for length in prompt_lengths]
            self._warpers = _warpers(config, device)
        except (ValueError, TypeError) as error:
            raise RuntimeInputError(f"Sampling: {' '.join(str(error).split())}.", "Change that option.") from None

    def __call__(self, history: Sequence[Sequence[int]], logits: Tensor) -> list[int]:
        """Draw one token per sequence.

        Args:
            history: [B] token ids of each sequence, prompt included.
            logits: [B, vocab_size] float32; rows of idle sequences are drawn from too, and mean nothing.

        Returns:
            [B] token ids.
        """
        scores = logits
        if any(self._by_history):
            rows = [
                chain(torch.tensor([list(ids)], device=self._device), logits[row : row + 1].clone())
                for row, (chain, ids) in enumerate(zip(self._by_history, history, strict=True))
            ]
            scores = torch.cat(rows)
        if not self._sample:
            return [int(token) for token in scores.argmax(dim=-1).tolist()]
        no_ids = torch.empty(len(history), 0, dtype=torch.int64, device=self._device)  # warpers look at scores only
        probabilities = self._warpers(no_ids, scores).nan_to_num(nan=0.0).softmax(dim=-1)
        return [int(token) for token in torch.multinomial(probabilities, 1, generator=self._random)[:, 0].tolist()]


def sampling_config(base: GenerationConfig | None, **fields: Any) -> GenerationConfig:
    """A model's generation config with a request's fields in place of its own.

    Args:
        base: the config saved beside the model, or None.
        fields: fields of transformers' GenerationConfig; None leaves the model's. Temperature 0 means greedy; another
            temperature, or a top_k, top_p or min_p, means sampling unless do_sample says otherwise.

    Raises:
        RuntimeInputError: for a name that is no field.
    """
    config = copy.deepcopy(base) if base is not None else GenerationConfig()
    fields = {name: value for name, value in fields.items() if value is not None}
    known = config.to_dict()
    for name in fields:
        if name not in known:
            raise RuntimeInputError(f"{name}: no such sampling option.", "Options are those of GenerationConfig.")
    if fields.get("temperature") == 0:
        del fields["temperature"]
        fields.setdefault("do_sample", False)
    elif any(name in fields for name in ("temperature", "top_k", "top_p", "min_p")):
        fields.setdefault("do_sample", True)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _history_processors(
    config: GenerationConfig, prompt_length: int, stop_tokens: Sequence[int], device: torch.device
) -> processors.LogitsProcessorList:
    chain = processors.LogitsProcessorList()
    if config.sequence_bias is not None:
        chain.append(processors.SequenceBiasLogitsProcessor(config.sequence_bias))
    if _given(config.repetition_penalty, neutral=1.0):
        chain.append(processors.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if _given(config.no_repeat_ngram_size, neutral=0):
        chain.append(processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        eos = torch.tensor(list(stop_tokens)) if stop_tokens else None
        chain.append(processors.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if stop_tokens and config.min_new_tokens:
        chain.append(
            processors.MinNewTokensLengthLogitsProcessor(
                prompt_length, config.min_new_tokens, list(stop_tokens), device=str(device)
            )
        )
    if config.remove_invalid_values:
        chain.append(processors.InfNanRemoveLogitsProcessor())
    if config.suppress_tokens is not None:
        chain.append(processors.SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    return chain


def _warpers(config: GenerationConfig, device: torch.device) -> processors.LogitsProcessorList:
    chain = processors.LogitsProcessorList()
    top_k = 50 if config.top_k is None else config.top_k
    if _given(config.temperature, neutral=1.0):
        chain.append(processors.TemperatureLogitsWarper(float(config.temperature)))
    if top_k != 0:
        chain.append(processors.TopKLogitsWarper(top_k))
    if _given(config.top_p, neutral=1.0):
        chain.append(processors.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        chain.append(processors.MinPLogitsWarper(config.min_p))
    if _given(config.typical_p, neutral=1.0):
        chain.append(processors.TypicalLogitsWarper(config.typical_p))
    if _given(config.epsilon_cutoff, neutral=0.0):
        chain.append(processors.EpsilonLogitsWarper(config.epsilon_cutoff))
    if _given(config.eta_cutoff, neutral=0.0):
        chain.append(processors.EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    if config.renormalize_logits:
        chain.append(processors.LogitNormalization())
    return chain


def _given(value: float | None, *, neutral: float) -> bool:
    return value is not None and value != neutral
