"""Weights that stay in the checkpoint's files: where a model may find them, and what happens when they change."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import save_checkpoint, tiny_llama
from graph_runner import GraphRunner
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from safetensors.torch import load_file, save_file

from hip_trt.config import HipConfig
from hip_trt.errors import EngineError, ExportError
from hip_trt.export import ExportedModel, export_onnx, graph, onnx_export, weights
from hip_trt.onnx_file import WEIGHTS_KEY, map_weights, read_onnx
from hip_trt.spec import METADATA_KEY

HIP = HipConfig.create(
    mask_k=512, decode_mask_k=512, block_q=8, block_k=4, stride_q=2, branch=2, leaf_branch=2, page_size=8,
    sink_tokens=4, window_tokens=8,
)
PAGES = [list(range(12))]
PROMPT = [(7 * index) % 250 for index in range(40)]

Exporter = Callable[..., ExportedModel]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, one layer, float32."""
    model = tiny_llama(num_hidden_layers=1)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), model, max_shard_size="40KB")


@pytest.fixture(scope="module")
def export(checkpoint: Path) -> Iterator[Exporter]:
    """export_onnx, which traces each kind of model once."""
    traces: dict[Any, graph.Trace] = {}

    def trace(family: Any, config: Any, *args: Any, **options: Any) -> graph.Trace:
        kind = options["dtype"], config.tie_word_embeddings
        if kind not in traces:
            traces[kind] = graph.trace(family, config, *args, **options)
        return graph.Trace(traces[kind].model.clone(), traces[kind].weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "trace", trace)
        yield lambda source, out, **options: export_onnx(source, out, config=HIP, **options)


def logits(model: ExportedModel) -> np.ndarray[Any, Any]:
    return GraphRunner(model.path, PAGES).step([PROMPT])


def locations(model: ExportedModel) -> set[str]:
    tensors = onnx.load(model.path, load_external_data=False).graph.initializer
    return {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}


def written(folder: Path) -> int:
    """Bytes of files that are not also somewhere else."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.stat().st_nlink == 1)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(EngineError) as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def copied(export: Exporter, checkpoint: Path, tmp_path: Path) -> ExportedModel:
    return export(checkpoint, tmp_path / "copied")


def test_linked_and_copied_compute_the_same(
    export: Exporter, checkpoint: Path, copied: ExportedModel, tmp_path: Path
) -> None:
    linked = export(checkpoint, tmp_path / "linked", link_weights=True)
    assert (linked.placement, copied.placement) == ("linked", "copied")
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.stat().st_ino for path in linked.data) == sorted(path.stat().st_ino for path in shards)
    assert set(linked.data) <= set(linked.files)
    assert written(linked.path.parent) < written(copied.path.parent) - sum(path.stat().st_size for path in copied.data)\
        + 10_000
    np.testing.assert_allclose(logits(linked), logits(copied), rtol=0, atol=1e-6)
    tensors = {tensor.name: tensor for tensor in onnx.load(linked.path, load_external_data=False).graph.initializer}
    assert not [name for name in tensors if name.endswith("_transposed")]
    assert len(copied.data) == 1
    onnx.checker.check_model(copied.path)


def test_links_outlive_the_checkpoint(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    linked = export(source, tmp_path / "out", link_weights=True)
    expected = logits(linked)
    shutil.rmtree(source)
    np.testing.assert_array_equal(logits(linked), expected)


def test_hub_cache_of_links(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    """The cache's snapshots are links into another folder, which no runtime follows: the files themselves get links."""
    blobs, snapshot = Path(shutil.copytree(checkpoint, tmp_path / "blobs")), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    linked = export(snapshot, tmp_path / "out", link_weights=True)
    assert linked.placement == "linked"
    assert not any(path.is_symlink() for path in linked.data)
    assert logits(linked).shape == (1, 1, 258)


@pytest.mark.parametrize("where", ["", "checkpoint"], ids=["above", "within"])
def test_in_place(export: Exporter, checkpoint: Path, copied: ExportedModel, tmp_path: Path, where: str) -> None:
    """In the checkpoint's folder, or on request above it, its files are pointed at; every tool takes them."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = export(source, tmp_path / "out" / where / "model.onnx", link_weights=not where)
    assert model.placement == "in place"
    shards = {path.name for path in source.glob("*.safetensors")}
    assert locations(model) == {f"checkpoint/{name}" if not where else name for name in shards}
    assert not set(model.data) & set(model.files)
    assert before.items() <= {path.name: path.read_bytes() for path in source.iterdir()}.items()
    onnx.checker.check_model(model.path, full_check=True)
    np.testing.assert_allclose(logits(model), logits(copied), rtol=0, atol=1e-6)
    again = export(source, model.path, link_weights=not where)
    assert before.items() <= {path.name: path.read_bytes() for path in source.iterdir()}.items()
    assert locations(again) == locations(model)
    if where:
        assert {path.name for path in model.files} == {"model.onnx", "hip_config.yaml"}


def test_copied_unless_asked_or_in_the_own_folder(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint"))
    assert export(source, tmp_path / "out").placement == "copied"
    assert export(source, tmp_path / "elsewhere").placement == "copied"
    assert export(source, source).placement == "in place"


def test_folder_of_another_checkpoint(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    """Even where hip-trt has written a model before."""
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    export(other, other)
    before = sorted(path.name for path in other.iterdir())
    with pytest.raises(ExportError, match=r"holds a model\.safetensors\.index\.json that hip-trt did not write"):
        export(checkpoint, other)
    assert sorted(path.name for path in other.iterdir()) == before


def test_what_is_converted_is_copied(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    """All of it for another type; and alone those weights that are stored in another type than the rest."""
    whole = export(checkpoint, tmp_path / "whole", dtype="float16", link_weights=True)
    assert (whole.placement, whole.warnings) == ("copied", ())
    mixed = Path(shutil.copytree(checkpoint, tmp_path / "mixed"))
    name = "model.norm.weight"
    for shard in mixed.glob("*.safetensors"):
        stored = load_file(shard)
        if name in stored:
            save_file({**stored, name: stored[name].half()}, shard, metadata={"format": "pt"})
    model = export(mixed, tmp_path / "out", dtype="float32", link_weights=True)
    own = [path for path in model.data if path.suffix == ".data"]
    assert [path.stat().st_size for path in own] == [32 * 4]
    assert len(model.data) == 1 + len(list(mixed.glob("*.safetensors")))
    halved = {**load_all(checkpoint), name: load_all(checkpoint)[name].half().float()}
    for found, tensor in map_weights(read_onnx(model.path), tuple(halved)):
        torch.testing.assert_close(tensor, halved[found], rtol=0, atol=0)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_tied_embeddings_in_place(export: Exporter, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    source = save_checkpoint(tmp_path / "checkpoint", model)
    linked, copied = (export(source, tmp_path / str(link), link_weights=link) for link in (True, False))
    assert (linked.placement, copied.placement) == ("linked", "copied")
    np.testing.assert_allclose(logits(linked), logits(copied), rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_offsets_need_no_alignment(export: Exporter, checkpoint: Path, tmp_path: Path, offset: int) -> None:
    """safetensors aligns nothing: the header may have any length."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    for shard in source.glob("*.safetensors"):
        content = shard.read_bytes()
        header = int.from_bytes(content[:8], "little")
        padded = content[8: 8 + header].rstrip() + b" " * (offset + -len(content[8: 8 + header].rstrip()) % 8)
        shard.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + header:])
    model = export(source, tmp_path / "out", link_weights=True)
    offsets = {ExternalDataInfo(tensor).offset % 8
               for tensor in onnx.load(model.path, load_external_data=False).graph.initializer
               if uses_external_data(tensor)}
    assert offset % 8 in {value % 4 if offset < 4 else value for value in offsets}
    np.testing.assert_allclose(logits(model), logits(export(checkpoint, tmp_path / "aligned")), rtol=0, atol=1e-6)
    expected = load_all(checkpoint)
    for name, tensor in map_weights(read_onnx(model.path), tuple(expected)):
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_file_system_without_links(
    export: Exporter, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(weights.os, "link", refuse)
    model = export(checkpoint, tmp_path / "out", link_weights=True)
    assert model.placement == "copied"
    (warning,) = model.warnings
    assert "cannot be linked" in warning
    assert "cross-device" in warning
    assert logits(model).shape == (1, 1, 258)


def test_replacing_links(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export(checkpoint, out, link_weights=True)
    assert {path.name for path in export(checkpoint, out, link_weights=True).data} == {path.name for path in first.data}
    other = save_checkpoint(tmp_path / "other", tiny_llama(seed=1, num_hidden_layers=1))
    second = export(other, out, link_weights=True)
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in second.data}
    third = export(other, out)
    assert [path.name for path in out.iterdir() if "-" in path.name] == [third.data[0].name]


@pytest.mark.parametrize("stem", ["my#model", "m[0-9]", "000000000000"])
def test_replaced_weights_go_whatever_the_name(export: Exporter, checkpoint: Path, tmp_path: Path, stem: str) -> None:
    first = export(checkpoint, tmp_path / f"{stem}.onnx")
    other = save_checkpoint(tmp_path / "other", tiny_llama(seed=1, num_hidden_layers=1))
    second = export(other, tmp_path / f"{stem}.onnx")
    assert not first.data[0].exists()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".data"] == list(second.data)


def test_space_for_a_copy_is_checked_first(
    export: Exporter, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = onnx_export._SPARE + 1000
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    assert export(checkpoint, tmp_path / "linked", link_weights=True).placement == "linked"
    monkeypatch.setattr(onnx_export, "trace", None)
    with pytest.raises(ExportError, match=r"64\.\d MB are needed, and 64\.0 MB are free"):
        export(checkpoint, tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


# Weights that change after the export


@pytest.fixture
def linked(export: Exporter, checkpoint: Path, tmp_path: Path) -> tuple[ExportedModel, Path]:
    """A model, and a shard of the checkpoint that it is linked to, to be changed."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    return export(source, tmp_path / "linked", link_weights=True), sorted(source.glob("*.safetensors"))[0]


def overwrite(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file in place, as whoever saves a checkpoint again does."""
    content = bytearray(path.read_bytes())
    change(content)
    with path.open("r+b") as file:
        file.truncate(len(content))
        file.write(content)


def test_changed_weights_are_noticed(linked: tuple[ExportedModel, Path]) -> None:
    model, shard = linked

    def flip(content: bytearray) -> None:
        content[-1] ^= 1

    overwrite(shard, flip)
    refused(model.path, "changed since model.onnx was exported", "checksum")
    overwrite(shard, flip)
    read_onnx(model.path)  # the same content with another time
    overwrite(shard, lambda content: content.extend(b"\0"))
    refused(model.path, "changed since the export", "bytes")
    overwrite(shard, lambda content: content.__delitem__(slice(100, None)))
    refused(model.path, "truncated", "it has 100 bytes")


def test_touched_weights_are_summed_and_copies_are_not(
    linked: tuple[ExportedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shard = linked
    summed: list[Path] = []
    monkeypatch.setattr("hip_trt.onnx_file.sha256", lambda path: summed.append(path) or "0")
    read_onnx(model.path)
    assert summed == []
    own = tmp_path / "own"
    shutil.copytree(model.path.parent, own, copy_function=shutil.copyfile)  # new files, new times
    read_onnx(own / "model.onnx")
    assert summed == []
    os.utime(shard, ns=(time.time_ns(), time.time_ns()))
    refused(model.path, "checksum")
    assert len(summed) == 1


def test_moved_weights(export: Exporter, checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint"))
    model = export(source, tmp_path / "out", link_weights=True)
    source.rename(tmp_path / "out" / "elsewhere")
    refused(model.path, "its weights are missing", "checkpoint/model-00001", "must stay where they were")


# Paths that leave the folder


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", "link.bin", "door/secret.bin"]
)
@pytest.mark.parametrize("place", ["initializer", "constant", "function"])
def test_paths_that_leave_the_folder_are_refused(copied: ExportedModel, location: str, place: str) -> None:
    folder = copied.path.parent
    (folder.parent / "secret.bin").write_bytes(bytes(1 << 20))
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    (folder / "door").symlink_to(folder.parent)
    model = onnx.load(copied.path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if uses_external_data(tensor))
    if place != "initializer":
        node = onnx.helper.make_node("Constant", [], ["unused"], value=tensor)
        (model.graph if place == "constant" else model.functions[0]).node.append(node)
        tensor = (model.graph if place == "constant" else model.functions[0]).node[-1].attribute[0].t
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    copied.path.write_bytes(model.SerializeToString())
    refused(copied.path, repr(location), "outside its folder: refused")


def test_models_that_are_links_themselves(copied: ExportedModel, tmp_path: Path) -> None:
    """As in a hub cache: the weights lie beside the model that the link leads to."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (copied.path, *copied.data):
        (snapshot / path.name).symlink_to(path)
    assert read_onnx(snapshot / "model.onnx").spec == copied.spec


# Metadata


def edit_metadata(path: Path, key: str, edit: Callable[[Any], object]) -> None:
    """Change in place what an .onnx file's metadata holds in JSON."""
    model = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == key)
    value = json.loads(entry.value)
    edit(value)
    entry.value = json.dumps(value)
    path.write_bytes(model.SerializeToString())


def test_facts_of_a_later_version_are_passed_over(copied: ExportedModel) -> None:
    before = read_onnx(copied.path)
    edit_metadata(copied.path, METADATA_KEY, lambda spec: spec.update(later=1))
    edit_metadata(copied.path, WEIGHTS_KEY, lambda records: records[0].update(later=1))
    after = read_onnx(copied.path)
    assert (after.spec, after.checksums) == (before.spec, before.checksums)


def test_settings_of_a_later_version_are_refused(copied: ExportedModel) -> None:
    """They change what is computed, so the rest is of no use without them."""
    edit_metadata(copied.path, METADATA_KEY, lambda spec: spec["hip"].update(later=1))
    refused(copied.path, "of another version: hip.later: ", "Export it again")
