"""A process that keeps its KV cache in host memory, for tests of what happens to it.

    python offload_child.py LAYERS SLOTS STEPS [none|address_space|device_error]

Decodes STEPS steps (0: until it is killed) of a stack of layers. Prints a line "decoding BYTES" of host memory after
the first, a line "digest HEX" of all results at the end, and "error: ..." for what the package refuses.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from offload_stack import Stack
from torch import Tensor

from hip_trt import library as binding
from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError
from hip_trt.library import Library
from hip_trt.offload import Geometry, Offload, OffloadedCache

CUDA = torch.device("cuda:0")
CONFIG = HipConfig.create(decode_mask_k=256, leaf_branch=8)


def geometry(layers: int, slots: int) -> Geometry:
    """Llama-3.1-8B's layers: 256 KiB a page of 64 tokens and layer."""
    return Geometry(layers, 8, 8, 128, torch.bfloat16, 1, slots, slots, CONFIG)


def begin(library: Library, pools: list[tuple[Tensor, Tensor]], cache: OffloadedCache | None = None) -> Stack:
    """A prompt of 2,000 tokens and a step."""
    stack = Stack(library, pools, batch=1, query_heads=32, config=CONFIG, cache=cache)
    stack.prefill([2000], chunk=4096)
    stack.decode(1)
    return stack


def digest(stack: Stack) -> str:
    """Of the bits of all results."""
    found = hashlib.sha256()
    for result in stack.results:
        found.update(result.view(torch.int16).cpu().numpy().tobytes())
    return found.hexdigest()


def main(layers: int, slots: int, steps: int, fault: str) -> None:
    named = os.environ.get("HIP_TRT_LIBRARY")
    library = Library(named) if named else binding.load()
    torch.zeros(1, device=CUDA)
    if fault == "address_space":  # room for half of what is asked for
        status = Path("/proc/self/statm").read_text().split()
        held, asked = int(status[0]) * resource.getpagesize(), layers * geometry(layers, slots).layer_bytes
        resource.setrlimit(resource.RLIMIT_AS, (held + asked // 2, resource.RLIM_INFINITY))
    with OffloadedCache(geometry(layers, slots), Offload(), device=CUDA, library=library) as cache:
        stack = begin(library, [cache.pools(layer) for layer in range(layers)], cache)
        torch.cuda.synchronize()
        print("decoding", sum(layer.memory.size for layer in cache._layers), flush=True)
        if fault == "device_error":
            torch.zeros(1, device=CUDA)[torch.full((1,), 1 << 40, device=CUDA)].clone()  # every call fails from here on
            return
        stack.decode(steps - 1 if steps else slots * CONFIG.page_size - 2001)
        print("digest", digest(stack), flush=True)


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:4]), *(sys.argv[4:] or ["none"]))
    except HipTrtError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
