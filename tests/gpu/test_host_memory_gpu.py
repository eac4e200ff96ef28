"""Locked, mapped host memory on a GPU, and a patched model whose KV cache is there."""

from __future__ import annotations

import gc

import pytest
import torch
from oracle import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import hip_trt
from hip_trt.config import HipConfig
from hip_trt.huggingface import HipCache, cache_argument, output_cache
from hip_trt.offload import Offload
from hip_trt.offload.host_memory import CudaHost, HostMemory, Refused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda:0")
CONFIG = HipConfig.create(
    mask_k=256, decode_mask_k=128, block_q=64, block_k=16, branch=4, leaf_branch=4, page_size=64, sink_tokens=16,
    window_tokens=64, refresh_interval=4,
)


@pytest.mark.parametrize("size", [4096, (3 << 20) + 5, 1 << 28])
def test_both_sides_see_one_memory(size: int) -> None:
    memory = HostMemory(CudaHost(CUDA), size)
    device, host = memory.device_bytes(), memory.host_bytes()
    assert device.device == CUDA
    assert device.shape == host.shape == (size,)
    pattern = (torch.arange(size) % 251).to(torch.uint8)
    device[:] = pattern.to(CUDA)
    torch.cuda.synchronize()
    assert host.equal(pattern)
    host.fill_(7)
    assert (device == 7).all()
    del device, host
    torch.cuda.synchronize()
    memory.close()


def test_refusal_leaves_no_error_behind() -> None:
    host = CudaHost(CUDA)
    memory = HostMemory(host, 1 << 21)
    if memory.registered:
        with pytest.raises(Refused, match="ALREADY_REGISTERED"):
            host.register(memory._address, 1 << 21)
    with pytest.raises(Refused, match="cuMemHostUnregister"):
        host.unregister(memory._address + (1 << 22))
    assert torch.ones(1000, device=CUDA).sum() == 1000
    memory.close()


def test_numa_node() -> None:
    node = CudaHost(CUDA).numa_node()
    assert node is None or node >= 0


def talk(model: LlamaForCausalLM) -> tuple[list[Tensor], HipCache]:
    """Two turns of two sequences, with decode steps after each."""
    cache, results, generator = None, [], torch.Generator().manual_seed(0)
    for tokens in (1000, *[1] * 20, 77, *[1] * 20, 700, 1):
        ids = torch.randint(1, 61, (2, tokens), generator=generator).to(CUDA)
        given = model(ids, **cache_argument(model, cache), use_cache=True)
        cache = output_cache(model, given)
        results.append(given.logits.cpu())
    return results, cache


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_patched_model(dtype: torch.dtype) -> None:
    """Bits of every call, while pools grow."""
    model = tiny_llama(head_dim=64, hidden_size=64, initializer_range=0.2, max_position_embeddings=4096)
    model = model.to(CUDA, dtype)
    with torch.inference_mode():
        expected, _ = talk(hip_trt.patch(model, CONFIG))
        for offload in (Offload(), Offload(key_cache=0, value_cache=0), Offload.of_share(0.2)):
            actual, cache = talk(hip_trt.patch(model, CONFIG, offload=offload))
            for call, (one, other) in enumerate(zip(actual, expected, strict=True)):
                assert one.equal(other), f"call {call}"
            assert cache.offloaded is not None
            stats = cache.offloaded.stats()
            assert stats.tokens == 82
            assert stats.gpu_bytes < stats.host_bytes
            del cache
            gc.collect()
    hip_trt.unpatch(model)
