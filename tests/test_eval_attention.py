"""The studies of attention: mass that chosen blocks hold, locality of scores, break-even length. Where the answer is
known, the figures must be it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import EmulatedLibrary, build, compiler
from tiny_export import SPARSE, save_tiny_checkpoint
from torch import Tensor
from typer.testing import CliRunner

from hip_trt.bench import decode_step, dense, inputs
from hip_trt.bench.break_even import break_even as crossing
from hip_trt.bench.geometry import Geometry
from hip_trt.bench.timing import Timing
from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate import break_even, break_even_study, locality_study, mass_recall, mass_recall_study
from hip_trt.evaluate.attention_states import visit_layers
from hip_trt.evaluate.locality_scores import Nodes, correlation, random_correlation
from hip_trt.evaluate.mass_recall_masks import LibraryMasks, Masks, ReferenceMasks, candidates, first_search
from hip_trt.evaluate.mass_recall_rows import METHODS, Blocks, Masses, dense_rows
from hip_trt.evaluate.study import Study

CONFIG = HipConfig.create(
    mask_k=32, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, branch=2, leaf_branch=2, page_size=16,
    sink_tokens=16, window_tokens=32,
)
TOKENS = 512


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def structured(query_heads: int = 4, kv_heads: int = 2, size: int = 32) -> tuple[Tensor, Tensor]:
    """Queries and keys that drift slowly over the text, so that neighbours are alike: [Hq, T, D], [Hkv, T, D]."""
    torch.manual_seed(1)
    drift = torch.randn(kv_heads, TOKENS, size).cumsum(1)
    keys = (drift - drift.mean(1, keepdim=True)) / drift.std(1, keepdim=True)
    queries = 2 * torch.randn(query_heads, TOKENS, size)
    return queries, keys


def masses(
    queries: Tensor, keys: Tensor, config: HipConfig, first: int, rows: int, random: torch.Generator,
    chosen: Tensor | None = None,
) -> Masses:
    """Of one query block; by default of the blocks that the reference chooses."""
    decode = rows == 1
    if chosen is None:
        masks = ReferenceMasks()
        chosen = (masks.decode(queries, keys, config, [first]) if decode else
                  masks.prefill(queries, keys, config, [first // config.block_q]))
    scores, weights = dense_rows(queries, keys, first + torch.arange(rows)[None], 1.0)
    blocks = Blocks.of(scores, weights, [first], config, kv_heads=len(keys), budget=chosen.shape[-1])
    return Masses.of(blocks, blocks.choices(chosen, random))


# ---- Mass ----


def test_dense_rows_are_attention() -> None:
    queries, keys = structured()
    scores, weights = dense_rows(queries, keys, torch.tensor([[100, 101], [300, 301]]), 0.5)
    assert scores.shape == weights.shape == (2, 4, 2, TOKENS)
    logits = 0.5 * queries[3, 301] @ keys[1, :302].T
    torch.testing.assert_close(weights[1, 3, 1, :302], logits.softmax(-1))
    assert not weights[1, 3, 1, 302:].any()
    assert scores[1, 3, 1, 301].isfinite()
    assert scores[1, 3, 1, 302] == -torch.inf


def test_the_first_search() -> None:
    for decode in (False, True):
        config = CONFIG.replace(decode_mask_k=64)
        first = first_search(config, decode=decode)
        for position, more in ((first - 1, False), (first, True)):
            sink, window = candidates(config, position)
            assert (window - sink > (8 if decode else 4)) is more


def test_all_mass_in_one_block(random: torch.Generator) -> None:
    """Every method that looks at scores finds it; a longer window does not."""
    queries, keys = torch.ones(4, TOKENS, 32), torch.zeros(2, TOKENS, 32)
    keys[:, 160:168] = 2  # block 20; a score of 64 against 0
    config = CONFIG.replace(leaf_branch=16)  # one level: every block is scored
    for rows, first in ((16, 496), (1, 511)):
        found = masses(queries, keys, config, first, rows, random)
        assert found.rows == rows
        for method in ("hip", "exact", "best", "tokens"):
            torch.testing.assert_close(found.held[method], found.outside)
            torch.testing.assert_close(found.shared[method], found.top)
        torch.testing.assert_close(found.outside, torch.full((4,), float(rows), dtype=torch.float64))
        assert (found.held["recent"] < 1e-6).all()


def test_uniform_attention_is_shared_evenly(random: torch.Generator) -> None:
    """With equal weights each method holds what its number of blocks says."""
    queries, keys = torch.zeros(4, TOKENS, 32), torch.ones(2, TOKENS, 32)
    found = masses(queries, keys, CONFIG, 511, 1, random)
    sink, window = candidates(CONFIG, 511)
    for method in METHODS:
        torch.testing.assert_close(found.held[method], torch.full((4,), 32 / 512, dtype=torch.float64))
    torch.testing.assert_close(found.outside, torch.full((4,), 8 * (window - sink) / 512, dtype=torch.float64))
    torch.testing.assert_close(found.always + found.outside, torch.ones(4, dtype=torch.float64))


def test_everything_chosen_is_everything_held(random: torch.Generator) -> None:
    queries, keys = structured()
    config = CONFIG.replace(mask_k=512, decode_mask_k=512)
    sink, window = candidates(config, 496)
    chosen = torch.full((1, 2, 64), -1)
    chosen[..., : window - sink] = torch.arange(sink, window)
    found = masses(queries, keys, config, 496, 16, random, chosen)
    for method in METHODS:
        torch.testing.assert_close(found.held[method], found.outside)
        torch.testing.assert_close(found.shared[method], found.top)


@pytest.mark.parametrize("rows", [16, 1])
def test_order_of_the_methods(rows: int, random: torch.Generator) -> None:
    """Tokens hold most, then the best blocks, exact block top-k, HiP; random blocks least."""
    queries, keys = structured()
    total: Masses | None = None
    for first in range(256, 512, 32):
        found = masses(queries, keys, CONFIG, first, rows, random)
        if total is None:
            total = found
        else:
            total.add(found)
    assert total is not None
    held = {method: float(total.held[method].sum()) for method in METHODS}
    assert held["tokens"] > held["best"] >= held["exact"] >= held["hip"] > 1.5 * held["random"]
    assert held["exact"] > held["hip"]  # the tree of this config loses something
    assert all(float((total.held[method] - total.outside).max()) < 1e-6 for method in METHODS)


@pytest.mark.parametrize("change", [{}, {"stride_q": 16}, {"stride_k": 4}, {"mask_heads": "query"}])
def test_one_level_is_exact_block_top_k(change: dict[str, Any], random: torch.Generator) -> None:
    """Blocks.scores scores as the shipped search does."""
    queries, keys = structured()
    config = CONFIG.replace(leaf_branch=16, **change)
    for rows in (16, 1):
        found = masses(queries, keys, config, 448, rows, random)
        torch.testing.assert_close(found.held["hip"], found.held["exact"])
        assert (found.held["hip"] < found.held["tokens"]).all()


def test_the_library_chooses_like_the_reference() -> None:
    """Emulated kernels, integer-valued inputs: exact scores, so the same blocks."""
    if compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    torch.manual_seed(0)
    queries = torch.randint(-3, 4, (4, TOKENS - 7, 64)).float()
    keys = torch.randint(-3, 4, (2, TOKENS - 7, 64)).float()
    ours: list[Masks] = [ReferenceMasks(), LibraryMasks(EmulatedLibrary(build()))]
    for config in (CONFIG, CONFIG.replace(mask_heads="query"), CONFIG.replace(reuse_level=0)):
        one, other = (masks.prefill(queries, keys, config, [14, 30]) for masks in ours)
        assert torch.equal(one, other)
        assert one.min() >= 2
        for age in (0, 5):
            one, other = (masks.decode(queries, keys, config, [250, 503], age=age) for masks in ours)
            assert torch.equal(one, other)
    fresh, reused = (ours[0].decode(queries, keys, CONFIG.replace(reuse_level=0), [503], age=age) for age in (0, 9))
    assert not torch.equal(fresh, reused)


def test_variations_differ_in_one_thing() -> None:
    for mode in mass_recall.MODES:
        base, *others = mass_recall.variations(HipConfig(), mode)
        assert base.config == HipConfig()
        assert len({variation.name for variation in others}) == len(others) > 8
        assert all(variation.config != base.config or variation.age for variation in others)


def test_spread() -> None:
    assert mass_recall.spread(5, 9, 10) == [5, 6, 7, 8]
    assert mass_recall.spread(0, 101, 5) == [0, 25, 50, 75, 100]
    assert mass_recall.spread(3, 9, 1) == [8]


# ---- Locality ----


def test_correlation_of_what_is_known(random: torch.Generator) -> None:
    tokens = 4096
    valid = torch.ones(2, tokens, dtype=torch.bool)
    noise = torch.randn(2, 3, tokens)
    smooth = torch.sin(torch.arange(tokens) / 200.0).expand(2, 3, -1)
    averaged = torch.nn.functional.avg_pool1d(torch.randn(2, 3, tokens + 3), 4, 1)  # of 4 neighbours
    for distance in (1, 16, 256):
        assert correlation(noise, valid, distance).abs().max() < 0.08
    assert correlation(smooth, valid, 16).min() > 0.98
    torch.testing.assert_close(correlation(averaged, valid, 1), torch.full((2, 3), 0.75), atol=0.08, rtol=0)
    torch.testing.assert_close(correlation(averaged, valid, 3), torch.full((2, 3), 0.25), atol=0.12, rtol=0)
    assert random_correlation(smooth, valid, random).abs().max() < 0.08


def test_only_valid_keys_count(random: torch.Generator) -> None:
    smooth = torch.sin(torch.arange(1024) / 50.0).expand(1, 1, -1).clone()
    valid = torch.zeros(1, 1024, dtype=torch.bool)
    valid[:, 64:960] = True
    before = Nodes.of(smooth, valid, 32)
    expected = [correlation(smooth, valid, 4), before.between(), before.weights]
    smooth[..., :64], smooth[..., 960:] = 1e4, -torch.inf
    after = Nodes.of(smooth, valid, 32)
    for one, other in zip([correlation(smooth, valid, 4), after.between(), after.weights], expected, strict=True):
        torch.testing.assert_close(one, other)
    nodes = Nodes.of(smooth, valid, 32)
    assert nodes.whole.sum() == 28
    assert float(nodes.weights.sum()) == pytest.approx(1)
    assert torch.isfinite(nodes.rank_correlation(nodes.middle_token())).all()
    assert random_correlation(smooth, valid, random).abs().max() < 0.2


def test_variance_between_nodes() -> None:
    valid = torch.ones(1, 4096, dtype=torch.bool)
    steps = torch.randn(1, 2, 256).repeat_interleave(16, -1)  # constant within nodes of 16
    noise = torch.randn(1, 2, 4096)
    assert Nodes.of(steps, valid, 16).between().min() > 0.999
    assert Nodes.of(noise, valid, 16).between().abs().max() < 0.05
    torch.testing.assert_close(Nodes.of(steps + noise, valid, 16).between(), torch.full((1, 2), 0.5), atol=0.1, rtol=0)
    three = torch.tensor([[[1.0, 3.0, 2.0, 6.0, 9.0, 5.0]]])  # means 2, 4, 7; each of two keys
    among, inside = 2 * torch.tensor([2.0, 4.0, 7.0]).var(), (2.0 + 8.0 + 8.0) / 3
    found = Nodes.of(three, torch.ones(1, 6, dtype=torch.bool), 2).between()
    torch.testing.assert_close(found, ((among - inside) / (among + inside)).expand(1, 1))


def test_representatives() -> None:
    """Where all keys of a node are alike nothing is lost; where the largest hides from the middle, all of it."""
    valid = torch.ones(1, 2048, dtype=torch.bool)
    steps = torch.randn(1, 2, 32).repeat_interleave(64, -1)
    nodes = Nodes.of(steps, valid, 64)
    for values in (nodes.middle_token(), nodes.middle_block(16)):
        torch.testing.assert_close(nodes.rank_correlation(values), torch.ones(1, 2))
        torch.testing.assert_close(nodes.held(values, 0.25), nodes.held(nodes.largest(), 0.25))
    hidden = torch.zeros(1, 1, 2048)
    hidden[..., 0:512:64] = 50.0  # the first key of each of the first 8 nodes
    hidden[..., 512 + 32 :: 64] = 1.0  # the middle of all others
    nodes = Nodes.of(hidden, valid, 64)
    assert float(nodes.held(nodes.largest(), 0.25)) == pytest.approx(1)
    for values in (nodes.middle_token(), nodes.middle_block(16)):
        assert float(nodes.held(values, 0.25)) < 1e-6
        assert float(nodes.rank_correlation(values)) < 0
    whole = Nodes.of(hidden, valid, 16)
    torch.testing.assert_close(whole.middle_block(16), whole.largest())


# ---- A whole study ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 8)
    return path


SMALL = [word for field in ("mask_k", "decode_mask_k", "block_q", "block_k", "stride_q", "page_size", "sink_tokens",
                            "window_tokens", "branch", "leaf_branch")
         for word in (f"--{field.replace('_', '-')}", str(getattr(SPARSE, field)))]


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_recall_command(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("recall", checkpoint, "--text", text, "--max-tokens", 200, "--query-blocks", 2, "--rows", 3, *SMALL,
               "--out", out)
    assert done.exit_code == 0, done.output
    data = json.loads((out / "eval_recall.json").read_text())["data"]
    assert data.keys() == {"prefill", "decode"}
    base = data["decode"][0]
    assert (base["name"], base["tokens"], base["rows"]) == ("base", SPARSE.decode_mask_k, 3)
    for entries in data.values():
        for entry in entries:
            for method in METHODS:
                for share, mean in entry["means"][method].items():
                    assert 0 < mean <= 1
                    heads = entry["heads"].get(method, {}).get(share)
                    assert (heads is not None) is (entry["name"] == "base" or (method, share) == ("hip", "outside"))
                    if heads is not None:
                        values = [value for layer in heads for value in layer]
                        assert sum(values) / len(values) == pytest.approx(mean, abs=1e-4)
    page = (out / "eval_recall.md").read_text()
    assert "exact token top-k" in page
    assert "tale" in page
    assert str(checkpoint.parent) not in page
    study = mass_recall_study.study(data, command="x", parameters={}, measured_on={})
    assert study.findings[0] in page


def test_findings_follow_the_data(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Another figure makes another sentence."""
    run("locality", checkpoint, "--text", text, "--max-tokens", 400, "--rows", 4, "--out", tmp_path, *SMALL)
    data = Study.read(tmp_path / "eval_locality.json").data
    before = locality_study.findings(data)
    name = f"correlation {data['distances'][0]}"
    data["heads"][name] = [[0.987 for _ in layer] for layer in data["heads"][name]]
    after = locality_study.findings(data)
    assert "correlate by 0.99" in after[0]
    assert "correlate by 0.99" not in before[0]
    assert before[1:] == after[1:]


def test_locality_command(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("locality", checkpoint, "--text", text, "--max-tokens", 400, "--rows", 4, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    data = json.loads((out / "eval_locality.json").read_text())["data"]
    assert data["widths"] == [16]  # 188 tokens between sink and window in the middle of the text: 11 nodes
    assert all(value == 0 for layer in data["heads"]["lost block 16"] for value in layer) is False
    assert all(-1 <= value <= 1 for layer in data["heads"]["correlation 1"] for value in layer)
    assert "variance between nodes" in (out / "eval_locality.md").read_text()


@pytest.mark.parametrize(("words", "message"), [
    (("recall", "--max-tokens", "100", "--mask-k", "1024"), "nothing is pruned before token"),
    (("recall", "--max-tokens", "600"), "beyond the model's context of 512"),
    (("recall", "--max-tokens", "9000"), "tokens, and 9000 are needed"),
    (("recall", "--device", "cuda"), "PyTorch sees no GPU"),
    (("recall", "--texts", "news"), "'news' is not known"),
    (("locality", "--max-tokens", "32"), "between sink and window"),
    (("locality", "--max-tokens", "256", "--block-k", "5"), "block_k: 5 is not allowed"),
])
def test_errors(
    checkpoint: Path, text: Path, tmp_path: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study, *options = words
    small = [*SMALL] if "--mask-k" not in options else []
    done = run(study, checkpoint, "--text", text, "--out", tmp_path / "out", *small, *options)
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_longer_texts_with_scaled_positions(checkpoint: Path) -> None:
    from hip_trt.evaluate.models import load_model

    model, _ = load_model(checkpoint)
    seen: dict[str, Tensor] = {}
    for scaling in ("none", "linear"):
        visit_layers(model, [1] * 600, lambda layer, queries, keys, scale, name=scaling: seen.update(
            {name: keys} if layer == 0 else {}), scaling=scaling)  # type: ignore[misc]
    assert seen["none"].shape[1] == 600
    assert not torch.allclose(seen["none"], seen["linear"])
    with pytest.raises(RuntimeInputError, match="beyond the model's context"):
        visit_layers(model, [1] * 600, lambda *_: None)


# ---- Break-even ----


GEOMETRY = Geometry(query_heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors of the CPU, emulated kernels, and a clock of our own: HiP takes 1, dense attention as many as
    there are thousandths of keys."""

    def timed(calls: Any, **_: Any) -> Timing:
        for call in calls if isinstance(calls, list) else [calls]:
            call()
        return Timing.of([1.0], "single calls")

    def dense_time(geometry: Geometry, backend: str, *_: Any, tokens: int = 0, **__: Any) -> Timing:
        return Timing.of([tokens / 150], "single calls")

    for module, name, stand_in in (
        (break_even, "draw", partial(inputs.draw, device="cpu")), (break_even, "single_calls", timed),
        (break_even, "replayed_steps", timed), (dense, "time_decode", dense_time),
        (dense, "time_prefill", lambda geometry, backend, tensors, **_: Timing.of([tensors.key.shape[2] / 150], "")),
        (break_even, "decode_steps", partial(decode_step.decode_steps, device="cpu")),
    ):
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("on_cpu")
def test_break_even_is_interpolated(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    library, saved = EmulatedLibrary(build()), []
    wanted = [case for case in break_even.cases(CONFIG, [1]) if case.name in ("base", *dense.BACKENDS, "branch 8")]
    data = break_even.measure(library, GEOMETRY, wanted, lengths=[128, 256], save=lambda data: saved.append(len(data)))
    assert len(saved) == len(wanted)
    for curve in data["curves"]:
        assert not curve["failed"]
        assert list(curve["times"]) == ["128", "256"]
        if curve["config"]:
            found = break_even_study.crossing(data, curve)
            assert (found.side, found.tokens) == ("at", pytest.approx(150, rel=1e-3))  # 1 against tokens / 150
            assert curve["checked"]["error"] < 1e-2
    study = break_even_study.study(data, command="x", parameters={}, measured_on={})
    written = study.write(tmp_path, break_even_study.plots(data))
    assert {path.name for path in written} >= {"eval_break_even.json", "eval_break_even.md"}
    assert "Prefill: the base config is ahead of the faster dense kernel from about 150 tokens on" in study.findings[0]
    assert json.loads((tmp_path / "eval_break_even.json").read_text())["data"] == data


@pytest.mark.usefixtures("on_cpu")
def test_what_cannot_be_timed_says_so() -> None:
    class Wrong(EmulatedLibrary):
        def attention(self, **arguments: Any) -> Any:
            result = super().attention(**arguments)
            arguments["output"].fill_(0.5)
            return result

    if compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    wanted = [case for case in break_even.cases(CONFIG, [1]) if case.name in ("cuDNN", "base")]
    data = break_even.measure(Wrong(build()), GEOMETRY, wanted, lengths=[128, 256])
    for curve in data["curves"]:
        assert bool(curve["times"]) is (curve["config"] is None)
        if curve["config"]:
            assert all("relative error" in reason for reason in curve["failed"].values())
    late = break_even.measure(Wrong(build()), GEOMETRY, wanted, lengths=[128], limit=-1)
    assert all(curve["failed"] == {"128": "no time was left"} for curve in late["curves"])
    study = break_even_study.study(late, command="x", parameters={}, measured_on={})
    assert study.findings == []


def test_faster_dense_kernel_counts() -> None:
    def curve(name: str, config: dict[str, Any] | None, *times: float) -> dict[str, Any]:
        return {"mode": "decode", "name": name, "batch": 1, "unit": "µs", "config": config, "failed": {},
                "times": dict(zip(("1024", "2048", "4096"), times, strict=True))}

    ours = curve("base", {"mask_k": 1}, 4.0, 4.0, 4.0)
    data = {"curves": [curve("one", None, 1.0, 3.0, 16.0), curve("two", None, 2.0, 8.0, 8.0), ours]}
    found = break_even_study.crossing(data, ours)
    assert found == crossing({1024: 4, 2048: 4, 4096: 4}, {1024: 1, 2048: 3, 4096: 8})
    assert found is not None
    assert found.tokens == pytest.approx(2510, rel=1e-3)
    text = break_even_study.study(data, command="x", parameters={}, measured_on={}).markdown()
    assert "| Decode | base | 2,307 | 1,448 | 2,510 |" in text


@pytest.mark.parametrize(("options", "message"), [
    ((), "PyTorch sees none"), (("--heads", "3,2,64"), "--heads 3,2,64"), (("--heads", "8"), "--heads 8"),
    (("--lengths", "100"), "multiples of 64"), (("--batches", "1,x"), "--batches: '1,x'"),
])
def test_break_even_errors(options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("break-even", *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
