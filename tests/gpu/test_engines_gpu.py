"""Engines of genuine TensorRT: built here, executed here, and compared with ONNX Runtime.

The group has a marker of its own: ``pytest -m engine``. Engines whose budget covers the context are compared with the
float32 .onnx of the same checkpoint, on the same tokens: errors of logits within the bound of the engine's type, and
the same token wherever the margin decides (tests/margin_rule.py). Engines that prune are compared by ``hip-trt
verify``, which knows that rounding turns close scores around, and with themselves. Set HIP_TRT_ENGINE_REPORT to a file
for one JSON line a comparison.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, Case
from margin_rule import BOUNDS, assert_agree
from oracle import tiny_llama
from torch import Tensor

import hip_trt
from hip_trt.config import HipConfig
from hip_trt.errors import EngineError, HipTrtError, RuntimeInputError
from hip_trt.export import build_engine, export_onnx
from hip_trt.gpu import current_gpu
from hip_trt.offload import Offload
from hip_trt.runtime import Generator, Session
from hip_trt.sidecar import sidecar_path
from hip_trt.tensorrt_flavour import find_flavour, installed

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

COVERED = HipConfig.create(mask_k=640, decode_mask_k=640, window_tokens=128, refresh_interval=3)
"""Nothing is pruned in the context of these models."""
PRUNED = COVERED.replace(mask_k=128, decode_mask_k=64)
"""Prompts of 500 tokens are pruned, in prefill and in decode."""
PROMPT, STEPS = 500, 24
SIZES = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 192, "max_position_embeddings": 640,
         "initializer_range": 0.1}


def missing() -> str:
    """What this machine lacks to build and run engines."""
    if current_gpu() is None or not torch.cuda.is_available():
        return "a GPU"
    if "tensorrt" not in installed():
        return "TensorRT (not TensorRT-RTX), which builds for the GPU here"
    try:
        find_flavour("tensorrt")
    except HipTrtError as error:
        return str(error)
    return ""


if lacking := missing():
    pytest.skip(f"engines need {lacking}", allow_module_level=True)


@dataclass(frozen=True)
class Pair:
    """One checkpoint twice.

    Attributes:
        plan: the engine's file.
        engine: it, loaded.
        reference: the float32 .onnx in ONNX Runtime.
        dtype: what the engine computes in.
    """

    plan: Path
    engine: Generator
    reference: Generator
    dtype: str


def make(
    folder: Path, model: Any, dtype: str = "float16", *, hip: HipConfig = COVERED, max_context: int | None = None,
    options: dict[str, Any] | None = None, loading: dict[str, Any] | None = None, **limits: Any,
) -> Pair:
    """Save a model, export it in two types, build an engine of one, and load both."""
    model.to(getattr(torch, dtype)).save_pretrained(folder / "checkpoint")
    paths = [
        export_onnx(
            folder / "checkpoint", folder / name / "model.onnx", config=hip, dtype=kind, max_context=max_context,
        ).path
        for name, kind in (("engine", dtype), ("reference", "float32"))
    ]
    plan = folder / "engine" / "engine.plan"
    options = {"max_batch": 3, "max_prefill": 512, **limits, **(options or {})}
    build_engine(paths[0], plan, runtime="tensorrt", **options)
    return Pair(plan, hip_trt.load(plan, **(loading or {})), hip_trt.load(paths[1]), dtype)


def prompts(*lengths: int, vocabulary: int = 97, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=random).tolist() for length in lengths]


def greedy(session: Session, given: Sequence[Sequence[int]], steps: int = STEPS) -> tuple[Tensor, list[list[int]]]:
    """Logits [rows, V] of prompts and of the tokens that follow greedily, and those tokens, a list a step."""
    logits, rows, tokens = session.append(given), [], []
    for _ in range(steps):
        rows.append(logits.float().cpu().clone())
        tokens.append(rows[-1].argmax(dim=1).tolist())
        logits = session.step(tokens[-1])
    return torch.cat([*rows, logits.float().cpu()]), tokens


def follow(session: Session, given: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Tensor:
    """The same logits of another executor, given the same tokens."""
    rows = [session.append(given).float().cpu()]
    rows += [session.step(step).float().cpu().clone() for step in tokens]
    return torch.cat(rows)


def agree(
    pair: Pair, given: Sequence[Sequence[int]], name: str, *, bound: float | None = None, **session: Any
) -> Tensor:
    """Compare a pair on prompts and greedy steps; the engine's logits."""
    most = max(map(len, given)) + STEPS + 1
    expected, tokens = greedy(Session(pair.reference.executor, batch=len(given), max_seq_len=most), given)
    with Session(pair.engine.executor, batch=len(given), max_seq_len=most, **session) as opened:
        found = follow(opened, given, tokens)
    report(name, pair, expected, found, bound or BOUNDS[pair.dtype])
    return found


def report(name: str, pair: Pair, expected: Tensor, found: Tensor, bound: float) -> None:
    """Assert that they agree, and write down by how much."""
    from margin_rule import compare

    if file := os.environ.get("HIP_TRT_ENGINE_REPORT"):
        result = compare(expected, found, bound)
        row = {"name": name, "dtype": pair.dtype, "bound": bound, **result.__dict__}
        with open(file, "a", encoding="utf-8") as lines:
            print(json.dumps(row), file=lines)
    assert_agree(expected, found, bound)


# Shapes and types

SHAPES = {
    "MHA": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
    "GQA 2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "GQA 4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "GQA 8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64},
    "head size 80": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80},
    "head size 96": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96},
    "head size 128": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": True,
               "mlp_bias": True},
    "tied weights": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    agree(make(tmp_path, tiny_llama(**SIZES, **SHAPES[shape])), prompts(PROMPT, 77, 2), shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", ["GQA 4", "head size 128"])
def test_types(shape: str, dtype: str, tmp_path: Path) -> None:
    agree(make(tmp_path, tiny_llama(**SIZES, **SHAPES[shape]), dtype), prompts(PROMPT, 77, 2), shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_families(case: Case, tmp_path: Path) -> None:
    """Biases, norms, multipliers, RoPE of every kind, and sliding windows up to the window."""
    context = case.max_context or 256
    pair = make(
        tmp_path, case.model(), "float32", max_context=case.max_context, max_prefill=min(512, context),
        hip=COVERED.replace(sink_tokens=16, window_tokens=32),
    )
    longest = min(200, pair.engine.max_seq_len - STEPS - 1)
    agree(pair, prompts(longest, 33), case.name)


# What a session does


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("pair"), tiny_llama(**SIZES, **SHAPES["GQA 4"]))


def test_chunked_prefill(pair: Pair) -> None:
    given = prompts(PROMPT, 130)
    whole = agree(pair, given, "prefill at once")
    chunked = agree(pair, given, "prefill in chunks of 64", prefill_chunk=64)
    assert (whole - chunked).abs().max() < BOUNDS[pair.dtype] * whole.abs().max()


def test_prefix_reuse(pair: Pair) -> None:
    """A second prompt that begins as the first did: what both share is not computed again."""
    first, second = prompts(PROMPT, 90)
    given = first[:320] + second
    expected, tokens = greedy(Session(pair.reference.executor, max_seq_len=600), [given])
    session = Session(pair.engine.executor, max_seq_len=600)
    session.append([first])
    session.truncate(0, 320)
    report("prefix reuse", pair, expected, follow(session, [second], tokens), BOUNDS[pair.dtype])


def test_shared_pages(pair: Pair) -> None:
    """Two sequences over the same pages, and then each by itself."""
    first, second = prompts(PROMPT, 70)
    both = [first, first[:384] + second]
    expected, tokens = greedy(Session(pair.reference.executor, batch=2, max_seq_len=600), both)
    session = Session(pair.engine.executor, batch=2, max_seq_len=600)
    session.append([first, []])
    shared = session.share_prefix(1, 0, 384)
    assert shared == 384
    logits = session.append([[], both[1][shared:]])
    rows = [torch.stack([expected[0], logits[1].float().cpu()])]
    rows += [session.step(step).float().cpu().clone() for step in tokens]
    report("shared pages", pair, expected, torch.cat(rows), BOUNDS[pair.dtype])


def test_limits_are_refused(pair: Pair) -> None:
    for options in ({"batch": 4}, {"max_seq_len": 641}, {"prefill_chunk": 513}):
        with pytest.raises(RuntimeInputError, match="more than the engine allows"):
            Session(pair.engine.executor, **{"max_seq_len": 64, **options})


# What pruning engines do


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("pruned"), tiny_llama(**SIZES, **SHAPES["GQA 4"]), hip=PRUNED)


@pytest.mark.parametrize("against", ["reference", "onnxruntime"])
def test_verify(pruned: Pair, against: str) -> None:
    """What ``hip-trt verify engine.plan`` runs."""
    verified(pruned, against)


def test_verify_bfloat16(tmp_path: Path) -> None:
    """ONNX Runtime computes in float32 then."""
    verified(make(tmp_path, tiny_llama(**SIZES, **SHAPES["GQA 4"]), "bfloat16", hip=PRUNED), "onnxruntime")


def verified(pair: Pair, against: str) -> None:
    pytest.importorskip("polygraphy", reason="needs polygraphy")
    from hip_trt.verify import verify

    result = verify(pair.plan, against=against, require_engine=True)
    assert result.agrees, result.model_dump_json()
    assert "tensorrt" in result.runner.lower()


def test_offload_gives_the_same_bits(pruned: Pair) -> None:
    given = prompts(PROMPT, 130)
    resident, tokens = greedy(Session(pruned.engine.executor, batch=2, max_seq_len=600), given)
    with Session(pruned.engine.executor, batch=2, max_seq_len=600, offload=Offload()) as session:
        assert torch.equal(resident, follow(session, given, tokens))


# Plans of other kinds


def test_stripped_plan_is_refitted(tmp_path: Path) -> None:
    pair = make(tmp_path, tiny_llama(**SIZES, **SHAPES["GQA 2"]), options={"strip_weights": True})
    agree(pair, prompts(PROMPT, 40), "stripped and refitted")


def test_weight_streaming(tmp_path: Path) -> None:
    pair = make(
        tmp_path, tiny_llama(**SIZES, **SHAPES["GQA 2"]), options={"weight_streaming": True},
        loading={"weight_budget": 100_000},
    )
    agree(pair, prompts(PROMPT, 40), "weights streamed")


@pytest.mark.parametrize("shape", ["GQA 2", "head size 128"])
def test_int4(shape: str, tmp_path: Path) -> None:
    """Against ONNX Runtime on the same file: scales of another type would round to other weights."""
    pytest.importorskip("modelopt.onnx.quantization", reason="needs NVIDIA Model Optimizer")
    model = tiny_llama(**SIZES, **SHAPES[shape]).to(torch.float16)
    model.save_pretrained(tmp_path / "checkpoint")
    exported = export_onnx(tmp_path / "checkpoint", tmp_path / "model.onnx", config=COVERED, quantize="int4")
    build_engine(exported.path, tmp_path / "engine.plan", runtime="tensorrt", max_batch=2, max_prefill=512)
    pair = Pair(
        tmp_path / "engine.plan", hip_trt.load(tmp_path / "engine.plan"), hip_trt.load(exported.path), "float16"
    )
    agree(pair, prompts(PROMPT, 40), f"INT4, {shape}")


# A published model

CHATS = [
    "What is the capital of France?", "Name three colours of the rainbow.", "How many legs does a spider have?",
    "Write a haiku about the sea.", "What is 12 times 12?", "Who wrote Romeo and Juliet?",
    "Explain photosynthesis in one sentence.", "Translate 'good morning' into Spanish.",
    "What is the boiling point of water?",
    "Tell me a short story about a fox.", "What does a compiler do?", "List the planets of the solar system.",
    "How do I boil an egg?", "What is the largest ocean?", "Give me a synonym for 'happy'.",
    "Why is the sky blue?", "Who painted the Mona Lisa?", "What is a prime number?", "Name two kinds of cheese.",
    "How far away is the Moon?", "Write a Python function that adds two numbers.", "What is the opposite of 'cold'?",
    "Describe a rainy day.", "What is gravity?", "Which language is spoken in Brazil?", "What do bees make?",
    "Give three tips for sleeping well.", "What is a noun?", "When did the Second World War end?", "Tell me a joke.",
]
DOCS, LONG_PROMPT = Path(__file__).parents[2] / "docs", 7000


@pytest.fixture(scope="module")
def smollm(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """SmolLM2-135M; chats and the long prompt fit into the budget."""
    folder = tmp_path_factory.mktemp("smollm")
    covered = HipConfig.create(mask_k=8192, decode_mask_k=8192)
    paths = [
        export_onnx(sample_model, folder / kind / "model.onnx", dtype=kind, config=covered).path
        for kind in ("float16", "float32")
    ]
    plan = folder / "float16" / "engine.plan"
    build_engine(paths[0], plan, runtime="tensorrt", max_batch=10)
    return Pair(plan, hip_trt.load(plan), hip_trt.load(paths[1]), "float16")


@pytest.mark.parametrize("first", range(0, len(CHATS), 10))
def test_smollm_chats(smollm: Pair, first: int) -> None:
    asked = [
        smollm.reference.encode_chat([{"role": "user", "content": text}]) for text in CHATS[first : first + 10]
    ]
    agree(smollm, asked, f"SmolLM2, chats {first} to {first + 9}")


def test_smollm_long_prompt(smollm: Pair) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    agree(smollm, [smollm.reference.encode(text)[:LONG_PROMPT]], f"SmolLM2, a prompt of {LONG_PROMPT} tokens")


# Plans that cannot be run


def _other_version(plan: Path) -> None:
    edit(plan, tensorrt_version="9.9.9")


def _other_gpu(plan: Path) -> None:
    edit(plan, compute_capabilities=["8.9"])


def _truncated(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-100])


def _other_format(plan: Path) -> None:
    edit(plan, format_version=99, hip_trt_version="9.9.9")


def edit(plan: Path, **fields: Any) -> None:
    beside = sidecar_path(plan)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_other_version, ("built by tensorrt 9.9.9, which alone can read it; here is tensorrt",)),
        (_other_gpu, ("built for GPUs of compute capability 8.9;", "has ")),
        (_truncated, ("damaged", "bytes")),
        (_other_format, ("made by hip-trt 9.9.9 in format 99", "reads format")),
    ],
    ids=["other TensorRT", "other GPU", "truncated", "other format"],
)
def test_bad_plans(pair: Pair, tmp_path: Path, damage: Callable[[Path], None], parts: tuple[str, ...]) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(pair.plan.read_bytes())
    sidecar_path(plan).write_bytes(sidecar_path(pair.plan).read_bytes())
    damage(plan)
    before = torch.cuda.memory_allocated()
    with pytest.raises(EngineError) as error:
        hip_trt.load(plan)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert torch.cuda.memory_allocated() == before
