"""Train the recall model from nothing: a Llama of 3 million parameters that recalls single lines from 128k tokens.

    python benchmarks/recall_model/train.py --out FOLDER

It learns hip_trt.evaluate.retrieval_language. Recall takes two heads that work together (a token learns which one
stands before it; a later query looks for that and reads on), and a model finds them within minutes where each sequence
asks for many recalls and is short. The curriculum begins there; each further stage is longer and has fewer lines in
proportion, and only needs attention to be sharper. RoPE's base is large enough that half of each head does not turn
within 128k tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hip_trt.evaluate.retrieval_language import RecallLanguage

_GOAL = 0.999
"""Share of recalled tokens at which a stage has done its work."""
_QUESTION = 2
"""Tokens of a line that are given; the rest are recalled."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        tokens: length of its sequences.
        batch: sequences a step.
        rate: learning rate; three tenths of it where 90% is recalled.
        steps: at least so many, unless time runs out.
        seconds: at most so many. What a stage leaves, the later ones have.
    """

    tokens: int
    batch: int
    rate: float
    steps: int
    seconds: float


STAGES = (
    Stage(256, 256, 1.5e-3, 600, 180),
    Stage(1024, 64, 1e-3, 300, 20),
    Stage(4096, 16, 1e-3, 200, 15),
    Stage(16384, 8, 7e-4, 150, 30),
    Stage(32768, 4, 5e-4, 150, 40),
    Stage(65536, 2, 5e-4, 100, 45),
    Stage(131072, 1, 3e-4, 80, 60),
)
TINY_STAGES = (Stage(64, 64, 2e-3, 200, 300), Stage(128, 32, 2e-3, 200, 300))


def model_config(language: RecallLanguage, *, hidden: int, layers: int, heads: int, max_tokens: int) -> LlamaConfig:
    """A plain Llama with two query heads to each key/value head of size 64."""
    return LlamaConfig(
        vocab_size=language.vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, max_position_embeddings=max_tokens,
        rope_theta=1e10, rope_parameters={"rope_type": "default", "rope_theta": 1e10}, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=0, eos_token_id=None, pad_token_id=None, recall_language=asdict(language),
    )


def tokenizer(language: RecallLanguage) -> Any:
    """Words with spaces between them: <s>, line1 and so on, filler1 and so on."""
    counts = (("line", language.line_vocabulary), ("filler", language.filler_vocabulary))
    words = ["<s>", *(f"{kind}{number}" for kind, count in counts for number in range(1, count + 1))]
    words_only = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, bos_token="<s>", unk_token="<s>")


@dataclass(frozen=True)
class Examples:
    """Sequences to learn from.

    Attributes:
        tokens: [batch, T] int64.
        asked: [batch, N] int64, positions after which a token of a line that has been seen comes.
    """

    tokens: Tensor
    asked: Tensor


def examples(
    language: RecallLanguage, batch: int, tokens: int, lines: int, generator: torch.Generator, *, at_end: bool
) -> Examples:
    """Sequences in which each of some lines stands twice.

    Args:
        at_end: second occurrences stand at the end, close together and in random order; else anywhere.
    """
    device, width = generator.device, language.line_tokens
    slot = width + 4
    slots = (tokens - 1) // slot
    order = torch.rand(batch, slots - lines * at_end, generator=generator, device=device).argsort(1)
    if at_end:
        first, second = order[:, :lines], (slots - lines + torch.arange(lines, device=device)).expand(batch, lines)
    else:
        pairs = order[:, : 2 * lines].view(batch, lines, 2).sort(-1).values
        first, second = pairs[..., 0], pairs[..., 1]
    inside = torch.arange(width, device=device)
    content = language.lines(batch, lines, generator)
    text = language.filler(batch, tokens, generator)
    for where in (first, second):
        offset = torch.randint(slot - width + 1, (batch, lines), generator=generator, device=device)
        start = 1 + where * slot + offset
        at = start[..., None] + inside
        text.scatter_(1, at.flatten(1), content.flatten(1))
    asked = at[..., _QUESTION - 1 : -1]
    return Examples(text, asked.flatten(1))


def recall(model: Any, batch: Examples) -> tuple[Tensor, Tensor]:
    """The loss of the tokens that are asked for, and which are right: [batch, N] bool."""
    hidden = model.model(batch.tokens, use_cache=False).last_hidden_state
    asked = hidden.gather(1, batch.asked[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.lm_head(asked).float()
    answers = batch.tokens.gather(1, batch.asked + 1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss, logits.argmax(-1) == answers


def train(
    model: Any, language: RecallLanguage, stages: tuple[Stage, ...], *, limit: float, seed: int, device: str,
    save: Callable[[], None], say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train in stages.

    Args:
        limit: seconds for all of it.
        save: keeps the model as it is, after each stage.

    Returns:
        What each stage did.
    """
    generator = torch.Generator(device).manual_seed(seed)
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    began, done, allotted = time.monotonic(), [], 0.0
    for stage in stages:
        allotted = min(allotted + stage.seconds, limit)
        slots = (stage.tokens - 1) // (language.line_tokens + 4)
        most = min(language.max_lines, slots // 2)
        share, step, since = 0.0, 0, time.monotonic()
        while True:
            elapsed = time.monotonic() - began
            if elapsed > allotted or (share > _GOAL and step >= stage.steps):
                break
            scale = min(1.0, (step + 1) / 50) * (0.3 if share > 0.9 else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * scale
            few, at_end = (torch.rand(2, generator=chance) < torch.tensor([0.25, 0.5])).tolist()
            lines = max(1, round(math.exp(float(torch.rand((), generator=chance)) * math.log(most)))) if few else most
            batch = examples(language, stage.batch, stage.tokens, lines, generator, at_end=at_end)
            with _half(device):
                loss, right = recall(model, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0:  # reading a number waits for the GPU
                now = right.float().mean().item()
                share = now if step == 10 else 0.8 * share + 0.2 * now
            if step % 50 == 0:
                say(f"  {stage.tokens:6d} tokens  step {step:5d}  loss {loss.item():.4f}  recalled {share:.4f}  "
                    f"{time.monotonic() - began:.0f} s")
        seconds = time.monotonic() - since
        say(f"stage of {stage.tokens} tokens: {step} steps, {seconds:.0f} s, recalled {share:.4f}")
        done.append({**asdict(stage), "taken_steps": step, "taken_seconds": round(seconds, 1), "recalled": share})
        save()
    return done


def test(
    model: Any, language: RecallLanguage, tokens: int, lines: int, *, trials: int, batch: int, seed: int, device: str
) -> tuple[int, int, int]:
    """Recall under dense attention, of lines anywhere in the text by questions at its end.

    Returns:
        Lines recalled whole, tokens recalled, and lines asked for.
    """
    generator = torch.Generator(device).manual_seed(seed)
    whole = each = asked = 0
    while asked < trials:
        with torch.inference_mode(), _half(device):
            _, right = recall(model, examples(language, batch, tokens, lines, generator, at_end=True))
        by_line = right.view(-1, language.line_tokens - _QUESTION)
        whole, each, asked = whole + int(by_line.all(-1).sum()), each + int(by_line.sum()), asked + len(by_line)
    return whole, each, asked


def _half(device: str) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, model.safetensors, train.json")
    parser.add_argument("--limit", type=float, default=330, help="seconds of training at most")
    parser.add_argument("--tiny", action="store_true", help="a model of 64 x 2 layers on short sequences, for a CPU")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=131072, help="leave out stages that are longer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    if options.tiny:
        language = RecallLanguage(line_vocabulary=255, filler_vocabulary=64, topics=4)
        size = {"hidden": 64, "layers": 2, "heads": 2}
    else:
        language = RecallLanguage()
        size = {"hidden": options.hidden, "layers": options.layers, "heads": options.hidden // 64}
    stages = tuple(stage for stage in (TINY_STAGES if options.tiny else STAGES) if stage.tokens <= options.max_tokens)
    config = model_config(language, **size, max_tokens=stages[-1].tokens)
    model = LlamaForCausalLM(config).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters on {device}", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer(language).save_pretrained(options.out)

    def save() -> None:
        copy.deepcopy(model).to("cpu", torch.float16).save_pretrained(options.out)

    def say(text: str) -> None:
        print(text, flush=True)

    began = time.monotonic()
    done = train(
        model, language, stages, limit=options.limit, seed=options.seed + 1, device=device, save=save, say=say
    )
    seconds = time.monotonic() - began
    saved = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device).eval()
    tests = []
    say("tokens  lines  recalled whole   tokens right   (dense attention, weights as saved)")
    for stage in stages:
        slots = (stage.tokens - 1) // (language.line_tokens + 4)
        for lines in (1, min(language.max_lines, slots // 2)):
            batch = max(1, min(64, 131072 // stage.tokens))
            whole, each, asked = test(
                saved, language, stage.tokens, lines, trials=32 if lines == 1 else 256, batch=batch, seed=99,
                device=device,
            )
            tests.append({"tokens": stage.tokens, "lines": lines, "whole": whole, "asked": asked})
            say(f"{stage.tokens:6d}  {lines:5d}  {whole:5d} of {asked:5d}   "
                f"{100 * each / (asked * (language.line_tokens - _QUESTION)):.2f} %")
    record = {
        "parameters": parameters, "seconds": round(seconds, 1), "seed": options.seed, "device": _device_name(device),
        "torch": torch.__version__, "stages": done, "tests": tests,
    }
    (options.out / "train.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
