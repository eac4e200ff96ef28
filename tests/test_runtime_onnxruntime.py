"""The ONNX Runtime executor on an exported model, against the oracle."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
from oracle import OracleExecutor
from tiny_export import SPARSE, export_tiny
from transformers import LlamaForCausalLM

import hip_trt
from hip_trt import operator as names
from hip_trt.errors import EngineError, EnvironmentProblem
from hip_trt.runtime import Generator, Session, load
from hip_trt.runtime.onnxruntime import OrtExecutor


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported"), logits="all")


@pytest.fixture(scope="module")
def executor(path: Path) -> OrtExecutor:
    return OrtExecutor(path, threads=1)


@pytest.fixture(scope="module")
def oracle(path: Path) -> OracleExecutor:
    model = LlamaForCausalLM.from_pretrained(path.parent / "checkpoint").eval()
    return OracleExecutor(model, SPARSE, logits="all")


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def poisoned(session: Session) -> Session:
    """Pools that hold NaN wherever nothing was committed."""
    for pool in (*session.state.tensors(names.KEY), *session.state.tensors(names.VALUE)):
        pool.fill_(math.nan)
    return session


def test_prefill_and_decode_agree_with_the_oracle(executor: OrtExecutor, oracle: OracleExecutor) -> None:
    sessions = [poisoned(Session(one, batch=2, max_seq_len=128, prefill_chunk=40)) for one in (executor, oracle)]
    tokens = [prompt(100, seed=1), prompt(21, seed=2)]
    actual, expected = (session.append(tokens) for session in sessions)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    for step in range(5):
        second = step if step % 2 else None
        actual, expected = (session.step([step, second]) for session in sessions)
        rows = [0, 1] if second is not None else [0]
        torch.testing.assert_close(actual[rows], expected[rows], atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(*(session.state.tensors(names.NODES) for session in sessions), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("width", [1, 9])
def test_aliasing_is_bit_identical(executor: OrtExecutor, width: int, refresh: int) -> None:
    """present bound to past, as sessions do, against separate buffers."""
    running = Session(executor, batch=2, max_seq_len=128)
    for pool in (*running.state.tensors(names.KEY), *running.state.tensors(names.VALUE)):
        pool.fill_(0.5)  # the same everywhere, also where nothing is committed, so that whole pools compare
    running.append([prompt(90, seed=1), prompt(60, seed=2)])
    running.step([1, 2])
    state, layers = running.state, range(executor.spec.num_layers)
    running.reserve([100, 80])

    def call(aliased: bool) -> dict[str, torch.Tensor]:
        inputs = {
            names.INPUT_IDS: torch.arange(2 * width).reshape(2, width),
            names.PAST_LENGTHS: state.past_lengths.clone(),
            names.QUERY_LENGTHS: torch.tensor([width, 0 if refresh else width], dtype=torch.int32),
            names.PAGE_TABLE: state.page_table.clone(),
            names.REFRESH_MASK: torch.tensor([refresh], dtype=torch.int32),
        }
        outputs = {names.LOGITS: torch.zeros(2, width, executor.spec.vocab_size)}
        for layer in layers:
            for past, present, tensor in (
                (names.KEY.past, names.KEY.present, state.layers[layer][names.KEY]),
                (names.VALUE.past, names.VALUE.present, state.layers[layer][names.VALUE]),
                (names.NODES.past, names.NODES.present, state.layers[layer][names.NODES]),
            ):
                inputs[past(layer)] = tensor.clone()
                outputs[present(layer)] = inputs[past(layer)] if aliased else torch.zeros_like(tensor)
        executor.run(inputs, outputs)
        return outputs

    aliased, separate = call(True), call(False)
    assert aliased.keys() == separate.keys()
    for name, tensor in aliased.items():
        assert torch.equal(tensor, separate[name]), name
    assert not torch.equal(aliased[names.KEY.present(0)], state.layers[0][names.KEY])  # the new rows are there


def test_pools_are_written_in_place(executor: OrtExecutor) -> None:
    running = Session(executor, max_seq_len=64)
    running.append([prompt(20)])
    (binding, copies) = next(reversed(executor._bindings.values()))
    shapes = {tuple(target.shape) for target, _ in copies}
    assert shapes == {executor.spec.state_shape(names.NODES, 1)}  # tree nodes alone go through a copy
    del binding


def test_decode_steps_reuse_one_binding(executor: OrtExecutor) -> None:
    running = Session(executor, max_seq_len=64)
    running.append([prompt(20)])
    running.step([0])
    first = next(reversed(executor._bindings.values()))
    for token in range(1, 5):
        running.step([token])
        assert next(reversed(executor._bindings.values())) is first
    assert len(executor._bindings) <= 4


def test_greedy_text_equals_the_oracles(path: Path, oracle: OracleExecutor) -> None:
    generator = hip_trt.load(path, threads=1)
    prompts = ["Once upon a time there was a longer prompt than the window, sinks and masks.", "Hi"]
    expected = Generator(oracle, generator.tokenizer).generate(prompts, max_new_tokens=10, eos_token_id=[])
    results = generator.generate(prompts, max_new_tokens=10, eos_token_id=[])
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    for result in results:
        assert result.text == generator.tokenizer.decode(result.tokens, skip_special_tokens=True)


def test_perplexity_equals_the_oracles(path: Path, oracle: OracleExecutor) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom."
    generator = load(path, threads=1, prefill_chunk=16)
    assert generator.perplexity(text) == pytest.approx(Generator(oracle).perplexity(generator.encode(text)), rel=1e-4)


def test_chat_keeps_the_cache(path: Path) -> None:
    chat = load(path, threads=1).chat("Be brief.", max_seq_len=256)
    first = "".join(chat.send("Hello", max_new_tokens=6, eos_token_id=[]))
    assert chat.stats.reused_tokens == 0
    list(chat.send("And now?", max_new_tokens=6))
    said = len("Be brief.Hello") + 5  # with the special tokens, up to <|assistant|>
    assert chat.stats.reused_tokens >= said
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == first


def test_abandoned_reply_is_remembered_as_far_as_read(path: Path) -> None:
    chat = load(path, threads=1).chat(max_seq_len=256)
    pieces = chat.send("Hello", max_new_tokens=40, eos_token_id=[])
    read = "".join(next(pieces) for _ in range(5))
    pieces.close()
    assert chat.messages[1] == {"role": "assistant", "content": read}


# What is wrong with a file


def copy(path: Path, folder: Path) -> onnx.ModelProto:
    for file in path.parent.glob("*.data"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.onnx").write_bytes(path.read_bytes())
    return onnx.load(path, load_external_data=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        load(tmp_path / "model.onnx")


def test_neither_onnx_nor_plan(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"neither .onnx nor .plan"):
        load(tmp_path / "model.bin")


def test_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match="not an ONNX file"):
        load(tmp_path / "model.onnx")


def test_missing_weights(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    with pytest.raises(EngineError, match="weights are missing"):
        load(tmp_path / "model.onnx")


def test_onnx_of_another_tool(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [value], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    ])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(EngineError, match="not a model exported by hip-trt"):
        load(tmp_path / "model.onnx")


def test_graph_that_onnx_runtime_refuses(path: Path, tmp_path: Path) -> None:
    model = copy(path, tmp_path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load it: .*NoSuchOperator"):
        load(tmp_path / "model.onnx")


def test_type_without_kernels(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, dtype="bfloat16")
    with pytest.raises(EnvironmentProblem, match=r"no CPU kernels for bfloat16.*--dtype float32"):
        load(exported)


def test_float16_runs(tmp_path: Path, oracle: OracleExecutor) -> None:
    executor = OrtExecutor(export_tiny(tmp_path, dtype="float16"), threads=1)
    actual, expected = (poisoned(Session(one, max_seq_len=64)) for one in (executor, oracle))
    assert actual.state.layers[0][names.KEY].dtype == torch.float16
    logits, reference = (session.append([prompt(20)]) for session in (actual, expected))
    torch.testing.assert_close(logits, reference, atol=0.2, rtol=0.05)
    torch.testing.assert_close(actual.step([3]), expected.step([3]), atol=0.2, rtol=0.05)


def test_damaged_tokenizer(path: Path, tmp_path: Path) -> None:
    copy(path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EnvironmentProblem, match="tokenizer cannot be loaded"):
        load(tmp_path / "model.onnx")


def test_model_without_tokenizer_takes_token_ids(path: Path, tmp_path: Path) -> None:
    copy(path, tmp_path)
    generator = load(tmp_path / "model.onnx", threads=1)
    assert len(generator.generate([prompt(9)], max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(EnvironmentProblem, match="no tokenizer"):
        generator.generate("text")
    with pytest.raises(EnvironmentProblem, match=r"no tokenizer_config.json"):
        load(tmp_path / "model.onnx", tokenizer=tmp_path)
    assert load(tmp_path / "model.onnx", tokenizer=path.parent).encode("abc")
