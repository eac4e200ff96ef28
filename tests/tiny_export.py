"""A tiny random Llama whose tokens are bytes, exported to ONNX with its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oracle import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hip_trt.config import HipConfig
from hip_trt.export import export_onnx

SPARSE = HipConfig.create(
    mask_k=16, decode_mask_k=8, block_q=8, block_k=4, stride_q=4, page_size=8, sink_tokens=4, window_tokens=8,
    branch=2, leaf_branch=2, refresh_interval=3,
)
EOS = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and <|end|>, <|user|>, <|assistant|>, <|system|> as 256 to 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_tiny_checkpoint(folder: Path, *, chat: bool = True, **overrides: Any) -> Path:
    """A Hugging Face folder."""
    tiny_llama(**{"vocab_size": 260, "eos_token_id": EOS, **overrides}).save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def export_tiny(folder: Path, *, hip: HipConfig = SPARSE, chat: bool = True, **options: Any) -> Path:
    """Export into ``folder``, weights copied, so that all files can be moved; the .onnx file."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", chat=chat)
    return export_onnx(checkpoint, folder / "model.onnx", config=hip, **options).path
