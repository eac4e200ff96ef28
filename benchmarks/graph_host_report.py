"""The exported sample on a GPU, its attention in the TensorRT plugin: against hip_trt.patch and against the reference.

    python benchmarks/graph_host_report.py --models build/graph_host

For each exported model (a folder of ``--models`` with a model.onnx, as ``hip-trt export`` makes it), after a prompt of
real text: greedy tokens by the graph host under the runtime's generator, by the patched Hugging Face model on the CUDA
kernels, and by the same on the reference; logits of each step where all are given the reference's tokens; and all of it
with the KV cache in host memory. docs/verification.md says what the graph host is. Exits with 1 if anything differs.

Models that an earlier run left in ``--out``, after the same prompt, stay in the report unless they are measured anew.

An .onnx may come without its weights, if it was exported from the sample with weights copied: they are made again, and
must have the checksum that they had at the export.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import onnx  # noqa: E402  (after the path of graph_host is known)
import torch  # noqa: E402
from graph_host import GraphExecutor, Plugin  # type: ignore[import-not-found]  # noqa: E402
from graph_host.agreement import (  # type: ignore[import-not-found]  # noqa: E402
    HOST,
    OFFLOADED,
    PATCHED,
    REFERENCE,
    failures,
    first_difference,
    measure,
)
from graph_host.weights import restore_weights  # type: ignore[import-not-found]  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hip_trt import library  # noqa: E402
from hip_trt.evaluate import machine, texts  # noqa: E402
from hip_trt.evaluate.study import Cell, Study, Table  # noqa: E402
from hip_trt.offload import Offload  # noqa: E402
from hip_trt.runtime.executor import Limits  # noqa: E402
from hip_trt.spec import METADATA_KEY, ModelSpec  # noqa: E402

LOGIT_ERRORS = {"float32": 5e-3, "float16": 0.5, "bfloat16": 4.0}
"""Largest absolute error of a logit that passes, of logits up to about 30: rounding over thirty layers."""

PREFILL = 512
FORMATS = {
    "median max abs": ".1e", "worst max abs": ".1e", "worst max rel": ".1e", "worst KL (nats)": ".1e",
    "smallest margin": ".2e",
}


class Report(Study):
    """A study in files of its own name."""

    @property
    def stem(self) -> str:
        return self.name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write graph_host.json, .md and .png after each model."""
    options = _options(arguments)
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("highest")
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    path = options.library or library.plugin_path()
    plugin = Plugin(options.session, path, options.tensorrt)
    # The patched model, and the caches of a KV cache in host memory, belong to the library that they are called by.
    library.plugin_path = lambda: path
    loaded = AutoModelForCausalLM.from_pretrained(
        options.sample.parent, gguf_file=options.sample.name, dtype=torch.float32
    ).eval()
    say("loaded the sample")
    folders = [file.parent for file in options.models.glob("*/model.onnx")]
    folders = [folder for folder in folders if not options.only or folder.name in options.only]
    folders.sort(key=lambda folder: (-_dtype(folder / "model.onnx").itemsize, folder.name))
    if not folders:
        raise SystemExit(f"{options.models}: no folder with a model.onnx")
    text = texts.manual()
    prompt = _prompt(options, text.content)
    results = earlier(options.out, _parameters(options, text))
    if results:
        say(f"kept from an earlier run: {', '.join(results)}")
    wrong: list[str] = []
    offload = Offload.create(key_cache=options.cache_share, value_cache=options.cache_share)
    for number, folder in enumerate(folders):
        if number and time.monotonic() - start > options.limit * number / (number + 1):
            say(f"no time is left for {folder.name}")
            wrong.append(f"{folder.name}: not measured")
            continue
        file = folder / "model.onnx"
        model = _in_type(loaded, _dtype(file))
        restore_weights(file, model.state_dict())
        executor = GraphExecutor(
            file, plugin, device=device, limits=Limits(1, PREFILL, len(prompt) + options.steps)
        )
        say(f"{folder.name}: ready")
        result = measure(
            executor, model.to(device), prompt, options.steps, offload=offload if device.type == "cuda" else None,
            say=partial(_say_of, say, folder.name),
        )
        results[folder.name] = {**result, "measured_on": machine.describe(device, path)}
        found = failures(result, logits=LOGIT_ERRORS[executor.spec.dtype])
        for line in found or ["all agree"]:
            say(f"{folder.name}: {line}")
        wrong += [f"{folder.name}: {line}" for line in found]
        report = _report(results, options, text, results[folder.name]["measured_on"])
        files = report.write(options.out, {"": partial(plot, results)})
    print("\n\n".join(["", *(table.markdown() for table in report.tables[:-1]), *wrong, *map(str, files)]))
    return 1 if wrong else 0


def _say_of(say: Callable[[str], None], name: str, line: str) -> None:
    say(f"{name}: {line}")


def _dtype(path: Path) -> torch.dtype:
    """Of an exported model, whose weights may be missing."""
    metadata = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return ModelSpec.model_validate_json(metadata[METADATA_KEY]).torch_dtype


def _in_type(model: Any, dtype: torch.dtype) -> Any:
    """A copy on the CPU, its parameters in another type; RoPE's frequencies stay as they are."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _prompt(options: argparse.Namespace, text: str) -> list[int]:
    """The first tokens of a text."""
    tokenizer = AutoTokenizer.from_pretrained(options.sample.parent, gguf_file=options.sample.name)
    tokens = [int(token) for token in tokenizer(text[: 20 * options.prompt])["input_ids"]]
    if len(tokens) < options.prompt:
        raise SystemExit(f"--prompt: the text gives {len(tokens)} tokens only")
    return tokens[: options.prompt]


def _parameters(options: argparse.Namespace, text: texts.Text) -> dict[str, Any]:
    return {
        "sample": options.sample.name, "prompt": f"{options.prompt} tokens of {text.source} ({text.sha256})",
        "steps": options.steps, "cache share": options.cache_share,
        "plugin loaded by": options.tensorrt.name if options.tensorrt else "the graph host itself",
    }


def earlier(folder: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Results by model that a folder holds, each with the machine that it was measured on; none of other parameters."""
    file = folder / "graph_host.json"
    if not file.is_file():
        return {}
    study = Report.read(file)
    if study.parameters != parameters:
        return {}
    return {name: {"measured_on": study.measured_on, **result} for name, result in study.data.items()}


def _report(results: Mapping[str, Any], options: argparse.Namespace, text: texts.Text, where: Any) -> Report:
    command = f"python benchmarks/graph_host_report.py --models MODELS --sample {options.sample.name}"
    return Report(
        name="graph_host", title="The exported graph and the TensorRT plugin, executed together",
        command=command, parameters=_parameters(options, text), measured_on=where, data=dict(results),
        tables=[
            table for table in (agreement_table(results), offload_table(results), step_table(results)) if table.rows
        ],
        findings=_findings(results),
        notes=[
            "The graph host executes the .onnx file node by node, HipAttention nodes through the plugin's enqueue "
            "(tests/graph_host); TensorRT's own kernels and optimizer take no part.",
            "Reference: the Hugging Face model patched by hip_trt.patch, with hip_trt/reference in place of the "
            "kernels, on the same device in the same type. All are given its tokens for the logits.",
            f"Prefill in chunks of {PREFILL}; present pools are the past pools; a search from the top every "
            "refresh_interval steps.",
            *(
                f"{name} was measured on {other['date']}, with the library {other.get('library_sha256')}."
                for name, result in results.items() if (other := result.get("measured_on", where)) != where
            ),
        ],
    )


def agreement_table(results: Mapping[str, Any]) -> Table:
    """A row for each model and way, and one for the graph host beside the patched model."""
    rows: list[Sequence[Cell]] = []
    for name, result in results.items():
        tokens, errors, hip = result["tokens"], result["errors"], result["hip"]
        count, model = result["count"], [name, hip["reuse_level"], hip["refresh_interval"]]
        ways = [(way, tokens[way], tokens[REFERENCE], errors.get(way)) for way in tokens]
        ways.insert(3, (f"{HOST} against {PATCHED}", tokens[HOST], tokens[PATCHED], result["between"]))
        for way, found, expected, error in ways:
            same = sum(a == b for a, b in zip(found, expected, strict=True))
            numbers: list[Cell] = [None] * 5
            if error:
                numbers = [
                    median(error["max_abs"]), max(error["max_abs"]), max(error["max_rel"]), max(error["kl"]),
                    f"{sum(error['same_argmax']):.0f} of {count}",
                ]
            margin = min(errors[HOST]["margin"]) if way == REFERENCE else None
            rows.append([*model, way, f"{same} of {count}", *numbers, margin])
    return Table(
        "Against the reference",
        ["model", "reuse level", "refresh interval", "way", "same greedy tokens", "median max abs", "worst max abs",
         "worst max rel", "worst KL (nats)", "same argmax", "smallest margin"],
        rows,
        "Errors are of logits, a step at a time, where all were given the reference's tokens: the largest absolute "
        "one, that by the largest absolute logit, and the divergence of the distribution. Margin: by how much the "
        "reference's first token leads its second.", FORMATS,
    )


def offload_table(results: Mapping[str, Any]) -> Table:
    """What the caches did during the generator's run; no row where nothing was offloaded."""
    rows: list[Sequence[Cell]] = []
    for name, result in results.items():
        if offload := result.get("offload"):
            counts = [_counts(offload["keys"]), _counts(offload["values"])]
            rows.append([
                name, "the same" if offload["same_bits"] else f"{offload['steps_with_other_bits']} steps differ",
                offload["host_bytes"] / 2**20, (offload["key_cache_bytes"] + offload["value_cache_bytes"]) / 2**20,
                *counts,
            ])
    return Table(
        "KV cache in host memory: the graph host's logits, and its caches",
        ["model", "bits", "host MiB", "cache MiB", "blocks of keys", "blocks of values"],
        rows, "Blocks are counted in decode steps.",
        {"host MiB": ".1f", "cache MiB": ".1f"},
    )


def _counts(cache: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in cache.items())


def step_table(results: Mapping[str, Any]) -> Table:
    """The graph host's errors, step by step."""
    columns = ["step"]
    for name in results:
        columns += [f"{name}: max abs", "max rel", "KL (nats)", "argmax"]
    rows = []
    for step in range(max(result["count"] for result in results.values())):
        row: list[Cell] = [step]
        for result in results.values():
            errors = result["errors"][HOST]
            row += [
                f"{errors['max_abs'][step]:.1e}", f"{errors['max_rel'][step]:.1e}", f"{errors['kl'][step]:.1e}",
                "same" if errors["same_argmax"][step] else "other",
            ]
        rows.append(row)
    return Table("Every step: the graph host's logits against the reference's", columns, rows)


def _findings(results: Mapping[str, Any]) -> list[str]:
    found = []
    for name, result in results.items():
        expected = result["tokens"][REFERENCE]
        same, others = [], []
        for way, tokens in result["tokens"].items():
            step = first_difference(tokens, expected)
            if step is None:
                same.append(way)
                continue
            errors = result["errors"][way.removesuffix(OFFLOADED)]
            others.append(
                f"{way} leaves them at step {step}, where the reference's first token leads by "
                f"{errors['margin'][step]:.1e} and logits differ by up to {errors['max_abs'][step]:.1e}"
            )
        found.append(
            f"{name}: the same {result['count']} greedy tokens after {result['prompt_tokens']} by {', '.join(same)}"
            + "".join(f"; {other}" for other in others) + "."
        )
    return found


def plot(results: Mapping[str, Any], figure: Any) -> None:
    """Largest error of a logit, step by step, of the graph host and of the patched model."""
    figure.set_size_inches(9, 2.6 * len(results))
    for axes, (name, result) in zip(figure.subplots(len(results), squeeze=False)[:, 0], results.items(), strict=True):
        for way, style in ((HOST, "-"), (PATCHED, ":")):
            errors = result["errors"][way]["max_abs"]
            axes.plot([max(error, 1e-9) for error in errors], style, label=way, linewidth=1)
        axes.plot(result["errors"][HOST]["margin"], color="0.7", linewidth=0.8, label="margin of the first token")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("logit")
        axes.legend(fontsize=7, ncols=3)
    axes.set_xlabel("decode step")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder of folders with an exported model.onnx")
    parser.add_argument("--only", nargs="*", default=[], help="of these folders")
    parser.add_argument("--sample", type=Path, default=os.environ.get("HIP_TRT_SAMPLE"), help="the sample's .gguf")
    parser.add_argument("--session", type=Path, default=os.environ.get("HIP_TRT_PLUGIN_SESSION"),
                        help="the library of plugins/tests/plugin_session.cpp")
    parser.add_argument("--library", type=Path, default=os.environ.get("HIP_TRT_LIBRARY"),
                        help="the plugin library, in place of the installed one")
    parser.add_argument("--tensorrt", type=Path, help="TensorRT library whose plugin registry loads the plugin")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
    parser.add_argument("--device", default="cuda:0", help="cpu: with a plugin of emulated kernels, to try the program")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=256, help="tokens to decode")
    parser.add_argument("--cache-share", type=float, default=0.1, help="keys', and values', of the whole KV cache")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no model is begun")
    options = parser.parse_args(arguments)
    if options.sample is None or options.session is None:
        parser.error("--sample and --session must be named")
    return options


if __name__ == "__main__":
    sys.exit(main())
