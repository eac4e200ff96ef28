"""Perplexity of one text, dense against HiP: ``python -m hip_trt.evaluate.perplexity MODEL.onnx --checkpoint DIR``.

Dense is the checkpoint in transformers, in float32; HiP is the exported model (``--logits all``) in ONNX Runtime, which
prefills the same tokens with its masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_trt.evaluate.likelihood import LogLikelihood

_CHUNK = 512


def dense_perplexity(model: Any, tokens: Sequence[int], *, skip: int = 0) -> float:
    """Perplexity under a transformers causal language model with its own, dense attention.

    Args:
        model: a transformers model.
        tokens: one sequence of token ids.
        skip: see :class:`LogLikelihood`.
    """
    likelihood = LogLikelihood(tokens, skip=skip)
    cache = None
    with torch.inference_mode():
        for start in range(0, len(tokens), _CHUNK):
            chunk = torch.tensor([list(tokens[start : start + _CHUNK])], device=model.device)
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            likelihood.add(output.logits[0], start)
    return likelihood.perplexity


def manual_text() -> str:
    """A real text that comes with every Python: its language reference, as help() prints it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def compare(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Exported with --logits all.")],
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="The Hugging Face folder or .gguf file that it was exported from.")
    ],
    text: Annotated[
        Path | None, typer.Option("--text", help="A UTF-8 text.", show_default="Python's own language reference")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Use so many tokens of the text.")] = 4096,
    skip: Annotated[
        int, typer.Option("--skip", help="Count only predictions with at least so many tokens before them.")
    ] = 2048,
    threads: Annotated[int | None, typer.Option("--threads")] = None,
) -> None:
    """Print the perplexity of one text, dense and HiP."""
    from transformers import AutoModelForCausalLM

    from hip_trt.runtime import load

    generator = load(model, threads=threads)
    content = manual_text() if text is None else text.read_text(encoding="utf-8")
    tokens = generator.encode(content)[:max_tokens]
    typer.echo(f"{len(tokens)} tokens, predictions from token {skip + 1} on")
    pruned = generator.perplexity(tokens, skip=skip)
    if checkpoint.is_file():
        where: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.parent, "gguf_file": checkpoint.name}
    else:
        where = {"pretrained_model_name_or_path": checkpoint}
    reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    dense = dense_perplexity(reference, tokens, skip=skip)
    typer.echo(f"dense (transformers)     {dense:.4f}")
    typer.echo(f"HiP (exported model)     {pruned:.4f}   {100 * (pruned / dense - 1):+.2f} %")


if __name__ == "__main__":
    typer.run(compare)
