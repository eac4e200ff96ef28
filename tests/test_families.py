"""Every model family: exported, in a plan and in eager mode it computes what transformers computes; what HiP cannot
represent is refused by name."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_gguf
from family_models import CASES, Case
from graph_runner import GraphRunner
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from typer.testing import CliRunner, Result

import hip_trt
from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import CheckpointError, ConfigError, ExportError, RuntimeInputError
from hip_trt.export import ExportedModel, Family, build_engine, export_onnx, families, graph, register_family
from hip_trt.export.checkpoint import open_checkpoint
from hip_trt.export.layers import Pattern, find_pattern, layer_kinds
from hip_trt.huggingface import cache_argument, output_cache
from hip_trt.model_support import check_call, limits

DENSE = HipConfig.create(mask_k=512, decode_mask_k=512, block_q=32, page_size=16, sink_tokens=16, window_tokens=32)
"""More than any prompt here needs, so that HiP is dense attention."""

Array = np.ndarray[Any, Any]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CASE = {case.name: case for case in CASES}


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model: PreTrainedModel, prompt: list[int]) -> Array:
    """transformers' own, of every token: [S, V]."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].float().numpy()


def assert_serves(path: Path, expected: Array, prompt: list[int]) -> None:
    """In ONNX Runtime: a prompt in two chunks, then one token at a time, against the logits of the whole."""
    runner, done = GraphRunner(path, [list(range(8))]), 0
    for count in (45, len(prompt) - 49, 1, 1, 1, 1):
        actual = runner.step([prompt[done : done + count]])[0, 0]
        done += count
        np.testing.assert_allclose(actual, expected[done - 1], rtol=0, atol=1e-3, err_msg=f"after {done} tokens")


# What each family computes


def export(
    case: Case, path: Path, model: PreTrainedModel, *, max_context: int | None = None
) -> tuple[ExportedModel, list[int]]:
    """An export, and how many layers it traced at once."""
    model.save_pretrained(path / "model")
    traced: list[int] = []
    trace = graph._trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_trace", lambda *args: traced.append(args[-1]) or trace(*args))
        exported = export_onnx(path / "model", path, config=DENSE, max_context=max_context or case.max_context)
    return exported, traced


@by_name
def test_exported_model_and_plan(case: Case, tmp_path: Path) -> None:
    model, prompt = case.model(), tokens(80)
    layers = model.config.num_hidden_layers
    exported, traced = export(case, tmp_path, model)
    spec = exported.spec
    assert traced == [5 if case.name == "SmolLM3-3B" else min(3, layers)]
    assert spec.model_type == model.config.model_type
    assert spec.max_position_embeddings == (case.max_context or model.config.max_position_embeddings)
    assert_serves(exported.path, logits(model, prompt), prompt)
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("the plan was not built: needs the extra tensorrt-rtx")
    built = build_engine(
        exported.path, tmp_path / "engine.plan", runtime="tensorrt-rtx", compute_capabilities=["8.9"], max_batch=1,
        max_prefill=64, max_seq_len=80,
    )
    assert len(built.plugin_layers) == layers


@by_name
def test_patched_model(case: Case) -> None:
    model, prompt = case.model(), tokens(80)
    expected, ids = logits(model, prompt), torch.tensor([prompt])
    hip_trt.patch(model, DENSE, max_context=case.max_context)
    cache = None
    for part in ids.split([45, 31, 1, 1, 1, 1], dim=1):
        with torch.no_grad():
            result = model(part, **cache_argument(model, cache), use_cache=True)
        cache = output_cache(model, result)
        end = cache.get_seq_length()
        np.testing.assert_allclose(result.logits[0], expected[end - part.shape[1] : end], rtol=0, atol=1e-3)


def test_patched_mixture_of_experts() -> None:
    """It cannot be traced, but HiP does not care what follows attention."""
    case = Case("Mixtral", "MixtralForCausalLM", {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4})
    model = case.model()
    expected = logits(model, tokens(40))
    np.testing.assert_allclose(logits(hip_trt.patch(model, DENSE), tokens(40)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("case", "special"), [(case, special) for case in CASES for special in case.special],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_special_shows(case: Case, special: str) -> None:
    """The random models would betray an export that left out a bias, a norm, a multiplier, ..."""
    changed, expected = case.model(), logits(case.model(), tokens(80))
    case.special[special](changed)
    assert np.abs(logits(changed, tokens(80))[44:] - expected[44:]).max() > 0.1


@pytest.mark.parametrize(("name", "architecture"), [("Qwen2-0.5B", "qwen2"), ("Qwen3-0.6B", "qwen3")])
def test_gguf(name: str, architecture: str, tmp_path: Path) -> None:
    """Opened as transformers opens it, and as the model that was saved."""
    model = CASE[name].model(num_hidden_layers=1)
    fields = {"qwen3.attention.key_length": 128} if architecture == "qwen3" else {}
    path = save_gguf(tmp_path / "tiny.gguf", model, architecture=architecture, fields=fields)
    checkpoint = open_checkpoint(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert type(theirs) is checkpoint.family.model_class is type(model)
    parameters = dict(model.named_parameters())
    assert set(checkpoint.tensors) == set(parameters)
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(checkpoint.tensors[key].load(), parameters[key].detach(), rtol=0, atol=0)
        torch.testing.assert_close(parameter.detach(), parameters[key].detach(), rtol=0, atol=0)
    ours = type(model)(checkpoint.config).eval()
    ours.load_state_dict(model.state_dict())
    np.testing.assert_allclose(logits(ours, tokens(40)), logits(model, tokens(40)), rtol=0, atol=1e-4)


# How layers repeat


def test_pattern_of_real_models() -> None:
    def pattern(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Pattern:
        with torch.device("meta"):
            return find_pattern(layer_kinds(model_class(config).model.layers))

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 9}
    deep = {**sizes, "num_hidden_layers": 36, "pad_token_id": None}
    assert pattern(LlamaForCausalLM, LlamaConfig(**deep)) == Pattern(1, 1)
    assert pattern(SmolLM3ForCausalLM, SmolLM3Config(**deep, num_key_value_heads=1)) == Pattern(4, 4)
    windows = Qwen2Config(**deep, num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=9)
    assert pattern(Qwen2ForCausalLM, windows) == Pattern(9, 1)


@pytest.mark.parametrize(("kinds", "pattern"), [
    ("a", Pattern(1, 1)), ("aa", Pattern(1, 1)), ("aaa", Pattern(1, 1)), ("baaa", Pattern(1, 1)),
    ("bbaaaa", Pattern(2, 1)), ("aaab" * 3, Pattern(4, 4)), ("abababa", Pattern(1, 2)), ("xabcabc", Pattern(1, 3)),
])
def test_pattern(kinds: str, pattern: Pattern) -> None:
    assert find_pattern(kinds) == pattern


@pytest.mark.parametrize("kinds", ["ab", "abcd", "aaaab", "abcabd"])
def test_layers_without_pattern_are_all_traced(kinds: str) -> None:
    assert find_pattern(kinds).traced >= len(kinds)


# Up to which length windows and changing frequencies make no difference


@pytest.mark.parametrize("name", ["Mistral-7B-v0.1", "Phi-3-mini-4k", "Phi-4-mini"])
def test_exact_up_to_the_limit_and_not_beyond(name: str) -> None:
    """transformers itself agrees that the limit named is the limit."""
    model = CASE[name].model()
    (limit,) = limits(model.config)
    assert limit.tokens == CASE[name].max_context
    free = CASE[name].model(sliding_window=None)
    graph._hold_rope(free)
    prompt = tokens(limit.tokens + 1)
    np.testing.assert_allclose(logits(model, prompt[:-1]), logits(free, prompt[:-1]), rtol=0, atol=1e-5)
    assert np.abs(logits(model, prompt)[-1] - logits(free, prompt)[-1]).max() > 1e-3


def test_long_factors_hold_where_they_are_asked_for(tmp_path: Path) -> None:
    case, prompt = CASE["Phi-4-mini"], tokens(110)
    model = case.model(num_hidden_layers=1)
    exported, _ = export(case, tmp_path, model, max_context=4096)
    assert "long factors" in exported.warnings[-1]
    assert exported.spec.max_position_embeddings == 4096
    assert_serves(exported.path, logits(model, prompt), prompt)
    with pytest.raises(CheckpointError, match=r"pass max_context=96\.$"):
        hip_trt.patch(model, DENSE, max_context=4096)


def test_patched_model_refuses_what_lies_beyond() -> None:
    model = hip_trt.patch(CASE["Mistral-7B-v0.1"].model(), DENSE, max_context=80)
    ids = torch.tensor([tokens(81)])
    with torch.no_grad():
        cache = output_cache(model, model(ids[:, :79], use_cache=True))
        model(ids[:, 79:80], **cache_argument(model, cache))
        with pytest.raises(RuntimeInputError, match="81 tokens are beyond max_context 80"):
            model(ids[:, 80:], **cache_argument(model, cache))
    with pytest.raises(RuntimeInputError, match="81 tokens"):
        model(ids)


def test_window_that_a_layer_asks_for_is_checked_again() -> None:
    key = torch.zeros(1, 1, 1, 8)
    check_call(torch.nn.Module(), key, key, max_context=80, sliding_window=80)
    for max_context in (81, None):
        with pytest.raises(RuntimeInputError, match="sliding_window 80"):
            check_call(torch.nn.Module(), key, key, max_context=max_context, sliding_window=80)


def test_window_wider_than_the_context_is_no_window(tmp_path: Path) -> None:
    fields = {**SMALL["Mistral"], "sliding_window": 4096, "max_position_embeddings": 4096}
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):  # all else is fine
        open_checkpoint(folder(tmp_path, fields))


# What is refused


def folder(path: Path, fields: dict[str, Any]) -> Path:
    """A checkpoint of which there is only config.json: what is refused is refused before weights are looked at."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


_SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
SMALL = {
    name: {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **_SIZES}
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite", "Olmo2")
}
_ROPE = {"rope_theta": 1e4}


@pytest.mark.parametrize(("name", "fields", "words"), [
    ("Mistral", {"sliding_window": 4096}, ["sliding window of 4096 tokens", "--max-context 4096"]),
    ("Phi3", {"sliding_window": 2047, "pad_token_id": 0}, ["2047 tokens", "--max-context 2047"]),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 3},
     ["sliding window of 1024 tokens in 1 of its layers", "--max-context 1024"]),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 0}, ["in 4 of its layers"]),
    ("SmolLM3", {"use_sliding_window": True, "sliding_window": 512, "pad_token_id": 0}, ["512 tokens in 1 of its"]),
    ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, **_ROPE}},
     ["'dynamic'", "--max-context 8192"]),
    ("Phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
              "original_max_position_embeddings": 4096, "pad_token_id": 0},
     ["'longrope'", "--max-context 4096", "With --max-context 8192 RoPE's long factors hold at every length"]),
    ("Qwen3", {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, ["linear_attention"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_configuration_that_is_refused(tmp_path: Path, name: str, fields: dict[str, Any], words: list[str]) -> None:
    refused(tmp_path, {**SMALL[name], **fields}, *words)


@pytest.mark.parametrize(("architecture", "fields", "word"), [
    ("Gemma2ForCausalLM", {"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("GptOssForCausalLM", {"model_type": "gpt_oss", "num_local_experts": 32}, "attention sinks"),
    ("T5ForConditionalGeneration", {"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
    ("DeepseekV3ForCausalLM", {"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention"),
    ("BloomForCausalLM", {"model_type": "bloom"}, "ALiBi"),
    ("MptForCausalLM", {"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
    ("FalconForCausalLM", {"model_type": "falcon", "alibi": True}, "ALiBi"),
    ("MixtralForCausalLM", {"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
    ("MambaForCausalLM", {"model_type": "mamba", "state_size": 16}, "state-space layers"),
    ("LlavaForConditionalGeneration", {"model_type": "llava", "text_config": {}, "vision_config": {}}, "of several"),
    ("Lfm2ForCausalLM", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "conv"),
    ("StableLmForCausalLM", {"model_type": "stablelm"}, "docs/adding_a_family.md says how to add one"),
], ids=lambda value: value if isinstance(value, str) and value.endswith("LM") else "")
def test_architecture_that_is_refused(
    tmp_path: Path, architecture: str, fields: dict[str, Any], word: str
) -> None:
    message = refused(tmp_path, {"architectures": [architecture], **fields}, architecture, word, "Supported: Llama")
    assert ("which is not supported" in message) == ("docs" not in word)


def refused(path: Path, fields: dict[str, Any], *words: str, **options: Any) -> str:
    """Exporting fails with one line that has these words, and leaves nothing."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        export_onnx(folder(path / "model", fields), path / "out", **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (path / "out").exists()
    return message


@pytest.mark.parametrize("max_context", [0, 8193])
def test_context_beyond_the_model_is_refused(tmp_path: Path, max_context: int) -> None:
    refused(tmp_path, SMALL["Llama"], f"max_context: {max_context}", "from 1 to 8192", max_context=max_context)


@pytest.mark.parametrize(("fields", "words"), [
    ({"num_key_value_heads": 3}, ["num_key_value_heads 3 does not divide num_attention_heads 4"]),
    ({"num_key_value_heads": 8}, ["num_key_value_heads 8 does not divide num_attention_heads 4"]),
    ({"num_attention_heads": 0}, ["num_attention_heads"]),
    ({"num_key_value_heads": 0}, ["num_key_value_heads is 0"]),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["num_attention_heads 5 does not divide hidden_size 64"]),
    ({"head_dim": -8}, ["head_dim is -8"]),
    ({"num_attention_heads": "four"}, ["num_attention_heads is 'four'"]),
])
def test_heads_that_cannot_be(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    refused(tmp_path, {**SMALL["Llama"], **fields}, "config.json", *words)


def test_heads_left_to_defaults_that_cannot_be(tmp_path: Path) -> None:
    fields = {key: value for key, value in SMALL["Mistral"].items() if key != "num_key_value_heads"}
    refused(tmp_path, fields, "num_key_value_heads 8 does not divide num_attention_heads 4")


@pytest.mark.parametrize(("fields", "weight"), [
    ({"num_key_value_heads": 2}, "k_proj"), ({"head_dim": 64}, "q_proj"), ({"num_attention_heads": 8}, "q_proj"),
])
def test_heads_that_the_weights_do_not_have(tmp_path: Path, fields: dict[str, Any], weight: str) -> None:
    model = CASE["Llama-3.1-8B"].model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    with pytest.raises(CheckpointError) as caught:
        export_onnx(folder(path.parent, {**json.loads(path.read_text()), **fields}), tmp_path / "out")
    assert re.search(rf"{weight}.*num_attention_heads, num_key_value_heads and head_dim", str(caught.value))


@pytest.mark.parametrize(("fields", "word"), [
    ({"num_attention_heads": 32, "num_key_value_heads": 1}, "at most 16 times num_kv_heads"),
    ({"head_dim": 100}, "head_dim: 100"), ({"head_dim": 256}, "head_dim: 256"),
])
def test_heads_beyond_the_plugin_are_refused_before_the_export(
    tmp_path: Path, fields: dict[str, Any], word: str
) -> None:
    model = folder(tmp_path / "model", {**SMALL["Llama"], **fields})
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    result = cli("export", "--model", model, "--out", tmp_path / "out" / "e.plan", "--runtime", "tensorrt-rtx")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_engine_limits_are_checked_before_the_export(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", SMALL["Llama"])
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    result = cli("export", "--model", model, "--out", tmp_path / "out" / "e.plan", "--runtime", "tensorrt-rtx",
                 "--max-seq-len", "9000")
    assert "max_seq_len: 9000 is not allowed; it must be from 1 to 8192" in result.stderr
    result = cli("export", "--model", model, "--out", tmp_path / "out" / "e.plan", "--runtime", "tensorrt-rtx",
                 "--max-context", "2048", "--max-seq-len", "4096")
    assert "max_seq_len: 4096 is not allowed; it must be from 1 to 2048" in result.stderr


def cli(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


# Further families, as docs/adding_a_family.md has it


@pytest.fixture(autouse=True)
def _forget_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


def save_pythia(path: Path) -> GPTNeoXForCausalLM:
    """A small GPT-NeoX: parallel residual, layer norms with biases, rotary over a quarter of each head."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=97, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.3, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    model.save_pretrained(path)
    return model


def test_family_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program in docs/adding_a_family.md."""
    monkeypatch.chdir(tmp_path)
    model = save_pythia(tmp_path / "pythia-1b")
    with pytest.raises(CheckpointError, match=r"GPTNeoXForCausalLM, which cannot be exported\. .*adding_a_family"):
        export_onnx("pythia-1b", "build")
    page = Path(__file__).parent.parent / "docs" / "adding_a_family.md"
    program = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(program, {})
    assert_serves(tmp_path / "build" / "model.onnx", logits(model, tokens(80)), tokens(80))


def test_family_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line finds families that installed packages name."""
    package = tmp_path / "plugin"
    (package / "pythia-1.0.dist-info").mkdir(parents=True)
    (package / "pythia-1.0.dist-info" / "METADATA").write_text("Name: pythia\nVersion: 1.0\n")
    (package / "pythia-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{families.ENTRY_POINTS}]\npythia = pythia_family:FAMILY\n")
    (package / "pythia_family.py").write_text(
        "from hip_trt.export.families import Family\nFAMILY = Family('GPTNeoXForCausalLM', 'gpt_neox')\n")
    monkeypatch.syspath_prepend(package)
    fields = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    assert families.find_family(fields, "config.json").layers == "model.layers"


def test_family_of_an_own_class(tmp_path: Path) -> None:
    class TwiceConfig(LlamaConfig):  # type: ignore[misc]
        model_type = "twice"

    class TwiceForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
        """A Llama whose logits are doubled."""

        config_class = TwiceConfig

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            result.logits = 2 * result.logits
            return result

    fields = CASE["Llama-3.2-1B"].model().config.to_dict()
    torch.manual_seed(0)
    model = TwiceForCausalLM(TwiceConfig(**{**fields, "architectures": ["TwiceForCausalLM"], "model_type": "twice"}))
    model.eval().save_pretrained(tmp_path / "model")
    register_family(Family("TwiceForCausalLM", "twice", implementation=TwiceForCausalLM))
    exported = export_onnx(tmp_path / "model", tmp_path, config=DENSE)
    assert_serves(exported.path, logits(model, tokens(80)), tokens(80))


def test_layer_that_bypasses_the_interface_is_noticed(tmp_path: Path) -> None:
    class OwnAttention(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.layers[1].self_attn.forward = lambda hidden_states, **options: (hidden_states, None)

    CASE["Llama-3.2-1B"].model(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    register_family(Family("LlamaForCausalLM", "llama", implementation=OwnAttention))
    with pytest.raises(ExportError, match="layer 1 did not call transformers' attention interface"):
        export_onnx(tmp_path / "model", tmp_path, config=DENSE)
