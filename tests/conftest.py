"""Settings of the whole suite, and the checkpoints that tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell that runs the suite in the background ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors here are tiny, so threads cost more than they bring, and on a busy machine they spin while they wait for each
# other. Set before torch starts its pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton kernels are interpreted. Triton reads this when it is first imported, as transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SAMPLE_MODEL = "HIP_TRT_SAMPLE"
"""Environment variable that names the sample model's .gguf file; build/sample/*.gguf if it is not set."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in one safetensors file, float32, with a tokenizer and a chat template."""
    from checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several shards with an index."""
    from checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="10KB")


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    named = os.environ.get(SAMPLE_MODEL)
    found = [Path(named)] if named else sorted(Path(__file__).parent.parent.glob("build/sample/*.gguf"))
    if not found or not found[0].is_file():
        pytest.skip(f"no sample model: run `make sample`, or set {SAMPLE_MODEL}")
    return found[0]
