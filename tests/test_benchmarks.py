"""The kernel benchmarks, as far as they need no GPU: what they count, check, interpolate and write."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kernel_decode
import kernel_prefill
from kernel_bench import hip_attn, options
from kernel_bench.options import length
from kernel_bench.report import Header, Report, markdown

from hip_trt.bench import dense, pages, roofline
from hip_trt.bench.break_even import break_even
from hip_trt.bench.checks import CheckError, Comparison, compare_dense
from hip_trt.bench.decode_step import decode_steps
from hip_trt.bench.geometry import LLAMA_8B, Geometry
from hip_trt.bench.inputs import draw
from hip_trt.bench.prefill_call import PrefillCall
from hip_trt.bench.roofline import Rates
from hip_trt.bench.timing import Timing
from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.reference import Tree, select_blocks, tree

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = Geometry(query_heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
CONFIG = HipConfig.create(
    mask_k=32, decode_mask_k=32, block_q=16, block_k=8, stride_q=4, branch=2, leaf_branch=2, page_size=16,
    sink_tokens=16, window_tokens=32,
)
TREES = [HipConfig.create(**{**CONFIG.model_dump(), "branch": branch, "leaf_branch": leaf, "stride_k": stride})
         for branch, leaf, stride in ((2, 2, 1), (4, 2, 2), (2, 16, 1), (3, 5, 8))]


class CountedSearch:
    """The reference, with its scores counted as it computes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks, self.products = 0, 0
        scores = tree.block_scores

        def counted(queries: Tensor, keys: Tensor, blocks: Tensor, *, block_k: int, stride_k: int) -> Tensor:
            self.blocks += len(blocks)
            self.products += len(queries) * len(blocks) * (block_k // stride_k)
            return scores(queries, keys, blocks, block_k=block_k, stride_k=stride_k)

        monkeypatch.setattr(tree, "block_scores", counted)


def levels(config: HipConfig, first: int, last: int, budget: int) -> int:
    return Tree(first, max(first, last), config.branch, config.leaf_branch).start_level(budget) + 1


@pytest.mark.parametrize("config", TREES, ids=lambda config: f"{config.branch}-{config.leaf_branch}-{config.stride_k}")
@pytest.mark.parametrize("tokens", [16, 200, 333, 800])
def test_prefill_work_is_what_the_reference_does(
    config: HipConfig, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs are counted one by one; scores as the reference computes them, but for children that edge nodes lack."""
    counted, keys, pairs, attended, slack = CountedSearch(monkeypatch), torch.randn(tokens, 8), 0, 0, 0
    for first in range(0, tokens, config.block_q):
        positions = torch.arange(first, min(first + config.block_q, tokens))
        before = counted.blocks
        blocks, _ = select_blocks(torch.randn(1, len(positions), 8), keys, positions, config=config, decode=False)
        chosen = (blocks[:, None] * config.block_k + torch.arange(config.block_k)).flatten()
        pairs += int((chosen[:, None] <= positions).sum())
        attended += int((chosen <= positions[-1]).sum())
        if counted.blocks > before:
            window = max(0, first - config.window_tokens + 1) // config.block_k
            edges = 2 * (max(config.branch, config.leaf_branch) - 1)
            slack += edges * levels(config, 2, window, config.mask_blocks)
    work = roofline.prefill(SMALL, config, tokens)
    assert work.attention_flops == 4 * SMALL.head_dim * SMALL.query_heads * pairs
    per_product = 2 * SMALL.head_dim * SMALL.query_heads
    scored_tokens = config.block_k // config.stride_k
    most = counted.products + slack * scored_tokens * config.block_q // config.stride_q
    assert counted.products <= work.search_flops // per_product <= most
    rows = work.gathered_bytes // (SMALL.row_bytes * SMALL.kv_heads) - 2 * attended
    assert counted.blocks * scored_tokens <= rows <= (counted.blocks + slack) * scored_tokens
    assert tokens <= 200 or counted.blocks > 0


def test_prefill_work_is_exact_where_every_node_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sink and window at node borders: nothing is missing at the edges."""
    config = CONFIG.replace(sink_tokens=0, window_tokens=1, mask_k=32, stride_q=16)
    counted = CountedSearch(monkeypatch)
    first = 64 * config.block_k  # 64 candidates: whole nodes at every level
    positions = torch.arange(first, first + config.block_q)
    select_blocks(torch.randn(1, config.block_q, 8), torch.randn(int(positions[-1]) + 1, 8), positions, config=config,
                  decode=False)
    assert roofline.scored_blocks(config, 0, 64, config.mask_blocks) == counted.blocks > 0


@pytest.mark.parametrize("config", TREES, ids=lambda config: f"{config.branch}-{config.leaf_branch}-{config.stride_k}")
@pytest.mark.parametrize(("past", "reused"), list(itertools.product([40, 300, 799, 1600], [False, True])))
def test_decode_work_is_what_the_reference_does(
    config: HipConfig, past: int, reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, query, positions = torch.randn(past + 1, 8), torch.randn(2, 1, 8), torch.tensor([past])
    counted = CountedSearch(monkeypatch)
    blocks, nodes = select_blocks(query, keys, positions, config=config, decode=True)
    if reused and nodes is not None:
        counted.blocks = 0
        blocks, _ = select_blocks(query, keys, positions, config=config, decode=True, past_nodes=nodes)
    work = roofline.decode(SMALL, config, past, 3, reused=reused)
    row = 3 * SMALL.row_bytes * SMALL.kv_heads
    scored = work.device_bytes // row - 2 * len(blocks) * config.block_k
    widest = max(config.branch, config.leaf_branch)
    depth = levels(config, 2, (past - config.window_tokens + 1) // config.block_k, config.decode_mask_blocks)
    # Reused nodes may hold the newest two already, which then are expanded once.
    slack = 2 * widest + 2 * widest * (depth if not reused else 1)
    scored_tokens = config.block_k // config.stride_k
    assert counted.blocks * scored_tokens <= scored <= (counted.blocks + slack) * scored_tokens
    assert work.attention_flops == 4 * SMALL.head_dim * SMALL.query_heads * 3 * len(blocks) * config.block_k


def test_llama_decode_reads_what_the_notes_say() -> None:
    """The figures that predictions in benchmarks/NOTES.md start from."""
    config = HipConfig.create()
    for tokens, expected in ((32768, 25), (131072, 30), (1 << 20, 36)):
        assert round(roofline.decode(LLAMA_8B, config, tokens, 1, reused=False).device_bytes / 1e6) == expected
        assert round(roofline.decode(LLAMA_8B, config, tokens, 1, reused=True).device_bytes / 1e6) == 22


def test_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    work = roofline.Work(search_flops=30, attention_flops=70, device_bytes=50, gathered_bytes=999)
    assert work.least_seconds(Rates(bytes_per_second=50, flops_per_second=10)) == 10
    assert work.least_seconds(Rates(bytes_per_second=2, flops_per_second=10)) == 25


def test_dense_work() -> None:
    assert roofline.dense_prefill(SMALL, 3).attention_flops == 4 * 64 * 4 * (1 + 2 + 3)
    assert roofline.dense_decode(SMALL, 5, 2).device_bytes == 2 * 2 * 2 * 5 * 128


def test_break_even_is_interpolated_in_log_scale() -> None:
    # ours is flat at 2; theirs doubles with each doubling: level at 2048 * sqrt(2), where theirs is 2.
    theirs = {1024: 2**-0.5, 2048: 2**0.5, 4096: 2 * 2**0.5, 8192: 4 * 2**0.5}
    found = break_even(dict.fromkeys(theirs, 2.0), theirs)
    assert found is not None
    assert found.side == "at"
    assert found.tokens == pytest.approx(2048 * 2**0.5)


@pytest.mark.parametrize(("ours", "theirs", "side", "tokens"), [
    ({1: 1.0, 2: 1.0}, {1: 2.0, 2: 2.0}, "below", 1),
    ({1: 3.0, 2: 3.0}, {1: 2.0, 2: 3.0}, "above", 2),
    ({1: 1.0, 2: 4.0, 4: 1.0, 8: 1.0}, {1: 2.0, 2: 2.0, 4: 2.0, 9: 1.0}, "at", 2 * 2**0.5),  # ahead, behind, ahead
    ({1: 4.0, 2: 1.0, 4: 4.0, 8: 1.0}, {1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0}, "at", 4 * 2**0.5),  # for good only at last
])
def test_break_even_sides(ours: dict[int, float], theirs: dict[int, float], side: str, tokens: float) -> None:
    found = break_even(ours, theirs)
    assert found is not None
    assert (found.side, found.tokens) == (side, pytest.approx(tokens))
    assert break_even({1: 1.0}, {2: 1.0}) is None


def filled_report(folder: Path) -> Report:
    header = Header("kernel_prefill", "prefill", "ms", ("hip-trt",), ("cuDNN",), ("hip-attn 1.1",))
    report = Report(folder, header, Rates(4.3e12, 790e12), {"environment": {"gpu": "some GPU", "driver": None}})
    for tokens, ours, theirs in ((4096, 0.5, 0.25), (8192, 0.8, 1.0), (131072, 22.7, 251.0)):
        report.work("hip-trt", tokens, 1, roofline.Work(int(2e12), int(3e12), int(1e9), int(9e9)))
        report.time("hip-trt", tokens, 1, Timing.of([ours, ours * 2, ours / 2], "single calls"))
        report.time("cuDNN", tokens, 1, Timing.of([theirs], "single calls"))
        report.time("hip-attn 1.1", tokens, 1, {"failed": "took too\nlong."})
    report.check("hip-attn 1.1", 8192, 1, {"error": None, "triton": "3.1.0"})
    report.check("hip-trt", 8192, 1, Comparison(64, 2e-3, 100, 99).as_json())
    report.write()
    return report


def test_report_is_written_as_results_come(tmp_path: Path) -> None:
    content = filled_report(tmp_path / "new").content
    assert json.loads((tmp_path / "new" / "kernel_prefill.json").read_text()) == content
    table = (tmp_path / "new" / "kernel_prefill.md").read_text()
    assert table == markdown(content)
    lines = table.splitlines()
    assert lines[0] == "| prefill, ms | 4k | 8k | 128k |"
    assert "| **hip-trt** | 0.5 | 0.8 | 22.7 |" in lines
    assert "| cuDNN / hip-trt | 0.5 | 1.2 | 11 |" in lines
    assert "| hip-attn 1.1 | failed | failed | failed |" in lines
    assert "| hip-trt: TFLOP, search + attention | 2 + 3 | 2 + 3 | 2 + 3 |" in lines
    assert "| hip-trt: GB of device memory / gathered | 1 / 9 | 1 / 9 | 1 / 9 |" in lines
    assert "| hip-trt: of the limit | 1266% | 791% | 28% |" in lines  # 5 TFLOP at 790 TFLOP/s: 6.33 ms
    crossing = 4096 * 2 ** (1 / (1 + (0.2231 / 0.6931)))
    assert f"- Break-even of hip-trt against cuDNN, batch 1: at about {crossing:,.0f} tokens." in lines
    assert "- hip-attn 1.1 at 4k; 8k; 128k: took too long." in lines
    assert any("largest relative error 2.0e-03 over 64 rows, 99 of 100 chosen" in line for line in lines)
    assert "- hip-attn 1.1, before timing: output is not finite; it ran with Triton 3.1.0." in lines
    assert lines[-1] == "- gpu some GPU."


@pytest.mark.parametrize("script", [kernel_prefill, kernel_decode], ids=lambda script: script.__name__)
def test_help_and_no_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit) as shown:
        options.parse(script.__doc__)
    assert shown.value.code == 0
    assert "--hip-attn-11" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [script.__name__])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        options.run(options.parse(script.__doc__), script.measure)
    assert refused.value.code == "This benchmark needs a CUDA GPU; --from makes table and plot from earlier results."


def test_table_and_plot_are_made_again_from_results(tmp_path: Path) -> None:
    """The script itself, as it is started by hand."""
    filled_report(tmp_path)
    table = (tmp_path / "kernel_prefill.md").read_text()
    (tmp_path / "kernel_prefill.md").unlink()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernel_prefill.py"), "--from", str(tmp_path / "kernel_prefill.json")],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel_prefill.md").read_text() == table
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in done.stderr
    else:
        assert (tmp_path / "kernel_prefill.png").read_bytes().startswith(b"\x89PNG")


def test_other_files_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{}", "[]", "no JSON"):
        (tmp_path / "other.json").write_text(text)
        assert not options.render(tmp_path / "other.json")
        assert "other.json: no results of a benchmark" in capsys.readouterr().err
    assert not options.render(tmp_path / "gone.json")


def test_lengths() -> None:
    assert [length(text) for text in ("8192", "8k", "1M")] == [8192, 8192, 1 << 20]
    for text in ("", "k", "0", "100", "8q", "-8k"):
        with pytest.raises(Exception, match="is no length"):
            length(text)


def test_tensors_depend_on_the_seed_alone() -> None:
    first, same, other = (draw(SMALL, batch=2, queries=1, tokens=8, seed=seed, device="cpu") for seed in (1, 1, 2))
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first, name), getattr(same, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_dense_outputs_are_compared() -> None:
    tensors = draw(SMALL, batch=2, queries=40, tokens=40, seed=0, device="cpu")
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = [tensor.float() for tensor in (tensors.query, tensors.key, tensors.value)]
    right = attend(*whole, is_causal=True, scale=SMALL.scale, enable_gqa=True)
    wrong = attend(*whole, is_causal=False, scale=SMALL.scale, enable_gqa=True)
    assert compare_dense(right, tensors.query, tensors.key, tensors.value, SMALL.scale) < 1e-5
    assert compare_dense(wrong, tensors.query, tensors.key, tensors.value, SMALL.scale) > 1e-2


@pytest.fixture(scope="module")
def library() -> Library:
    emulated = pytest.importorskip("emulated")
    if emulated.compiler() is None:
        pytest.skip("the kernels are emulated with a C++ compiler")
    return emulated.EmulatedLibrary(emulated.build())


class Corrupted:
    """A library one of whose results is overwritten."""

    def __init__(self, library: Library, result: str, value: float) -> None:
        self._library, self._result, self._value = library, result, value
        self.workspace_size, self.path = library.workspace_size, library.path

    def attention(self, **arguments: Any) -> None:
        self._library.attention(**arguments)
        tensor = arguments[self._result]
        if tensor is not None:
            tensor.flatten(0, -2)[-1].fill_(self._value)


def test_choosing_too_few_is_found() -> None:
    comparison = Comparison(rows=1)
    comparison.agree(torch.tensor([1, 2]), torch.tensor([1, 2]))
    comparison.require("two of two")
    comparison.agree(torch.tensor([1, 2, 4]), torch.tensor([1, 2]))
    with pytest.raises(CheckError, match="three of two"):
        comparison.require("three of two")


def prefill_call(library: Any) -> PrefillCall:
    return PrefillCall(library, SMALL, CONFIG, draw(SMALL, batch=1, queries=272, tokens=272, seed=1, device="cpu"))


def test_prefill_is_checked(library: Library) -> None:
    """The real kernels, emulated: what is right passes, and each kind of wrong result is found."""
    found = prefill_call(library).check()
    assert found.error < 1e-2
    assert found.agreed == found.chosen > 0
    for result, value in (("output", 0.5), ("output", torch.nan), ("present_value", torch.nan), ("chosen_blocks", 3)):
        with pytest.raises(CheckError):
            prefill_call(Corrupted(library, result, value)).check()


def test_decode_is_checked(library: Library) -> None:
    def steps(with_library: Any) -> Any:
        return decode_steps(with_library, SMALL, CONFIG, past=512, batch=2, step_bytes=100 << 20, seed=3, device="cpu")

    searched = steps(library)
    assert len(searched) == 4
    for index, step in enumerate(searched):
        context = draw(SMALL, batch=2, queries=1, tokens=512, seed=3 + index, device="cpu")
        assert torch.equal(step.inputs["query"], context.query)
        for name in ("key", "value"):
            held = pages.gather(step.inputs[f"past_{name}"], step.inputs["page_table"][1], 1, 512)
            assert torch.equal(held, getattr(context, name)[1, 1].float())
    assert searched[0].check().agreed > 0
    searched[0].reuse()
    assert int(searched[0].inputs["refresh_mask"]) == 0
    assert int(searched[0].inputs["past_nodes"].min()) >= 0
    assert searched[0].check().agreed > 0
    searched[0].inputs["past_nodes"][:] = torch.arange(CONFIG.decode_mask_blocks, dtype=torch.int32) + 2
    before = searched[0].output.clone()
    assert searched[0].check().agreed > 0  # other nodes: the reference starts from them too
    assert not torch.equal(searched[0].output, before)
    with pytest.raises(CheckError):
        steps(Corrupted(library, "output", 0.5))[0].check()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both programs run here: small tensors of the CPU, and the host's clock."""

    def timed(calls: Any, **_: Any) -> Timing:
        for call in calls if isinstance(calls, list) else [calls]:
            call()
        return Timing.of([1.0], "single calls")

    for module in (kernel_prefill, kernel_decode, dense):
        for name, stand_in in (
            ("LLAMA_8B", SMALL), ("draw", partial(draw, device="cpu")), ("single_calls", timed),
            ("replayed_steps", timed), ("decode_steps", partial(decode_steps, device="cpu")),
        ):
            monkeypatch.setattr(module, name, stand_in, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernel_prefill.environment, "describe", lambda path: {"library": path.name})
    monkeypatch.setattr(kernel_prefill.HipConfig, "create", lambda: CONFIG)


@pytest.mark.parametrize("program", [kernel_prefill, kernel_decode], ids=lambda program: program.__name__)
@pytest.mark.usefixtures("on_cpu")
def test_whole_program(
    program: ModuleType, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything but the GPU: emulated kernels, PyTorch's attention on the CPU, absent peers."""
    arguments = ["--out", str(tmp_path), "--lengths", "128", "256", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    assert program.measure(options.parse(program.__doc__), library)
    content = json.loads((tmp_path / f"{program.__name__}.json").read_text())
    assert [row["tokens"] for row in content["rows"]] == [128, 256]
    assert content["seed"] == 5
    for row in content["rows"]:
        for column in content["ours"]:
            assert row["times"][column]["median"] == 1.0
            assert row["checks"][column]["error"] < 1e-2
            assert row["work"][column]["least"] > 0
        assert all(row["times"][column]["failed"].startswith("not run") for column in content["peers"])
        assert row["times"].keys() == {*content["ours"], *content["dense"], *content["peers"]}
    assert (tmp_path / f"{program.__name__}.md").read_text() == markdown(content)
    assert "hip-attn 1.2" in capsys.readouterr().out


@pytest.mark.parametrize("program", [kernel_prefill, kernel_decode], ids=lambda program: program.__name__)
@pytest.mark.usefixtures("on_cpu")
def test_wrong_outputs_are_not_timed(
    program: ModuleType, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, "--out", str(tmp_path), "--lengths", "256"])
    wrong = Corrupted(library, "output", 0.5)
    assert not program.measure(options.parse(program.__doc__), wrong)
    (row,) = json.loads((tmp_path / f"{program.__name__}.json").read_text())["rows"]
    failed = [entry["failed"] for column, entry in row["times"].items() if column.startswith("hip-trt")]
    assert len(failed) == 1
    assert "CheckError" in failed[0]


def worker(site: Path, folder: Path, name: str = "hip-attn 1.1") -> hip_attn.Worker:
    peer = next(peer for peer in hip_attn.peers(site, site) if peer.name == name)
    return hip_attn.Worker(peer, folder / "peer.log")


CASE = hip_attn.Case("prefill", 8192, 1, 0)


def test_absent_peers_are_not_run(tmp_path: Path) -> None:
    answers: list[tuple[str, str]] = []
    hip_attn.time_peers(hip_attn.peers(None, tmp_path / "gone"), [CASE], tmp_path, compile_seconds=1,
                        record=lambda peer, _, answer: answers.append((peer.name, answer["failed"])))
    assert answers == [
        ("hip-attn 1.1", "not run: no site folder was given"),
        ("hip-attn 1.1, k 1024, key block 8", "not run: no site folder was given"),
        ("hip-attn 1.2", "not run: no folder gone"), ("hip-attn 1.2, no statistics", "not run: no folder gone"),
    ]


def test_a_peer_that_cannot_start_is_a_reason(tmp_path: Path) -> None:
    """The real worker, in a folder without hip-attn."""
    (tmp_path / "triton.py").write_text("__version__ = '0'")
    failed = worker(tmp_path, tmp_path).ask(CASE, warm=True, seconds=60)
    assert "ModuleNotFoundError" in failed["failed"]
    assert "Traceback" in (tmp_path / "peer.log").read_text()


def test_peers_answer_in_their_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the worker: compiled first, then timed, ended when it hangs, started again after it died."""
    (tmp_path / "kernel_bench").mkdir()
    (tmp_path / "kernel_bench" / "__init__.py").touch()
    (tmp_path / "kernel_bench" / "hip_attn_worker.py").write_text('''
import json, sys, time
print(json.dumps({"triton": "0"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["tokens"] == 1: sys.exit("dead")
    if request["tokens"] == 2: time.sleep(60)
    print(json.dumps({"warm": request["warm"], "tokens": request["tokens"]}), flush=True)
''')
    peers = [hip_attn.Peer("one", "1.1", tmp_path), hip_attn.Peer("two", "1.2", tmp_path)]
    cases = [hip_attn.Case("decode", tokens, 1, 0) for tokens in (1, 8, 2)]
    got: dict[tuple[str, int], dict[str, Any]] = {}

    def record(peer: hip_attn.Peer, case: hip_attn.Case, answer: dict[str, Any]) -> None:
        got[peer.name, case.tokens] = answer

    hip_attn.time_peers(peers, cases, tmp_path, compile_seconds=3, record=record)
    for name in ("one", "two"):
        assert "its process ended" in got[name, 1]["failed"]
        assert got[name, 8] == {"warm": False, "tokens": 8, "triton": "0"}
        assert got[name, 2]["failed"] == "took too long"
