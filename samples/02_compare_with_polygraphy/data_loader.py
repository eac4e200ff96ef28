"""Inputs for `polygraphy run --data-loader-script`: three calls that a generator could make, state included.

Random inputs, Polygraphy's default, are no valid state: page tables would name pages that do not exist, and keys would
be like no text's. So ONNX Runtime reads the prompt first, and its cache is what later calls begin with. The environment
variable HIP_TRT_MODEL names the exported .onnx that does so (build/model.onnx by default), and HIP_TRT_TOKENS how long
the prompt is (256). Inputs are the same every time.
"""

from __future__ import annotations

import os
import pydoc_data.topics  # a real text that every Python has: its language reference
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import hip_trt
from hip_trt.operator import NODES, NOTHING
from hip_trt.runtime import Session
from hip_trt.spec import ModelSpec

TOKENS = int(os.environ.get("HIP_TRT_TOKENS", "256"))
Inputs = dict[str, np.ndarray]


def load_data() -> Iterator[Inputs]:
    """A prompt, a decode step after it, and a batch of two prompts of which one is short and goes on after 5 tokens."""
    model = hip_trt.load(Path(os.environ.get("HIP_TRT_MODEL", "build/model.onnx")))
    spec = model.executor.spec
    text = model.encode(pydoc_data.topics.topics["specialnames"])[:TOKENS]
    session = Session(model.executor, max_seq_len=len(text))
    session.append([text])
    pages = list(session.state.pages(0))
    cache = {  # [Hkv, tokens, D] of each pool
        tensor.past(index): np.concatenate([pool[page].numpy() for page in pages], axis=1)
        for index, layer in enumerate(session.state.layers)
        for tensor, pool in layer.items()
        if tensor.paged
    }
    yield call(spec, cache, new=[text], past=[0])
    yield call(spec, cache, new=[text[-1:]], past=[len(text) - 1])
    yield call(spec, cache, new=[text, text[5:12]], past=[0, 5])


def call(spec: ModelSpec, cache: Inputs, *, new: list[list[int]], past: list[int]) -> Inputs:
    """The graph's inputs for sequences that have ``past`` tokens of the text in the cache, and ``new`` tokens."""
    batch, width, page = len(new), max(map(len, new)), spec.hip.page_size
    slots = max(-(-(length + len(tokens)) // page) for length, tokens in zip(past, new, strict=True))
    table = np.random.default_rng(0).permutation(batch * slots).astype(np.int32).reshape(batch, slots)  # any order
    inputs = {
        "input_ids": np.array([tokens + [0] * (width - len(tokens)) for tokens in new], np.int64),
        "past_lengths": np.array(past, np.int32),
        "query_lengths": np.array([len(tokens) for tokens in new], np.int32),
        "page_table": table,
        "refresh_mask": np.ones(1, np.int32),
    }
    for name, rows in cache.items():
        inputs[name] = np.zeros(spec.pool_shape(batch * slots), spec.dtype)
        for pages, length in zip(table, past, strict=True):
            token = np.arange(length)
            inputs[name][pages[token // page], :, token % page] = rows[:, token].swapaxes(0, 1)
    for layer in range(spec.num_layers):
        inputs[NODES.past(layer)] = np.full(spec.state_shape(NODES, batch), NOTHING, np.int32)
    return inputs
