"""An engine in plain TensorRT calls: prefill, then greedy decoding, token ids in and token ids out.

    python samples/03_engine_in_python/decode.py build/engine.plan --prompt 504,3575,282 --new-tokens 16

hip_trt is asked for one thing only, where the plugin library is; TensorRT does the rest. Needs a GPU that the plan was
built for; without one it stops in a line once the plugin is registered. The plan must hold its weights (no
--strip-weights).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_rtx as trt

PREFILL, DECODE = 0, 1  # optimization profiles
TYPES = {
    trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.float32: torch.float32, trt.int32: torch.int32,
    trt.int64: torch.int64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--prompt", required=True, help="token ids, apart by commas")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--refresh-interval", type=int, default=8, help="decode steps between searches from the top")
    arguments = parser.parse_args()
    prompt = [int(token) for token in arguments.prompt.split(",")]

    logger = trt.Logger(trt.Logger.ERROR)
    plugin = resources.files("hip_trt") / "libhip_trt_plugin.so"
    if trt.get_plugin_registry().load_library(str(plugin)) is None:
        sys.exit(f"error: {plugin}: TensorRT {trt.__version__} refuses the plugin library.")
    print(f"TensorRT {trt.__version__}: plugin registered", file=sys.stderr)
    if not torch.cuda.is_available():
        sys.exit(f"error: {arguments.plan}: a plan needs a GPU from here on, and there is none that PyTorch can use.")

    runtime = trt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(arguments.plan.read_bytes())
    if engine is None:
        sys.exit(f"error: {arguments.plan}: TensorRT {trt.__version__} cannot load it on this GPU.")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for token in decode(
            engine, prompt, arguments.new_tokens, refresh_interval=arguments.refresh_interval,
            device=torch.device("cuda"), stream=stream.cuda_stream,
        ):
            print(token, flush=True)


def decode(
    engine: Any, prompt: list[int], new_tokens: int, *, refresh_interval: int, device: torch.device, stream: int
) -> Iterator[int]:
    """Yield the likeliest tokens one by one. One sequence, whose cache is as long as it needs."""
    shapes = {
        name: tuple(engine.get_tensor_shape(name)) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
    }
    page_size = shapes["past_key_values.0.key"][2]
    pages = -(-(len(prompt) + new_tokens) // page_size)

    # The state is the caller's: a pool of pages for each layer's keys and values, and the tree nodes that decode steps
    # keep. Present outputs share the buffers of past inputs.
    buffers = {"page_table": torch.arange(pages, dtype=torch.int32, device=device)[None]}
    for name, shape in shapes.items():
        if name.startswith(("past_key_values.", "past_nodes.")):
            size = (pages if name.startswith("past_key_values.") else 1, *shape[1:])
            buffers[name] = torch.full(size, -1, dtype=TYPES[engine.get_tensor_dtype(name)], device=device)
            present = name.replace("past_key_values.", "present.").replace("past_nodes.", "present_nodes.")
            buffers[present] = buffers[name]

    contexts = []
    for profile in (PREFILL, DECODE):
        contexts.append(engine.create_execution_context())
        contexts[-1].set_optimization_profile_async(profile, stream)

    chunk = engine.get_tensor_profile_shape("input_ids", PREFILL)[2][1]  # the most tokens that a call may have

    def run(profile: int, tokens: list[int], past: int, refresh: bool) -> torch.Tensor:
        """Append tokens to the sequence; the logits after the last."""
        count = len(tokens)
        if profile == PREFILL and count == 1 and chunk > 1:
            tokens = [*tokens, 0]  # a call of one column would be a decode step; padding is left out by query_lengths
        outputs = 1 if shapes["logits"][1] == 1 else len(tokens)
        logits = torch.empty(1, outputs, shapes["logits"][2], dtype=torch.float32, device=device)
        tensors = {
            **buffers, "logits": logits, "input_ids": torch.tensor([tokens], dtype=torch.int64, device=device),
            "past_lengths": torch.tensor([past], dtype=torch.int32, device=device),
            "query_lengths": torch.tensor([count], dtype=torch.int32, device=device),
            "refresh_mask": torch.tensor([refresh], dtype=torch.int32, device=device),
        }
        context = contexts[profile]
        for name in shapes:
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                context.set_input_shape(name, tuple(tensors[name].shape))
            context.set_tensor_address(name, tensors[name].data_ptr())
        if not context.execute_async_v3(stream):
            sys.exit("error: TensorRT failed; its messages are above.")
        return logits[0, min(count, outputs) - 1]

    for past in range(0, len(prompt), chunk):
        logits = run(PREFILL, prompt[past : past + chunk], past, refresh=True)
    for step in range(new_tokens):
        token = int(logits.argmax())
        yield token
        if step + 1 < new_tokens:
            logits = run(DECODE, [token], len(prompt) + step, refresh=step % refresh_interval == 0)


if __name__ == "__main__":
    main()
