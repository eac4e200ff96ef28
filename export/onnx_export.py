"""From a checkpoint to an ONNX model that any runtime can run: the steps of ``hip-trt export``, and what they write."""

from __future__ import annotations

import filecmp
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
from torch import Tensor

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, ExportError
from hip_trt.export.checkpoint import Checkpoint, open_checkpoint
from hip_trt.export.function import add_function
from hip_trt.export.graph import buffers, parameter_shapes, trace
from hip_trt.export.int4 import OPSET as INT4_OPSET
from hip_trt.export.int4 import quantizer
from hip_trt.export.stored import check_shapes
from hip_trt.export.weights import Placement, data_name, link_name, plan_weights, write_weights
from hip_trt.files import Staging, require_space, staging
from hip_trt.huggingface.closed import TOKENIZER_FILES
from hip_trt.model_support import heads
from hip_trt.onnx_file import NAME_DIGITS, WEIGHTS_FILES, WEIGHTS_KEY, WeightsFile
from hip_trt.progress import Steps
from hip_trt.spec import METADATA_KEY, DType, Logits, ModelSpec

_SPARE = 64_000_000  # bytes: graph, tokenizer and padding, generously
Quantization = Literal["int4"]

_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")  # follows from the configuration, though old checkpoints store it
_HIP_CONFIG = "hip_config.yaml"
_CHECKPOINTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)
SHARED_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json")
"""What stands beside an .onnx file or a .plan, once for all models of a folder."""


@dataclass(frozen=True)
class ExportedModel:
    """What an export wrote.

    Attributes:
        path: the .onnx file.
        data: its weights, which must stay where they are. The names of files that the export made carry the beginning
            of their SHA-256, so that an .onnx file always finds the weights that it was written with.
        placement: whether the weights were "copied", "linked" (the checkpoint's files under a second name) or are used
            "in place".
        spec: facts about the model, also in the .onnx file's metadata.
        files: every file written, the .onnx file included.
        warnings: what the user should know, one line each.
    """

    path: Path
    data: tuple[Path, ...]
    placement: Placement
    spec: ModelSpec
    files: tuple[Path, ...]
    warnings: tuple[str, ...]


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    config: HipConfig | None = None,
    dtype: DType | None = None,
    logits: Logits = "last",
    max_context: int | None = None,
    link_weights: bool = False,
    quantize: Quantization | None = None,
    allow_download: bool = False,
    check: Callable[[ModelSpec], None] | None = None,
    steps: Steps | None = None,
) -> ExportedModel:
    """Export a checkpoint with HiP attention to ONNX.

    The graph has one ``HipAttention`` node per layer, and carries the operator's body as an ONNX function, so that
    plain ONNX Runtime runs it. Beside it go the tokenizer, config.json, generation_config.json and hip_config.yaml. All
    files appear when all is done, the .onnx file last; a failure or an interrupt leaves what was there before.

    Weights are copied, one at a time. A model in the checkpoint's own folder points at the checkpoint's safetensors
    files instead, where no conversion is asked for (:mod:`hip_trt.export.weights`).

    Args:
        model: a Hugging Face folder with safetensors weights, a .gguf file (dequantized), or a hub id.
        out: a file that ends in .onnx, or a folder for model.onnx.
        config: pruning; the defaults if None.
        dtype: type of weights, activations and KV cache; by default the checkpoint's own, and float16 for a quantized
            GGUF file.
        logits: "last": of the last valid token of each row, [B, 1, vocab_size]; "all": of every token.
        max_context: longest context that the exported model will be given, in tokens; by default the model's own. A
            model that attends in another way beyond some length (a sliding window) can be exported up to it.
        link_weights: copy nothing that need not be converted: point at safetensors files below the folder of ``out``,
            and make hard links to others, which need the same file system. The package onnx refuses hard links.
        quantize: "int4": weights of linear layers in four bits, rounded to nearest in blocks that share a scale; needs
            NVIDIA Model Optimizer. Embeddings, logits and the KV cache keep their type.
        allow_download: whether a hub id that is not in the local Hugging Face cache may be fetched.
        check: called with the model's facts before any work; what it raises ends the export.
        steps: shows progress and warnings, and keeps times.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, incomplete, or of a family that cannot be exported.
        ConfigError: ``config`` does not fit the model.
        ExportError: a wrong argument, a folder that cannot be written, or a full disk.
        EnvironmentProblem: ``quantize`` asks for a package that is not installed.

    Example:
        >>> exported = export_onnx("SmolLM2-135M-Instruct", "build/model", dtype="float32")  # doctest: +SKIP
        >>> exported.path                                                                    # doctest: +SKIP
        PosixPath('build/model/model.onnx')
    """
    steps, config = steps or Steps(), config or HipConfig.create()
    _check_choice("dtype", dtype, (None, *get_args(DType)))
    _check_choice("logits", logits, get_args(Logits))
    _check_choice("quantize", quantize, (None, *get_args(Quantization)))
    if quantize is not None:
        if link_weights:
            raise ExportError(
                "link_weights: not allowed with quantize: what is not quantized is copied too.",
                "Choose one of --link-weights and --quantize.",
            )
        quantizer()  # refuses now, if it must
    out = Path(out)
    path = out if out.suffix == ".onnx" else out / "model.onnx"
    if path.is_dir():
        raise ExportError(f"{path}: a folder stands where a file should go.", "Choose another --out.")
    with staging(path.parent, exclusive=True) as stage:
        checkpoint = open_checkpoint(model, max_context=max_context, allow_download=allow_download, steps=steps)
        spec = _spec(checkpoint, config, dtype, logits)
        if check is not None:
            check(spec)
        shapes = parameter_shapes(checkpoint.family, checkpoint.config)
        warnings = _check_checkpoint(checkpoint, shapes)
        plan = plan_weights(checkpoint.tensors, shapes, spec.torch_dtype, stage, link=link_weights,
                            quantize=quantize is not None)
        require_space(stage.target, plan.copied + _SPARE)
        if plan.warning:
            warnings.append(plan.warning)
        with steps.step("Save the tokenizer"):
            warnings += checkpoint.save_tokenizer(stage.path)
            side_files = _save_side_files(checkpoint, config, stage, path)
        with steps.step(f"Trace {spec.num_layers} layers"):
            traced = trace(
                checkpoint.family, checkpoint.config, config, dtype=spec.torch_dtype, logits=logits,
                constants=_constants(checkpoint), max_context=checkpoint.max_context,
            )
        if quantize is not None:
            traced.model.opset_imports[""] = INT4_OPSET
        with steps.step("Write the weights" if plan.copied else "Checksum the weights", total=plan.work) as advance:
            data = write_weights(plan, checkpoint.tensors, traced, spec.torch_dtype, stage, path.stem, advance)
        with steps.step("Write the graph"):
            (stage.path / path.name).write_bytes(_serialize(traced.model, spec, data))
            made = [record.name for record in data if (stage.path / record.name).is_file()]
            names = [*side_files, *made, path.name]
            files = stage.publish(names, obsolete=_obsolete(path.stem, side_files))
    warnings += checkpoint.differences
    for warning in warnings:
        steps.warn(warning)
    return ExportedModel(
        path, tuple(path.parent / record.name for record in data), plan.placement, spec, tuple(files), tuple(warnings)
    )


def _check_choice(field: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        names = ", ".join(name for name in allowed if name is not None)
        raise ExportError(f"{field}: {value!r} is not allowed; it must be one of {names}.")


def _spec(checkpoint: Checkpoint, config: HipConfig, dtype: DType | None, logits: Logits) -> ModelSpec:
    model, shape = checkpoint.config, heads(checkpoint.config)
    if config.dense_layers and config.dense_layers[-1] >= model.num_hidden_layers:
        raise ConfigError(
            f"dense_layers: {config.dense_layers[-1]} is not allowed; the model has layers 0 to "
            f"{model.num_hidden_layers - 1}."
        )
    return ModelSpec(
        model_type=checkpoint.family.model_type,
        source=checkpoint.name,
        num_layers=model.num_hidden_layers,
        num_attention_heads=shape.query,
        num_key_value_heads=shape.key_value,
        head_dim=shape.size,
        vocab_size=model.vocab_size,
        max_position_embeddings=checkpoint.max_context,
        dtype=dtype or str(checkpoint.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        logits=logits,
        hip=config,
        hip_trt_version=importlib.metadata.version("hip-trt"),
    )


def _check_checkpoint(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Raise CheckpointError unless every weight is there; a warning where there are others as well."""
    unused = check_shapes(checkpoint.tensors, shapes, str(checkpoint.path))
    unused = [name for name in unused if not _COMPUTED.fullmatch(name)]
    if not unused:
        return []
    return [
        f"{checkpoint.path}: {len(unused)} of its weights have no place in {checkpoint.family.architecture} and are "
        f"left out: {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}."
    ]


def _save_side_files(checkpoint: Checkpoint, config: HipConfig, stage: Staging, path: Path) -> list[str]:
    """Write configurations beside the staged tokenizer, and return all names to publish; refuse to overwrite a
    stranger's.

    The tokenizer, config.json and generation_config.json are one per folder, so models that share a folder must share
    them. In the checkpoint's own folder, its own stay.
    """
    own = _HIP_CONFIG if path.stem == "model" else f"{path.stem}.{_HIP_CONFIG}"
    (stage.path / own).write_text(config.to_yaml(), encoding="utf-8")
    checkpoint.config.to_json_file(stage.path / "config.json")
    checkpoint.generation_config().to_json_file(stage.path / "generation_config.json")
    shared = [name for name in SHARED_FILES if (stage.path / name).is_file()]
    if checkpoint.path.is_dir() and checkpoint.path.samefile(stage.target):
        return [*(name for name in shared if not (stage.target / name).exists()), own]
    present = [name for name in SHARED_FILES if (stage.target / name).exists()]
    strangers = [name for name in _CHECKPOINTS if (stage.target / name).exists()]
    if strangers or (present and not any(stage.target.glob(f"*{_HIP_CONFIG}"))):
        raise ExportError(
            f"{stage.target}: it holds a {(strangers or present)[0]} that hip-trt did not write.",
            "Choose another folder for --out.",
        )
    others = [other.name for other in stage.target.glob("*.onnx") if other.name != path.name]
    same = present == shared and all(filecmp.cmp(stage.path / name, stage.target / name, False) for name in shared)
    if others and not same:
        raise ExportError(
            f"{stage.target}: it holds {others[0]}, exported from another checkpoint, whose tokenizer and "
            "configuration this export would replace.",
            "Choose another folder for --out.",
        )
    return [*shared, own]


def _constants(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Buffers of the architecture, with RoPE's frequencies divided by what a GGUF file says."""
    constants: dict[str, Tensor] = buffers(checkpoint.family, checkpoint.config, checkpoint.max_context)
    if checkpoint.frequency_factors is not None:
        for name in constants:
            if _COMPUTED.fullmatch(name):
                constants[name] = constants[name] / checkpoint.frequency_factors
    return constants


def _obsolete(stem: str, side_files: Sequence[str]) -> re.Pattern[str]:
    """Names of what an earlier export of this name may have left: its weights, and, where this one brings its own
    configuration, tokenizer files of other kinds."""
    digits, hexadecimal = "0" * NAME_DIGITS, f"[0-9a-f]{{{NAME_DIGITS}}}"
    parts = (re.escape(name(stem, digits)).rpartition(digits) for name in (data_name, link_name))
    names = [f"{before}{hexadecimal}{after}" for before, _, after in parts]
    if "config.json" in side_files:
        names += map(re.escape, SHARED_FILES)
    return re.compile("|".join(names))


def _serialize(model: ir.Model, spec: ModelSpec, data: tuple[WeightsFile, ...]) -> bytes:
    """The model file, with the operator's body and the facts that runtimes need."""
    model.producer_name, model.producer_version = "hip-trt", spec.hip_trt_version
    model.metadata_props[METADATA_KEY] = spec.model_dump_json()
    model.metadata_props[WEIGHTS_KEY] = WEIGHTS_FILES.dump_json(data).decode()
    proto = ir.serde.serialize_model(model)
    add_function(proto)
    for function in proto.functions:  # ONNX wants them of the graph's own version
        for imported in function.opset_import:
            if not imported.domain:
                imported.version = model.opset_imports[""]
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
