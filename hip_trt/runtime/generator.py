"""Text generation over an executor: prompts in, tokens and text out."""

from __future__ import annotations

import time
from collections.abc import Generator as PyGenerator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import GenerationConfig

from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.evaluate.likelihood import LogLikelihood
from hip_trt.offload import Offload, OffloadStats
from hip_trt.runtime.executor import Executor
from hip_trt.runtime.sampling import Sampler, sampling_config
from hip_trt.runtime.session import Session
from hip_trt.runtime.text import TextStreamer
from hip_trt.spec import ModelSpec

DEFAULT_MAX_NEW_TOKENS = 256

Prompt = str | Sequence[int]
TextPieces = PyGenerator[str, None, None]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One token for each sequence that has not finished.

    Attributes:
        tokens: [B] token ids; None where the sequence had finished before.
        texts: [B] text that the tokens complete; empty without a tokenizer, or while a character is incomplete.
        finished: [B] why the sequence ends with this token; None where it goes on, or had finished before.
        refreshed: whether the decode step that gave the tokens searched its masks from the top; True for the first
            tokens, which prefill gives.
    """

    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    finished: tuple[FinishReason | None, ...]
    refreshed: bool


@dataclass
class Stats:
    """Counts and times of one generation; times are seconds.

    Attributes:
        sequences: prompts.
        prompt_tokens: tokens prefilled, all sequences together.
        reused_tokens: prompt tokens that the session had in its cache already.
        generated_tokens: tokens generated, all sequences together, stop tokens included.
        decode_steps: decode calls.
        refreshed_steps: decode calls that searched masks from the top.
        time_to_first_token: from the start to the first tokens.
        decode_seconds: from the first tokens to the last.
    """

    sequences: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    refreshed_steps: int = 0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """All sequences together."""
        return self.prompt_tokens / self.time_to_first_token if self.time_to_first_token else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """All sequences together; the first token of each, which prefill gives, is not counted."""
        return (self.generated_tokens - self.sequences) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
        prompt: its token ids.
        tokens: generated ids, the stop token included.
        text: their text, without special tokens; empty without a tokenizer.
        finish_reason: "stop" at a stop token, "length" at the limit.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason


class Stream(Iterator[Step]):
    """Iterator over the steps of a generation; :attr:`stats` is up to date after each.

    Nothing is computed before the first step is asked for; abandoning the iterator stops the generation. A session that
    was made for it alone gives its memory back at the last step, at an error, or when the iterator goes.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        streamers: Sequence[TextStreamer] | None,
        *,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        owns_session: bool,
    ) -> None:
        self._owns_session = owns_session
        self._offload_stats: OffloadStats | None = None
        self.stats = Stats(sequences=len(prompts))
        self.prompts = tuple(tuple(prompt) for prompt in prompts)
        self._session = session
        self._sampler = sampler
        self._streamers = streamers
        self._max_new_tokens = max_new_tokens
        self._stop_tokens = stop_tokens
        self._steps = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    @property
    def offload_stats(self) -> OffloadStats | None:
        """What the caches of the KV cache in host memory did, so far or to the end; None without offload."""
        offloaded = self._session.state.offloaded
        return self._offload_stats if offloaded is None or offloaded.closed else offloaded.stats()

    def close(self) -> None:
        """Stop here, and give back now what would else go with the iterator; nothing happens after the last step."""
        self._steps.close()
        if self._owns_session:
            self._session.close()  # where no step was asked for, too

    def _run(self) -> PyGenerator[Step, None, None]:
        try:
            yield from self._generate()
            if self._owns_session:
                self._offload_stats = self.offload_stats
        finally:
            if self._owns_session:
                self._session.close()

    def _generate(self) -> Iterator[Step]:
        stats, session = self.stats, self._session
        start = time.perf_counter()
        history = [list(prompt) for prompt in self.prompts]
        new = []
        for row, prompt in enumerate(history):
            common = _common_prefix(session.tokens[row], prompt)
            common = min(common, len(prompt) - 1)  # the last token must be computed, for its logits
            session.truncate(row, common)
            stats.reused_tokens += common
            new.append(prompt[common:])
        stats.prompt_tokens = sum(len(tokens) for tokens in new)
        logits = session.append(new)
        generated = 0
        refreshed = True
        tokens: list[int | None]
        running = [True] * len(history)
        while True:
            drawn = self._sampler(history, logits)
            tokens = [token if active else None for token, active in zip(drawn, running, strict=True)]
            generated += 1
            finished: list[FinishReason | None] = []
            for row, token in enumerate(tokens):
                reason: FinishReason | None = None
                if token is not None:
                    history[row].append(token)
                    if token in self._stop_tokens:
                        reason = "stop"
                    elif generated == self._max_new_tokens:
                        reason = "length"
                finished.append(reason)
                running[row] = running[row] and reason is None
            texts = self._texts(tokens, finished)
            now = time.perf_counter()
            stats.generated_tokens += sum(token is not None for token in tokens)
            if generated == 1:
                stats.time_to_first_token = now - start
                first = now
            else:
                stats.decode_seconds = now - first
            yield Step(tuple(tokens), texts, tuple(finished), refreshed)
            if not any(running):
                return
            logits = session.step([token if active else None for token, active in zip(tokens, running, strict=True)])
            refreshed = session.refreshed
            stats.decode_steps += 1
            stats.refreshed_steps += refreshed

    def _texts(self, tokens: Sequence[int | None], finished: Sequence[FinishReason | None]) -> tuple[str, ...]:
        if self._streamers is None:
            return ("",) * len(tokens)
        texts = []
        for streamer, token, reason in zip(self._streamers, tokens, finished, strict=True):
            text = "" if token is None else streamer.push(token)
            texts.append(text + streamer.finish() if reason else text)
        return tuple(texts)


class Generator:
    """Generates text with an exported model.

    Args:
        executor: runs the model.
        tokenizer: a transformers tokenizer; without one, prompts are token ids.
        generation_config: the model's own; its stop tokens and sampling options are the defaults.
        max_seq_len: most tokens per sequence, prompt and generated together; by default what the engine allows, or
            the context that the model was trained for.
        prefill_chunk: see :class:`Session`.
        refresh_interval: decode steps from one mask search from the top to the next; by default the model's.
        offload: keep KV caches in host memory, served by so much of the GPU's; None: on the GPU. Results are the same
            bits.

    Raises:
        RuntimeInputError: if a size is beyond the executor's limits.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        max_seq_len: int | None = None,
        prefill_chunk: int | None = None,
        refresh_interval: int | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.executor = executor
        self.offload = offload
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self._max_seq_len = max_seq_len
        self._prefill_chunk = prefill_chunk
        self._refresh_interval = refresh_interval

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self.executor.spec

    @property
    def max_seq_len(self) -> int:
        """Most tokens per sequence, prompt and generated together."""
        if self._max_seq_len is not None:
            return self._max_seq_len
        limit, context = self.executor.limits.max_seq_len, self.spec.max_position_embeddings
        return context if limit is None else min(limit, context)

    def session(self, *, batch: int = 1, max_seq_len: int | None = None, pages: int | None = None) -> Session:
        """Sequences whose cache outlives a call of :meth:`stream`, for conversations and shared prefixes."""
        return Session(
            self.executor, batch=batch, max_seq_len=max_seq_len or self.max_seq_len, pages=pages,
            prefill_chunk=self._prefill_chunk, refresh_interval=self._refresh_interval, offload=self.offload,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass through.

        Raises:
            EnvironmentProblem: for text, without a tokenizer.
            RuntimeInputError: if there are no tokens.
        """
        if isinstance(prompt, str):
            tokens = [int(token) for token in self._need_tokenizer()(prompt)["input_ids"]]
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise RuntimeInputError("The prompt is empty.", "Give at least one token.")
        return tokens

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's reply begins, by the tokenizer's chat template.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].

        Raises:
            RuntimeInputError: if the tokenizer has no chat template, or the template refuses the messages.
        """
        tokenizer = self._need_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise RuntimeInputError("The tokenizer has no chat template.", "Send plain text (--raw).")
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RuntimeInputError(f"The chat template refuses the messages: {error}.") from None
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Stream:
        """Generate token by token.

        Args:
            prompts: one prompt, or one per sequence: text or token ids. Text is taken as it is; compare
                :meth:`encode_chat`.
            max_new_tokens: by default the generation config's, else 256, or fewer where the room is less.
            seed: of sampling.
            session: continues its sequences: what a prompt has in common with the tokens of its sequence is not
                computed again. By default a new one, just large enough.
            sampling: fields of transformers' GenerationConfig, in place of the model's: temperature, top_k, ...
                eos_token_id, an id or a list, stops a sequence; without one in either place, the tokenizer's does.

        Raises:
            RuntimeInputError: before anything is computed, if prompt and new tokens are more than the KV cache holds,
                or for an option that cannot be.
        """
        ids = [self.encode(prompt) for prompt in _as_batch(prompts)]
        capacity = self.max_seq_len if session is None else session.state.max_seq_len
        config = sampling_config(self.generation_config, **sampling)
        if max_new_tokens is None:
            room = capacity - max(len(prompt) for prompt in ids)
            max_new_tokens = max(1, min(config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room))
        elif max_new_tokens < 1:
            raise RuntimeInputError(f"max_new_tokens: {max_new_tokens} is not allowed.", "It must be at least 1.")
        _check_room(ids, max_new_tokens, capacity)
        owns_session = session is None
        if session is None:
            session = self._session_for([len(prompt) + max_new_tokens for prompt in ids])
        elif session.batch != len(ids):
            raise RuntimeInputError(f"prompts: {len(ids)} for a session of {session.batch} sequences.", "Give as many.")
        session.reserve([len(prompt) + max_new_tokens for prompt in ids])
        stop_tokens = self._stop_tokens(config)
        sampler = Sampler(
            config, prompt_lengths=[len(prompt) for prompt in ids], stop_tokens=stop_tokens, seed=seed,
            device=self.executor.device,
        )
        streamers = [TextStreamer(self.tokenizer, prompt[-4:]) for prompt in ids] if self.tokenizer else None
        return Stream(
            session, ids, sampler, streamers, max_new_tokens=max_new_tokens, stop_tokens=frozenset(stop_tokens),
            owns_session=owns_session,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Generate to the end; arguments and errors as in :meth:`stream`.

        Returns:
            One generation per prompt.
        """
        stream = self.stream(prompts, max_new_tokens=max_new_tokens, seed=seed, session=session, **sampling)
        tokens: list[list[int]] = [[] for _ in stream.prompts]
        texts = [""] * len(stream.prompts)
        reasons: list[FinishReason] = ["length"] * len(stream.prompts)
        for step in stream:
            for row, token in enumerate(step.tokens):
                if token is not None:
                    tokens[row].append(token)
                    texts[row] += step.texts[row]
                    reasons[row] = step.finished[row] or reasons[row]
        return [
            Generation(prompt, tuple(ids), text, reason)
            for prompt, ids, text, reason in zip(stream.prompts, tokens, texts, reasons, strict=True)
        ]

    def perplexity(self, text: Prompt, *, skip: int = 0) -> float:
        """Perplexity of a text: exp of the mean negative log likelihood of each token after the first.

        The whole text is one sequence, prefilled with the model's masks.

        Args:
            text: text or token ids, two tokens at least.
            skip: leave out the first predictions, as where only those with a long context count.

        Raises:
            RuntimeInputError: if the model was exported with the logits of the last token only, or the text is too
                long or too short.
        """
        tokens = self.encode(text)
        if self.spec.logits != "all":
            raise RuntimeInputError(
                "Perplexity needs the logits of every token; this model gives the last one's.",
                "Export it with --logits all.",
            )
        likelihood = LogLikelihood(tokens, skip=skip)
        _check_room([tokens], 0, self.max_seq_len)
        with self._session_for([len(tokens)]) as session:
            for chunk in session.prefill([tokens]):
                likelihood.add(chunk.logits[0, : chunk.counts[0]], chunk.starts[0])
        return likelihood.perplexity

    def chat(self, system: str | None = None, *, max_seq_len: int | None = None) -> Chat:
        """A conversation with its own session; see :class:`Chat`."""
        return Chat(self, system, max_seq_len=max_seq_len)

    def _session_for(self, wanted: Sequence[int]) -> Session:
        page_size = self.spec.hip.page_size
        session = self.session(
            batch=len(wanted), max_seq_len=max(wanted), pages=sum(-(-tokens // page_size) for tokens in wanted)
        )
        session.reserve(wanted)
        return session

    def _stop_tokens(self, config: GenerationConfig) -> tuple[int, ...]:
        stop = config.eos_token_id
        if stop is None:
            stop = getattr(self.tokenizer, "eos_token_id", None)
        if stop is None:
            return ()
        return tuple(stop) if isinstance(stop, list | tuple) else (int(stop),)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise EnvironmentProblem(
                "There is no tokenizer beside the model.", "Export again, or name a tokenizer's folder (--tokenizer)."
            )
        return self.tokenizer


class Chat:
    """A conversation: keeps the messages, and the cache of all that was said.

    Args:
        generator: generates.
        system: system message, or None.
        max_seq_len: most tokens of the conversation; by default the generator's.

    Attributes:
        messages: the conversation so far.
        stats: of the last reply.
    """

    def __init__(self, generator: Generator, system: str | None = None, *, max_seq_len: int | None = None) -> None:
        self.generator = generator
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
        self._session = generator.session(max_seq_len=max_seq_len)
        self.stats = Stats()

    @property
    def offload_stats(self) -> OffloadStats | None:
        """What the caches of the KV cache in host memory did in the whole conversation; None without offload."""
        return self._session.state.offloaded.stats() if self._session.state.offloaded else None

    def close(self) -> None:
        """Give host memory back now; it goes with the object else."""
        self._session.close()

    def send(self, text: str, **options: Any) -> TextPieces:
        """Say something, and stream the reply.

        The user's message and the reply, as far as it was read, become part of the conversation even if the iterator
        is abandoned; they do not if the prompt is refused.

        Args:
            text: the user's message.
            options: of :meth:`Generator.stream`.

        Raises:
            RuntimeInputError: if the conversation has outgrown the KV cache.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self.generator.stream([self.generator.encode_chat(messages)], session=self._session, **options)
        return self._reply(messages, stream)

    def _reply(self, messages: list[dict[str, str]], stream: Stream) -> TextPieces:
        self.messages = messages
        self.stats = stream.stats
        reply = ""
        try:
            for step in stream:
                reply += step.texts[0]
                yield step.texts[0]
        finally:
            self.messages.append({"role": "assistant", "content": reply})


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    if not prompts:
        raise RuntimeInputError("There is no prompt.", "Give at least one.")
    return list(prompts)  # type: ignore[arg-type]


def _check_room(prompts: Sequence[Sequence[int]], new_tokens: int, capacity: int) -> None:
    row = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = len(prompts[row])
    if longest + new_tokens > capacity:
        raise RuntimeInputError(
            f"prompt {row}: {longest} tokens and {new_tokens} to generate are {longest + new_tokens}, but the KV cache "
            f"holds {capacity} per sequence.",
            "Raise max_seq_len (--max-seq-len), shorten the prompt, or lower max_new_tokens (--max-new-tokens).",
        )


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
