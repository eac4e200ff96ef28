"""hip-trt eval perplexity: what it measures, what it says about it, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint, tiny_llama
from click.testing import Result
from torch import Tensor
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import hip_trt
from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import EnvironmentProblem, HipTrtError, RuntimeInputError
from hip_trt.evaluate import baselines, perplexity, perplexity_report, texts
from hip_trt.evaluate.baselines import BaselineCache, choose, masked_attention
from hip_trt.evaluate.likelihood import LogLikelihood
from hip_trt.evaluate.perplexity import Section, Setting, begin, best_scaling, compared, measure, read, read_within
from hip_trt.evaluate.perplexity_grid import GRIDS, LONG, Case, read_grid
from hip_trt.evaluate.perplexity_run import Options, run
from hip_trt.evaluate.rope_scaling import scaled
from hip_trt.evaluate.study import Study, Table
from hip_trt.evaluate.teacher_forced import TeacherForcedCache, stretches
from hip_trt.huggingface import HipCache, cache_argument

SMALL: dict[str, Any] = {
    "mask_k": 32, "decode_mask_k": 16, "block_k": 4, "block_q": 16, "stride_q": 4, "branch": 2, "leaf_branch": 4,
    "page_size": 8, "sink_tokens": 4, "window_tokens": 16,
}
CONFIG = HipConfig.create(**SMALL)
EVERYTHING = CONFIG.replace(mask_k=1024, decode_mask_k=1024)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def own_attention(model: LlamaForCausalLM) -> Any:
    """The model that tests share is handed on as it was."""
    yield
    hip_trt.unpatch(model)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model: LlamaForCausalLM, config: HipConfig, cache: HipCache, calls: list[list[int]]) -> Tensor:
    hip_trt.patch(model, config)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([call]), **cache_argument(model, cache)).logits[0] for call in calls])


# Decode steps, many at once


@pytest.mark.parametrize("prompt", [0, 96])
@pytest.mark.parametrize(
    "changes", [
        {"refresh_interval": 8}, {"refresh_interval": 8, "reuse_level": 0}, {"refresh_interval": 1},
        {"refresh_interval": 5, "mask_heads": "query", "leaf_branch": 2}, {"refresh_interval": 8, "dense_layers": (1,)},
    ], ids=str,
)
def test_teacher_forced_is_step_by_step(model: LlamaForCausalLM, changes: dict[str, Any], prompt: int) -> None:
    """Over the lengths at which a search first keeps nodes too; calls of 80 tokens, whole intervals."""
    config, ids = CONFIG.replace(**changes), some_tokens(190)
    by_step = [ids[:prompt]] * bool(prompt) + [[token] for token in ids[prompt:]]
    expected = logits(model, config, HipCache(model.config, config), by_step)
    cache = TeacherForcedCache(model.config, config, prompt=prompt)
    actual = logits(model, config, cache, [ids[start:end] for start, end in stretches(len(ids), prompt, 80)])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
    assert cache.get_seq_length() == len(ids)


def test_interval_and_level_matter(model: LlamaForCausalLM) -> None:
    """Else the test above shows nothing."""
    ids, found = some_tokens(190), []
    for changes in ({"refresh_interval": 1}, {"refresh_interval": 8}, {"refresh_interval": 8, "reuse_level": 0}):
        config = CONFIG.replace(leaf_branch=2, **changes)
        cache = TeacherForcedCache(model.config, config, prompt=96)
        found.append(logits(model, config, cache, [ids[:96], ids[96:]]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("calls", "message"), [([100], "across the prompt"), ([96, 5, 5], "within an interval of 8")]
)
def test_calls_that_break_the_schedule_are_refused(
    model: LlamaForCausalLM, calls: list[int], message: str
) -> None:
    cache = TeacherForcedCache(model.config, CONFIG, prompt=96)
    with pytest.raises(RuntimeInputError, match=message):
        logits(model, CONFIG, cache, [some_tokens(count) for count in calls])


def test_stretches_cover_the_text() -> None:
    assert list(stretches(10, 4, 3)) == [(0, 4), (4, 7), (7, 10)]  # no call of one token
    assert list(stretches(9, 0, 4)) == [(0, 4), (4, 9)]
    assert list(stretches(8, 0, 4)) == [(0, 4), (4, 8)]


# Baselines


@pytest.mark.parametrize("mask_heads", ["kv", "query"])
@pytest.mark.parametrize("prompt", [None, 96])
def test_exact_is_hip_with_a_tree_of_one_level(
    model: LlamaForCausalLM, mask_heads: Any, prompt: int | None
) -> None:
    config, ids = CONFIG.replace(leaf_branch=16, mask_heads=mask_heads, refresh_interval=1), some_tokens(200)
    calls = [ids[:96], ids[96:]]
    own: HipCache = (HipCache(model.config, config) if prompt is None
                     else TeacherForcedCache(model.config, config, prompt=prompt))
    expected = logits(model, config, own, calls)
    actual = logits(model, config, BaselineCache(model.config, config, "exact", prompt=prompt), calls)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["random", "exact"])
def test_baselines_that_keep_everything_are_dense(model: LlamaForCausalLM, method: Any) -> None:
    ids = some_tokens(200)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    actual = logits(model, EVERYTHING, BaselineCache(model.config, EVERYTHING, method), [ids[:96], ids[96:]])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("decode", [False, True])
def test_baselines_choose_what_they_say(decode: bool) -> None:
    """Budget, sink and window are kept; the better the choice, the nearer to dense."""
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (3 * torch.randn(heads, rows, 8, generator=generator)
                           for heads, rows in ((4, 32), (2, 400), (2, 400)))
    first, error = 368, {}
    dense = masked_attention(query, keys, values, first, 0.35, config=EVERYTHING, method="exact", decode=decode)
    budget = 4 if decode else 8
    for method in ("none", "random", "exact"):
        options = {"config": CONFIG, "method": method, "decode": decode}
        attended = choose(query, keys, first, generator=generator, **options)
        assert attended.shape == (2, 32 if decode else 2, 100)
        assert attended[:, :, 0].all()
        last = 399 // 4 if decode else 383 // 4
        row = -1 if decode else 0
        window = (399 - 15) // 4 if decode else (368 - 15) // 4
        assert attended[:, row, window : last + 1].all()
        assert not attended[:, row, last + 1 :].any()
        assert (attended[:, row, 1:window].sum(-1) == (0 if method == "none" else budget)).all()
        output = masked_attention(query, keys, values, first, 0.35, generator=generator, **options)
        error[method] = float((output - dense).norm())
        few = choose(query, keys, 32, generator=generator, **options)  # fewer candidates than the budget
        assert not few[:, 0, 9 if decode else 12 :].any()
    assert error["none"] > error["random"] > error["exact"] > 0


def test_random_blocks_follow_the_seed(model: LlamaForCausalLM) -> None:
    ids = some_tokens(200)
    one, same, other = (logits(model, CONFIG, BaselineCache(model.config, CONFIG, "random", seed=seed), [ids])
                        for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


# Reading


def test_read_counts_what_it_says(model: LlamaForCausalLM) -> None:
    ids = some_tokens(150)
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -scores[40:-1].gather(1, torch.tensor(ids[41:])[:, None])[:, 0].double()
    for chunk in (64, 149, 1000):
        actual = read(model, ids, skip=40, chunk=chunk)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    likelihood = LogLikelihood(ids, skip=40)
    likelihood.add(scores, 0)
    assert math.isclose(likelihood.perplexity, math.exp(expected.mean()), rel_tol=1e-4)


def test_read_within_sees_the_models_context_and_half_of_it_at_least(model: LlamaForCausalLM) -> None:
    ids = some_tokens(200)
    actual = read_within(model, ids, skip=10, context=64)
    assert len(actual) == len(ids) - 11
    torch.testing.assert_close(actual[:53], read(model, ids[:64], skip=10), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(  # after token 63 to 94: the window of tokens 32 to 95
        actual[53 : 53 + 32], read(model, ids[32:96], skip=31), atol=1e-4, rtol=1e-4
    )
    assert read_within(model, ids, skip=10, context=512).equal(read(model, ids, skip=10))


def test_not_finite_is_refused() -> None:
    broken = tiny_llama()
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeInputError, match="not finite in float32"):
        read(broken, some_tokens(50))


def test_everything_kept_is_dense(model: LlamaForCausalLM) -> None:
    content = {"one": some_tokens(300), "two": some_tokens(300, 1)}
    section = begin(model, content, Setting(256, 64, 128))
    everything = EVERYTHING.model_dump()
    for case in (Case("prefill", "hip", everything), Case("decode", "hip", everything), Case("decode", "exact", SMALL),
                 Case("prefill", "hip", SMALL), Case("decode", "hip", SMALL)):
        measure(model, content, section, case)
    kept, kept_decode, exact, prefill, decode = section.rows
    for row in (kept, kept_decode):
        assert abs(row["worst"]) < 1e-3
    for row in (exact, prefill, decode):
        assert all(abs(result["change"]) > 0.1 for result in row["texts"].values())
    assert prefill["worst"] == max(result["change"] for result in prefill["texts"].values())
    assert model.config._attn_implementation != "hip_trt"


def test_failure_is_entered_with_its_reason(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"one": some_tokens(100)}
    section = begin(model, content, Setting(100, 50, 50))
    measure(model, content, section, Case("prefill", "hip", {"dense_layers": (7,)}))
    assert "dense_layers: 7" in section.rows[0]["failed"]

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(perplexity, "read", out_of_memory)
    measure(model, content, section, Case("prefill"))
    assert section.rows[1]["failed"] == "out of memory"


def test_change_is_paired() -> None:
    dense = torch.rand(2000, dtype=torch.float64)
    same = compared(dense + 0.01, dense, Setting(3001, 1000, 1000), 1000)
    assert math.isclose(same["change"], 100 * math.expm1(0.01))
    assert same["error"] < 1e-9
    assert list(same["by_position"]) == ["1000-2048", "2048-3001"]
    half = torch.cat([torch.zeros(1048), torch.full((952,), 0.02)]).double()
    other = compared(dense + half, dense, Setting(3001, 1000, 1000), 1000)
    assert math.isclose(other["by_position"]["1000-2048"], 0, abs_tol=1e-9)
    assert math.isclose(other["by_position"]["2048-3001"], 100 * math.expm1(0.02), rel_tol=1e-6)
    assert 0.1 < other["error"] < 0.3  # of 31 means, half of them 0 and half 0.02


# Beyond the model's context


def test_scaled_rope(model: LlamaForCausalLM) -> None:
    own = model.base_model.rotary_emb
    trained = own.inv_freq.clone()
    for name in ("linear", "theta", "yarn"):
        with scaled(model, name, 4.0):
            frequencies = model.base_model.rotary_emb.inv_freq
            assert math.isclose(frequencies[-1], trained[-1] / 4, rel_tol=1e-4), name
            assert math.isclose(frequencies[0], trained[0] / (4 if name == "linear" else 1), rel_tol=1e-6), name
        assert model.base_model.rotary_emb is own
    with scaled(model, "none", 4.0):
        assert model.base_model.rotary_emb is own
    with pytest.raises(RuntimeInputError, match="'su' is not known"), scaled(model, "su", 2.0):
        pass
    other = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(RuntimeInputError, match="scales its RoPE already"), scaled(other, "yarn", 2.0):
        pass


def test_best_scaling_is_the_densest_models() -> None:
    worse, better = (Section(Setting(100, 10, 10), {"a": torch.full((89,), loss)}) for loss in (2.0, 1.5))
    assert best_scaling([worse, better]) is better
    with pytest.raises(HipTrtError, match="none given"):
        best_scaling([])


def test_run_reads_beyond_the_context_under_the_best_scaling() -> None:
    small = tiny_llama(max_position_embeddings=128).half()
    said: list[str] = []
    saved: list[int] = []
    options = Options(
        128, 32, [Case("prefill", "hip", SMALL), Case("decode", "none", SMALL)], lengths=[256],
        scalings=["none", "linear"], long_cases=[Case("prefill", "hip", SMALL)], float32_check=True,
    )
    content = {"one": some_tokens(256), "short": some_tokens(128)}
    data = run(small, content, options, say=said.append, save=lambda data: saved.append(len(data["sections"])))
    within, none, linear, exact = data["sections"]
    assert [len(section["rows"]) for section in data["sections"]] in ([2, 1, 0, 1], [2, 0, 1, 1])
    assert set(within["dense"]) == {"one", "short"}
    assert set(none["dense"]) == {"one"}
    assert linear["factor"] == 2
    best = min((none, linear), key=lambda section: section["dense"]["one"]["perplexity"])
    assert best["rows"]
    assert (within["dtype"], exact["dtype"]) == ("float16", "float32")
    assert small.dtype == torch.float16
    assert len(said) == 4 + 4  # four times dense, and each row
    assert saved == [1, 1, 1, 2, 3, 3, 4, 4]
    json.dumps(data)
    with pytest.raises(RuntimeInputError, match="No text has 512 tokens"):
        run(small, content, Options(128, 32, [], lengths=[512]), say=said.append, save=saved.append)


def test_time_limit_says_what_is_missing() -> None:
    small = tiny_llama(max_position_embeddings=128)
    options = Options(128, 32, [Case("prefill")], lengths=[256], time_limit=0)
    data = run(small, {"one": some_tokens(256)}, options, say=print, save=lambda data: None)
    assert data["unfinished"] == ["128 tokens, prefill, default", "256 tokens, dense, RoPE scaling none"]
    assert "Not measured, for lack of time: 2" in perplexity_report.findings(data)[-1]


# Grids


@pytest.mark.parametrize("cases", [*GRIDS.values(), LONG])
def test_built_in_grids_are_valid(cases: list[Case]) -> None:
    names = [(case.mode, case.label) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert perplexity._chunk(case) % case.config.refresh_interval == 0 or case.mode == "prefill"
        assert perplexity.CHUNK % case.config.block_q == 0
    assert {case.mode for case in cases} == {"prefill", "decode"}


def test_grid_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("- {}\n- {mode: decode, method: exact, decode_mask_k: 256, dense_layers: [0, 1]}\n")
    assert [case.label for case in read_grid(str(file))] == [
        "default", "best blocks, all scored, decode_mask_k 256, dense_layers 0+1"
    ]


@pytest.mark.parametrize(
    ("content", "message"), [
        ("- {mask_k: 7}", "entry 1: mask_k: 7 is not allowed"),
        ("- {}\n- {mode: decoding}", "entry 2: mode: 'decoding' is not allowed"),
        ("- {method: best}", "method: 'best'"), ("- {depth: 1}", "depth: no such field"),
        ("mask_k: 5", "must be a list"), ("[", "not valid YAML"), ("", "must be a list"),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(content)
    with pytest.raises(HipTrtError, match=message):
        read_grid(str(file))


# What follows from the figures


def row(worst: float, mode: str = "prefill", method: str = "hip", error: float = 0.1, **changes: Any) -> dict[str, Any]:
    result = {"perplexity": 5.0, "dense": 5.0, "error": error, "by_position": {}}
    return {"mode": mode, "method": method, "changes": changes, "label": Case(mode, method, changes).label,  # type: ignore[arg-type]
            "texts": {"book": {**result, "change": worst}, "code": {**result, "change": worst - 1}},
            "worst": worst, "worst_text": "book", "seconds": 1.0}


def section_of(*rows: dict[str, Any], tokens: int = 8192, **fields: Any) -> dict[str, Any]:
    dense = {"book": {"perplexity": 5.0, "by_position": {}}, "code": {"perplexity": 5.0, "by_position": {}}}
    return {"tokens": tokens, "skip": 2048, "prompt": 2048, "scaling": "none", "factor": 1.0, "dtype": "float16",
            "dense": dense, "rows": list(rows), **fields}


def findings(*sections: dict[str, Any], unfinished: tuple[str, ...] = ()) -> str:
    return "\n".join(perplexity_report.findings({"sections": sections, "unfinished": list(unfinished)}))


def test_verdict_follows_the_worst_text() -> None:
    assert "-0.60% to +0.40% (worst: book): within 1% on every text." in findings(section_of(row(0.4)))
    text = findings(section_of(row(1.3, error=0.05), row(0.9, mask_k=2048), row(0.8, mask_k=4096), row(2.0, mask_k=64)))
    assert "not within 1% on every text." in text
    assert "smallest budget first: mask_k 2048 (+0.90%); mask_k 4096 (+0.80%)." in text
    assert "the best is default (+1.30%)" in findings(section_of(row(1.3), row(1.4, mask_k=2048)))
    assert "though only 1.0 standard errors from it" in findings(section_of(row(0.9, error=0.1)))


def test_exact_search_is_said() -> None:
    assert "scores every block" in findings(section_of(row(0.4)))
    assert "scores every block" not in findings(section_of(row(0.4), tokens=32768))
    assert perplexity_report.scores_everything({}, "decode", 8192)
    assert not perplexity_report.scores_everything({"leaf_branch": 8}, "decode", 8192)


def test_intervals_and_baselines_are_listed() -> None:
    rows = [row(change, "decode", refresh_interval=interval, leaf_branch=4)
            for interval, change in ((32, 0.9), (1, 0.5), (8, 0.6))]
    text = findings(section_of(*rows, row(3.0, "decode", "random"), row(5.0, "decode", "none")))
    assert "leaf_branch 4, worst text by refresh interval: 1: +0.50%, 8: +0.60%, 32: +0.90%." in text
    assert "random blocks +3.0% (book), sink and window only +5.0% (book)." in text


def test_where_dense_breaks_is_said() -> None:
    entry = {"perplexity": 6.0, "by_position": {"2048-4096": 5.0, "4096-16384": 9.0},
             "within_context_by_position": {"2048-4096": 5.0, "4096-16384": 5.0}}
    fine = {**entry, "by_position": {"2048-4096": 5.2, "4096-16384": 4.5}}
    data = {"sections": [section_of(tokens=16384, dense={"book": entry}),
                         section_of(tokens=16384, dense={"book": fine}, scaling="yarn", factor=2.0)], "unfinished": []}
    said = "\n".join(perplexity_report.findings(data))
    assert "none +80.0% (works on 0 of 1 texts); yarn +4.0% (works on 1 of 1 texts)" in said
    table = perplexity_report.tables(data)[-1]
    assert [line[-1] for line in table.texts()] == ["breaks", "works"]
    assert table.texts()[0][3:5] == ["+0.0", "+80.0"]


# Files


def test_study_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"sections": [section_of(row(0.4), row(9.0, method="random"), row(0.7, mask_k=512))], "unfinished": []}
    study = perplexity_report.study(data, command="hip-trt eval", parameters={"a": [1]}, measured_on={"cpu": "c"})
    written = study.write(tmp_path, {"": perplexity_report.plot(data)})
    assert [path.name for path in written] == ["eval_perplexity.json", "eval_perplexity.md", "eval_perplexity.png"]
    page = written[1].read_text()
    assert "| mask_k 512 | +0.70 ± 0.10 | -0.30 ± 0.10 | +0.70 | yes |" in page
    assert "![Perplexity: dense against HiP](eval_perplexity.png)" in page
    again = Study.read(written[0])
    assert again.markdown(["eval_perplexity.png"]) == page
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert len(study.write(tmp_path / "other", {"": perplexity_report.plot(data)})) == 2


def test_study_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeInputError, match="cannot be read"):
        Study.read(tmp_path / "none.json")
    for content in ("[1]", "{}", "not JSON", '{"tables": []}'):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(RuntimeInputError, match=r"not a study's JSON"):
            Study.read(tmp_path / "wrong.json")


def test_table_rows_fit_their_columns() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells under 2"):
        Table("t", ["a", "b"], [["x"]])
    table = Table("t", ["a", "b|c"], [["x|y", 1.25], [None, 2]], formats={"b|c": ".1f"})
    assert table.markdown().splitlines()[2:] == ["| a | b&#124;c |", "|---|---|", "| x&#124;y | 1.2 |", "|  | 2.0 |"]


# Texts


def test_texts_that_every_python_has() -> None:
    manual, code = texts.gather(["manual", "code"])
    assert "assert_stmt" in manual.content
    assert "def namedtuple" in code.content
    assert len(manual.sha256) == 12
    assert {"manual", "code"} <= set(texts.installed())


def test_bible_and_node_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    monkeypatch.setattr(texts, "NODE_MANUAL", tmp_path)
    assert texts.installed() == ["code", "manual"]
    with pytest.raises(EnvironmentProblem, match="bible-kjv"):
        texts.gather(["bible"])
    with pytest.raises(EnvironmentProblem, match="nodejs"):
        texts.gather(["node"])
    (tmp_path / "fs.md").write_text("# File system")
    assert texts.node().content == "# File system"


def test_bible_loses_its_verse_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bible"
    program.write_text("#!/bin/sh\necho 'Ge1:1 In the beginning'\necho '1Sa2:3 Talk no more'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert texts.bible().content == "In the beginning\nTalk no more\n"


def test_bad_text_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "code.txt").write_text("x")
    for names, files, message in (
        ([], ["latin.txt"], "not UTF-8"), ([], ["none.txt"], "cannot be read"),
        (["psalms"], [], "'psalms' is not known"),
        (["code"], ["code.txt"], "two texts are called code"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            texts.gather(names, [tmp_path / file for file in files])


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint, a text of 1,000 tokens, and a grid."""
    folder = tmp_path_factory.mktemp("perplexity")
    save_checkpoint(folder / "model", tiny_llama(max_position_embeddings=256))
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    (folder / "grid.yaml").write_text(
        f"- {json.dumps(SMALL)}\n- {json.dumps({**SMALL, 'mode': 'decode', 'method': 'random'})}\n"
    )
    return folder


def command(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", "perplexity", str(folder / "model"), *arguments])


def test_command_writes_results(folder: Path) -> None:
    out = folder / "results"
    result = command(
        folder, "--text", str(folder / "book.txt"), "--skip", "64", "--grid", str(folder / "grid.yaml"), "--lengths",
        "512", "--scalings", "yarn", "--long-grid", str(folder / "grid.yaml"), "--out", str(out),
    )
    assert result.exit_code == 0, result.output
    study = Study.read(out / "eval_perplexity.json")
    assert [section["tokens"] for section in study.data["sections"]] == [256, 512]
    assert all("failed" not in row for section in study.data["sections"] for row in section["rows"])
    assert "--lengths 512" in study.command
    assert str(folder) not in study.command
    assert study.findings[0] in " ".join(result.stdout.replace("\n", " ").split())
    assert (out / "eval_perplexity.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"), [
        (["--max-tokens", "300"], "beyond the model's context of 256"),
        (["--skip", "255"], "leaves nothing to predict"),
        (["--lengths", "2000"], "No text has 2,000 tokens"), (["--lengths", "many"], "--lengths: 'many'"),
        (["--dtype", "int8"], "--dtype: 'int8'"), (["--grid", "none.yaml"], "--grid none.yaml"),
        (["--lengths", "512", "--scalings", "su"], "--scalings: 'su'"), (["--texts", "psalms"], "'psalms'"),
    ],
)
def test_command_refuses_in_one_line(folder: Path, arguments: list[str], message: str) -> None:
    result = command(folder, "--text", str(folder / "book.txt"), "--skip", "64", *arguments, "--out",
                     str(folder / "refused"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_short_text_and_missing_model_are_refused(folder: Path) -> None:
    (folder / "note.txt").write_text("too short")
    result = command(folder, "--text", str(folder / "note.txt"))
    assert result.exit_code == 1
    assert "The text note has 9 tokens, and 256 are needed." in result.stderr
    result = CliRunner().invoke(app, ["eval", "perplexity", str(folder / "absent")])
    assert result.exit_code == 1
    assert "no such file or folder" in result.stderr
    (folder / "empty").mkdir()
    result = CliRunner().invoke(app, ["eval", "perplexity", str(folder / "empty"), "--text", str(folder / "book.txt")])
    assert result.exit_code == 1
    assert "transformers cannot load it" in result.stderr


def test_rows_are_held_a_part_at_a_time(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are computed at once, the result is the same."""
    from hip_trt.evaluate import teacher_forced

    ids, results = some_tokens(190), []
    for rows in (16, 1024):
        monkeypatch.setattr(teacher_forced, "ROWS", rows)
        monkeypatch.setattr(baselines, "ROWS", rows)
        results.append([
            logits(model, CONFIG, cache, [ids[:96], ids[96:]])
            for cache in (TeacherForcedCache(model.config, CONFIG, prompt=96),
                          BaselineCache(model.config, CONFIG, "exact"))
        ])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
