"""Retrieval: probes hold what they say, dense attention passes them, sink and window alone do not, and the numbers
follow the config; the study's files, its command, and the training of the recall model.

The model is a Llama whose weights were written by hand, so what must be found is known.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recall_by_hand
import torch
from recall_by_hand import LANGUAGE
from typer.testing import CliRunner

from hip_trt.cli.app import app
from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, RuntimeInputError
from hip_trt.evaluate import retrieval, retrieval_report
from hip_trt.evaluate.perplexity_grid import METHODS, Method
from hip_trt.evaluate.retrieval import Choice, Setting, ask, choices
from hip_trt.evaluate.retrieval_language import RecallLanguage
from hip_trt.evaluate.retrieval_probes import Fact, Probe, synthetic_probe, text_probe
from hip_trt.evaluate.study import Study
from hip_trt.evaluate.texts import Text

TRAIN = Path(__file__).parent.parent / "benchmarks" / "recall_model" / "train.py"
SMALL = HipConfig.create(
    mask_k=32, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, page_size=16, sink_tokens=8, window_tokens=32,
    branch=2, leaf_branch=4,
)
"""Scores all blocks of contexts up to some 128 tokens; beyond, the tree has levels."""
DENSE = Choice("dense", None)
WHOLE = LANGUAGE.line_tokens - 2


@pytest.fixture(scope="module")
def model() -> Any:
    return recall_by_hand.recall_model()


def probe(tokens: int = 512, *, facts: int = 8, stretch: int = 1, seed: int = 0) -> Probe:
    return synthetic_probe(LANGUAGE, tokens, facts=facts, stretch=stretch, seed=seed)


# What probes hold.

def test_lines_have_tokens_of_their_own() -> None:
    made = probe(512, facts=16)
    context = made.context.tolist()
    assert made.tokens == 512
    for number, fact in enumerate(made.facts):
        line = [*fact.question, *fact.answer]
        assert context[fact.start : fact.start + 8] == line
        assert all(context.count(token) == 1 for token in line)
        assert number / 16 <= fact.start / len(context) < (number + 1) / 16


def test_stretch_repeats_a_line() -> None:
    made = probe(1024, facts=4, stretch=64)
    for fact in made.facts:
        for start in range(fact.start, fact.start + 64, 16):
            assert made.context[start : start + 8].tolist() == [*fact.question, *fact.answer]


def test_probes_differ_by_seed_only() -> None:
    assert torch.equal(probe(seed=1).context, probe(seed=1).context)
    assert not torch.equal(probe(seed=1).context, probe(seed=2).context)


@pytest.mark.parametrize(("tokens", "facts", "stretch"), [(256, 64, 1), (256, 8, 256)])
def test_too_much_for_a_context(tokens: int, facts: int, stretch: int) -> None:
    with pytest.raises(RuntimeInputError, match="do not fit into a context"):
        probe(tokens, facts=facts, stretch=stretch)


def test_filler_is_like_text() -> None:
    text = LANGUAGE.filler(2, 4096, torch.Generator().manual_seed(0))
    assert text[:, 0].tolist() == [0, 0]
    assert text[:, 1:].min() > LANGUAGE.line_vocabulary
    assert text.max() < LANGUAGE.vocab_size
    counts = text[0].bincount().sort(descending=True).values
    assert counts[0] > 4 * counts[16]  # some tokens are frequent
    runs = [tuple(text[0, start : start + 8].tolist()) for start in range(1, 4000)]
    assert len(set(runs)) < 0.9 * len(runs)  # phrases come again


class Words:
    """A tokenizer for which every word, space and sign is a token."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.findall(r" ?\w+|\n|[^\w\n]", text)
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return {"input_ids": [self.known.index(piece) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.known[index] for index in ids)


TEXT = Text("sea", "The sea was calm that day.\nNobody spoke, and the ship went on.\n" * 200, "")


def test_facts_in_a_text() -> None:
    words = Words()
    made = text_probe(words, TEXT, 800, facts=4, seed=0)
    assert made.tokens == 800
    assert made.candidates is not None
    content = words.decode(made.context.tolist())
    for fact in made.facts:
        line = words.decode([*fact.question, *fact.answer])
        assert content.count(f"{line}.\n") == 1
        assert re.fullmatch(r"\nThe words are( \w+,){8} \w+, \w+", line)
        assert fact.answer[0] in made.candidates
        assert words.decode([fact.answer[1]]) == ","
        assert fact.answer[1] not in made.candidates
        assert words.decode(made.context[fact.start - 1 : fact.start].tolist()) == "\n"  # where a line ends
    assert sorted(made.candidates.tolist()) == sorted(fact.answer[at] for fact in made.facts for at in (0, 2))


def test_text_too_short() -> None:
    with pytest.raises(RuntimeInputError, match="The text sea has"):
        text_probe(Words(), Text("sea", "Short.\n", ""), 800, facts=4, seed=0)


def test_candidates_leave_other_tokens_out() -> None:
    logits = torch.tensor([[[9.0, 1.0, 2.0, 0.0], [9.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0]]])
    answer = torch.tensor([[2, 1, 0]])
    assert retrieval._right(logits, answer, torch.tensor([1, 2])).tolist() == [[True, False, True]]
    assert retrieval._right(logits, answer, None).tolist() == [[False, False, False]]


def test_right_tokens_count_up_to_the_first_wrong_one() -> None:
    assert retrieval._leading(torch.tensor([[True, False, True], [True, True, True], [False, True, True]])) == [1, 3, 0]


# What is found.

def test_dense_attention_finds_all(model: Any) -> None:
    assert ask(model, probe(2048, facts=16), DENSE) == [WHOLE] * 16


def test_sink_and_window_find_the_newest_only(model: Any) -> None:
    made = probe(512, facts=8)
    found = ask(model, made, Choice("", SMALL.replace(window_tokens=128), "none"))
    assert found[-1] == WHOLE
    assert max(found[:-2]) < WHOLE


@pytest.mark.parametrize("asked", ["prefill", "decode"])
def test_search_finds_what_it_scores(model: Any, asked: retrieval.Asked) -> None:
    """With as many nodes as level 0 holds, every block is scored."""
    made = probe(512, facts=8)
    assert ask(model, made, Choice("", SMALL.replace(mask_k=128, decode_mask_k=128)), asked=asked) == [WHOLE] * 8


def test_search_misses_lone_lines_and_finds_repeated_ones(model: Any) -> None:
    """Above level 0 a node is known by its middle block only; a line in each of its blocks is seen, one is not."""
    config = SMALL.replace(mask_k=64, decode_mask_k=64, block_k=16)

    def found(stretch: int, method: Method = "hip") -> int:
        return sum(
            count == WHOLE for seed in range(2)
            for count in ask(model, probe(2048, facts=4, stretch=stretch, seed=seed), Choice("", config, method))
        )

    assert found(1) <= 4
    assert found(256) == 8
    assert found(1, "exact") == 8


def test_reused_blocks_are_stale(model: Any) -> None:
    """Questions begin with a token of another line; where they are decoded, that line's blocks are what is reused."""
    made = probe(512, facts=8)
    shifted = tuple(
        Fact(fact.depth, fact.start, (*other.answer[-1:], *fact.question), fact.answer)
        for fact, other in zip(made.facts, (*made.facts[1:], made.facts[0]), strict=True)
    )
    config = SMALL.replace(mask_k=64, decode_mask_k=64, leaf_branch=16, reuse_level=0)

    def begun(steps: int, asked: retrieval.Asked) -> int:
        """Answers whose first token is right."""
        choice = Choice("", config.replace(refresh_interval=steps))
        return sum(count > 0 for count in ask(model, Probe(made.context, shifted), choice, asked=asked))

    assert begun(1, "decode") == 8
    assert begun(16, "decode") <= 2
    assert begun(16, "prefill") == 8


def test_batches_change_nothing(model: Any) -> None:
    config = SMALL.replace(mask_k=16, decode_mask_k=16)
    made = probe(512, facts=8)
    assert ask(model, made, Choice("", config), at_once=3) == ask(model, made, Choice("", config))


def test_model_is_left_as_it_was(model: Any) -> None:
    before = model.config._attn_implementation
    ask(model, probe(256, facts=2), Choice("", SMALL))
    assert model.config._attn_implementation == before


# The grid.

def test_choices() -> None:
    found = choices([{}, {"mask_k": 2048, "branch": 8}, {"method": "none", "window_tokens": 64}])
    assert [choice.label for choice in found] == [
        "dense", "default", "mask_k 2048, branch 8", "sink and window only, window_tokens 64"
    ]
    assert found[0].config is None
    assert found[2].config == HipConfig.create(mask_k=2048, branch=8)
    assert found[3].method == "none"


def test_built_in_grid_is_valid_and_has_its_control() -> None:
    found = choices()
    assert len({choice.label for choice in found}) == len(found)
    assert found[-1].label == METHODS["none"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [("mask_k: 5", "must be a list"), ("- {mask_k: 5}", "mask_k: 5 is not allowed"), ("- {", "not valid YAML"),
     ("- {method: best}", "method: 'best' is not allowed"), ("- {maskk: 5}", "maskk: no such field")],
)
def test_bad_grids(tmp_path: Path, content: str, cause: str) -> None:
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(ConfigError, match=cause):
        choices(retrieval.read_grid(tmp_path / "grid.yaml"))


# The study.

def settings() -> Iterator[Setting]:
    yield Setting(256, "stands once", [probe(256, facts=4, seed=seed) for seed in range(2)])
    yield Setting(512, "stands once", [probe(512, facts=4, seed=seed) for seed in range(2)])


def test_run_keeps_every_outcome(model: Any) -> None:
    saved: list[dict[str, Any]] = []
    data = retrieval.run(model, settings(), [DENSE, *choices([{"method": "none"}], SMALL)[1:]], save=saved.append)
    assert data["depths"] == [0.125, 0.375, 0.625, 0.875]
    assert [(row["tokens"], row["config"]) for row in data["rows"]] == [
        (256, "dense"), (256, "sink and window only"), (512, "dense"), (512, "sink and window only")
    ]
    assert data["rows"][0]["right"] == ["6666"] * 2
    assert retrieval_report.counts(data, data["rows"][0]) == (8, 8)
    assert retrieval_report.counts(data, data["rows"][3])[0] < 4
    assert len(saved) == 2
    assert json.loads(json.dumps(data)) == data


def test_time_limit_is_told(model: Any) -> None:
    data = retrieval.run(model, settings(), [DENSE], time_limit=0)
    assert data["missing"] == ["stands once, 256 tokens, dense", "stands once, 512 tokens, dense"]
    page = retrieval_report.study(data, synthetic=True, command="", parameters={}, machine={}).markdown()
    assert "Left out for want of time: stands once, 256 tokens, dense" in page


def made_up(**shares: list[int]) -> dict[str, Any]:
    """Results of ten facts in one context, by config, at 1,000 and 2,000 tokens: how many are found."""
    return {
        "depths": [(part + 0.5) / 10 for part in range(10)], "answer_tokens": 2, "asked": "prefill", "missing": [],
        "rows": [
            {"tokens": tokens, "kind": "text", "config": config, "right": ["2" * found + "1" * (10 - found)]}
            for config, counts in shares.items()
            for tokens, found in zip((1000, 2000), counts, strict=True)
        ],
    }


def test_findings_follow_from_the_numbers() -> None:
    said = retrieval_report.findings(made_up(dense=[10, 8], default=[10, 6], worse=[3, 2], good=[10, 8], bad=[10, 4]))
    assert said == [
        "text: dense attention finds 80% to 100% up to 2,000 tokens.",
        "text, as much as dense at every length (98% or more): good.",
        "text, default: 100% of what dense finds at 1,000, 75% at 2,000.",
    ]
    said = retrieval_report.findings(made_up(dense=[10, 8], default=[10, 4], worse=[3, 2], bad=[10, 6]))
    assert said[1:] == [
        "text, default: 100% of what dense finds at 1,000, 50% at 2,000.",
        "text, bad: 100% of what dense finds at 1,000, 75% at 2,000.",
    ]


def test_nothing_is_said_where_dense_fails() -> None:
    said = retrieval_report.findings(made_up(dense=[9, 3], bad=[9, 0]))
    assert said[0] == "text: dense attention finds 90% up to 1,000 tokens and fails beyond (30% at 2,000)."
    assert said[1] == "text, as much as dense at every length (98% or more): bad."
    assert "nothing can be said" in retrieval_report.findings(made_up(dense=[3, 3], bad=[9, 0]))[0]


def test_tables() -> None:
    found, depths = retrieval_report.tables(made_up(dense=[10, 8], bad=[10, 4]))
    assert found.columns == ["what differs from the default", "1,000 tokens", "2,000 tokens"]
    assert found.rows[1] == ["bad", "10 of 10 (72 to 100)", "4 of 10 (17 to 69)"]
    assert depths.rows[1] == ["bad", *["100"] * 4, *["0"] * 6]


def test_interval() -> None:
    """Against a table of Wilson's intervals."""
    assert retrieval.interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert retrieval.interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


# The command.

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recall_by_hand.save(tmp_path_factory.mktemp("recall"))


def test_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("- {}\n- {method: none}\n")
    result = CliRunner().invoke(app, [
        "eval", "retrieval", str(folder), "--lengths", "256,512", "--stretches", "1", "--facts", "4", "--probes", "1",
        "--grid", str(tmp_path / "grid.yaml"), "--window-tokens", "64", "--out", str(tmp_path / "out"),
    ])
    assert result.exit_code == 0, result.output
    assert "stands once: dense attention finds 100% up to 512 tokens." in result.stdout
    study = Study.read(tmp_path / "out" / "eval_retrieval_recall.json")
    assert {row["config"] for row in study.data["rows"]} == {"dense", "default", "sink and window only"}
    assert "--window-tokens 64" in study.command
    assert (tmp_path / "out" / "eval_retrieval_recall.md").exists()


@pytest.mark.parametrize(
    ("options", "cause"),
    [(["--lengths", "8192"], "--lengths: 8192 tokens are beyond the model's context of 4096"),
     (["--lengths", "many"], "--lengths: 'many' is not allowed"),
     (["--lengths", "256,0"], "--lengths: '256,0' is not allowed"),
     (["--lengths", "-256"], "--lengths: '-256' is not allowed"),
     (["--question", "aloud"], "--question: 'aloud' is not known"),
     (["--dtype", "int8"], "--dtype: 'int8' is not known"),
     (["--grid", "absent.yaml"], "--grid absent.yaml: cannot be read"),
     (["--lengths", "256", "--facts", "100"], "100 facts of 8 tokens do not fit")],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, options: list[str], cause: str) -> None:
    result = CliRunner().invoke(app, ["eval", "retrieval", str(folder), *options, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert cause in result.stderr.splitlines()[-1]


# The training.

@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return runpy.run_path(str(TRAIN), run_name="train")


@pytest.mark.parametrize("at_end", [True, False])
def test_examples_can_be_answered(train: dict[str, Any], at_end: bool) -> None:
    made = train["examples"](LANGUAGE, 3, 128, 5, torch.Generator().manual_seed(0), at_end=at_end)
    for tokens, asked in zip(made.tokens.tolist(), made.asked.tolist(), strict=True):
        assert len(asked) == 5 * WHOLE
        for position in asked:
            before = tokens[:position].index(tokens[position])  # the line's first occurrence
            assert tokens[before + 1] == tokens[position + 1]
            assert position > 60 or not at_end


def test_training_learns_and_saves(
    train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage: Callable[..., Any] = train["Stage"]
    main = train["main"]
    # A rate at which the first step shows in weights saved in half precision: a busy machine takes few in a second.
    main.__globals__["TINY_STAGES"] = (stage(64, 8, 0.1, 20, 1.0), stage(128, 4, 0.1, 20, 1.0))
    monkeypatch.setattr(sys, "argv", ["train.py", "--tiny", "--out", str(tmp_path), "--limit", "3"])
    main()
    assert "recalled whole" in capsys.readouterr().out
    record = json.loads((tmp_path / "train.json").read_text())
    assert [entry["tokens"] for entry in record["stages"]] == [64, 128]
    assert all(entry["taken_steps"] > 0 for entry in record["stages"])
    from hip_trt.evaluate.models import load_model

    loaded, tokenizer = load_model(tmp_path)
    assert RecallLanguage.of(loaded.config) == LANGUAGE
    assert tokenizer("<s> line1 filler1")["input_ids"] == [0, 1, 1 + LANGUAGE.line_vocabulary]
    assert not torch.equal(loaded.model.layers[0].input_layernorm.weight, torch.ones(64))


def test_recall_model_that_ships() -> None:
    """Its weights find lines under dense attention at 8k; the rest is measured on a GPU."""
    from hip_trt.evaluate.models import load_model

    loaded, _ = load_model(TRAIN.parent)
    language = RecallLanguage.of(loaded.config)
    assert language is not None
    found = ask(loaded, synthetic_probe(language, 4096, facts=8, stretch=1, seed=0), DENSE)
    assert sum(count == WHOLE for count in found) >= 7
