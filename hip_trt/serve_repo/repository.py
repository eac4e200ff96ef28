"""Files of a model repository: gathered in a hidden folder, and moved into place when they are complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hip_trt import library
from hip_trt.errors import ExportError, RuntimeInputError
from hip_trt.files import replaced_name, require_space, staging
from hip_trt.offload import Offload
from hip_trt.onnx_file import read_onnx
from hip_trt.runtime.loading import refuse_offload
from hip_trt.serve_repo.config import engine_config, text_config
from hip_trt.sidecar import Sidecar, sidecar_path, verify_plan

_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Repository:
    """What :func:`write_repository` wrote.

    Attributes:
        text: folder of the model that takes and gives text.
        engine: folder of the bare engine; None where Triton's TensorRT backend cannot run it.
        no_engine: why there is none.
    """

    text: Path
    engine: Path | None
    no_engine: str = ""


def write_repository(
    model: str | Path, repository: str | Path, *, name: str | None = None, instances: int = 1,
    offload: Offload | None = None, force: bool = False,
) -> Repository:
    """Write a model repository for Triton Inference Server, or add to one.

    ``repository/NAME`` holds config.pbtxt and ``1/``, with the model, its tokenizer and a model.py for Triton's Python
    backend. A plan of ``tensorrt`` that has its weights also gives ``repository/NAME-engine``, for Triton's TensorRT
    backend, with the plugin library. Folders appear when they are complete.

    Args:
        model: .plan or .onnx from ``hip-trt export``. Files are copied.
        repository: folder of the repository, created if need be.
        name: the model's name in Triton; by default the checkpoint's.
        instances: copies of the model that answer at once.
        offload: keep KV caches in host memory, served by so much of the GPU's; None: on the GPU. It stands in
            config.pbtxt, where it can be changed. A client of the bare engine has the caches where it likes.
        force: replace models of these names.

    Raises:
        EngineError: the model or its weights are missing or damaged.
        PluginError: the plugin library is missing, or of another version than this package.
        ExportError: a name is not allowed or taken, the tokenizer is missing, or the disk is full.
        RuntimeInputError: ``instances`` is not positive, or ``offload`` is given for a .onnx.
    """
    model, repository = Path(model), Path(repository)
    if instances < 1:
        raise RuntimeInputError(f"instances: {instances} is not allowed.", "It must be at least 1.")
    sidecar: Sidecar | None = None
    if model.suffix == ".onnx":
        if offload:
            refuse_offload(model)
        source = read_onnx(model)
        files, spec = list(source.files), source.spec
    else:
        sidecar = verify_plan(model)
        spec = sidecar.spec
        files = [model, sidecar_path(model)]
        if sidecar.weights != "embedded":
            files += read_onnx(model.with_name(sidecar.model[0].name)).files
    files += _companions(model.parent)
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", spec.source).strip("-.") or "model"
    if not _NAME.fullmatch(name):
        raise ExportError(f"--name {name}: not allowed.", "Use letters, digits, '.', '_' and '-'.")
    text = {f"{_VERSION}/{_inside(file, model.parent)}": file for file in files}
    text[f"{_VERSION}/model.py"] = Path(__file__).with_name("model.py")
    configs = {
        name: text_config(name, model.name, gpu=sidecar is not None, instances=instances, offload=offload)
    }
    contents = {name: text}
    no_engine = _unfit(sidecar)
    if sidecar is not None and not no_engine:
        library.version()  # refuses a library of another build than this package
        bare, plugin = f"{name}-engine", library.plugin_path()
        configs[bare] = engine_config(bare, sidecar, plugin.name)
        contents[bare] = {f"{_VERSION}/{file.name}": file for file in (model, plugin)}
    _write(repository, contents, configs, force=force)
    folders = [repository / name for name in contents]
    return Repository(folders[0], folders[1] if len(folders) > 1 else None, no_engine)


def _companions(folder: Path) -> list[Path]:
    from hip_trt.export.onnx_export import SHARED_FILES

    found = [folder / name for name in SHARED_FILES if (folder / name).is_file()]
    if folder / "tokenizer_config.json" not in found:
        raise ExportError(
            f"{folder}: there is no tokenizer beside the model, and Triton's clients send text.",
            "Export again from a checkpoint that has its tokenizer.",
        )
    return found


def _inside(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _unfit(sidecar: Sidecar | None) -> str:
    """Why Triton's TensorRT backend cannot run a model; empty if it can."""
    if sidecar is None:
        return "an .onnx is no engine"
    if sidecar.flavour != "tensorrt":
        return f"the plan is of {sidecar.flavour}, and Triton's TensorRT backend reads plans of tensorrt only"
    if sidecar.weights != "embedded":
        return "the plan holds no weights, which that backend cannot bring"
    return ""


def _write(
    repository: Path, contents: dict[str, dict[str, Path]], configs: dict[str, str], *, force: bool
) -> None:
    taken = [name for name in contents if os.path.lexists(repository / name)]
    if taken and not force:
        raise ExportError(f"{repository / taken[0]}: it exists already.", "Replace it with --force, or choose --name.")
    with staging(repository) as stage:
        require_space(repository, sum(file.stat().st_size for files in contents.values() for file in files.values()))
        for name, files in contents.items():
            for place, file in files.items():
                target = stage.path / name / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)  # with its time, by which a checkpoint's own weights are known again
            (stage.path / name / "config.pbtxt").write_text(configs[name], encoding="utf-8")
        _publish(stage.path, repository, tuple(contents))


def _publish(folder: Path, repository: Path, names: Sequence[str]) -> None:
    """Rename whole folders; one that is replaced goes with the staging folder, or comes back."""
    for name in names:
        old = folder / replaced_name(name)
        replaced = os.path.lexists(repository / name)
        if replaced:
            os.rename(repository / name, old)
        try:
            os.rename(folder / name, repository / name)
        except BaseException:
            if replaced:
                os.rename(old, repository / name)
            raise
