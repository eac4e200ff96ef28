"""README and docs: every command and program in them runs, links lead somewhere, and quoted errors are real."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from documented import PAGES, ROOT, Shell, blocks, commands
from packaging.requirements import Requirement
from tiny_export import save_tiny_checkpoint

from hip_trt.tensorrt_flavour import installed

DOCS = ROOT / "docs"
GPU = torch.cuda.is_available()

NOT_RUN = {
    "make demo": "installs everything, minutes; its three commands are run here and in test_samples.py",
    "make test": "is this suite",
    "pip install": "changes the environment of the tests",
    "pytest": "is a part of this suite",
    "hip-trt run engine.plan -f book.txt --offload": "executes an engine: needs a GPU (test_run_cli.py, tests/gpu)",
    "hip-trt eval perplexity ./SmolLM2-135M-Instruct --device cuda": "needs a GPU; the next one runs it on the CPU",
    "hip-trt eval recall ./SmolLM2-135M-Instruct --device cuda": "needs a GPU; the next one runs it on the CPU",
    "hip-trt eval locality ./SmolLM2-135M-Instruct --device cuda": "needs a GPU; the next one runs it on the CPU",
    "hip-trt eval retrieval": "needs a GPU or minutes, and weights that recall (test_eval_retrieval.py)",
    "python benchmarks/recall_model/train.py": "needs a GPU (test_eval_retrieval.py trains for some steps)",
    "hip-trt eval break-even": "needs a GPU (test_eval_attention.py)",
    "hip-trt verify build/engine.plan --against onnxruntime": "executes an engine: needs a GPU (test_verify.py)",
    "hip-trt run llama/engine.plan": "executes an engine: needs a GPU (tests/gpu/test_engines_gpu.py)",
    "hip-trt verify llama/engine.plan --against onnxruntime": "executes an engine: needs a GPU (test_verify.py)",
}
"""Commands, by how they begin, that are not run, and why."""

PROGRAMS_NOT_RUN = {
    "docs/offload.md": "executes an engine: needs a GPU (tests/gpu/test_offload_model_gpu.py)",
    "docs/adding_a_family.md": "test_families.py::test_family_is_added runs it",
}
"""Pages whose Python blocks are not run here, and why."""


BEFORE = {"verification.md": "hip-trt export --model ./Llama-3.2-1B --out build/engine.plan --dtype float32"}
"""What has been done before a page's commands."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with what the pages' commands name: tiny models and a text."""
    for name in ("Llama-3.2-1B", "Llama-3.1-8B-Instruct", "SmolLM2-135M-Instruct"):
        save_tiny_checkpoint(tmp_path / name, max_position_embeddings=1024)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 10)
    return tmp_path


def pages() -> list[Path]:
    return [page for page in PAGES if page.parent.name != "samples"]  # those have a test of their own


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)], ids=lambda page: page.name)
def test_commands(page: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tensorrt-rtx" not in installed():
        pytest.skip("needs the extra tensorrt-rtx")
    shell = Shell(root, monkeypatch)
    for command in (*([BEFORE[page.name]] if page.name in BEFORE else []), *commands(page)):
        if command.startswith(tuple(NOT_RUN)):
            continue
        outcome = shell.run(command)
        assert outcome.status == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"


def test_list_of_commands_not_run_is_true() -> None:
    listed = [command for page in pages() for command in commands(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in listed), f"no such command any more: {start}"
    for page in PROGRAMS_NOT_RUN:
        assert blocks(ROOT / page, "python"), f"no program any more: {page}"


def test_programs_of_the_readme(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other: the second continues with what the first imported."""
    if "tensorrt-rtx" not in installed():
        pytest.skip("needs the extra tensorrt-rtx")
    monkeypatch.chdir(root)
    program = "\n".join(blocks(ROOT / "README.md", "python"))
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_programs_are_all_known() -> None:
    with_programs = {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")}
    assert with_programs == {"README.md", *PROGRAMS_NOT_RUN}


def test_operator_reference_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "operator_reference.py"))["page"]()
    assert (DOCS / "operator_reference.md").read_text(encoding="utf-8") == page, "run python docs/operator_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(r"`((?:hip_trt|export|plugins|tests|benchmarks|docs|samples)/[\w./*-]+)", page.read_text()):
        assert list(ROOT.glob(name.rstrip("/").partition("::")[0])), name


def test_versions_in_compatibility_are_those_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {(name := Requirement(text)).name: str(name.specifier) for text in project["dependencies"]}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", (DOCS / "compatibility.md").read_text("utf-8"), re.M)
    assert len(rows) >= 8
    for name, lowest, pinned in rows:
        assert declared[name] == f">={lowest}", name
        assert re.search(rf"^{name}=={re.escape(pinned)}( |$)", constraints, re.MULTILINE), name


def test_tensorrt_in_compatibility_is_what_is_declared() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    text = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    for extra, name in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX")):
        bounds = {part.operator: part.version for part in Requirement(extras[extra][0]).specifier}
        assert f"{name} {bounds['>=']} to {int(bounds['<']) - 1}.x" in text


def test_every_requirement_has_a_lowest_version() -> None:
    """Else the lowest version that the package declares is one from before all else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in (text for group in groups for text in group):
        assert any(part.operator in (">=", "==") for part in Requirement(text).specifier), text


def test_quoted_errors_are_real() -> None:
    """Each message of the troubleshooting page occurs in the sources, its pieces in order; … is any text."""
    sources = [*ROOT.glob("hip_trt/**/*.py"), *ROOT.glob("export/*.py"), *ROOT.glob("plugins/build_backend/**/*.py")]
    text = "\n".join(re.sub(r'"\s*\n\s*f?"', "", source.read_text(encoding="utf-8")) for source in sources)
    others = ("`potential hardlink attack`", "`is out of memory`", "`: cudaErrorNoKernelImageForDevice`")
    found = 0
    for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        message = re.match(r"\| `(.+?)`", line)
        if message is None or line.startswith(tuple(f"| {other}" for other in others)):
            continue
        pieces = [re.escape(piece) for piece in message[1].split("…") if piece]
        assert re.search(r"[^\n]*?".join(pieces), text), message[1]
        found += 1
    assert found > 20
