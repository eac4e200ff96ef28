"""The command line that both benchmarks share."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from hip_trt import library as binding
from hip_trt.bench.roofline import Rates
from hip_trt.errors import HipTrtError
from hip_trt.library import Library
from kernel_bench.plot import plot
from kernel_bench.report import markdown


def parse(description: str | None) -> argparse.Namespace:
    """Parse the program's arguments; see each option's help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="plugin library; the installed one by default")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for results")
    parser.add_argument("--lengths", type=length, nargs="+", help="only these lengths, such as 8k 128k 1M")
    parser.add_argument("--quick", action="store_true", help="two lengths, and fewer samples")
    parser.add_argument("--no-check", action="store_true", help="do not compare hip-trt with the reference first")
    parser.add_argument("--seed", type=int, default=None, help="of the tensors; a fresh one by default")
    parser.add_argument("--peers-up-to", type=length, metavar="LENGTH", default=None,
                        help="longest length at which peers run too")
    parser.add_argument("--hip-attn-11", type=Path, metavar="SITE", help="folder with hip_attn and Triton 3.1")
    parser.add_argument("--hip-attn-12", type=Path, metavar="SITE", help="folder with hip_attn and Triton 3.4")
    parser.add_argument("--compile-seconds", type=float, default=140, help="for hip-attn's kernels, all at once")
    parser.add_argument("--copy-rate", type=float, default=4.3e12, metavar="BYTES_PER_S",
                        help="device copy, read plus written; the default was measured on an H200")
    parser.add_argument("--matmul-rate", type=float, default=790e12, metavar="FLOP_PER_S",
                        help="bfloat16 matrix product; the default was measured on an H200")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON",
                        help="measure nothing: make table and plot from these results, beside them")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 31)
    return options


def length(text: str) -> int:
    """A number of tokens, such as 8192, 8k or 1M.

    Raises:
        argparse.ArgumentTypeError: it is none, or no multiple of 128.
    """
    factors = {"k": 1 << 10, "m": 1 << 20}
    digits, factor = (text[:-1], factors[text[-1].lower()]) if text[-1:].lower() in factors else (text, 1)
    tokens = int(digits) * factor if digits.isdigit() else 0
    if tokens <= 0 or tokens % 128:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; it must be a multiple of 128, such as 8192, 8k or 1M")
    return tokens


def rates(options: argparse.Namespace) -> Rates:
    """What percentages are of."""
    return Rates(options.copy_rate, options.matmul_rate)


def run(options: argparse.Namespace, measure: Callable[[argparse.Namespace, Library], bool]) -> None:
    """Measure, or render earlier results; exits with 1 where an output was wrong, with a line where nothing can run."""
    if options.source is not None:
        sys.exit(None if render(options.source) else 1)
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU; --from makes table and plot from earlier results.")
    try:
        library = Library(options.library) if options.library else binding.load()
    except HipTrtError as error:
        sys.exit(str(error))
    if not measure(options, library):
        sys.exit("Some of hip-trt's outputs were wrong or not computed: see above.")


def render(source: Path) -> bool:
    """Write table and plot beside a report's JSON, and print the table.

    Returns:
        Whether it could be read.
    """
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        table = markdown(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{source}: no results of a benchmark: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    source.with_suffix(".md").write_text(table, encoding="utf-8")
    if not plot(content, source.with_suffix(".png")):
        print("No plot: matplotlib is not installed.", file=sys.stderr)
    print(table)
    return True
