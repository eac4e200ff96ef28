"""The C ABI takes nonsense for what it is: a status, and never a fault of the process that called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from operator_cases import make_inputs, named

from hip_trt import library as binding
from hip_trt.errors import PluginError, RuntimeInputError

PROGRAM = Path(__file__).with_name("nonsense.py")
COUNTS = {"questions": 2000, "calls": 1000, "offload": 500}


def path_of(library: str) -> Path:
    if library == "emulated":
        if emulated.compiler() is None:
            pytest.skip("the kernels are emulated with a C++ compiler")
        return emulated.build()
    try:
        return binding.plugin_path()
    except PluginError:
        pytest.skip("hip-trt was installed without the plugin")


def feed(library: Path, part: str, count: int, seed: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(library), part, str(seed), str(count)], capture_output=True, text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["done"]), f"exit status {done.returncode} at {last}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("library", ["installed", "emulated"])
@pytest.mark.parametrize("part", COUNTS)
def test_nonsense_is_refused(library: str, part: str) -> None:
    feed(path_of(library), part, COUNTS[part])


def test_pages_outside_the_pool_harm_nobody() -> None:
    feed(path_of("emulated"), "pages", 4)


@pytest.mark.parametrize("name", ["query", "key", "past_key", "page_table"])
def test_tensors_of_another_rank_are_refused(name: str) -> None:
    library = emulated.EmulatedLibrary(path_of("emulated"))
    case = named("second chunk")
    for change in (lambda tensor: tensor[0], lambda tensor: tensor[None], lambda tensor: torch.tensor(1.0)):
        with pytest.raises(RuntimeInputError, match=f"{name}: shape"):
            library.attention(**{**make_inputs(case), name: change(make_inputs(case)[name])}, config=case.config,
                              scale=1.0)
