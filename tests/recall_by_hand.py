"""A Llama that recalls, its weights written by hand: the two heads that training finds, and nothing else.

Layer 0 attends to the token before, and notes it. Layer 1 looks for the place whose note is the current token, and
reads which token stands there: what followed last time follows again.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hip_trt.evaluate.retrieval_language import RecallLanguage

LANGUAGE = RecallLanguage(line_vocabulary=255, filler_vocabulary=64, topics=4)
CODE, HEAD, HIDDEN = 32, 64, 128
_TOKEN, _NOTE, _NEXT, _ONE = slice(0, CODE), slice(CODE, 2 * CODE), slice(2 * CODE, 3 * CODE), 3 * CODE
_THETA = 1e10


def recall_model(*, max_tokens: int = 4096) -> LlamaForCausalLM:
    """The model, in float32, with one head; right up to some thousand tokens."""
    config = LlamaConfig(
        vocab_size=LANGUAGE.vocab_size, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=HEAD, max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA}, tie_word_embeddings=False,
        recall_language=asdict(LANGUAGE),
    )
    model = LlamaForCausalLM(config).eval()
    codes = torch.randint(2, (LANGUAGE.vocab_size, CODE), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    half = HEAD // 2
    frequencies = _THETA ** -(torch.arange(half) / half)
    steady = torch.cat([torch.arange(half // 2, half), torch.arange(half // 2, half) + half])  # hardly turn
    turning = torch.arange(half // 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        model.model.embed_tokens.weight[:, _TOKEN] = codes
        model.model.embed_tokens.weight[:, _ONE] = 1
        before, match = (layer.self_attn for layer in model.model.layers)
        before.k_proj.weight[turning, _ONE] = 15
        before.q_proj.weight[turning, _ONE] = 15 * frequencies[: half // 2].cos()  # turned back by one token
        before.q_proj.weight[turning + half, _ONE] = -15 * frequencies[: half // 2].sin()
        match.k_proj.weight[steady, _NOTE] = 4 * torch.eye(CODE)
        match.q_proj.weight[steady, _TOKEN] = 4 * torch.eye(CODE)
        for attention, target in ((before, _NOTE), (match, _NEXT)):
            attention.v_proj.weight[:CODE, _TOKEN] = torch.eye(CODE)
            attention.o_proj.weight[target, :CODE] = torch.eye(CODE)
        model.lm_head.weight[:, _NEXT] = codes
    return model


def save(folder: Path) -> Path:
    """As a checkpoint with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    recall_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(LANGUAGE.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder
