"""The TensorRT executor's calls with the KV cache in host memory: same engine, same graphs, same bits."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle as oracle_module
import pytest
import torch
from checkpoints import VOCABULARY, byte_tokenizer
from emulated import EmulatedLibrary, build, compiler
from offload_host import FakeHost, emulate, operator_of
from oracle import OracleExecutor, tiny_llama
from test_runtime_tensorrt import Recording, make
from tiny_plan import LIMITS
from typer.testing import CliRunner, Result

from hip_trt import operator as names
from hip_trt import runtime
from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import EnvironmentProblem, RuntimeInputError
from hip_trt.offload import BlockCaches, Offload, OffloadStats
from hip_trt.offload.block_caches import Staging
from hip_trt.runtime import Generator, Session, load

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
HIP = HipConfig.create(
    mask_k=64, decode_mask_k=16, block_q=8, block_k=8, stride_q=4, page_size=16, sink_tokens=8, window_tokens=16,
    branch=2, leaf_branch=2, refresh_interval=3,
)
OFFLOAD = Offload(key_cache=0.3, value_cache=0.25)
PROMPTS = [list(range(60)), list(range(5, 12))]


@pytest.fixture(scope="module")
def library() -> EmulatedLibrary:
    return EmulatedLibrary(build())


@pytest.fixture(scope="module")
def oracle() -> OracleExecutor:
    """float16, as kernels use the caches for 16-bit types only."""
    model = tiny_llama(head_dim=64, vocab_size=VOCABULARY, initializer_range=0.2).to(torch.float16)
    executor = OracleExecutor(model, HIP, limits=LIMITS)
    executor.spec = executor.spec.model_copy(update={"dtype": "float16"})
    return executor


@pytest.fixture
def host(library: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    host = emulate(monkeypatch, library)
    monkeypatch.setattr(oracle_module, "hip_attention", operator_of(library))
    yield host
    gc.collect()
    assert host.held == 0


def converse(executor: Recording, offload: Offload | None) -> tuple[list[torch.Tensor], OffloadStats | None]:
    """Prompts, decode steps with an idle row, a shared prefix that is taken back in part, a second turn."""
    results = []
    with Session(executor, batch=3, max_seq_len=96, offload=offload) as session:
        def step(*rows: int) -> None:
            logits = session.step([7 + row if row in rows else None for row in range(3)])
            results.extend(logits[row].clone() for row in rows)

        results.append(session.append([*PROMPTS, []])[:2].clone())
        step(0, 1)
        step(0)
        assert session.share_prefix(2, 0, 40) == 32
        session.append([[], [], [3]])
        step(0, 1, 2)
        session.truncate(2, 20)  # in a page that row 0 has too: a copy, made behind the operator's back
        step(0, 2)
        session.truncate(0, 9)
        results.append(session.append([[1, 2, 3] * 9, [], [4, 5]])[[0, 2]].clone())
        step(0, 1, 2)
        return results, session.state.offloaded.stats() if session.state.offloaded else None


@pytest.fixture(scope="module")
def resident(oracle: OracleExecutor, library: EmulatedLibrary) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_module, "hip_attention", operator_of(library))
        return converse(make(oracle)[0], None)[0]


@pytest.mark.parametrize("offload", [OFFLOAD, Offload(key_cache=0.5, value_cache=0.5, release_staging=False)],
                         ids=["small", "whole"])
def test_same_bits(
    oracle: OracleExecutor, host: FakeHost, resident: list[torch.Tensor], offload: Offload
) -> None:
    executor, _, stream = make(oracle)
    actual, stats = converse(executor, offload)
    assert len(actual) == len(resident)
    assert all(one.equal(other) for one, other in zip(actual, resident, strict=True))
    assert stream.replays > 0  # captured as ever
    assert stats is not None
    assert stats.tokens == 11
    assert stats.host_bytes == 2 * 2 * 18 * 2 * 16 * 64 * 2
    assert stats.prefill.tokens == 67 + 1 + 29
    assert stats.prefill.unstaged_tokens == 0
    assert stats.prefill.written_bytes == 97 * 2 * 2 * 2 * 64 * 2
    for layer in (*stats.keys, *stats.values):
        assert layer.hits > 0
        assert layer.transfers > 0
    assert host.held == 0


def test_pools_in_host_memory_are_bound(oracle: OracleExecutor, host: FakeHost) -> None:
    executor, engine, _ = make(oracle)
    with Session(executor, max_seq_len=32, offload=OFFLOAD) as session:
        session.append([[1, 2]])
        (context,) = engine.contexts
        for layer, (start, size) in enumerate(host.registered.items()):
            for part in ("key", "value"):
                address = context.addresses[f"past_key_values.{layer}.{part}"]
                assert address == context.addresses[f"present.{layer}.{part}"]
                assert start <= address < start + size


def test_captured_steps_go_with_the_caches_that_they_use(oracle: OracleExecutor, host: FakeHost) -> None:
    """New pools may have the addresses of old ones: a graph of then would use caches that are no more."""
    executor, _, stream = make(oracle)
    for captures in (1, 2):
        with Session(executor, max_seq_len=32, offload=OFFLOAD) as session:
            assert not executor._decoders
            for _ in range(3):
                session.step([1])
            assert len(executor._decoders) == 1
        assert not executor._decoders
        assert len(stream.captures) == captures
    lost = Session(executor, max_seq_len=32, offload=OFFLOAD)
    lost.step([1])
    del lost  # without close
    gc.collect()
    assert host.held == 0
    with Session(executor, max_seq_len=32, offload=OFFLOAD):
        assert not executor._decoders


def test_generator(oracle: OracleExecutor, host: FakeHost) -> None:
    executor, _, _ = make(oracle)
    expected = Generator(executor).generate(PROMPTS, max_new_tokens=6)
    offloaded = Generator(executor, offload=OFFLOAD)
    assert offloaded.generate(PROMPTS, max_new_tokens=6) == expected
    assert host.held == 0
    stream = offloaded.stream(PROMPTS, max_new_tokens=6)
    next(stream), next(stream), next(stream)
    assert stream.offload_stats is not None
    assert stream.offload_stats.tokens == 4
    list(stream)
    assert host.held == 0
    assert stream.offload_stats.tokens == 10
    abandoned = offloaded.stream(PROMPTS, max_new_tokens=6)
    next(abandoned)
    assert host.held == 2
    del abandoned
    gc.collect()
    assert host.held == 0
    for steps in (0, 2, 6):
        stopped = offloaded.stream(PROMPTS, max_new_tokens=6)
        for _ in range(steps):
            next(stopped)
        assert host.held == 2
        stopped.close()
        assert host.held == 0
        assert list(stopped) == []


def test_failure_gives_memory_back(oracle: OracleExecutor, host: FakeHost) -> None:
    executor, engine, _ = make(oracle)
    stream = Generator(executor, offload=OFFLOAD).stream(PROMPTS, max_new_tokens=6)
    next(stream)
    engine.broken = True
    with pytest.raises(Exception, match="no memory"):
        next(stream)
    assert host.held == 0


def test_session_that_is_closed(oracle: OracleExecutor, host: FakeHost) -> None:
    executor, _, _ = make(oracle)
    session = Session(executor, max_seq_len=32, offload=OFFLOAD)
    session.append([[1]])
    session.close()
    session.close()
    for call in (lambda: session.step([1]), lambda: session.append([[1]]), session.state.offloaded.stats):
        with pytest.raises(RuntimeInputError, match="has been released"):
            call()


def test_pages_that_the_caller_wrote(oracle: OracleExecutor, host: FakeHost) -> None:
    """After set_page_table nothing is served that was cached before."""
    def play(offload: Offload | None) -> torch.Tensor:
        with Session(make(oracle)[0], max_seq_len=32, pages=4, offload=offload) as session:
            state = session.state
            session.append([list(range(20))])
            session.step([3])
            for pool in (*state.tensors(names.KEY), *state.tensors(names.VALUE)):
                pool[:] = torch.linspace(-1, 1, pool.numel()).view(pool.shape)
            state.set_page_table([[2, 0]], [20])
            return session.step([3])[0].clone()

    assert play(OFFLOAD).equal(play(None))


def test_pages_can_be_loaded(oracle: OracleExecutor, host: FakeHost) -> None:
    with Session(make(oracle)[0], max_seq_len=64, offload=Offload(key_cache=0.5, value_cache=0.5)) as session:
        session.append([list(range(26))])
        session.step([3])
        bank = session.state.offloaded
        assert bank is not None
        keys, values = bank.pools(1)
        new = torch.randn(2, *keys.shape[1:]), torch.randn(2, *keys.shape[1:])
        before = bank.stats().keys[1].misses
        bank.write(1, *new, first_page=1)
        assert keys[1:3].equal(new[0].half())
        assert values[1:3].equal(new[1].half())
        session.step([3])
        assert bank.stats().keys[1].misses > before
        bank.reset_stats()
        assert bank.stats().all_keys.lookups == bank.stats().tokens == bank.stats().prefill.tokens == 0
        session.step([3])
        assert bank.stats().all_values.hit_ratio == 1


# What is refused


def test_too_much(oracle: OracleExecutor, host: FakeHost) -> None:
    """Said before host memory is taken, or anything is written."""
    executor, _, _ = make(oracle)
    for sizes, message in (
        ({"batch": 3, "max_seq_len": 128, "pages": 33}, "pages: 33 are more than the engine allows"),
        ({"max_seq_len": 129}, "max_seq_len: 129 is more than the engine allows"),
        ({"max_seq_len": 100, "pages": 1 << 40}, "pages"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            Session(executor, offload=OFFLOAD, **sizes)
    with Session(executor, max_seq_len=32, offload=OFFLOAD) as session:
        with pytest.raises(RuntimeInputError, match="33 tokens wanted, but the KV cache has room for 32"):
            session.append([[1] * 33])
        assert session.state.lengths == (0,)
        assert session.state.layers[0][names.KEY].isnan().all()


def test_memory_of_the_machine(oracle: OracleExecutor, host: FakeHost) -> None:
    executor = OracleExecutor(tiny_llama(), HIP)  # has no limits of its own
    with pytest.raises(RuntimeInputError, match=r"needs .* of host memory, and .* is available .*--max-seq-len"):
        Session(executor, max_seq_len=1 << 40, offload=OFFLOAD)
    assert host.held == 0


def test_locking_refused(oracle: OracleExecutor, host: FakeHost) -> None:
    host.refuse = 1
    with pytest.raises(EnvironmentProblem, match=r"CUDA does not lock .* bytes of host memory .*OUT_OF_MEMORY"):
        Session(make(oracle)[0], max_seq_len=32, offload=OFFLOAD)
    assert host.held == 0


def test_no_gpu_memory_for_caches(oracle: OracleExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockCaches, "_allocate", full)
    with pytest.raises(RuntimeInputError, match=r"caches of .* do not fit in the memory of cpu.*--key-cache-mib"):
        Session(make(oracle)[0], max_seq_len=32, offload=OFFLOAD)
    assert host.held == 0


def test_no_gpu_memory_for_staging(
    oracle: OracleExecutor, host: FakeHost, resident: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Staging, "allocate", full)
    actual, _ = converse(make(oracle)[0], OFFLOAD)
    assert all(one.equal(other) for one, other in zip(actual, resident, strict=True))
    assert caplog.text.count("no GPU memory for prefill's staging area") == 1


def test_nothing_to_offload_on_the_cpu(oracle: OracleExecutor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeInputError, match="runs on cpu, where the KV cache is in host memory already"):
        Session(make(oracle)[0], max_seq_len=32, offload=OFFLOAD)
    with pytest.raises(RuntimeInputError, match=r"model\.onnx: ONNX Runtime runs it on the CPU"):
        load(tmp_path / "model.onnx", offload=OFFLOAD)


# hip-trt run --offload


@pytest.fixture
def run(oracle: OracleExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command on a plan, which the stand-in executes."""
    def stand_in(path: Path, *, offload: Offload | None, **options: Any) -> Any:
        for name in ("threads", "tokenizer", "weight_budget"):
            assert options.pop(name) is None
        return Generator(make(oracle)[0], byte_tokenizer(), offload=offload, **options)

    monkeypatch.setattr(runtime, "load", stand_in)

    def invoke(*arguments: Any, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, ["run", "e.plan", "--raw", "-n", "6", *map(str, arguments)], input=stdin)

    return invoke


def test_run(run: Callable[..., Result], host: FakeHost, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog" * 2
    plain = run("-p", text)
    assert plain.exit_code == 0
    result = run("-p", text, "--offload", "--stats", "--stats-json", tmp_path / "s.json", "--cache-share", 1)
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    assert host.held == 0
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["tokens"] == 5
    assert len(stats["layers"]) == 2
    assert sum(layer["keys"]["misses"] for layer in stats["layers"]) == stats["keys"]["misses"] > 0
    assert stats["bus_bytes"] == stats["keys"]["bus_bytes"] + stats["values"]["bus_bytes"]
    assert stats["bus_bytes"] == 5 * stats["bus_bytes_per_token"]
    for part in ("decode: 5 tokens", "│ keys", "│ values", "5 decoded tokens", "GPU memory:"):
        assert part in result.stderr
    assert f"{stats['keys']['hit_ratio']:.1%}" in result.stderr
    # In chunks of a page, each of which is read again by all that follow.
    page, tokens, chunks = 2 * 2 * 2 * 16 * 64 * 2, len(text), -(-len(text) // 16)
    assert stats["prefill"]["tokens"] == tokens
    assert stats["prefill"]["staged_bytes"] == sum(range(chunks)) * page
    assert stats["prefill"]["written_bytes"] == tokens * page // 16
    assert f"Prefill: {tokens} tokens; per token" in result.stderr


def test_small_caches_are_named(run: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    result = run("-p", "x" * 90, "--offload", "--key-cache-mib", 0.01, "--value-cache-mib", 0)
    assert result.exit_code == 0
    assert "MiB would do (--key-cache-mib)" in caplog.text
    assert "MiB would do (--value-cache-mib)" in caplog.text


def test_options_that_do_not_fit(run: Callable[..., Result], tmp_path: Path) -> None:
    for arguments in (
        ["--key-cache-mib", 1], ["--cache-share", 0.1], ["--stats-json", "x"],
        ["--offload", "--cache-share", 0.1, "--value-cache-mib", 1],
    ):
        assert run("-p", "x", *arguments).exit_code == 2
    for arguments, message in (
        (["--cache-share", 2], "cache_share: 2.0 is not allowed"),
        (["--key-cache-mib", -1], "key_cache_mib: -1.0 is not allowed"),
        (["--stats-json", tmp_path / "no" / "s.json"], "s.json: cannot be written: No such file"),
    ):
        result = run("-p", "x", "--offload", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr


def test_onnx_file_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path / "model.onnx"), "-p", "x", "--offload"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "ONNX Runtime runs it on the CPU, where the KV cache is in host memory already" in result.stderr


def test_chat(oracle: OracleExecutor, host: FakeHost) -> None:
    """A conversation counts over all its turns, and gives memory back at its end."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    expected = []
    for offload in (None, OFFLOAD):
        chat = Generator(make(oracle)[0], tokenizer, offload=offload).chat(max_seq_len=96)
        said = ["".join(chat.send(text, max_new_tokens=4)) for text in ("hello", "again")]
        if offload is None:
            assert chat.offload_stats is None
            expected = said
        else:
            assert said == expected
            assert chat.offload_stats is not None
            assert chat.offload_stats.tokens == 6
        chat.close()
        assert host.held == 0
