"""What the CUDA compiler says of every kernel: registers, spills to local memory, and size of the code per GPU.

    python benchmarks/compiler_report.py [--nvcc nvcc] [--architectures 80 90a 120] [--out build/benchmarks] [--jobs 2]

Compiles plugins/cuda as the plugin's build does, to machine code only. Writes compiler_report.json and .md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent.parent / "plugins" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
HOPPER_ONLY = ("_sm90_", "tensor_map")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one source, as ptxas reports it.

    Attributes:
        name: mangled.
        registers: of a thread.
        spilled: bytes that a thread stores to local memory because registers ran out.
    """

    name: str
    registers: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture; ``code`` is the size of its machine code in bytes."""

    source: str
    code: int
    kernels: list[Kernel]


def parse(report: str) -> list[Kernel]:
    """Kernels in what ``ptxas -v`` printed. Functions that kernels call are reported there too, and left out here."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>[^']+)'.*?Function properties for (?P=name)\s+"
        r"\d+ bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers", re.DOTALL,
    )
    return [Kernel(found["name"], int(found["registers"]), int(found["spilled"])) for found in entry.finditer(report)]


def compile_source(nvcc: str, source: Path, architecture: str, folder: Path) -> Compiled:
    """Compile one source; the compiler's own message is the error."""
    target = folder / f"{source.stem}.{architecture}.cubin"
    result = subprocess.run(
        [nvcc, "-cubin", "-O3", "-std=c++17", f"-arch=sm_{architecture}", '-DHIP_TRT_VERSION="report"', "-Xptxas", "-v",
         *(["-DHIP_TRT_HOPPER"] if architecture == "90a" else []), str(source), "-o", str(target)],
        capture_output=True, text=True, check=False,
    )
    if result.returncode != 0:
        sys.exit(f"{source.name} for {architecture}: {result.stderr}")
    kernels = parse(result.stderr)
    return Compiled(source.stem, target.stat().st_size if kernels else 0, kernels)


def markdown(report: dict[str, list[Compiled]]) -> str:
    """One line an architecture, then every kernel that spills."""
    lines = ["| architecture | kernels | most registers | kernels that spill | machine code, MB |", "|---" * 5 + "|"]
    spilling = []
    for architecture, compiled in report.items():
        kernels = [kernel for source in compiled for kernel in source.kernels]
        spills = [kernel for kernel in kernels if kernel.spilled]
        spilling += [f"- {architecture}: `{kernel.name}`, {kernel.spilled} bytes" for kernel in spills]
        size = sum(source.code for source in compiled) / 1e6
        most = max(kernel.registers for kernel in kernels)
        lines.append(f"| {architecture} | {len(kernels)} | {most} | {len(spills)} | {size:.2f} |")
    return "\n".join([*lines, *(["", *spilling] if spilling else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="CC")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--jobs", type=int, default=2, help="sources compiled at once")
    options = parser.parse_args()
    report: dict[str, list[Compiled]] = {}
    with TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for architecture in options.architectures:
            sources = [source for source in sorted(SOURCES.glob("*.cu"))
                       if architecture == "90a" or not any(part in source.stem for part in HOPPER_ONLY)]
            report[architecture] = list(pool.map(
                lambda source, to=architecture: compile_source(options.nvcc, source, to, Path(folder)), sources
            ))
            print(markdown({architecture: report[architecture]}).splitlines()[2], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compiler_report.md").write_text(markdown(report))
    (options.out / "compiler_report.json").write_text(json.dumps(
        {architecture: [asdict(source) for source in compiled] for architecture, compiled in report.items()}, indent=1
    ))
    print(markdown(report))


if __name__ == "__main__":
    main()
