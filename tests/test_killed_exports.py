"""kill -9 at any moment of an export over another one: what is left is the old one, the new one, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_export import byte_tokenizer, save_tiny_checkpoint

from hip_trt.errors import HipTrtError
from hip_trt.files import staging
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.loading import load_tokenizer
from hip_trt.sidecar import verify_plan

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

KILLS = int(os.environ.get("HIP_TRT_KILLS", "0"))
"""How many; an evening's worth is 100. None by default, as it fails now and then, and rightly: while an engine is
built, the plan before it is still there, beside the new model and tokenizer, and can be run."""
SEED = int(os.environ.get("HIP_TRT_SEED", "0"))
OPTIONS = ["--compute-capability", "8.0", "--max-seq-len", "64", "--max-batch", "1", "--max-prefill", "32"]
NAMES = "old", "new"


class Exports:
    """Two exports, each whole in a folder of its own, and a process that makes them again and is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        save_tiny_checkpoint(folder / "old-checkpoint", num_hidden_layers=1)
        new = save_tiny_checkpoint(folder / "new-checkpoint", num_hidden_layers=1, chat=False, initializer_range=0.5)
        tokenizer = byte_tokenizer(chat=False)  # other tokens, and no template, which the old one has
        tokenizer.add_special_tokens({"bos_token": "<|user|>"})
        tokenizer.save_pretrained(new)
        program = Path(__file__).with_name("killed_exports.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(new), str(folder / "scratch")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        self.operations = {}
        for name in NAMES:
            self.operations[name] = self.export(name, folder / name)["operations"]
        self.files = {name: self.read(folder / name) for name in NAMES}
        self.models = {(folder / name / "model.onnx").read_bytes(): name for name in NAMES}
        self.plans = {(folder / name / "engine.plan").read_bytes(): name for name in NAMES}

    def export(self, name: str, out: Path, **kill: Any) -> dict[str, int]:
        """Export a checkpoint to ONNX and an engine."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        arguments = ["export", "--model", str(self.folder / f"{name}-checkpoint"), "--out", str(out / "engine.plan")]
        request = {"arguments": [*arguments, *OPTIONS], "folder": str(out), **kill}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        assert answer["status"] == (-9 if "operations" in kill else 0) or "seconds" in kill  # which it may outrun
        return answer

    @staticmethod
    def read(folder: Path) -> dict[str, bytes]:
        """Files by name; plans have a time in their description and are no twins."""
        files = (path for path in folder.iterdir() if path.is_file())
        return {path.name: b"" if "plan" in path.name else path.read_bytes() for path in files}

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.folder / "old", self.out)

    def companions(self) -> str | None:
        """Whose tokenizer and configuration lie in the folder."""
        found = self.read(self.out)
        for name in NAMES:
            files = {file: content for file, content in self.files[name].items() if not file.startswith(("model", "e"))}
            others = {file for other in NAMES for file in self.files[other] if not file.startswith(("model", "e"))}
            if {file: content for file, content in found.items() if file in others} == files:
                return name
        return None

    def check(self) -> tuple[str, str]:
        """What a user of model and plan gets: "old", "new" or "refused"; fails where either is mixed with the other."""
        return self._use(self.out / "model.onnx", self.models), self._use(self.out / "engine.plan", self.plans)

    def _use(self, path: Path, known: dict[bytes, str]) -> str:
        try:
            if path.suffix == ".onnx":
                source = read_onnx(path)
                for file, record in source.checksums.items():
                    assert hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256
            else:
                verify_plan(path)
            load_tokenizer(path.parent)
        except HipTrtError as error:
            return "refused" if "\n" not in str(error) else f"refused on several lines: {error}"
        whose = known.get(path.read_bytes(), "new" if path.suffix == ".plan" else "")
        assert self.companions() == whose, f"{path.name} is of {whose}, its tokenizer of {self.companions()}"
        return whose

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    exports = Exports(tmp_path_factory.mktemp("killed"))
    yield exports
    exports.close()


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(KILLS == 0, reason="set HIP_TRT_KILLS to how many")
@pytest.mark.slow
def test_killed_at_random_moments(exports: Exports) -> None:
    """Half of them at a file operation, which most are when files are published; half at a time."""
    draw = random.Random(SEED)
    exports.reset()
    begin = time.perf_counter()
    exports.operations["replaced"] = exports.export("new", exports.out)["operations"]
    seconds = time.perf_counter() - begin
    seen: dict[tuple[str, str, str], int] = {}
    for kill in range(KILLS):
        exports.reset()
        if kill % 2:
            at: dict[str, Any] = {"seconds": draw.uniform(0, 0.9 * seconds)}
        else:
            at = {"operations": draw.randrange(exports.operations["replaced"])}
        exports.export("new", exports.out, **at)
        left = exports.check()
        assert set(left) <= {*NAMES, "refused"}
        with staging(exports.out):  # as the next export begins
            pass
        assert hidden(exports.out) == [], at
        swept = exports.check()
        assert swept[0] != "refused", at
        assert swept[0] == "new" or swept == ("old", "old"), at
        seen[(*left, swept[0])] = seen.get((*left, swept[0]), 0) + 1
    exports.export("new", exports.out)
    assert exports.check() == ("new", "new")
    assert exports.read(exports.out) == exports.files["new"]
    print(f"{KILLS} kills: model, plan, and model once swept: {seen}")
