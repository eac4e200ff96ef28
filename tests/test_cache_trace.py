"""Recorded traces: states as the model computes them, reads as the reference makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cache_policies

from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate.cache_trace import Accesses, LayerStates, Trace, capture, replay
from hip_trt.huggingface import cache_argument
from hip_trt.reference import Tree, select_blocks, tree

CONFIG = HipConfig.create(
    mask_k=32, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, branch=2, leaf_branch=3, page_size=16,
    sink_tokens=16, window_tokens=24, refresh_interval=4,
)


def states(steps: int = 11, tokens: int = 500, heads: int = 2, query_heads: int = 4) -> LayerStates:
    return LayerStates(torch.randn(query_heads, steps, 8), torch.randn(heads, tokens, 8))


def expected_attended(given: LayerStates, config: HipConfig) -> list[list[int]]:
    """Blocks of all heads by step, in a pool whose pages are in order."""
    heads, tokens, _ = given.keys.shape
    steps, per_page, group = given.queries.shape[1], config.page_size // config.block_k, given.queries.shape[0] // heads
    nodes: dict[int, Tensor] = {}
    result = []
    for step in range(steps):
        blocks: list[int] = []
        for head in range(heads):
            queries = given.queries[head * group : (head + 1) * group, step : step + 1]
            position = tokens - steps + step
            reused = nodes.get(head) if step % config.refresh_interval else None
            chosen, kept = select_blocks(queries, given.keys[head, : position + 1], torch.tensor([position]),
                                         config=config, decode=True, past_nodes=reused)
            if kept is not None:
                nodes[head] = kept
            blocks += [(b // per_page * heads + head) * per_page + b % per_page for b in chosen.tolist()]
        result.append(blocks)
    return result


@pytest.mark.parametrize("level", [0, 1])
def test_what_is_attended(level: int) -> None:
    given, config = states(), CONFIG.replace(reuse_level=level)
    trace = replay(given, config)
    assert [trace.values.step(i).tolist() for i in range(11)] == expected_attended(given, config)
    assert trace.pool_blocks == 2 * 2 * 32  # 500 tokens fill 32 pages of 2 blocks a head


def test_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that the reference scores, level by level, and then the attended ones, head after head."""
    given, scored = states(heads=1, query_heads=2), []
    scores = tree.block_scores

    def counted(queries: Tensor, keys: Tensor, blocks: Tensor, **options: Any) -> Tensor:
        scored.append(blocks.tolist())
        return scores(queries, keys, blocks, **options)

    monkeypatch.setattr(tree, "block_scores", counted)
    trace = replay(given, CONFIG)
    levels = Tree(2, 58, CONFIG.branch, CONFIG.leaf_branch).start_level(CONFIG.decode_mask_blocks) + 1
    assert levels >= 3
    assert len(scored) == 3 * levels + 8  # searched from the top in steps 0, 4 and 8
    reads = iter(scored)
    for step in range(11):
        blocks = [b for _ in range(1 if step % 4 else levels) for b in next(reads)]
        assert trace.keys.step(step).tolist() == blocks + trace.values.step(step).tolist()


def test_pages_may_lie_anywhere() -> None:
    given = states()
    table = torch.randperm(40)[:32]
    plain, scattered = replay(given, CONFIG), replay(given, CONFIG, page_table=table)
    page, rest = np.divmod(plain.keys.blocks, 4)
    assert (table.numpy()[page] * 4 + rest == scattered.keys.blocks).all()
    assert (plain.keys.offsets == scattered.keys.offsets).all()


def test_short_contexts_are_read_whole() -> None:
    trace = replay(states(steps=3, tokens=50), CONFIG)
    assert [len(trace.values.step(i)) for i in range(3)] == [12, 14, 14]  # tokens 48, 49 and 50: 6, 7 and 7 blocks
    assert (trace.keys.blocks == trace.values.blocks).all()
    assert trace.keys.distinct().tolist() == [12, 14, 14]


def test_one_mask_a_query_head() -> None:
    given = states()
    trace = replay(given, CONFIG.replace(mask_heads="query"))
    single = replay(LayerStates(given.queries[2:3], given.keys[1:]), CONFIG)
    # Query head 2 is the third mask, on the second KV head.
    third = trace.values.step(0)[2 * len(single.values.step(0)) :][: len(single.values.step(0))]
    assert (third // 4 * 2 + third % 2 == single.values.step(0)).all()
    assert (third // 2 % 2 == 1).all()


def test_a_file(tmp_path: Path) -> None:
    trace = replay(states(), CONFIG)
    trace.save(tmp_path / "trace.npz")
    loaded = Trace.load(tmp_path / "trace.npz")
    for one, other in ((trace.keys, loaded.keys), (trace.values, loaded.values)):
        assert (one.blocks == other.blocks).all()
        assert (one.offsets == other.offsets).all()
    assert loaded.pool_blocks == trace.pool_blocks
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    for name in ("no.npz", "absent.npz"):
        with pytest.raises(RuntimeInputError, match=name):
            Trace.load(tmp_path / name)


# ---- Recording ----


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attn_implementation="eager",
    )).eval()


def test_states_are_the_models(tmp_path: Path) -> None:
    """Keys as its cache has them; queries that give its own attention weights."""
    model, stretch, cache = llama(), torch.randint(64, (40,)), DynamicCache()
    with torch.inference_mode():
        weights = model(stretch[None], **cache_argument(model, cache), output_attentions=True).attentions
    recorded = capture(model, [stretch.tolist()], [0, 2], steps=5)
    assert recorded.keys() == {0, 2}
    for layer, state in recorded.items():
        assert torch.allclose(state.keys, cache.layers[layer].keys[0], atol=1e-5)
        logits = state.queries @ state.keys.repeat_interleave(2, dim=0).mT * 8**-0.5
        future = torch.arange(40) > torch.arange(35, 40)[:, None]
        assert torch.allclose(logits.masked_fill(future, -torch.inf).softmax(-1), weights[layer][0, :, 35:], atol=1e-5)


def test_stretches_side_by_side() -> None:
    model, text = llama(), torch.randint(64, (3, 40)).tolist()
    finished: list[int] = []
    whole = capture(model, text, [1], steps=5, drop=4, progress=finished.append)[1]
    parts = [capture(llama(), [stretch], [1], steps=5)[1] for stretch in text]
    assert finished == [0, 1, 2]
    assert torch.equal(whole.queries, parts[2].queries)
    assert torch.equal(whole.keys, torch.cat([parts[0].keys, parts[1].keys[:, 4:], parts[2].keys[:, 4:]], dim=1))


@pytest.mark.parametrize(("tokens", "layers", "steps", "what"), [
    (65, [0], 5, "65 tokens"), (40, [3], 5, r"\[3\]"), (40, [], 5, "layers"), (40, [0], 40, "40 decode steps"),
])
def test_what_cannot_be_recorded(tokens: int, layers: list[int], steps: int, what: str) -> None:
    with pytest.raises(RuntimeInputError, match=what):
        capture(llama(), [[1] * tokens], layers, steps=steps)


# ---- The benchmark ----


def test_a_benchmark(tmp_path: Path) -> None:
    """From recorded states to table and plot; nothing reads less than the optimum, and a full cache what is new."""
    file = tmp_path / "states.pt"
    torch.save({5: (torch.randn(2, 20, 8), torch.randn(1, 2048, 8))}, file)
    options = [
        "--model", "none.gguf", "--states", str(file), "--out", str(tmp_path), "--contexts", "1k", "2k",
        "--all-policies", "2k", "--steps", "20", "--warm-up", "4", "--jobs", "1", "--traces", str(tmp_path / "t"),
        "--multiples", "0.5", "1",
    ]
    cache_policies.main(cache_policies.parse(options))
    content = json.loads((tmp_path / "cache_policies.json").read_text())
    rows = content["rows"]
    assert {row["policy"] for row in rows if row["context"] == 1024} == set(cache_policies.FEW)
    assert len({row["policy"] for row in rows if row["context"] == 2048}) == 6
    where = itemgetter("context", "mode", "cache", "blocks")
    least = {where(row): row["misses"] for row in rows if row["policy"] == "optimum"}
    for row in rows:
        assert row["misses"] >= least[where(row)] - 0.5  # steps before the warm-up's end may have been better
        if row["multiple"] is None and row["policy"] == "LRU":
            assert row["misses"] < row["lookups"] / 3
    assert {row["multiple"] for row in rows} == {0.5, 1, None}
    trace = Trace.load(tmp_path / "t" / "2048-top-0.npz")
    assert trace.pool_blocks == 128
    lookups = next(r["lookups"] for r in rows if (r["context"], r["mode"], r["cache"]) == (2048, "top", "keys"))
    assert lookups == pytest.approx(sum(len(trace.keys.step(i)) for i in range(4, 20)) / 16)
    table = (tmp_path / "cache_policies.md").read_text()
    assert (tmp_path / "cache_policies.png").is_file()
    (tmp_path / "cache_policies.md").unlink()
    cache_policies.main(cache_policies.parse(["--from", str(tmp_path / "cache_policies.json"), "--out", str(tmp_path)]))
    assert (tmp_path / "cache_policies.md").read_text() == table


def test_contexts_keep_sink_and_end() -> None:
    given = states(tokens=300)
    short = cache_policies.shortened(given, 128, 32)
    assert torch.equal(short.keys, torch.cat([given.keys[:, :32], given.keys[:, -96:]], dim=1))
    assert cache_policies.shortened(given, 300, 32).keys.equal(given.keys)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, cache_policies.__file__, "--model", "absent.gguf", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "absent.gguf: no such file or folder. Give a .gguf file or a Hugging Face folder.\n"


def test_accesses_of_no_steps() -> None:
    accesses = Accesses.from_steps([])
    assert accesses.steps == 0
    assert Accesses.from_steps([[3, 3], [], [1]]).distinct().tolist() == [1, 0, 1]
