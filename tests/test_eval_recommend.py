"""hip-trt eval recommend: what it reads from results, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import RuntimeInputError
from hip_trt.evaluate import recommend, recommend_report
from hip_trt.evaluate.recommend import Curve, gather, speedup, work
from hip_trt.evaluate.retrieval import WINDOW_ONLY
from hip_trt.evaluate.study import Study

DEFAULT = HipConfig.create()
MACHINE = {"gpu": "some GPU", "date": "2026-01-01"}


def row(mode: str, worst: float, method: str = "hip", **changes: Any) -> dict[str, Any]:
    label = ", ".join(f"{name} {value}" for name, value in changes.items()) or "default"
    return {"mode": mode, "method": method, "label": label, "changes": changes, "worst": worst, "worst_text": "book",
            "texts": {"book": {"error": 0.25}}}


def section(tokens: int, *rows: dict[str, Any], dtype: str = "float16", scaling: str = "none",
            excess: float = 1.0) -> dict[str, Any]:
    entry = {"perplexity": 5.0, "by_position": {"2048-8192": 5.0 * excess}}
    if tokens > 8192:
        entry["within_context_by_position"] = {"2048-8192": 5.0}
    return {"tokens": tokens, "dtype": dtype, "scaling": scaling, "rows": list(rows), "dense": {"book": entry}}


SECTIONS = (
    section(8192, row("prefill", 0.8), row("prefill", 0.4, mask_k=2048), row("prefill", 0.3, mask_k=4096),
            row("prefill", 1.9, mask_k=512), row("prefill", 0.1, "exact", mask_k=256),
            row("prefill", 0.2, mask_k=256, block_k=8), row("decode", 0.6)),
    section(16384, row("prefill", 1.5), row("prefill", 0.9, mask_k=2048), row("decode", 3.0), scaling="yarn",
            excess=1.2),
    section(8192, row("prefill", 9.0), dtype="float32"),
)
CURVES = [
    {"mode": "prefill", "name": "cuDNN", "config": None, "batch": 1,
     "times": {"4096": 1.0, "8192": 4.0, "16384": 16.0}},
    {"mode": "prefill", "name": "FlashAttention-2", "config": None, "batch": 1, "times": {"4096": 2.0, "8192": 3.0}},
    {"mode": "prefill", "name": "base", "config": DEFAULT.model_dump(mode="json"), "batch": 1,
     "times": {"4096": 1.25, "8192": 2.0, "16384": 4.0}},
    {"mode": "prefill", "name": "mask_k 2048", "config": DEFAULT.replace(mask_k=2048).model_dump(mode="json"),
     "batch": 1, "times": {"8192": 2.5, "16384": 5.0}},
    {"mode": "decode", "name": "base", "config": DEFAULT.model_dump(mode="json"), "batch": 16, "times": {"65536": 1.0}},
]


def write(folder: Path, name: str, data: dict[str, Any]) -> None:
    Study(name, name, "hip-trt eval", {}, MACHINE, data).write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "perplexity", {"sections": SECTIONS, "unfinished": []})
    return tmp_path


def advise(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    data = recommend.recommend(gather(folder))
    json.dumps(data)
    return {(found["mode"], found["tokens"]): found for found in data["rows"]}


def test_smallest_budget_within_each_limit(folder: Path) -> None:
    write(folder, "break-even", {"curves": CURVES})
    rows = advise(folder)
    assert set(rows) == {("prefill", 4096), ("prefill", 8192), ("prefill", 16384), ("decode", 8192), ("decode", 16384)}
    at_8k = rows["prefill", 8192]
    assert [choice["label"] for choice in at_8k["choices"]] == ["mask_k 2048", "default", "mask_k 512"]
    assert [choice["loss"] for choice in at_8k["choices"]] == [0.4, 0.8, 1.9]
    assert [choice["speedup"] for choice in at_8k["choices"]] == [3.0 / 2.5, 1.5, None]
    assert at_8k["speedup"] == 1.5
    assert at_8k["choices"][1]["work"] == 1
    assert at_8k["choices"][0]["work"] > 1 > at_8k["choices"][2]["work"]
    at_16k = rows["prefill", 16384]
    assert [choice and choice["label"] for choice in at_16k["choices"]] == [None, "mask_k 2048", "default"]
    assert (at_16k["scaling"], at_16k["dense_works"], at_8k["dense_works"]) == ("yarn", "0 of 1", "1 of 1")
    assert rows["decode", 16384]["choices"] == [None, None, None]
    assert rows["prefill", 4096]["quality_at"] == 8192


def test_stay_dense_where_the_default_is_slower(folder: Path) -> None:
    write(folder, "break-even", {"curves": CURVES})
    data = recommend.recommend(gather(folder))
    said = recommend_report.findings(data)
    assert said[0] == ("Prefill: stay dense up to 4,096 tokens; of the lengths timed, the default is faster from 8,192 "
                       "on; 4.0 times as fast at 16,384.")
    assert ("Prefill, loss up to 1%: stay dense at 4,096 tokens; default (+0.80%) at 8,192 tokens; mask_k 2048 "
            "(+0.90%) at 16,384 tokens." in said)
    study = recommend_report.study(data, command="c", parameters={}, measured_on={})
    lines = study.tables[0].texts()
    assert lines[0][2:5] == ["stay dense", "stay dense", "mask_k 512 (+1.90% ± 0.25)"]
    assert lines[1] == ["8,192", "1.50", "mask_k 2048 (+0.40% ± 0.25, 1.2x)", "default (+0.80% ± 0.25, 1.5x)",
                        "mask_k 512 (+1.90% ± 0.25)", "8,192", "", ""]
    assert lines[2][-3] == "16,384, RoPE yarn, with which dense works on 0 of 1 texts"
    assert "none tried suffices" in lines[2]


def test_stay_dense_where_the_budget_that_suffices_is_slower(folder: Path) -> None:
    """mask_k 2048 is slower than dense, so 4096, which was not timed, is too; the default is faster."""
    slow = {**CURVES[3], "times": {"8192": 3.5}}
    write(folder, "break-even", {"curves": [*CURVES[:3], slow]})
    write(folder, "perplexity", {"sections": [
        section(8192, row("prefill", 0.8), row("prefill", 0.6, mask_k=2048), row("prefill", 0.3, mask_k=4096))
    ]})
    data = recommend.recommend(gather(folder), (0.5, 0.7, 1.0))
    study = recommend_report.study(data, command="c", parameters={}, measured_on={})
    lines = study.tables[0].texts()
    assert lines[1][2:5] == ["stay dense", "stay dense", "default (+0.80% ± 0.25, 1.5x)"]
    assert lines[2][2:5] == ["at least mask_k 4096", "at least mask_k 2048", "at least default (4.0x)"]
    said = recommend_report.findings(data)
    assert ("Prefill, loss up to 0.7%: stay dense at 4,096 to 8,192 tokens; at least mask_k 2048 at 16,384 tokens."
            in said)


def test_speed_from_the_benchmarks(folder: Path) -> None:
    """Without break-even: kernel_*.json, of the default only; decode steps are means of an interval."""
    for mode, ours in (("prefill", ["hip-trt"]), ("decode", ["hip-trt, searched", "hip-trt, reused nodes"])):
        times = {"cuDNN": {"median": 30.0}, "FlashAttention-2": {"failed": "no"},
                 **{name: {"median": time} for name, time in zip(ours, (20.0, 12.0), strict=False)}}
        rows = [{"tokens": 131072, "batch": 1, "times": times}, {"tokens": 131072, "batch": 16, "times": times}]
        (folder / f"kernel_{mode}.json").write_text(json.dumps({
            "what": f"{mode}, one layer", "ours": ours, "dense": ["FlashAttention-2", "cuDNN"], "environment": MACHINE,
            "config": DEFAULT.model_dump(mode="json"), "rows": rows,
        }))
    rows = advise(folder)
    assert rows["prefill", 131072]["speedup"] == 1.5
    assert rows["decode", 131072]["speedup"] == pytest.approx(30 / ((20 + 7 * 12) / 8))
    assert rows["prefill", 131072]["quality_at"] == 16384
    said = recommend_report.findings(recommend.recommend(gather(folder)))
    assert "Prefill: from 131,072 tokens on quality was not measured." in said
    assert any("at every timed length, from 131,072 tokens on" in line for line in said)


def test_missing_results_are_named(folder: Path) -> None:
    found = gather(folder)
    assert [what.partition(" ")[0] for what in found.missing] == [
        "eval_break_even.json", "kernel_prefill.json", "kernel_decode.json", "eval_retrieval*.json"
    ]
    assert [part["tokens"] for part in found.sections] == [8192, 16384]
    assert found.sources == {"eval_perplexity.json": "some GPU, 2026-01-01"}
    said = recommend_report.findings(recommend.recommend(found))
    assert sum(line.startswith("Missing: ") for line in said) == 4


def test_short_lengths_prune_nothing(tmp_path: Path) -> None:
    write(tmp_path, "perplexity", {"sections": [section(1024, row("prefill", 0.0), row("decode", 0.0))],
                                   "unfinished": []})
    rows = advise(tmp_path)
    assert rows["prefill", 1024]["exact"]
    assert rows["decode", 1024]["exact"]
    study = recommend_report.study(recommend.recommend(gather(tmp_path)), command="", parameters={}, measured_on={})
    assert study.tables[0].texts()[0][2] == "any: nothing is pruned"


def test_retrieval_counts_where_dense_finds(folder: Path) -> None:
    def outcome(kind: str, config: str, tokens: int, right: str) -> dict[str, Any]:
        return {"kind": kind, "config": config, "tokens": tokens, "right": right}

    data: dict[str, Any] = {"rows": [
        outcome("easy", "dense", 8192, "1111111111"), outcome("easy", "default", 8192, "1111111110"),
        outcome("easy", WINDOW_ONLY, 8192, "1111111111"), outcome("easy", "mask_k 4096", 8192, "1111111111"),
        outcome("hard", "dense", 8192, "1100000000"), outcome("hard", "default", 8192, "0000000000"),
        outcome("long", "dense", 16384, "1111111111"), outcome("long", "default", 16384, "1000000000"),
    ]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommend, "counts", lambda data, row: (row["right"].count("1"), 10))
        patch.setattr(recommend, "of_dense", lambda data, row: (row["right"].count("1"), 10))
        write(folder, "retrieval", data)
        found = recommend.recommend(gather(folder))
    at = {row["tokens"]: row["retrieval"] for row in found["rows"] if row["mode"] == "prefill"}
    assert at == {8192: 0.9, 16384: 0.1}  # "hard" says nothing: dense itself fails
    assert found["retrieval"]["8192"] == {"default": 0.9, "mask_k 4096": 1, WINDOW_ONLY: 1}
    best = {row["tokens"]: row["retrieval_best"] for row in found["rows"] if row["mode"] == "prefill"}
    assert best == {8192: {"label": "mask_k 4096", "share": 1}, 16384: {"label": "default", "share": 0.1}}
    assert found["retrieval_of"] == {"8192": ["a model"], "16384": ["a model"]}
    said = "\n".join(recommend_report.findings(found))
    assert "a model, 8,192 to 16,384 tokens: the default finds 10% to 90% of the facts" in said
    assert "do not use it" in said
    assert "the best is default, 10% at worst" in said  # the other was not tried everywhere
    del found["retrieval"]["16384"]
    said = "\n".join(recommend_report.findings(found))
    assert "at least 98% of what dense finds: mask_k 4096." in said
    assert "do not use it" not in said
    study = recommend_report.study(found, command="", parameters={}, measured_on={})
    assert study.tables[-1].texts() == [["default", "90"], [WINDOW_ONLY, "100"], ["mask_k 4096", "100"]]


@pytest.mark.parametrize(
    ("mode", "changes", "same"), [
        ("prefill", {"refresh_interval": 32, "decode_mask_k": 1024, "reuse_level": 0}, True),
        ("prefill", {"block_k": 32}, False), ("prefill", {"dense_layers": (0,)}, False),
        ("decode", {"mask_k": 2048, "stride_q": 1, "refresh_interval": 4}, True), ("decode", {"leaf_branch": 8}, False),
    ],
)
def test_timed_configs_are_those_that_compute_the_same(mode: str, changes: dict[str, Any], same: bool) -> None:
    curves = [Curve(mode, None, {8192: 2.0}), Curve(mode, DEFAULT.model_dump(mode="json"), {8192: 1.0})]
    assert speedup(curves, DEFAULT.replace(**changes), mode, 8192) == (2.0 if same else None)
    assert speedup(curves, DEFAULT, mode, 4096) is None
    assert speedup(curves[1:], DEFAULT, mode, 8192) is None


def test_work_follows_budget_and_interval() -> None:
    for mode, field in (("prefill", "mask_k"), ("decode", "decode_mask_k")):
        small, large = (work(DEFAULT.replace(**{field: size}), mode, 32768) for size in (512, 2048))
        assert small < large
    often, seldom = (work(DEFAULT.replace(refresh_interval=interval), "decode", 131072) for interval in (1, 64))
    assert often > seldom


# The command


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", "recommend", *arguments])


def test_command_prints_and_writes(folder: Path) -> None:
    result = command(str(folder), "--budgets", "1,5")
    assert result.exit_code == 0, result.output
    assert "loss up to 5%" in result.stdout
    assert "Missing: eval_break_even.json" in result.stdout
    result = command(str(folder), "--out", str(folder))
    assert result.exit_code == 0, result.output
    assert Study.read(folder / "eval_recommend.json").data["budgets"] == [0.5, 1, 2]
    assert "## Decode, by length" in (folder / "eval_recommend.md").read_text()


def test_command_refuses_in_one_line(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such folder"), ([str(empty)], "nothing is known of quality"),
        ([str(folder), "--budgets", "much"], "--budgets much"), ([str(folder), "--budgets", "-1"], "--budgets -1"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_damaged_results_are_refused(folder: Path) -> None:
    for content in ("{}", "[", '{"environment": {}, "rows": [{}], "ours": [], "dense": []}'):
        (folder / "kernel_decode.json").write_text(content)
        with pytest.raises(RuntimeInputError, match=r"kernel_decode\.json: not a benchmark's JSON"):
            gather(folder)
