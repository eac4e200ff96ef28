"""Opening checkpoints: what is read, and what is said of those that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint, save_gguf, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hip_trt.errors import CheckpointError
from hip_trt.export import gguf_file, hub
from hip_trt.export.checkpoint import Checkpoint, open_checkpoint
from hip_trt.export.graph import buffers, parameter_shapes
from hip_trt.export.stored import check_shapes, convert


def assert_holds(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    """The checkpoint has the model's parameters, bit for bit."""
    expected = dict(model.named_parameters())
    assert set(parameter_shapes(checkpoint.family, checkpoint.config)) == set(expected)
    for name, parameter in expected.items():
        assert checkpoint.tensors[name].shape == tuple(parameter.shape)
        torch.testing.assert_close(checkpoint.tensors[name].load(), parameter.detach(), rtol=0, atol=0)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sharded, tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def fails(source: Path | str, *words: str, **options: Any) -> str:
    """Opening fails with one line that has these words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_safetensors_single_and_sharded(tiny_folder: Path, tiny_sharded: Path) -> None:
    assert len(list(tiny_sharded.glob("*.safetensors"))) > 2
    for path in (tiny_folder, tiny_sharded):
        checkpoint = open_checkpoint(path)
        assert checkpoint.name == path.name
        assert checkpoint.dtype == torch.float32
        assert_holds(checkpoint, LlamaForCausalLM.from_pretrained(path))


def test_stored_type_is_the_default(folder: Path) -> None:
    save_checkpoint(folder, tiny_llama().bfloat16())
    assert open_checkpoint(folder).dtype == torch.bfloat16
    edit_config(folder, dtype=None)
    assert open_checkpoint(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("stored", ["embeddings", "head", "equal", "different"])
def test_tied_embeddings_follow_transformers(folder: Path, stored: str) -> None:
    save_checkpoint(folder, tiny_llama(tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    if stored == "head":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    elif stored != "embeddings":
        weights["lm_head.weight"] = embeddings.clone() if stored == "equal" else embeddings + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings == (stored != "different")
    assert_holds(checkpoint, LlamaForCausalLM.from_pretrained(folder))
    assert check_shapes(checkpoint.tensors, parameter_shapes(checkpoint.family, checkpoint.config), "") == []


KINDS = gguf.GGMLQuantizationType


UNREADABLE = {
    kind for kind in KINDS if kind.name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")
}
"""Types of which the gguf package, and so transformers, cannot make floats; none is a type of published weights."""


@pytest.fixture
def any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let :func:`save_gguf` write every type: where gguf cannot quantize, blocks of random bytes, finite ones."""
    original, random = gguf.quantize, np.random.default_rng(0)

    def quantize(values: np.ndarray[Any, Any], kind: KINDS) -> np.ndarray[Any, Any]:
        try:
            return original(values, kind)
        except NotImplementedError:
            size, length = gguf.GGML_QUANT_SIZES[kind]
            shape = (*values.shape[:-1], values.shape[-1] // size * length)
            return random.integers(0, 60, shape, dtype=np.uint8)  # as float16 scales: below 1.1, never infinite

    monkeypatch.setattr(gguf, "quantize", quantize)


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", sorted(UNREADABLE), ids=lambda kind: kind.name)
def test_gguf_types_that_cannot_be_undone(tmp_path: Path, kind: KINDS) -> None:
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama(num_hidden_layers=1, hidden_size=256), kind=kind)
    fails(path, "tiny.gguf", f"quantized as {kind.name}", "Q8_0")


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", sorted(set(KINDS) - UNREADABLE), ids=lambda kind: kind.name)
def test_gguf_equals_what_transformers_reads(tmp_path: Path, kind: KINDS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_ROWS_SIZE", 7 * 256 * 4)  # seven rows at a time
    model = tiny_llama(hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=1)
    path = save_gguf(tmp_path / "tiny.gguf", model, kind=kind)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.name, checkpoint.dtype) == ("Tiny", torch.float16)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
                  "tie_word_embeddings", "eos_token_id"):
        assert getattr(checkpoint.config, field) == getattr(expected.config, field), field
    assert checkpoint.config.head_dim == 64
    for name, parameter in expected.named_parameters():
        loaded = checkpoint.tensors[name].load().float()
        assert loaded.isfinite().all()
        torch.testing.assert_close(loaded, parameter.detach(), rtol=0, atol=0)
    assert checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].load().abs().max() > 0
    if kind == KINDS.F32:
        assert_holds(checkpoint, model)


def test_gguf_type_of_the_future(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama(num_hidden_layers=1))
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    where = content.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and their sizes
    assert content[where : where + 4] == (0).to_bytes(4, "little")
    content[where : where + 4] = (999).to_bytes(4, "little")
    path.write_bytes(content)
    fails(path, "does not know", "999", "newer gguf")


@pytest.mark.parametrize(("file_type", "dtype"), [(0, torch.float32), (1, torch.float16), (32, torch.bfloat16)])
def test_gguf_type(tmp_path: Path, file_type: int, dtype: torch.dtype) -> None:
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama(), fields={"general.file_type": file_type})
    assert open_checkpoint(path).dtype == dtype


def test_gguf_tied_embeddings_and_biases(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    checkpoint = open_checkpoint(save_gguf(tmp_path / "tiny.gguf", model))
    assert_holds(checkpoint, model)
    assert checkpoint.config.tie_word_embeddings


def test_gguf_rope(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
               "llama.rope.scaling.original_context_length": 128}
    checkpoint = open_checkpoint(save_gguf(tmp_path / "yarn.gguf", tiny_llama(), fields=scaling))
    assert checkpoint.config.rope_parameters == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    }
    factors = np.array([1, 2, 4, 8], dtype=np.float32)
    path = save_gguf(tmp_path / "llama3.gguf", tiny_llama(), extra={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(path)
    assert checkpoint.frequency_factors is not None
    assert checkpoint.frequency_factors.tolist() == [1, 2, 4, 8]
    assert set(checkpoint.tensors) == set(parameter_shapes(checkpoint.family, checkpoint.config))


def test_missing_paths() -> None:
    fails("/no/such/folder", "/no/such/folder", "no such file or folder")
    fails("no-such-folder", "no such file or folder")
    fails("org/name", "org/name", "local Hugging Face cache", "--allow-download")


def test_hub_id_in_the_cache(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--org--name"
    shutil.copytree(tiny_folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.name == "org/name"
    assert_holds(checkpoint, LlamaForCausalLM.from_pretrained(tiny_folder))


def test_hub_is_asked_only_when_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def model_info(self: Any, hub_id: str, **options: Any) -> None:
        asked.append(hub_id)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    fails("org/name", "--allow-download")
    assert asked == []
    fails("org/name", "no network", allow_download=True)
    assert asked == ["org/name"]


def hub_snapshot(source: Path, cache: Path, *left_out: str) -> Path:
    """A copy of a folder in a hub cache, of links as the hub's client makes them."""
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("abc")
    for path in source.iterdir():
        if path.name not in left_out:
            shutil.copyfile(path, blobs / f"blob-of-{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    return snapshot


@pytest.mark.parametrize(("lost", "missing"), [
    (("config.json",), "config.json"), (("model-00002-of-*",), "model-00002-of-"),
    (("model.safetensors.index.json", "model-*"), "model.safetensors"), (("tokenizer.json",), None), ((), None),
])
def test_partial_snapshots_are_completed(
    tiny_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, ...], missing: str | None
) -> None:
    names = [path.name for pattern in lost for path in tiny_sharded.glob(pattern)]
    snapshot = hub_snapshot(tiny_sharded, tmp_path, *names)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    download, asked = hub.snapshot_download, []

    def fake_download(hub_id: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return download(hub_id, local_files_only=True, **options)
        asked.append(hub_id)
        return str(hub_snapshot(tiny_sharded, tmp_path / "new"))

    monkeypatch.setattr(hub, "snapshot_download", fake_download)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *args, **options: SimpleNamespace(siblings=[]))
    if missing:
        fails("org/name", "incomplete", missing, "--allow-download")
    else:
        assert open_checkpoint("org/name").path == snapshot
    assert asked == []
    open_checkpoint("org/name", allow_download=True)
    assert asked == (["org/name"] if lost else [])


def test_whole_weights_are_used_where_the_hub_cannot_be_reached(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_info(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    snapshot = hub_snapshot(tiny_folder, tmp_path, "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    assert open_checkpoint("org/name", allow_download=True).path == snapshot


def test_folder_without_model(tmp_path: Path) -> None:
    fails(tmp_path, "no config.json")
    (tmp_path / "tiny.gguf").touch()
    fails(tmp_path, "no config.json", "tiny.gguf")
    (tmp_path / "readme.md").touch()
    fails(tmp_path / "readme.md", "not a .gguf file")


def test_other_architectures_are_refused_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit_config(folder, architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    fails(folder, "config.json", "Gemma2ForCausalLM", "LlamaForCausalLM")
    edit_config(folder, architectures=None)
    fails(folder, "gemma2")
    edit_config(folder, model_type=None)
    fails(folder, "no architecture")


def test_damaged_config(folder: Path) -> None:
    edit_config(folder, hidden_size=30, num_attention_heads=4)
    fails(folder, "config.json", "hidden size")
    (folder / "config.json").write_text("{")
    fails(folder, "config.json", "not valid JSON")
    (folder / "config.json").write_text("[]")
    fails(folder, "config.json")


def test_quantized_checkpoints_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    fails(folder, "gptq")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_length_is_refused(folder: Path, rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    edit_config(folder, rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0,
                                         "original_max_position_embeddings": 256, **factors})
    fails(folder, "rope", rope_type, "--max-context")


@pytest.mark.parametrize("rope", [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
], ids=lambda rope: rope["rope_type"])
def test_rope_frequencies(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = tiny_llama(rope_parameters={"rope_theta": 1000.0, **rope})
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, model))
    frequencies = buffers(checkpoint.family, checkpoint.config)["model.rotary_emb.inv_freq"]
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)


def test_rope_of_older_configurations(folder: Path) -> None:
    """Before transformers 5: rope_theta and rope_scaling."""
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(fields))
    rope = open_checkpoint(folder).config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500000.0, "linear", 4.0)


def truncate(path: Path, keep: Callable[[int], int]) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: keep(len(content))])


@pytest.mark.parametrize("keep", [lambda size: size - 1, lambda size: size // 2, lambda size: 20, lambda size: 4])
def test_truncated_safetensors(folder: Path, keep: Callable[[int], int]) -> None:
    truncate(folder / "model.safetensors", keep)
    message = fails(folder, "model.safetensors")
    assert "truncated" in message or "damaged" in message


def test_what_is_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails(folder, "Git LFS")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    fails(folder, "model.safetensors")
    (folder / "model.safetensors").unlink()
    fails(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").touch()
    fails(folder, ".bin", "save_pretrained")


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    fails(sharded, f"1 of {len(shards)} shards", shards[1].name)


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    fails(sharded, "model.safetensors.index.json", "not a valid index")


def test_wrong_index(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    name = "model.norm.weight"
    home = next(shard for shard in shards if name in load_file(sharded / shard))
    other = next(shard for shard in shards if shard != home)
    edit_index(sharded, lambda held: held.update({name: other}))
    fails(sharded, "index.json", f"the weight {name} is in {other}, which does not hold it; it is in {home}")
    edit_index(sharded, lambda held: held.update({name: home, "model.norm.other": home}))
    fails(sharded, f"the weight model.norm.other is in {home}, which does not hold it.")
    edit_index(sharded, lambda held: held.update({"model.norm.other": "../model-00001.safetensors"}))
    fails(sharded, "'../model-00001.safetensors', which is no file of this folder")


def test_weight_in_two_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(shards[0]).items()))
    save_file({**load_file(shards[1]), name: tensor}, shards[1])
    fails(sharded, f"the weight {name} is in both {shards[0].name} and {shards[1].name}")


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


NORM, FIRST = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda header: header[NORM].update(data_offsets=[0, 128]), (f"damaged: the weights {NORM} and {FIRST} overlap",)),
    (lambda header: header[NORM].update(shape=[33]), (f"{NORM} of shape [33] needs 132 bytes, and has 128",)),
    (lambda header: header.pop(FIRST), ("belong to no weight",)),
    (lambda header: header.pop(NORM), ("bytes after the last weight",)),
    (lambda header: header[NORM].update(dtype="F8_E4M3"), (f"the weight {NORM} is stored as F8_E4M3", "bfloat16")),
    (lambda header: header[NORM].update(data_offsets=[5, 1]), ("damaged",)),
    (lambda header: header[NORM].pop("shape"), ("damaged", "KeyError")),
], ids=["overlap", "size", "gap", "tail", "type", "backwards", "no shape"])
def test_damaged_headers(folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]) -> None:
    edit_header(folder / "model.safetensors", change)
    fails(folder, "model.safetensors", *words)


def test_truncated_weights_are_named(folder: Path) -> None:
    truncate(folder / "model.safetensors", lambda size: size - 1)
    fails(folder, "truncated", f"{NORM} is not whole")


def test_weights_that_do_not_fit(folder: Path) -> None:
    def compare(**fields: Any) -> None:
        edit_config(folder, **fields)
        checkpoint = open_checkpoint(folder)
        check_shapes(checkpoint.tensors, parameter_shapes(checkpoint.family, checkpoint.config), str(folder))

    compare()
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[258, 32\].*\[300, 32\].*vocab_size"):
        compare(vocab_size=300)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight and 8 others is missing"):
        compare(vocab_size=258, num_hidden_layers=3)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.99])
def test_truncated_gguf(tmp_path: Path, part: float) -> None:
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama())
    truncate(path, lambda size: int(size * part))
    message = fails(path, "tiny.gguf")
    assert "truncated" in message or "not a GGUF file" in message


def test_gguf_that_is_no_llama(tmp_path: Path) -> None:
    fails(save_gguf(tmp_path / "gemma.gguf", tiny_llama(), architecture="gemma2"), "gemma2", "llama, qwen2, qwen3")
    fails(save_gguf(tmp_path / "moe.gguf", tiny_llama(), fields={"llama.expert_count": 8}), "mixture of experts")
    fails(save_gguf(tmp_path / "part.gguf", tiny_llama(), fields={"split.count": 3}), "3 parts", "--merge")
    path = tmp_path / "text.gguf"
    path.write_text("hello, world")
    fails(path, "not a GGUF file")


def test_values_beyond_float16_are_refused() -> None:
    weight = torch.tensor([1.0, 7e4])
    for sign in (1, -1):
        with pytest.raises(CheckpointError, match=r"w holds -?7e\+04, beyond float16"):
            convert(sign * weight, torch.float16, "w")
    assert convert(weight, torch.bfloat16, "w").isfinite().all()
    weight = torch.tensor([65510.0, float("inf")])  # rounds to float16's largest; infinite already
    assert convert(weight, torch.float16, "w").tolist() == [65504.0, float("inf")]


def test_tokenizer(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    assert open_checkpoint(tiny_folder).save_tokenizer(saved) == []
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (tiny_folder / name).read_bytes()
    (folder / "tokenizer.json").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    (warning,) = open_checkpoint(folder).save_tokenizer(empty)
    assert "cannot be loaded" in warning
    assert list(empty.iterdir()) == []
    (folder / "tokenizer.json").unlink()
    (warning,) = open_checkpoint(folder).save_tokenizer(empty)
    assert "tokenizer.json" in warning
    assert list(empty.iterdir()) == []


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_llama(vocab_size=250, bos_token_id=0, eos_token_id=1))
    (warning,) = open_checkpoint(folder).save_tokenizer(tmp_path)
    assert "258 tokens and the model 250" in warning


def test_generation_config(folder: Path) -> None:
    assert open_checkpoint(folder).generation_config().eos_token_id == 257
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    generation = open_checkpoint(folder).generation_config()
    assert (generation.eos_token_id, generation.temperature) == ([1, 2], 0.5)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(folder).generation_config()
