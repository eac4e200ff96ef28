"""A model folder is data: no command runs its code, asks anything, starts programs or reaches for the network."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_export import export_tiny, save_tiny_checkpoint

from hip_trt.errors import CheckpointError
from hip_trt.evaluate.models import load_model
from hip_trt.huggingface import closed

GUARD = Path(__file__).with_name("closed_guard.py")
EVIL = """
import sys
sys.audit("hip_trt.tests.fetched", __file__)
class Slow: pass
class Fast: pass
class Config: pass
class Model: pass
def generate(*args, **kwargs): pass
"""
KERNELS = """
import sys
def _identity(*args, **kwargs):
    return lambda decorated: decorated
def _fetch(*args, **kwargs):
    sys.audit("hip_trt.tests.fetched", "a kernel of the hub", args)
get_kernel = _fetch
use_kernel_forward_from_hub = use_kernelized_func = _identity
class _Stub:
    def __init__(self, *args, **kwargs): pass
CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = Mode = ROCMProperties = _Stub
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = kernelize = has_kernel = _fetch
"""


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle was read",)


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, **fields}), encoding="utf-8")


def make_hostile(folder: Path) -> Path:
    """All that a folder may bring to have code run or fetched."""
    kernel = "org/attention:evil"
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
         _attn_implementation=kernel, attn_implementation=kernel, experts_implementation=kernel,
         _name_or_path="org/base", base_model_name_or_path="org/base", custom_generate="org/generate",
         transformers_weights="pytorch_model.bin")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", "org/other--evil.Fast"]},
         tokenizer_class="EvilTokenizer", name_or_path="org/base")
    edit(folder / "generation_config.json", custom_generate="org/generate", _from_model_config=True)
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    (folder / "custom_generate").mkdir()
    for name in ("evil", "custom_generate/generate", "sitecustomize", "kernels", "peft", "torch", "sentencepiece"):
        (folder / f"{name}.py").write_text(EVIL, encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile checkpoint, and an export that was made hostile afterwards."""
    folder = tmp_path_factory.mktemp("hostile")
    export_tiny(folder, logits="all", dtype="float32")
    make_hostile(folder / "checkpoint")
    make_hostile(folder)
    return folder


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that transformers asks to fetch, where they are installed."""
    folder = tmp_path_factory.mktemp("fakes")
    for name, version, source in (("kernels", "0.18.3", KERNELS), ("peft", "0.99.0", "")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"__version__ = {version!r}\n{source}", encoding="utf-8")
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


def guarded(folder: Path, fakes: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """What commands did that ran in ``folder``, one after the other in one guarded process."""
    done = subprocess.run(
        [sys.executable, "-P", str(GUARD), str(folder), str(fakes)], input="\n".join(map(json.dumps, commands)),
        capture_output=True, text=True, cwd=folder, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


STUDY = "--texts '' --text {out}/text.txt --max-tokens 512 --out {out}/eval"
SMALL = "--mask-k 32 --decode-mask-k 32 --sink-tokens 16 --window-tokens 16"
COMMANDS = {
    "export": "export --model {folder}/checkpoint --out {out}/export/model.onnx",
    "export within": "export --model {folder}/checkpoint --out {folder}/checkpoint/model.onnx --dtype float32",
    "build": "export --model {folder}/model.onnx --out {out}/plan/engine.plan --max-seq-len 64 "
    "--compute-capability 8.0",
    "inspect": "inspect {folder}/model.onnx",
    "inspect plan": "inspect {out}/plan/engine.plan",
    "run": "run {folder}/model.onnx --prompt hello -n 2",
    "run within": "run {folder}/checkpoint/model.onnx --prompt hello -n 2",
    "verify": "verify {folder}/model.onnx --checkpoint {folder}/checkpoint --steps 1 --max-tokens 16",
    "serve-repo": "serve-repo {folder}/model.onnx --out {out}/triton",
    "eval perplexity": f"eval perplexity {{folder}}/checkpoint {STUDY} --skip 8 --seconds 1",
    "eval recall": f"eval recall {{folder}}/checkpoint {STUDY} {SMALL} --rows 2 --query-blocks 1",
    "eval locality": f"eval locality {{folder}}/checkpoint {STUDY} {SMALL} --rows 2",
    "eval retrieval": "eval retrieval {folder}/checkpoint --text {out}/text.txt --texts '' --lengths 128 --facts 1 "
    "--probes 1 --time-limit 1 --out {out}/eval",
    "eval break-even": "eval break-even --lengths 256 --heads 4,2,64 --batches 1 --out {out}/eval",
    "eval recommend": "eval recommend {out}/eval",
    "doctor": "doctor",
}
REFUSED = {"eval break-even": "GPU", "eval retrieval": "the tokenizer has 0 of one token"}
"""Those that have nothing to do here, and what they say."""


@pytest.fixture(scope="module")
def records(hostile: Path, fakes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    out = tmp_path_factory.mktemp("out")
    (out / "text.txt").write_text("The cat sat on the mat, and so on. " * 200, encoding="utf-8")
    commands = [shlex.split(command.format(folder=hostile, out=out)) for command in COMMANDS.values()]
    return dict(zip(COMMANDS, guarded(hostile, fakes, *commands), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_or_fetches_anything(records: dict[str, dict[str, Any]], name: str) -> None:
    record = records[name]
    assert record["refused"] == []
    assert "Traceback" not in record["messages"]
    if name in REFUSED:
        assert REFUSED[name] in record["messages"]
    else:
        assert record["status"] == 0, record["messages"]


def test_questions_are_answered_no_and_other_code_is_named(hostile: Path, tmp_path: Path) -> None:
    from hip_trt.export import export_onnx

    (warning,) = export_onnx(hostile / "checkpoint", tmp_path / "out").warnings
    assert "names Python code of its own (auto_map), which is not run" in warning
    for name in ("tokenizer_config.json", "config.json"):
        assert "evil" not in (tmp_path / "out" / name).read_text(encoding="utf-8")
    assert closed.load_tokenizer(tmp_path / "out")("ab")["input_ids"]


def test_evaluation_reads_no_pickles_and_imports_no_quantizers(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="quantized"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickles \(\.bin\) are not read"):
        load_model(folder)


def test_closed_drops_what_names_code_and_keeps_the_rest() -> None:
    fields = {"auto_map": {"AutoConfig": "a.B"}, "text_config": {"_attn_implementation": "org/k", "hidden_size": 8},
              "layers": [{"custom_generate": "x", "n": 1}], "vocab_size": 5, "chat_template": "auto_map"}
    assert closed.closed(fields) == {
        "text_config": {"hidden_size": 8}, "layers": [{"n": 1}], "vocab_size": 5, "chat_template": "auto_map",
    }
