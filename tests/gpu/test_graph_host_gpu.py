"""The exported sample on a GPU, its attention in the TensorRT plugin, under the runtime's own generator and sessions.

``benchmarks/graph_host_report.py`` measures the same with more in its report.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_host import GraphExecutor, Plugin
from graph_host.agreement import failures, measure
from graph_host.decoding import host_greedy, host_logits
from graph_host.weights import restore_weights
from plugin_host import find_session

from hip_trt import library as binding
from hip_trt.errors import PluginError
from hip_trt.evaluate.texts import manual
from hip_trt.offload import Offload
from hip_trt.runtime import Generator
from hip_trt.runtime.executor import Limits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sample,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MODELS = "HIP_TRT_GRAPH_HOST_MODELS"
"""Environment variable that names a folder of exports of the sample, without weights if need be; made here if unset."""

CUDA = torch.device("cuda:0")
EXPORTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"}, "float32-reuse0": {"dtype": "float32", "reuse_level": 0},
    "float16": {"dtype": "float16"},
}
LIMITS = Limits(max_batch=3, max_prefill=512, max_seq_len=2400)
LOGIT_ERRORS = {"float32": 5e-3, "float16": 0.5}


@pytest.fixture(scope="module")
def plugin() -> Iterator[Plugin]:
    """From the library that everything else uses: the caches of offloading belong to it. HIP_TRT_LIBRARY names one that
    is not the installed one."""
    with pytest.MonkeyPatch.context() as patch:
        if "HIP_TRT_LIBRARY" in os.environ:
            patch.setattr(binding, "plugin_path", lambda: Path(os.environ["HIP_TRT_LIBRARY"]))
            binding.load.cache_clear()
        try:
            path = binding.load().path
        except PluginError as error:
            pytest.skip(f"no CUDA kernels: {error.cause}")
        plugin = Plugin(find_session(), path)
        yield plugin
        gc.collect()  # layers go before the library
        plugin.close()
    binding.load.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(sample_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        sample_model.parent, gguf_file=sample_model.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompt(sample_model: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    return [int(token) for token in tokenizer(manual().content[:40000])["input_ids"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, sample_model: Path) -> Callable[[str], Path]:
    def model(name: str) -> Path:
        if MODELS in os.environ:
            return Path(os.environ[MODELS], name, "model.onnx")
        from hip_trt.config import HipConfig
        from hip_trt.export import export_onnx

        options = dict(EXPORTS[name])
        dtype = options.pop("dtype")
        return export_onnx(
            sample_model, tmp_path_factory.mktemp(name) / "model.onnx", dtype=dtype, config=HipConfig.create(**options)
        ).path

    return model


@pytest.fixture
def ready(models: Callable[[str], Path], checkpoint: Any, plugin: Plugin) -> Callable[[str], tuple[GraphExecutor, Any]]:
    """The executor of an export, and the checkpoint in its type on the GPU."""
    def make(name: str) -> tuple[GraphExecutor, Any]:
        model = copy.deepcopy(checkpoint)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, EXPORTS[name]["dtype"]))
        restore_weights(models(name), model.state_dict())
        return GraphExecutor(models(name), plugin, device=CUDA, limits=LIMITS, poison=True), model.to(CUDA)

    return make


@pytest.mark.parametrize("name", EXPORTS)
def test_256_tokens_are_the_references(
    ready: Callable[[str], tuple[GraphExecutor, Any]], prompt: list[int], name: str
) -> None:
    """Of the graph host and of the patched model, resident and offloaded; and all logits of the steps."""
    executor, model = ready(name)
    offload = Offload.create(key_cache=0.1, value_cache=0.1)
    result = measure(executor, model, prompt[:2000], 256, offload=offload)
    assert not failures(result, logits=LOGIT_ERRORS[executor.spec.dtype])
    if executor.spec.dtype != "float32":  # 16-bit kernels read through the caches
        assert result["offload"]["keys"]["misses"] > 0
        assert result["offload"]["keys"]["evictions"] > 0


def test_a_ragged_batch_is_its_sequences(
    ready: Callable[[str], tuple[GraphExecutor, Any]], prompt: list[int]
) -> None:
    executor, _ = ready("float32")
    prompts = [prompt[:1900], prompt[300:700], prompt[1000:1007]]
    together = Generator(executor, max_seq_len=2048).generate(prompts, max_new_tokens=64, do_sample=False)
    alone = [host_greedy(executor, one, 64)[0] for one in prompts]
    assert [list(generation.tokens) for generation in together] == alone


def test_on_another_stream(ready: Callable[[str], tuple[GraphExecutor, Any]], prompt: list[int]) -> None:
    """Nothing runs on the default stream: what is there already holds it up for long."""
    executor, _ = ready("float16")
    tokens = prompt[1800:1840]
    expected = host_logits(executor, prompt[:1800], tokens)
    stream = torch.cuda.Stream(CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second, which calls on this stream would wait for
    with torch.cuda.stream(stream):
        found = host_logits(executor, prompt[:1800], tokens)
    stream.synchronize()
    assert torch.equal(found, expected)
