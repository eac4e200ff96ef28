"""``hip-trt run``: a prompt in, streamed text out."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hip_trt.cli.console import Verbose, set_verbose
from hip_trt.cli.offload_options import PANEL, CacheShare, KeyCacheMib, Switch, ValueCacheMib, offload_of
from hip_trt.cli.offload_report import Report
from hip_trt.errors import RuntimeInputError

if TYPE_CHECKING:
    from hip_trt.offload import OffloadStats
    from hip_trt.runtime import Chat, Generator, Stats

_SAMPLING = "Sampling (by default as the model's generation_config.json says, else greedy)"
_INTERACTIVE_SEQ_LEN = 8192
_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run")(run)


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|ENGINE.plan", help="What `hip-trt export` has made.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", metavar="FILE", help="Read the prompt from a UTF-8 file.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message of the chat.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.", show_default="256, or what fits")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len", help="Tokens that the KV cache holds per sequence, prompt and reply together.",
            show_default=f"the model's context; in a conversation at most {_INTERACTIVE_SEQ_LEN}",
        ),
    ] = None,
    refresh_interval: Annotated[
        int | None,
        typer.Option("--refresh-interval", help="Decode steps from one mask search from the top to the next.",
                     show_default="the model's"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads, for a .onnx.", show_default="all cores")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="Folder of another tokenizer than the one beside "
                                  "the model.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the likeliest tokens of this total probability.",
                                   rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from so many likeliest tokens; 0 is all.",
                                 rich_help_panel=_SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Sample from tokens at least this fraction as likely as the "
                                   "likeliest.", rich_help_panel=_SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1, tokens seen before become less likely.",
                                   rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
    = None,
    weight_budget_mib: Annotated[
        float | None,
        typer.Option("--weight-budget-mib", min=0, help="Weights to keep on the GPU, of an engine exported with "
                     "--weight-streaming; the rest is read from host memory in every step.",
                     show_default="what TensorRT finds best for free memory, leaving little to a KV cache")
    ] = None,
    offload: Switch = False,
    key_cache_mib: KeyCacheMib = None,
    value_cache_mib: ValueCacheMib = None,
    cache_share: CacheShare = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print speeds and counts on standard error; with --offload also a table of "
                           "hit ratios, bytes over the bus, GPU and host bytes.")
    ] = False,
    stats_json: Annotated[
        Path | None, typer.Option("--stats-json", metavar="FILE.json", help="Write the statistics of --offload, layer "
                                  "by layer.", rich_help_panel=PANEL)
    ] = None,
    stats_plot: Annotated[
        Path | None, typer.Option("--stats-plot", metavar="FILE.png", help="Plot hit ratios and bytes over the bus by "
                                  "layer; needs matplotlib.", rich_help_panel=PANEL)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Generate text with an exported model.

    The prompt is --prompt, --prompt-file or standard input. With none of these, at a terminal, a conversation begins.
    Text goes to standard output as it comes, everything else to standard error.
    """
    set_verbose(verbose)
    text = _prompt(prompt, prompt_file)
    if raw and system is not None:
        raise typer.BadParameter("a system message needs the chat template; leave --raw out", param_hint="--system")
    if not offload and (stats_json or stats_plot):
        raise typer.BadParameter("there is nothing to write without --offload", param_hint="--stats-json, --stats-plot")
    sizes = offload_of(
        offload, key_cache_mib=key_cache_mib, value_cache_mib=value_cache_mib, cache_share=cache_share
    )
    report = Report(stats, stats_json, stats_plot)
    with _quiet_endings():
        generator = _load(
            model, tokenizer=tokenizer, threads=threads, max_seq_len=max_seq_len, refresh_interval=refresh_interval,
            offload=sizes, weight_budget=_bytes(weight_budget_mib),
        )
        options = {
            "max_new_tokens": max_new_tokens, "seed": seed, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "min_p": min_p, "repetition_penalty": repetition_penalty,
        }
        raw = raw or (system is None and not getattr(generator.tokenizer, "chat_template", None))
        if text is not None:
            _once(generator, text, system=system, raw=raw, report=report, options=options)
        else:
            _converse(
                generator, system=system, raw=raw, report=report, options=options,
                max_seq_len=max_seq_len or min(generator.max_seq_len, _INTERACTIVE_SEQ_LEN),
            )


def _bytes(mib: float | None) -> int | None:
    """Of --weight-budget-mib."""
    if mib is not None and not math.isfinite(mib):
        raise typer.BadParameter(f"{mib} is no size", param_hint="--weight-budget-mib")
    return None if mib is None else int(mib * 2**20)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    """The prompt's text; None where a conversation is to begin."""
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give either --prompt or --prompt-file, not both", param_hint="--prompt-file")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        return None
    try:
        data = sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
    except OSError as error:
        raise RuntimeInputError(f"{prompt_file or 'standard input'}: cannot be read: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise RuntimeInputError(
            f"{prompt_file or 'standard input'}: not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}.",
            "Give a text file in UTF-8.",
        ) from None
    return text.removesuffix("\n").removesuffix("\r")  # the end of a file's last line is not the prompt's


def _load(model: Path, **options: Any) -> Generator:
    from transformers.utils import logging

    from hip_trt.progress import Steps
    from hip_trt.runtime import load

    logging.set_verbosity_error()  # its warnings about long prompts are of no concern: lengths are checked here
    with Steps().step(f"Load {model.name}"):
        return load(model, **options)


def _once(
    generator: Generator, text: str, *, system: str | None, raw: bool, report: Report, options: dict[str, Any]
) -> None:
    """Answer one prompt, with a KV cache just large enough."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    prompt = generator.encode(text) if raw else generator.encode_chat([*messages, {"role": "user", "content": text}])
    stream = generator.stream([prompt], **options)
    _write(step.texts[0] for step in stream)
    _report(report, stream.stats, stream.offload_stats)


def _converse(
    generator: Generator, *, system: str | None, raw: bool, report: Report, options: dict[str, Any], max_seq_len: int
) -> None:
    """Answer line by line until the input ends. Ctrl-C ends a reply; at the prompt, the conversation."""
    chat = None if raw else generator.chat(system, max_seq_len=max_seq_len)
    _say("Ctrl-D ends the conversation, Ctrl-C a reply." if chat else "Each line is a prompt of its own; Ctrl-D ends.")
    with closing(chat) if chat else nullcontext():
        _converse_with(generator, chat, report=report, options=options)


def _converse_with(generator: Generator, chat: Chat | None, *, report: Report, options: dict[str, Any]) -> None:
    while line := _read_line():
        text = line.rstrip("\n")
        if not text.strip():
            continue
        try:
            if chat is None:
                _once(generator, text, system=None, raw=True, report=report, options=options)
                continue
            with closing(chat.send(text, **options)) as pieces:
                _write(pieces)
            _report(report, chat.stats, chat.offload_stats if report.wants_offload else None)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except RuntimeInputError as error:
            _say(f"error: {error}")


def _read_line() -> str:
    sys.stderr.write("> ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        _say("")
    return line


def _write(pieces: Iterable[str]) -> None:
    """Print pieces as they come, and end the line."""
    last = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        last = piece or last
    if not last.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


def _report(report: Report, stats: Stats, offload: OffloadStats | None) -> None:
    if report.stats:
        _report_speed(stats)
    if offload is not None:
        report.offload(offload)


def _report_speed(stats: Stats) -> None:
    reused = f" ({stats.reused_tokens:,} more were in the cache)" if stats.reused_tokens else ""
    decoded = stats.generated_tokens - stats.sequences
    _say(
        f"prefill: {stats.prompt_tokens:,} tokens{reused}, first token after {stats.time_to_first_token:.2f} s, "
        f"{stats.prefill_tokens_per_second:,.1f} tokens/s\n"
        f"decode: {decoded:,} tokens in {stats.decode_seconds:.2f} s, {stats.decode_tokens_per_second:,.1f} tokens/s, "
        f"masks searched from the top in {stats.refreshed_steps} of {stats.decode_steps} steps"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _quiet_endings() -> Iterator[None]:
    """End on a closed pipe or on Ctrl-C without a word; what was written so far stands."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        raise typer.Exit(_BROKEN_PIPE) from None
    except KeyboardInterrupt:
        _say("")
        raise typer.Exit(_INTERRUPTED) from None
