"""Open a checkpoint: a Hugging Face folder, a GGUF file or a hub id. Everything but the weights is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from hip_trt.errors import CheckpointError, ConfigError
from hip_trt.export.families import Family, find_family
from hip_trt.export.gguf_file import read_gguf
from hip_trt.export.hub import fetch, looks_like_hub_id
from hip_trt.export.safetensors_folder import stored_tensors
from hip_trt.export.stored import StoredTensor
from hip_trt.huggingface.closed import TOKENIZER_FILES, VOCABULARIES, closed, load_tokenizer
from hip_trt.model_support import check_model, check_sizes, resolve_context
from hip_trt.progress import Steps

_TOKEN_IDS_ONLY = "the exported model takes token ids only."
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights stay on disk.

    Attributes:
        path: the folder or the .gguf file.
        name: name of the folder or hub id, or the name that the GGUF file gives itself.
        family: its architecture.
        config: its configuration.
        dtype: the type it is stored in; float16 for quantized GGUF files.
        tensors: weights by transformers' names.
        max_context: longest context that it may be given with HiP, in tokens.
        differences: how it then differs from transformers', a line each.
        frequency_factors: [head_dim / 2], divisors of RoPE's frequencies beyond what ``config`` says; None for 1.
    """

    path: Path
    name: str
    family: Family
    config: PreTrainedConfig
    dtype: torch.dtype
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    max_context: int
    differences: tuple[str, ...] = ()
    frequency_factors: Tensor | None = None

    def save_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer's files and check that it loads; warnings if it does not, is missing, or does not fit."""
        warnings: list[str] = []
        try:
            if self.path.is_file():
                with _quiet():
                    tokenizer = load_tokenizer(self.path)
                tokenizer.save_pretrained(folder)
            else:
                if not any((self.path / name).is_file() for name in VOCABULARIES):
                    return [f"{self.path}: no {' or '.join(VOCABULARIES)}: {_TOKEN_IDS_ONLY}"]
                for name in TOKENIZER_FILES:
                    if (self.path / name).is_file():
                        shutil.copyfile(self.path / name, folder / name)
                warnings += _close_tokenizer(folder, self.path)
                with _quiet():
                    tokenizer = load_tokenizer(folder)
                if not (folder / "tokenizer_config.json").is_file():  # how runtimes recognize a tokenizer
                    tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # tokenizers' loaders raise anything over a damaged file
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
            return [f"{self.path}: its tokenizer cannot be loaded ({_one_line(error)}): {_TOKEN_IDS_ONLY}"]
        if len(tokenizer) > self.config.vocab_size:
            warnings.append(
                f"{self.path}: its tokenizer has {len(tokenizer)} tokens and the model {self.config.vocab_size}: "
                "prompts with the tokens beyond will fail."
            )
        return warnings

    def generation_config(self) -> GenerationConfig:
        """The checkpoint's own, or one with the configuration's special tokens."""
        if (self.path / "generation_config.json").is_file():
            try:
                return GenerationConfig.from_pretrained(self.path, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path / 'generation_config.json'}: cannot be read ({_one_line(error)}).",
                    "Correct or remove it.",
                ) from None
        return GenerationConfig.from_model_config(self.config)


def open_checkpoint(
    source: str | Path, *, max_context: int | None = None, allow_download: bool = False, steps: Steps | None = None
) -> Checkpoint:
    """Open a checkpoint.

    A path that exists is used as it is. Otherwise, a text of the form org/name is a Hugging Face hub id: its copy in
    the local cache is used, or, only with ``allow_download``, fetched.

    Args:
        source: a folder in Hugging Face format with safetensors weights, a .gguf file, or a hub id.
        max_context: longest context that is wanted, in tokens; by default the model's own.
        allow_download: whether what the local cache lacks may be fetched from the hub.
        steps: shows progress.

    Raises:
        CheckpointError: it is missing, damaged, incomplete, quantized other than GGUF, of a family that cannot be
            exported, or attends in another way than HiP at the length wanted.
        ConfigError: ``max_context`` is beyond the model's own context.
    """
    steps = steps or Steps()
    path = Path(source).expanduser()
    name = path.resolve().name
    if not path.exists():
        name = str(source)
        if not looks_like_hub_id(name):
            raise CheckpointError(
                f"{source}: no such file or folder.", "Give a Hugging Face folder, a .gguf file or a hub id."
            )
        path = fetch(name, allow_download=allow_download, steps=steps)
    with steps.step("Read the checkpoint"):
        return _open_folder(path, name, max_context) if path.is_dir() else _open_gguf(path, max_context)


def _open_gguf(path: Path, max_context: int | None) -> Checkpoint:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path}: not a .gguf file.", "Give a .gguf file, or the folder that holds the model.")
    file = read_gguf(path)
    family = find_family(file.config.to_dict(), str(path))
    context = _check(file.config, str(path), max_context)
    return Checkpoint(path, file.name, family, file.config, file.dtype, file.tensors, *context, file.frequency_factors)


def _check(config: PreTrainedConfig, where: str, max_context: int | None) -> tuple[int, tuple[str, ...]]:
    """Refuse what HiP cannot represent; see :func:`resolve_context`."""
    check_model(config, where, traced=True)
    return resolve_context(config, where, max_context, option="--max-context {}", static=True)


def _open_folder(path: Path, name: str, max_context: int | None) -> Checkpoint:
    where = path / "config.json"
    fields = _read_config(path, where)
    family = find_family(fields, str(where))
    if "quantization_config" in fields:
        method = dict(fields["quantization_config"] or {}).get("quant_method", "unknown")
        raise CheckpointError(
            f"{where}: the weights are quantized ({method}), which is not supported.",
            "Use the checkpoint in float16 or bfloat16 that it was made from, or a GGUF file.",
        )
    check_sizes(fields.get, str(where))
    try:
        with _quiet():
            config = family.config_class.from_dict(fields)
            context = _check(config, str(where), max_context)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # transformers' validation raises errors of many kinds
        raise CheckpointError(f"{where}: not a valid configuration ({_one_line(error)}).") from None
    tensors = {family.renamed.get(name, name): tensor for name, tensor in stored_tensors(path).items()}
    _settle_tied(config, tensors)
    return Checkpoint(path, name, family, config, _dtype(config, tensors), tensors, *context)


def _read_config(path: Path, where: Path) -> dict[str, Any]:
    if not where.is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        raise CheckpointError(
            f"{path}: no config.json.",
            f"Name the file itself: {path / found[0]}." if found else "Give a folder in Hugging Face format.",
        )
    try:
        fields = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({_one_line(error)}).", "Download it again.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: not a model's configuration.", "Give a folder in Hugging Face format.")
    return closed(fields)  # type: ignore[no-any-return]


def _close_tokenizer(folder: Path, source: Path) -> list[str]:
    """Take from a copied tokenizer what names code, repositories or paths; a warning where it named code."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    fields = json.loads(path.read_text(encoding="utf-8"))
    if closed(fields) != fields:
        path.write_text(json.dumps(closed(fields), indent=2, ensure_ascii=False), encoding="utf-8")
    if "auto_map" not in fields:
        return []
    return [f"{source}: its tokenizer names Python code of its own (auto_map), which is not run."]


def _settle_tied(config: PreTrainedConfig, tensors: dict[str, StoredTensor]) -> None:
    """transformers' rule: weights said to be tied are one if one is stored or both are equal, else they are two."""
    if not config.tie_word_embeddings:
        return
    embeddings, head = tensors.get(_EMBEDDINGS), tensors.get(_HEAD)
    if embeddings is not None and head is not None:
        config.tie_word_embeddings = torch.equal(embeddings.load(), head.load())
    elif head is not None:
        tensors[_EMBEDDINGS] = head
    if config.tie_word_embeddings:
        tensors.pop(_HEAD, None)


def _dtype(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """What config.json says, else the type of the first weight; anything wider than float32 is float32."""
    if config.dtype in _DTYPES:
        return config.dtype  # type: ignore[no-any-return]
    stored = next(iter(tensors.values())).load().dtype if tensors else torch.float32
    return stored if stored in _DTYPES else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' notes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
