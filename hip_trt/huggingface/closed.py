"""Model folders as data: what transformers loads through here can neither run code, nor ask, nor have anything fetched.

A folder may name Python of its own (auto_map), repositories to fetch code, kernels or a base model from, and packages
to import. So transformers is not given the folder, but a view of it: links to its weights and tokenizer files, and
copies of its configurations without those fields. Pickled weights (.bin) and Python files are not in it. Loading from
it is offline, with trust_remote_code off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

CONFIG_FILES: Final = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)
VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer has one."""
_FOREIGN: Final = frozenset({
    "auto_map", "custom_pipelines", "custom_generate",  # code
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "kernel_config", "use_kernels",  # kernels
    "_name_or_path", "name_or_path", "base_model_name_or_path",  # repositories
    "transformers_weights", "tokenizer_file", "vocab_file", "merges_file",  # files elsewhere
})
"""Fields that say what to run, or where from; none says what the model computes."""


def closed(fields: Any) -> Any:
    """A configuration, or a part of one, without fields that name code, repositories or paths."""
    match fields:
        case dict():
            return {name: closed(value) for name, value in fields.items() if name not in _FOREIGN}
        case list():
            return [closed(value) for value in fields]
    return fields


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a model folder, or of a .gguf file.

    Raises:
        Exception: of any kind, as transformers and its libraries do over a damaged file.
    """
    from transformers import AutoTokenizer

    with _closed_view(path) as where:
        return AutoTokenizer.from_pretrained(**where)


def load_causal_lm(path: Path, **options: Any) -> Any:
    """transformers' causal language model of a model folder with safetensors, or of a .gguf file; see
    :func:`load_tokenizer`.

    Args:
        path: the folder or file.
        options: further ones of from_pretrained.
    """
    from transformers import AutoModelForCausalLM

    with _closed_view(path) as where:
        return AutoModelForCausalLM.from_pretrained(
            **where, use_safetensors=True, attn_implementation="sdpa", use_kernels=False, **options
        )


@contextmanager
def _closed_view(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments of from_pretrained."""
    with TemporaryDirectory(prefix="hip-trt-") as folder, _offline():
        view = Path(folder)
        where = {"pretrained_model_name_or_path": folder, "local_files_only": True, "trust_remote_code": False}
        if path.is_file():
            (view / path.name).symlink_to(path.resolve())
            yield {**where, "gguf_file": path.name}
            return
        for name in CONFIG_FILES:
            if (path / name).is_file():
                fields = json.loads((path / name).read_text(encoding="utf-8"))
                (view / name).write_text(json.dumps(closed(fields)), encoding="utf-8")
        others = [path / name for name in TOKENIZER_FILES if name not in CONFIG_FILES]
        for file in (*others, *path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")):
            if file.is_file() and not file.name.startswith("adapter_"):
                (view / file.name).symlink_to(file.resolve())
        yield where


@contextmanager
def _offline() -> Iterator[None]:
    """Without the hub's client, whoever calls it."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
