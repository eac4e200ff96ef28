"""Inputs for `polygraphy run --data-loader-script`: three calls that a generator could make, state included.

Random inputs, Polygraphy's default, are no valid state: page tables would name pages that do not exist. The environment
variable HIP_TRT_MODEL names the exported .onnx that says which shapes there are (build/model.onnx by default), and
HIP_TRT_TOKENS how long the prompt is (256). Inputs are the same every time.
"""

from __future__ import annotations

import os
import pydoc_data.topics  # a real text that every Python has: its language reference
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.loading import load_tokenizer
from hip_trt.spec import ModelSpec

TOKENS = int(os.environ.get("HIP_TRT_TOKENS", "256"))
Inputs = dict[str, np.ndarray]


def load_data() -> Iterator[Inputs]:
    """A prompt, a decode step after a cache of its length, and a batch of two prompts of which one is short."""
    path = Path(os.environ.get("HIP_TRT_MODEL", "build/model.onnx"))
    spec = read_onnx(path).spec
    text = load_tokenizer(path.parent)(pydoc_data.topics.topics["specialnames"])["input_ids"][:TOKENS]
    yield call(spec, new=[text], past=[0])
    yield call(spec, new=[text[-1:]], past=[len(text) - 1])
    yield call(spec, new=[text, text[:7]], past=[0, 5])


def call(spec: ModelSpec, *, new: list[list[int]], past: list[int]) -> Inputs:
    """The graph's inputs for sequences with ``past`` tokens in the cache, here random ones, and ``new`` tokens."""
    random = np.random.default_rng(0)
    batch, width, page = len(new), max(map(len, new)), spec.hip.page_size
    slots = max(-(-(length + len(tokens)) // page) for length, tokens in zip(past, new, strict=True))
    pages = batch * slots
    inputs = {
        "input_ids": np.array([tokens + [0] * (width - len(tokens)) for tokens in new], np.int64),
        "past_lengths": np.array(past, np.int32),
        "query_lengths": np.array([len(tokens) for tokens in new], np.int32),
        "page_table": random.permutation(pages).astype(np.int32).reshape(batch, slots),  # any order will do
        "refresh_mask": np.ones(1, np.int32),
    }
    for layer in range(spec.num_layers):
        for part in ("key", "value"):
            pool = random.standard_normal(spec.pool_shape(pages)).astype(spec.dtype)
            inputs[f"past_key_values.{layer}.{part}"] = pool
        inputs[f"past_nodes.{layer}"] = np.full(spec.nodes_shape(batch), -1, np.int32)
    return inputs
