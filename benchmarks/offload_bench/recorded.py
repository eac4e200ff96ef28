"""Queries, keys and values of a real model on real text, as the attention of another geometry would see them.

Random keys have no locality, and caches of them say nothing. So SmolLM2-135M reads real text, its context of 8,192
tokens at a time, and each (layer, KV head) of it becomes one stream of rows: keys of all stretches of text, one after
the other, and queries of the last stretch's last tokens. Rotary positions begin anew in each stretch, so keys stay
where the model was trained; the queries meet older stretches as text that is equally near. Streams are handed out to
the layers and KV heads of the larger geometry in turn. A head size of 128 takes every row of 64 twice: the scores are
the same but for a factor of 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STRETCH = 8192
"""Tokens that the model reads at once: its context."""


@dataclass(frozen=True)
class Recording:
    """Rows of every stream, on the GPU.

    Attributes:
        keys, values: [streams, tokens, 64].
        queries: [streams, steps, group, 64], of the last ``steps`` tokens.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    @property
    def steps(self) -> int:
        return self.queries.shape[1]

    def streams(self, layer: int, heads: int) -> list[int]:
        """Those that a layer of ``heads`` KV heads gets."""
        return [(layer * heads + head) % len(self.keys) for head in range(heads)]

    def rows(self, name: str, layer: int, heads: int, start: int, end: int) -> Tensor:
        """[heads, end - start, 128]: keys or values of a layer."""
        rows: Tensor = getattr(self, name)[self.streams(layer, heads), start:end]
        return torch.cat([rows, rows], -1)

    def layer_queries(self, layer: int, heads: int, group: int) -> Tensor:
        """[steps, heads group, 128]; where the model's groups are smaller, their first queries come again."""
        rows = self.queries[self.streams(layer, heads)]
        wanted = [index % rows.shape[2] for index in range(group)]
        rows = rows[:, :, wanted].permute(1, 0, 2, 3).flatten(1, 2)
        return torch.cat([rows, rows], -1)


def real_text(characters: int) -> str:
    """Python's language reference, and then the source of its standard library, at least so many characters."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    length = sum(map(len, parts))
    for path in _sources():
        if length >= characters:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(parts[-1])
    return "\n\n".join(parts)


def _sources() -> Iterator[Path]:
    import ast

    yield from sorted(path for path in Path(ast.__file__).parent.rglob("*.py") if "site-packages" not in path.parts)


def record(model: Any, tokens: Tensor, *, steps: int) -> Recording:
    """Run a Hugging Face Llama over whole stretches of tokens.

    Args:
        model: with its attention interface set to "record_rows", see :func:`load`.
        tokens: [stretches, STRETCH] token ids, on the model's device.
        steps: queries kept, of the last tokens.
    """
    config = model.config
    streams = config.num_hidden_layers * config.num_key_value_heads
    shape = (streams, tokens.numel(), config.head_dim)
    keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=tokens.device) for _ in range(2))
    group = config.num_attention_heads // config.num_key_value_heads
    queries = torch.empty(streams, steps, group, config.head_dim, dtype=torch.bfloat16, device=tokens.device)

    def keep(layer: int, stretch: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        place = slice(layer * key.shape[0], (layer + 1) * key.shape[0])
        span = slice(stretch * tokens.shape[1], (stretch + 1) * tokens.shape[1])
        keys[place, span], values[place, span] = key, value
        queries[place] = query[:, -steps:].reshape(-1, group, steps, config.head_dim).transpose(1, 2)

    with torch.inference_mode():
        for stretch, row in enumerate(tokens):
            _keep[:] = [lambda *rows, stretch=stretch: keep(rows[0], stretch, *rows[1:])]
            model.model(row[None], use_cache=False)
    _keep.clear()
    return Recording(keys, values, queries)


_keep: list[Any] = []


def load(path: Path, device: torch.device) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, from the .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        _keep[0](module.layer_idx, query[0], key[0], value[0])
        return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})

    ALL_ATTENTION_FUNCTIONS.register("record_rows", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("record_rows", lambda *_, **__: None)
    options = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.bfloat16, attn_implementation="record_rows", **options
    )
    return model.to(device).eval(), tokenizer
