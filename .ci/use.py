"""Use an installed hip-trt as a newcomer would: every command's help, the doctor, an export to an engine, a question.

python .ci/use.py MODEL.gguf FOLDER [--lowest]

--lowest: every package that hip-trt names must be there in the lowest version that it allows, so that what is declared
is what was tried.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import typer
from packaging.requirements import Requirement
from packaging.version import Version

WHEEL_KERNELS = "8.0, 8.6, 8.9, 9.0, 10.0, 11.0, 12.0, 12.0 and later"
"""What a release has kernels for; 11.0 needs the compiler of CUDA 13.0."""
ENGINE_GPUS = {"8.0", "8.6", "8.9", "12.0"}
"""What TensorRT-RTX 1.7 builds for; later ones may add to it."""
COMMAND = Path(sysconfig.get_path("scripts"), "hip-trt")


def hip_trt(*arguments: str | Path) -> str:
    """Standard output of a command; what it says else is shown, and a failure ends the check."""
    done = subprocess.run([COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"hip-trt {' '.join(map(str, arguments))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def versions(lowest: bool) -> Iterator[str]:
    """Of the packages that hip-trt names."""
    for text in importlib.metadata.requires("hip-trt") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "tensorrt-rtx"}):
            version = importlib.metadata.version(requirement.name)
            bound = next(part.version for part in requirement.specifier if part.operator == ">=")
            if lowest and Version(version) != Version(bound) and not version.startswith(f"{bound}."):
                sys.exit(f"{requirement.name}: {version} was tried, and {bound} is declared")
            yield f"{requirement.name} {version}"


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, with the groups above it, the application itself included."""
    from hip_trt.cli.app import app

    found: list[tuple[tuple[str, ...], object]] = [((), typer.main.get_command(app))]
    for path, command in found:
        found += [((*path, name), child) for name, child in getattr(command, "commands", {}).items()]
        yield path


def check_kernels() -> None:
    """The plugin library has kernels for every GPU of a release."""
    from hip_trt import library
    from hip_trt.fat_binary import compiled_for

    kernels = str(compiled_for(library.plugin_path()))
    assert kernels == WHEEL_KERNELS, kernels


def check_engine(plan: Path) -> None:
    """It has HipAttention layers, and names the GPUs that it was built for."""
    report = hip_trt("inspect", plan)
    assert "HipAttention" in report, report
    named = json.loads(hip_trt("inspect", plan, "--json"))["engine"]["compute_capabilities"]
    assert set(named) >= ENGINE_GPUS, named
    assert f"GPUs of compute capability {', '.join(named)}" in report, report


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print(f"Python {sys.version.split()[0]}:", ", ".join(versions("--lowest" in sys.argv)))
    helped = list(commands())
    for command in helped:
        assert "Usage" in hip_trt(*command, "--help"), command
    assert len(helped) > 12
    assert "--model" in hip_trt("export", "--help")
    check_kernels()
    print(hip_trt("doctor"), end="")
    print(hip_trt("export", "--model", model, "--out", folder / "engine.plan"), end="")
    check_engine(folder / "engine.plan")
    answer = hip_trt("run", folder / "model.onnx", "--prompt", "What is the capital of France?")
    print(answer, end="")
    assert "Paris" in answer
    print(f"{len(helped)} commands helped; the model was exported, and an engine built")


if __name__ == "__main__":
    main()
