"""Generator, session, state and page bookkeeping, over an executor that runs the reference operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import OracleExecutor, tiny_llama
from transformers import GenerationConfig, LlamaForCausalLM

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.evaluate import perplexity
from hip_trt.runtime import Generator, KVState, Limits, Session
from hip_trt.runtime.pages import PageAllocator, check_page_table
from hip_trt.runtime.text import TextStreamer

DENSE = HipConfig.create(
    mask_k=512, decode_mask_k=512, block_q=8, block_k=4, stride_q=4, page_size=8, sink_tokens=4, window_tokens=8
)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # float32, logits of about 10
SPARSE = DENSE.replace(mask_k=16, decode_mask_k=8, branch=2, leaf_branch=2, refresh_interval=3)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def session(model: LlamaForCausalLM, hip: HipConfig = SPARSE, **options: Any) -> Session:
    """A session whose pools hold NaN wherever nothing was committed."""
    result = Session(OracleExecutor(model, hip), **{"max_seq_len": 128, **options})
    for pool in (*result.state.tensors(names.KEY), *result.state.tensors(names.VALUE)):
        pool.fill_(math.nan)
    return result


def generate(model: LlamaForCausalLM, prompts: Any, hip: HipConfig = SPARSE, **options: Any) -> list[tuple[int, ...]]:
    return [row.tokens for row in Generator(OracleExecutor(model, hip)).generate(prompts, **options)]


# Prefill and decode


@pytest.mark.parametrize("hip", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("chunk", [8, 24])
def test_chunked_prefill_equals_whole(model: LlamaForCausalLM, hip: HipConfig, chunk: int) -> None:
    tokens = prompt(73)  # the last chunk is one token, which must not be taken for a decode step
    whole, chunked = session(model, hip), session(model, hip, prefill_chunk=chunk)
    expected, actual = whole.append([tokens]), chunked.append([tokens])
    calls = chunked.executor.calls  # type: ignore[attr-defined]
    assert [int(call[names.QUERY_LENGTHS]) for call in calls] == [min(chunk, 73 - i) for i in range(0, 73, chunk)]
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(chunked.step([5]), whole.step([5]), **CLOSE)


def test_prefill_chunk_is_a_multiple_of_block_q(model: LlamaForCausalLM) -> None:
    chunked = session(model, prefill_chunk=21)
    assert [chunk.counts for chunk in chunked.prefill([prompt(40)])] == [(16,), (16,), (8,)]


def test_executor_limit_splits_prompts(model: LlamaForCausalLM) -> None:
    executor = OracleExecutor(model, SPARSE, limits=Limits(max_prefill=16))
    assert [chunk.counts for chunk in Session(executor, max_seq_len=64).prefill([prompt(40)])] == [(16,), (16,), (8,)]


@pytest.mark.parametrize("hip", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_ragged_batch_equals_each_alone(model: LlamaForCausalLM, hip: HipConfig) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 7, 64, 90)]
    together = generate(model, prompts, hip, max_new_tokens=6)
    assert together == [generate(model, [one], hip, max_new_tokens=6)[0] for one in prompts]
    assert len(set(together)) == 4


def test_finished_rows_are_idle(model: LlamaForCausalLM) -> None:
    prompts = [prompt(20, seed=1), prompt(90, seed=2)]
    free = generate(model, prompts, max_new_tokens=8)
    stop = free[0][2]
    assert stop not in (*free[0][:2], *free[1])
    executor = OracleExecutor(model, SPARSE)
    stream = Generator(executor).stream(prompts, max_new_tokens=8, eos_token_id=stop)
    steps = list(stream)
    assert [step.tokens[0] for step in steps] == [*free[0][:3], None, None, None, None, None]
    assert tuple(step.tokens[1] for step in steps) == free[1]
    assert [step.finished for step in steps] == [(None, None)] * 2 + [("stop", None)] + [(None, None)] * 4 + [
        (None, "length")
    ]
    decode = [call for call in executor.calls if call[names.INPUT_IDS].shape[1] == 1]
    assert [call[names.QUERY_LENGTHS].tolist() for call in decode] == [[1, 1]] * 2 + [[0, 1]] * 5
    assert stream.stats.generated_tokens == 3 + 8


def test_all_rows_stopped_ends_the_stream(model: LlamaForCausalLM) -> None:
    free = generate(model, [prompt(20)], max_new_tokens=8)[0]
    (result,) = Generator(OracleExecutor(model, SPARSE)).generate(
        [prompt(20)], max_new_tokens=8, eos_token_id=[60, free[3]]
    )
    assert result.tokens == free[: free.index(free[3]) + 1]
    assert result.finish_reason == "stop"


def test_refresh_schedule(model: LlamaForCausalLM) -> None:
    executor = OracleExecutor(model, SPARSE)
    stream = Generator(executor).stream([prompt(60)], max_new_tokens=8)
    steps = list(stream)
    assert [int(call[names.REFRESH_MASK]) for call in executor.calls[1:]] == [1, 0, 0, 1, 0, 0, 1]
    assert [step.refreshed for step in steps[1:]] == [True, False, False, True, False, False, True]
    assert (stream.stats.decode_steps, stream.stats.refreshed_steps) == (7, 3)


def test_refresh_interval_override_and_restart_after_prefill(model: LlamaForCausalLM) -> None:
    running = session(model, refresh_interval=4)
    running.append([prompt(60)])
    for token in (1, 2, 3):
        running.step([token])
    running.append([[4, 5]])
    running.step([6])
    calls = running.executor.calls  # type: ignore[attr-defined]
    assert [int(call[names.REFRESH_MASK]) for call in calls] == [1, 1, 0, 0, 1, 1]


def test_decode_nodes_are_kept_between_steps(model: LlamaForCausalLM) -> None:
    running = session(model)
    running.append([prompt(100)])
    assert all((nodes == -1).all() for nodes in running.state.tensors(names.NODES))
    running.step([1])
    kept = [nodes.clone() for nodes in running.state.tensors(names.NODES)]
    assert all((nodes[0, :, 0] >= 0).all() for nodes in kept)
    running.step([2])
    assert all(torch.equal(nodes, old) for nodes, old in zip(running.state.tensors(names.NODES), kept, strict=True))
    running.append([[3, 4]])
    assert all((nodes == -1).all() for nodes in running.state.tensors(names.NODES))


def test_greedy_equals_transformers(model: LlamaForCausalLM) -> None:
    tokens = prompt(50)
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False)[0, 50:].tolist()
    assert list(generate(model, [tokens], DENSE, max_new_tokens=24)[0]) == expected


def test_logits_of_every_token(model: LlamaForCausalLM) -> None:
    tokens = prompt(21)
    running = Session(OracleExecutor(model, DENSE, logits="all"), max_seq_len=64, prefill_chunk=8, batch=2)
    chunks = list(running.prefill([tokens, tokens[:5]]))
    assert [chunk.rows for chunk in chunks] == [(0, 1), (0,), (0,)]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    actual = torch.cat([chunk.logits[0, : chunk.counts[0]] for chunk in chunks])
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(chunks[0].last(), expected[[7, 4]], **CLOSE)


# Pages


@pytest.mark.parametrize("hip", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_permuted_page_table_changes_nothing(model: LlamaForCausalLM, hip: HipConfig) -> None:
    tokens = [prompt(70, seed=1), prompt(33, seed=2)]
    plain, permuted = session(model, hip, batch=2), session(model, hip, batch=2)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    permuted.state.set_page_table(order.reshape(2, 16))
    assert torch.equal(permuted.append(tokens), plain.append(tokens))
    for token in range(5):
        assert torch.equal(permuted.step([token, token]), plain.step([token, token]))


@pytest.mark.parametrize("hip", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_shared_prefix_page_changes_nothing(model: LlamaForCausalLM, hip: HipConfig) -> None:
    prefix = prompt(45, seed=1)
    tails = [prompt(20, seed=2), prompt(30, seed=3)]
    alone = [session(model, hip) for _ in tails]
    expected = torch.cat([one.append([prefix + tail]) for one, tail in zip(alone, tails, strict=True)])
    shared = session(model, hip, batch=2, pages=9 + 5 + 2)
    shared.append([prefix, []])
    assert shared.share_prefix(1, source=0, tokens=45) == 40
    assert shared.state.pages(1) == shared.state.pages(0)[:5]
    shared.truncate(0, 40)
    actual = shared.append([prefix[40:] + tail for tail in tails])
    torch.testing.assert_close(actual, expected, **CLOSE)
    expected = torch.cat([one.step([7]).clone() for one in alone])
    torch.testing.assert_close(shared.step([7, 7]), expected, **CLOSE)


@pytest.mark.parametrize(("block_q", "page_size", "shared"), [(32, 8, 32), (8, 32, 32), (8, 12, 24), (8, 8, 40)])
def test_shared_prefix_is_aligned(model: LlamaForCausalLM, block_q: int, page_size: int, shared: int) -> None:
    running = session(model, SPARSE.replace(block_q=block_q, page_size=page_size), batch=2)
    running.append([prompt(90), []])
    assert running.share_prefix(1, source=0, tokens=47) == shared


def test_truncating_into_a_shared_page_copies_it(model: LlamaForCausalLM) -> None:
    tokens = prompt(40)
    running = session(model, DENSE, batch=2)
    running.append([tokens, []])
    running.share_prefix(1, source=0, tokens=40)
    before = running.state.pages(0)
    running.truncate(1, 19)
    assert running.state.pages(0) == before
    assert running.state.pages(1)[:2] == before[:2]
    assert running.state.pages(1)[2:] != before[2:3]
    logits = running.append([[1], prompt(9, seed=5)])
    expected = torch.cat(
        [session(model, DENSE).append([ids]) for ids in ([*tokens, 1], tokens[:19] + prompt(9, seed=5))]
    )
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_truncating_forgets_nodes(model: LlamaForCausalLM) -> None:
    running = session(model, batch=2)
    running.append([prompt(100), prompt(100)])
    running.step([1, 1])
    running.truncate(0, 60)
    for nodes in running.state.tensors(names.NODES):
        assert (nodes[0] == -1).all()
        assert (nodes[1, :, 0] >= 0).all()


def test_truncated_pages_are_free_again(model: LlamaForCausalLM) -> None:
    running = session(model, batch=2, pages=16)
    running.append([prompt(128), []])
    with pytest.raises(RuntimeInputError, match="sequence 1: 8 tokens wanted, but the KV cache has room for 0"):
        running.append([[], prompt(8)])
    running.truncate(0, 64)
    running.append([[], prompt(64)])
    assert set(running.state.pages(0)) | set(running.state.pages(1)) == set(range(16))


def test_allocator_counts_holders() -> None:
    allocator = PageAllocator(4)
    first = allocator.allocate(3)
    allocator.share(first[:1])
    allocator.release(first)
    assert (allocator.available, allocator.holders(first[0])) == (3, 1)
    allocator.release(first[:1])
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        ([[0, 1], [2, 4]], [0, 0], r"sequence 1, slot 1: page 4 is out of range. .*0 to 3"),
        ([[0, -2], [1, 2]], [0, 0], r"sequence 0, slot 1: page -2 is out of range"),
        ([[0, 1], [3, 3]], [0, 0], r"sequence 1, slot 1: page 3 is already in slot 0"),
        ([[-1, 1], [2, 3]], [0, 0], r"sequence 0, slot 1: page 1 comes after slot 0"),
        ([[0, 1], [2, -1]], [16, 9], r"sequence 1, slot 1: no page \(-1\), but its 9 tokens need 2 pages of 8"),
        ([[0, 1], [1, 2]], [16, 8], None),
        ([[0, 1], [0, 2]], [8, 7], r"sequence 1, slot 0: page 0 is shared with sequence 0 but not full in both"),
        ([[0, 1], [0, 2]], [7, 8], r"sequence 1, slot 0: page 0 is shared with sequence 0 but not full in both"),
        ([[0, 1], [0, 1]], [8, 8], r"sequence 1, slot 1: page 1 is shared with sequence 0 but not full in both"),
    ],
)
def test_page_table_check(table: list[list[int]], lengths: list[int], message: str | None) -> None:
    if message is None:
        check_page_table(table, lengths, pages=4, page_size=8)
    else:
        with pytest.raises(RuntimeInputError, match=message):
            check_page_table(table, lengths, pages=4, page_size=8)


def test_bad_page_table_is_refused_and_changes_nothing(model: LlamaForCausalLM) -> None:
    running = session(model)
    before = running.state.page_table.clone()
    for table, message in (
        ([[3, 3]], "page 3 is already in slot 0"),
        ([[0, 99]], "page 99 is out of range"),
        ([[0], [1]], r"shape \[2, 1\] does not fit"),
        ([[*range(16), 0]], r"shape \[1, 17\] does not fit"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            running.state.set_page_table(table)
    with pytest.raises(RuntimeInputError, match=r"sequence 0, slot 1: no page"):
        running.state.set_page_table([[0]], lengths=[9])
    assert torch.equal(running.state.page_table, before)
    assert running.executor.calls == []  # type: ignore[attr-defined]


def test_supplied_page_table_with_too_few_pages(model: LlamaForCausalLM) -> None:
    running = session(model)
    running.state.set_page_table([[4, 2]])
    with pytest.raises(RuntimeInputError, match="sequence 0: 17 tokens wanted, but the KV cache has room for 16"):
        running.append([prompt(17)])
    running.append([prompt(16)])
    with pytest.raises(RuntimeInputError, match="sequence 0: 17 tokens wanted"):
        running.step([1])


# Capacity


def test_prompt_longer_than_the_pages_allow(model: LlamaForCausalLM) -> None:
    executor = OracleExecutor(model, SPARSE)
    generator = Generator(executor, max_seq_len=64)
    with pytest.raises(RuntimeInputError, match=r"prompt 1: 65 tokens and 1 to generate are 66, .* 64 .*--max-seq-len"):
        generator.generate([prompt(5), prompt(65)])
    with pytest.raises(RuntimeInputError, match=r"60 tokens and 8 to generate are 68"):
        generator.generate([prompt(60)], max_new_tokens=8)
    assert executor.calls == []
    assert len(generator.generate([prompt(60)])[0].tokens) == 4  # by default, as many as fit


def test_session_capacity_error_computes_nothing(model: LlamaForCausalLM) -> None:
    running = session(model, batch=2, pages=18)
    with pytest.raises(RuntimeInputError, match=r"sequence 0: 129 tokens wanted, but .* room for 128. Raise max_seq_l"):
        running.append([prompt(129), prompt(3)])
    with pytest.raises(RuntimeInputError, match=r"sequence 1: 64 tokens wanted, but .* room for 16. Raise the number"):
        running.append([prompt(128), prompt(64)])
    assert running.executor.calls == []  # type: ignore[attr-defined]
    assert running.state.pages(0) == ()


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        (Limits(max_batch=2), {"batch": 3}, "batch: 3 is more than the engine allows"),
        (Limits(max_seq_len=64), {"max_seq_len": 65}, "max_seq_len: 65 is more"),
        (Limits(max_prefill=16), {"prefill_chunk": 24}, "prefill_chunk: 24 is more"),
        (Limits(max_pages=8), {"max_seq_len": 65}, "pages: 9 are more than the engine allows"),
        (Limits(), {"batch": 0}, "batch: 0 is not allowed"),
        (Limits(), {"max_seq_len": 0}, "max_seq_len: 0 is not allowed"),
        (Limits(), {"refresh_interval": 0}, "refresh_interval: 0 is not allowed"),
        (Limits(), {"max_seq_len": 1 << 44}, "takes .* GiB"),
    ],
)
def test_limits(model: LlamaForCausalLM, limits: Limits, options: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        Session(OracleExecutor(model, SPARSE, limits=limits), **{"max_seq_len": 32, **options})


def test_engine_limit_is_the_default_capacity(model: LlamaForCausalLM) -> None:
    assert Generator(OracleExecutor(model, SPARSE, limits=Limits(max_seq_len=96))).max_seq_len == 96
    assert Generator(OracleExecutor(model, SPARSE)).max_seq_len == 512


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt is empty"),
        ([], {}, "no prompt"),
        ([[1, 61]], {}, r"sequence 0, token 1: id 61 is not in the model's vocabulary of 61"),
        ([[-1]], {}, "id -1 is not in"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: 0 is not allowed"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_p": 2.0}, "top_p"),
        ([[1]], {"num_beams": 4}, "num_beams: 4 is not supported"),
        ([[1]], {"heat": 4}, "heat: no such sampling option"),
    ],
)
def test_bad_requests(model: LlamaForCausalLM, prompts: Any, options: dict[str, Any], message: str) -> None:
    executor = OracleExecutor(model, SPARSE)
    with pytest.raises(RuntimeInputError, match=message):
        Generator(executor).generate(prompts, **options)
    assert executor.calls == []


def test_text_without_a_tokenizer(model: LlamaForCausalLM) -> None:
    with pytest.raises(EnvironmentProblem, match="no tokenizer"):
        Generator(OracleExecutor(model, SPARSE)).generate("Hello")


# Several turns


def test_continuation_equals_from_scratch(model: LlamaForCausalLM) -> None:
    first, second = prompt(30, seed=1), prompt(12, seed=2)
    executor = OracleExecutor(model, DENSE)
    generator = Generator(executor)
    talk = generator.session(max_seq_len=128)
    (reply,) = generator.generate([first], max_new_tokens=5, session=talk)
    assert talk.tokens[0] == [*first, *reply.tokens[:4]]  # the last one has not been computed yet
    conversation = [*first, *reply.tokens, *second]
    stream = generator.stream([conversation], max_new_tokens=6, session=talk)
    continued = tuple(step.tokens[0] for step in stream)
    assert (stream.stats.reused_tokens, stream.stats.prompt_tokens) == (34, 13)
    assert continued == generate(model, [conversation], DENSE, max_new_tokens=6)[0]


def test_changed_conversation_is_recomputed_from_where_it_differs(model: LlamaForCausalLM) -> None:
    tokens = prompt(40)
    generator = Generator(OracleExecutor(model, DENSE))
    talk = generator.session(max_seq_len=64)
    generator.generate([tokens], max_new_tokens=3, session=talk)
    changed = tokens[:21] + prompt(10, seed=9)
    assert changed[21] != tokens[21]
    stream = generator.stream([changed], max_new_tokens=4, session=talk)
    assert tuple(step.tokens[0] for step in stream) == generate(model, [changed], DENSE, max_new_tokens=4)[0]
    assert stream.stats.reused_tokens == 21


def test_same_prompt_again_computes_its_last_token(model: LlamaForCausalLM) -> None:
    generator = Generator(OracleExecutor(model, DENSE))
    talk = generator.session(max_seq_len=64)
    results = {generator.generate([prompt(20)], max_new_tokens=4, session=talk)[0].tokens for _ in range(2)}
    assert len(results) == 1


def test_abandoned_stream_leaves_a_usable_session(model: LlamaForCausalLM) -> None:
    generator = Generator(OracleExecutor(model, DENSE))
    talk = generator.session(max_seq_len=64)
    next(generator.stream([prompt(20)], session=talk))
    conversation = [*prompt(20), 3, 4]
    (result,) = generator.generate([conversation], max_new_tokens=4, session=talk)
    assert result.tokens == generate(model, [conversation], DENSE, max_new_tokens=4)[0]


# Sampling


def test_sampling_is_reproducible_by_seed(model: LlamaForCausalLM) -> None:
    def sample(seed: int | None) -> list[tuple[int, ...]]:
        return generate(model, [prompt(10), prompt(12)], max_new_tokens=12, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_sampling_options_shape_the_distribution(model: LlamaForCausalLM) -> None:
    greedy = generate(model, [prompt(10)], max_new_tokens=8)
    assert generate(model, [prompt(10)], max_new_tokens=8, temperature=0) == greedy
    assert generate(model, [prompt(10)], max_new_tokens=8, temperature=5.0, top_k=1) == greedy
    assert generate(model, [prompt(10)], max_new_tokens=8, temperature=5.0, top_p=1e-6) == greedy
    assert generate(model, [prompt(10)], max_new_tokens=8, temperature=5.0, min_p=1.0) == greedy
    assert generate(model, [prompt(10)], max_new_tokens=8, temperature=5.0, seed=0) != greedy


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [26, 43]},
        {"bad_words_ids": [[43]]}, {"sequence_bias": [[[20], 30.0]]},
        {"min_new_tokens": 6, "eos_token_id": [26, 43]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_equal_transformers(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    tokens = prompt(30)
    expected = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, 30), max_new_tokens=12, do_sample=False, pad_token_id=0,
        **options,
    )[0, 30:].tolist()
    plain, actual = (generate(model, [tokens], DENSE, max_new_tokens=12, **extra)[0] for extra in ({}, options))
    assert list(actual) == expected
    assert actual != plain


def test_ragged_repetition_penalty_sees_no_padding(model: LlamaForCausalLM) -> None:
    prompts = [prompt(5), prompt(30)]
    together = generate(model, prompts, max_new_tokens=6, repetition_penalty=1.5)
    assert together == [generate(model, [one], max_new_tokens=6, repetition_penalty=1.5)[0] for one in prompts]


def test_models_generation_config_is_the_default(model: LlamaForCausalLM) -> None:
    free = generate(model, [prompt(20)], max_new_tokens=8)[0]
    config = GenerationConfig(eos_token_id=free[4], max_new_tokens=7, do_sample=True, temperature=9.0, top_k=1)
    generator = Generator(OracleExecutor(model, SPARSE), generation_config=config)
    assert generator.generate([prompt(20)])[0].tokens == free[: free.index(free[4]) + 1]
    assert generator.generate([prompt(20)], eos_token_id=[])[0].tokens == free[:7]
    assert config.eos_token_id == free[4]
    sampling = Generator(
        OracleExecutor(model, SPARSE), generation_config=GenerationConfig(do_sample=True, temperature=9.0)
    )
    assert sampling.generate([prompt(20)], max_new_tokens=8, temperature=0)[0].tokens == free
    assert sampling.generate([prompt(20)], max_new_tokens=8, seed=0)[0].tokens != free


# Perplexity


def test_perplexity_equals_transformers(model: LlamaForCausalLM) -> None:
    tokens = torch.tensor([prompt(60)])
    generator = Generator(OracleExecutor(model, DENSE, logits="all"), prefill_chunk=16)
    with torch.inference_mode():
        logits = model(tokens).logits
    for skip in (0, 15, 16, 30):
        loss = torch.nn.functional.cross_entropy(logits[0, skip:-1], tokens[0, skip + 1 :])
        assert generator.perplexity(tokens[0].tolist(), skip=skip) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_the_study_counts_the_same_predictions(model: LlamaForCausalLM) -> None:
    generator = Generator(OracleExecutor(model, DENSE, logits="all"))
    for skip in (0, 17):
        expected = generator.perplexity(prompt(60), skip=skip)
        losses = perplexity.read(model, prompt(60), skip=skip, chunk=16)
        assert float(losses.mean().exp()) == pytest.approx(expected, rel=1e-5)


def test_perplexity_errors(model: LlamaForCausalLM) -> None:
    with pytest.raises(RuntimeInputError, match="--logits all"):
        Generator(OracleExecutor(model, DENSE)).perplexity(prompt(20))
    generator = Generator(OracleExecutor(model, DENSE, logits="all"), max_seq_len=32)
    with pytest.raises(RuntimeInputError, match="33 tokens"):
        generator.perplexity(prompt(33))
    with pytest.raises(RuntimeInputError, match="too few"):
        generator.perplexity(prompt(6), skip=5)


# Text


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is special."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_streamed_text_never_splits_a_character() -> None:
    text = "naïve 東京 🙂 ok"
    streamer = TextStreamer(Bytes(), context=b"before ")
    pieces = [streamer.push(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert streamer.push(256) == ""
    assert streamer.finish() == ""


class Halves(Bytes):
    """A tokenizer none of whose tokens is a whole character."""

    def decode(self, tokens: list[int], **options: bool) -> str:  # type: ignore[override]
        return super().decode([128 + token for token in tokens], **options)


def test_text_held_back_comes_with_the_last_token(model: LlamaForCausalLM) -> None:
    steps = list(Generator(OracleExecutor(model, SPARSE), Halves()).stream([prompt(5)], max_new_tokens=3))
    assert [step.texts[0] for step in steps] == ["", "", "\ufffd" * 3]


def test_broken_bytes_are_flushed_at_the_end() -> None:
    streamer = TextStreamer(Bytes())
    broken = "é".encode()[:1] + b"a" + "🙂".encode()[:3]
    assert [streamer.push(token) for token in broken] == ["", "\ufffda", "", "", ""]
    assert streamer.finish() == "\ufffd"
    assert streamer.finish() == ""


def test_state_holds_no_more_than_asked(model: LlamaForCausalLM) -> None:
    spec = OracleExecutor(model, DENSE).spec
    state = KVState(spec, torch.device("cpu"), batch=2, max_seq_len=17)
    assert state.page_table.shape == (2, 3)
    assert state.bytes == 2 * 2 * 6 * 2 * 8 * 8 * 4  # layers, key and value, pages, heads, page_size, head_dim, bytes
