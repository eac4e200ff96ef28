"""Every model family: exported, in a plan and in eager mode it computes what transformers computes; what HiP cannot
represent is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CASES, Case
from graph_runner import GraphRunner
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import hip_trt
from hip_trt.cli import main
from hip_trt.config import HipConfig
from hip_trt.errors import CheckpointError, ConfigError, ExportError, RuntimeInputError
from hip_trt.export import Family, build_engine, export_onnx, families, graph, register_family
from hip_trt.export.checkpoint import open_checkpoint
from hip_trt.export.layers import Pattern, find_pattern, layer_kinds
from hip_trt.model_support import limits, resolve_context

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
    runner, done = GraphRunner(path, [list(range(6))]), 0
    for count in (45, len(prompt) - 49, 1, 1, 1, 1):
        actual = runner.step([prompt[done : done + count]])[0, 0]
        done += count
        np.testing.assert_allclose(actual, expected[done - 1], rtol=0, atol=1e-3, err_msg=f"after {done} tokens")


# What each family computes


@by_name
def test_exported_model_and_plan(case: Case, tmp_path: Path) -> None:
    model, prompt = case.model(), tokens(80)
    model.save_pretrained(tmp_path / "model")
    exported = export_onnx(tmp_path / "model", tmp_path, config=DENSE, max_context=case.max_context)
    assert exported.spec.model_type == model.config.model_type
    assert exported.spec.max_position_embeddings == (case.max_context or model.config.max_position_embeddings)
    assert_serves(exported.path, logits(model, prompt), prompt)
    built = build_engine(exported.path, tmp_path / "engine.plan", compute_capabilities=["8.9"], max_batch=1,
                         max_prefill=64, max_seq_len=80, runtime="tensorrt-rtx")
    assert len(built.plugin_layers) == model.config.num_hidden_layers


@by_name
def test_patched_model(case: Case) -> None:
    model, prompt = case.model(), tokens(80)
    expected, ids = logits(model, prompt), torch.tensor([prompt])
    hip_trt.patch(model, DENSE, max_context=case.max_context)
    np.testing.assert_allclose(logits(model, prompt), expected, rtol=0, atol=1e-3)
    cache = None
    for part in ids.split([45, 31, 1, 1, 1, 1], dim=1):
        with torch.no_grad():
            result = model(part, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        at = cache.get_seq_length()
        np.testing.assert_allclose(result.logits[0, -1], expected[at - 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("case", "special"), [(case, special) for case in CASES for special in case.special],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_special_shows(case: Case, special: str) -> None:
    """The random models would betray an export that left out a bias, a norm, a multiplier, ..."""
    changed, expected = case.model(), logits(case.model(), tokens(80))
    case.special[special](changed)
    assert np.abs(logits(changed, tokens(80))[44:] - expected[44:]).max() > 0.1


def test_layers_without_rope_follow_in_their_period(tmp_path: Path) -> None:
    """Seven layers of which five are traced."""
    model = CASE["SmolLM3-3B"].model(num_hidden_layers=7, no_rope_layers=[1, 0, 1, 0, 1, 0, 1], hidden_size=128,
                                     num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        traced: list[int] = []
        original = graph._trace
        patch.setattr(graph, "_trace", lambda *args: traced.append(args[-1]) or original(*args))
        exported = export_onnx(tmp_path / "model", tmp_path, config=DENSE.replace(dense_layers=[5]))
    assert traced == [5]
    assert_serves(exported.path, logits(model, tokens(80)), tokens(80))
    nodes = [node for node in GraphRunner(exported.path, [[0]]).spec.hip.dense_layers]
    assert nodes == [5]
