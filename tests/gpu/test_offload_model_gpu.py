"""Models with their KV cache in page-locked host memory: the same tokens, within a limit of GPU memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import LLAMA, NEEDS_CLUSTERS
from oracle import tiny_llama
from test_kernels_gpu import library  # noqa: F401  (the fixture)
from torch import Tensor

import hip_trt
from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.offload import Geometry, Offload, OffloadedCache

pytestmark = NEEDS_CLUSTERS

CUDA = torch.device("cuda:0")
SPARSE = HipConfig.create(
    mask_k=64, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, branch=2, leaf_branch=2, page_size=16,
    sink_tokens=8, window_tokens=16, refresh_interval=3,
)


def generate(model: Any, ids: Tensor, valid: Tensor, tokens: int) -> Tensor:
    with torch.inference_mode():
        return model.generate(ids.to(CUDA), attention_mask=valid.to(CUDA), do_sample=False, pad_token_id=0,
                              min_new_tokens=tokens, max_new_tokens=tokens).cpu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("offload", [
    Offload.create(key_cache_mib=0, value_cache_mib=0), Offload.create(key_cache_mib=0.125, value_cache_mib=0.125),
    Offload.create(key_cache=0.5, value_cache=0.5),
], ids=["none", "tiny", "whole"])
def test_tiny_model_generates_the_same(installed: None, offload: Offload) -> None:
    model = tiny_llama(head_dim=64, hidden_size=64, initializer_range=0.2).to(CUDA, torch.float16)
    ids, valid = torch.randint(1, 61, (2, 200)), torch.ones(2, 200, dtype=torch.long)
    valid[1, :71] = 0
    results = []
    for where in (None, offload):
        hip_trt.patch(model, SPARSE, offload=where)
        results.append(generate(model, ids, valid, 100))
        hip_trt.unpatch(model)
    assert torch.equal(*results)


@pytest.mark.sample
@pytest.mark.usefixtures("installed")
def test_sample_model_generates_the_same(sample_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": sample_model.name}
    tokenizer = AutoTokenizer.from_pretrained(sample_model.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(sample_model.parent, dtype=torch.bfloat16, **options).to(CUDA).eval()
    from pydoc_data.topics import topics

    inputs = tokenizer("\n".join(topics.values())[:12000], return_tensors="pt")
    results = []
    for where in (None, Offload.create(), Offload.create(key_cache_mib=8, value_cache_mib=8)):
        hip_trt.patch(model, LLAMA, offload=where)
        results.append(generate(model, inputs.input_ids, inputs.attention_mask, 256))
        hip_trt.unpatch(model)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """Whatever limit a test sets is lifted after it."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("memory_limit")
def test_a_context_that_does_not_fit_when_resident(library: Library) -> None:  # noqa: F811
    """Four layers of 128k tokens, 2.1 GB, where the GPU gives 0.9 GB; without the limit, the same bits resident."""
    layers, tokens = 4, 128 * 1024
    slots = tokens // LLAMA.page_size + 1
    geometry = Geometry(layers, 8, 8, 128, torch.bfloat16, 1, slots, slots, LLAMA)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((before + 0.9e9) / total)
    with pytest.raises(torch.OutOfMemoryError):
        _resident(geometry)
    torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, layers, 1, 32, 1, 128, generator=generator).to(torch.bfloat16)
    rows = torch.randn(40, 2, layers, 1, 8, 1, 128, generator=generator).to(torch.bfloat16)
    with OffloadedCache(geometry, Offload.create(), device=CUDA, library=library) as cache:
        for layer in range(layers):
            pages = torch.randn(2, slots, 8, LLAMA.page_size, 128, generator=generator).to(torch.bfloat16)
            cache.write(layer, pages[0], pages[1])
        offloaded = _decode(library, [cache.pools(layer) for layer in range(layers)], queries, rows, tokens - 64)
        stats = cache.stats()
        assert stats.gpu_bytes < 0.06 * stats.host_bytes
        assert torch.cuda.max_memory_reserved() - before < 0.5 * stats.host_bytes
        torch.cuda.set_per_process_memory_fraction(1.0)
        pools = _resident(geometry)
        for layer in range(layers):
            for to, pool in zip(pools[layer], cache.pools(layer), strict=True):
                to.copy_(pool)
    resident = _decode(library, pools, queries, rows, tokens - 64)
    assert torch.equal(offloaded, resident)


def _resident(geometry: Geometry) -> list[tuple[Tensor, Tensor]]:
    return [(torch.empty(geometry.pool_shape, dtype=geometry.dtype, device=CUDA),
             torch.empty(geometry.pool_shape, dtype=geometry.dtype, device=CUDA)) for _ in range(geometry.num_layers)]


def _decode(
    library: Library, pools: list[tuple[Tensor, Tensor]], queries: Tensor, rows: Tensor, start: int  # noqa: F811
) -> Tensor:
    """Outputs of every step and layer."""
    slots = pools[0][0].shape[0]
    table = torch.arange(slots, dtype=torch.int32, device=CUDA)[None].contiguous()
    length = torch.full((1,), start, dtype=torch.int32, device=CUDA)
    one = torch.ones(1, dtype=torch.int32, device=CUDA)
    nodes = [torch.full((1, 8, LLAMA.decode_mask_blocks), -1, dtype=torch.int32, device=CUDA) for _ in pools]
    outputs = []
    for step, query in enumerate(queries):
        refresh = torch.tensor([int(step % LLAMA.refresh_interval == 0)], dtype=torch.int32, device=CUDA)
        for layer, (keys, values) in enumerate(pools):
            output, _, _, nodes[layer] = library.attention(
                query[layer].to(CUDA), rows[step, 0, layer].to(CUDA), rows[step, 1, layer].to(CUDA), keys, values,
                table, length, one, nodes[layer], refresh, config=LLAMA, scale=128**-0.5, present_key=keys,
                present_value=values,
            )
            outputs.append(output.cpu())
        length += 1
    return torch.stack(outputs)
