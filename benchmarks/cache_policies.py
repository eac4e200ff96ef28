"""Which block cache a KV cache in host memory needs: policies over sizes, on traces of real text.

    python benchmarks/cache_policies.py --model FILE.gguf --out benchmarks/results

Runs on a CPU. A dense pass of the model over a text gives queries and keys; decode steps replayed on them by the
reference say which blocks are read (hip_trt/evaluate/cache_trace.py); policies are simulated on that
(hip_trt/evaluate/cache_policy.py). Contexts beyond the model's own are stretches of text side by side. Writes
cache_policies.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError, RuntimeInputError
from hip_trt.evaluate.cache_policy import POLICIES, simulate
from hip_trt.evaluate.cache_trace import Accesses, LayerStates, Trace, capture, replay
from hip_trt.evaluate.texts import manual
from hip_trt.offload import CacheCounts
from hip_trt.offload.block_caches import WAYS

STRETCH = 8192
"""Tokens of text in one pass: all that the sample model was trained for."""
MULTIPLES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Sizes, of what a step reads; and the full cache."""
MODES = {"top": (1, 1), "8, level 1": (8, 1), "32, level 1": (32, 1), "8, level 0": (8, 0)}
"""Refresh interval and reuse_level, by name."""
FEW = ("shipped", "LRU", "optimum")
"""Policies simulated at every context; the others only at the one of --all-policies."""
STYLES: dict[str, dict[str, Any]] = {
    "shipped": {"color": "black", "linewidth": 3}, "optimum": {"color": "black", "linestyle": ":"},
}
"""Of lines in the plot."""


@dataclass(frozen=True)
class Row:
    """One cache of all recorded layers under one policy; steps after the warm-up.

    Attributes:
        context: tokens.
        mode: of MODES.
        cache: keys or values.
        policy: of POLICIES.
        multiple: size over ``need``; None for the full cache.
        blocks: size in one layer.
        share: of the keys' (or values') full cache.
        need: different blocks that a step reads in one layer, on average.
        lookups, misses, fills: per decode step, layer and KV head.
        hit_ratio: of look-ups.
    """

    context: int
    mode: str
    cache: str
    policy: str
    multiple: float | None
    blocks: int
    share: float
    need: float
    lookups: float
    misses: float
    fills: float
    hit_ratio: float


def states_of(arguments: argparse.Namespace) -> dict[int, LayerStates]:
    """What was recorded before, or else is now."""
    file: Path | None = arguments.states
    if file is None or not file.is_file():
        states = record(arguments)
        if file is not None:
            torch.save({layer: (state.queries, state.keys) for layer, state in states.items()}, file)
        return states
    return {layer: LayerStates(*tensors) for layer, tensors in torch.load(file, weights_only=True).items()}


def record(arguments: argparse.Namespace) -> dict[int, LayerStates]:
    """Run the model over as many stretches as the longest context needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Path = arguments.model
    where: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if model.is_file():
        where = {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
    if not model.exists():
        raise RuntimeInputError(f"{model}: no such file or folder.", "Give a .gguf file or a Hugging Face folder.")
    try:
        text = manual().content if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeInputError(f"{arguments.text}: cannot be read: {error}.", "Give a UTF-8 text.") from None
    ids = AutoTokenizer.from_pretrained(**where)(text)["input_ids"]
    drop = arguments.config.sink_tokens
    stretches = -(-(max(arguments.contexts) - drop) // (STRETCH - drop))
    if len(ids) < stretches * STRETCH:
        raise RuntimeInputError(
            f"The text has {len(ids)} tokens, too few for {stretches} stretches of {STRETCH}.",
            f"Give a longer --text, or contexts of at most {len(ids) // STRETCH * (STRETCH - drop) + drop}.",
        )
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).eval()
    return capture(
        loaded, [ids[i * STRETCH : (i + 1) * STRETCH] for i in range(stretches)], arguments.layers,
        steps=arguments.steps, drop=drop,
        progress=lambda number: print(f"pass {number + 1} of {stretches}", flush=True),
    )


def shortened(states: LayerStates, tokens: int, sink: int) -> LayerStates:
    """The first ``sink`` tokens of a context and its last ones, ``tokens`` in all."""
    return LayerStates(states.queries, torch.cat([states.keys[:, :sink], states.keys[:, sink - tokens :]], dim=1))


def sizes(need: float, full: int, multiples: Sequence[float]) -> Iterator[tuple[float | None, int]]:
    """Multiples, and blocks rounded up to whole sets, below the full cache; then that."""
    for multiple in multiples:
        blocks = int(np.ceil(multiple * need / WAYS)) * WAYS
        if blocks < full:
            yield multiple, blocks
    yield None, -(-full // WAYS) * WAYS


def study(
    traces: Sequence[Trace], *, context: int, mode: str, kv_heads: int, warm_up: int, policies: Sequence[str],
    multiples: Sequence[float],
) -> list[Row]:
    """Simulate all sizes of both caches, layer by layer, and add layers up."""
    rows = []
    full = traces[0].pool_blocks
    for cache in ("keys", "values"):
        accesses: list[Accesses] = [getattr(trace, cache) for trace in traces]
        need = float(np.mean([a.distinct()[warm_up:].mean() for a in accesses]))
        for multiple, blocks in sizes(need, full, multiples):
            for policy in policies:
                counts = sum((simulate(policy, a, blocks).counts(warm_up) for a in accesses), CacheCounts())
                unit = sum(a.steps - warm_up for a in accesses) * kv_heads
                rows.append(Row(
                    context, mode, cache, policy, multiple, blocks, blocks / full, need, counts.lookups / unit,
                    counts.misses / unit, counts.fills / unit, counts.hit_ratio,
                ))
    return rows


def run_mode(job: tuple[list[LayerStates], HipConfig, dict[str, Any]], folder: Path | None) -> list[Row]:
    """Replay and study one context in one mode."""
    torch.set_num_threads(1)
    states, config, options = job
    with torch.inference_mode():
        traces = [replay(layer, config) for layer in states]
    if folder is not None:
        for number, trace in enumerate(traces):
            trace.save(folder / f"{options['context']}-{options['mode'].replace(', ', '-')}-{number}.npz")
    rows = study(traces, kv_heads=states[0].keys.shape[0], **options)
    print(f"{options['context']} tokens, {options['mode']}: done", flush=True)
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All contexts and modes, as the JSON's content."""
    states = states_of(arguments)
    config: HipConfig = arguments.config
    jobs: list[tuple[list[LayerStates], HipConfig, dict[str, Any]]] = []
    for context in arguments.contexts:
        layers = [shortened(layer, context, config.sink_tokens) for layer in states.values()]
        for mode, (interval, level) in MODES.items():
            policies = tuple(POLICIES) if context == arguments.all_policies else FEW
            options = {"context": context, "mode": mode, "warm_up": arguments.warm_up, "policies": policies,
                       "multiples": arguments.multiples}
            jobs.append((layers, config.replace(refresh_interval=interval, reuse_level=level), options))
    folders = [arguments.traces] * len(jobs)
    print(f"{len(jobs)} pairs of context and mode to simulate", flush=True)
    if arguments.traces is not None:
        arguments.traces.mkdir(parents=True, exist_ok=True)
    if arguments.jobs == 1:
        rows = [row for job, folder in zip(jobs, folders, strict=True) for row in run_mode(job, folder)]
    else:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            rows = [row for result in pool.map(run_mode, jobs, folders) for row in result]
    rows.sort(key=lambda row: row.context)
    return {
        "model": arguments.model.name, "layers": list(states), "steps": arguments.steps, "warm_up": arguments.warm_up,
        "stretch": STRETCH, "text": "Python's language reference" if arguments.text is None else arguments.text.name,
        "config": config.model_dump(mode="json"), "all_policies": arguments.all_policies,
        "environment": {"python": platform.python_version(), "torch": torch.__version__,
                        "transformers": metadata.version("transformers"), "hip-trt": metadata.version("hip-trt"),
                        "date": datetime.now(UTC).isoformat(timespec="minutes")},
        "rows": [asdict(row) for row in rows],
    }


def markdown(content: dict[str, Any]) -> str:
    """The tables: transfers and hit ratios over sizes, one table a context and mode and cache."""
    lines = [
        "# Cache policies on traces of real text", "",
        f"{content['model']}, layers {', '.join(map(str, content['layers']))}; {content['text']}; "
        f"{content['steps'] - content['warm_up']} decode steps after {content['warm_up']} that are not counted; "
        f"contexts of more than {content['stretch']} tokens are stretches side by side.", "",
        "Cells: blocks that steps miss, per decode step, layer and KV head (in 8B geometry, 32 layers of 8 KV heads "
        "of size 128 in bfloat16, also MiB per token), and the hit ratio of look-ups in percent. Sizes: of the "
        "different blocks that a step reads, and of the full cache of keys (or values).",
    ]
    lines += summary(content["rows"])
    for (context, mode, cache), group in groupby(content["rows"], itemgetter("context", "mode", "cache")):
        rows = list(group)
        policies = list(dict.fromkeys(row["policy"] for row in rows))
        interval, level = MODES[mode]
        searched = "searched from the top every step" if interval == 1 else (
            f"searched from the top every {interval} steps, reuse_level {level}")
        lines += [
            "", f"## {context // 1024}k tokens, {searched}: {cache}", "",
            f"A step looks up {rows[0]['lookups']:.0f} blocks per layer and KV head.", "",
            f"| size, steps' reads | share | {' | '.join(policies)} |", "|---" * (2 + len(policies)) + "|",
        ]
        for blocks, cells in groupby(rows, lambda row: row["blocks"]):
            by_policy = {row["policy"]: row for row in cells}
            first = by_policy[policies[0]]
            size = "full" if first["multiple"] is None else f"{blocks / first['need']:.2f}"
            numbers = (f"{by_policy[p]['misses']:.2f} ({100 * by_policy[p]['hit_ratio']:.1f})" for p in policies)
            lines.append(f"| {size} | {100 * first['share']:.1f} % | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Both caches of every context and mode in a line: what the shipped policy reads, and how far from the optimum."""
    shown = (1.0, 1.5, 2.0, 3.0)
    lines = [
        "", "## The shipped policy, at 1, 1.5, 2 and 3 times what a step reads", "",
        "Blocks missed per step, layer and KV head (to fill, the shipped cache reads over the bus again only those "
        "that had not landed on the GPU), and beside it how many times the optimum's; the last column "
        "is true LRU at twice a step's reads over the optimum. A step's reads are different blocks per layer, of all "
        "KV heads, on average.",
        "", f"| context | searched | cache | step's reads | {' | '.join(f'{m:g}x' for m in shown)} | LRU, 2x |",
        "|---" * (5 + len(shown)) + "|",
    ]
    for (context, mode, cache), group in groupby(rows, itemgetter("context", "mode", "cache")):
        cells = {(row["multiple"], row["policy"]): row for row in group}
        need = next(iter(cells.values()))["need"]

        def ratio(multiple: float, policy: str, cells: dict[Any, Any] = cells) -> float | None:
            if (multiple, policy) not in cells:
                return None
            return float(cells[multiple, policy]["misses"] / cells[multiple, "optimum"]["misses"])

        numbers = [
            "-" if (times := ratio(m, "shipped")) is None else f"{cells[m, 'shipped']['misses']:.1f} ({times:.1f})"
            for m in shown
        ]
        lru = ratio(2.0, "LRU")
        lines.append(f"| {context // 1024}k | {mode} | {cache} | {need:.0f} | {' | '.join(numbers)} | "
                     f"{'-' if lru is None else f'{lru:.1f}'} |")
    return lines


def plot(content: dict[str, Any], path: Path) -> bool:
    """Transfers over size for the context with all policies; False without matplotlib."""
    try:
        import_module("matplotlib").use("Agg")
    except ImportError:
        return False
    pyplot = import_module("matplotlib.pyplot")
    context = content["all_policies"]
    figure, grid = pyplot.subplots(
        2, len(MODES), figsize=(4 * len(MODES), 7.5), squeeze=False, sharey="row", layout="constrained"
    )
    for line, cache in zip(grid, ("keys", "values"), strict=True):
        for axes, (mode, (interval, level)) in zip(line, MODES.items(), strict=True):
            rows = [row for row in content["rows"]
                    if (row["context"], row["mode"], row["cache"]) == (context, mode, cache)]
            for policy in dict.fromkeys(row["policy"] for row in rows):
                points = [(row["blocks"] / row["need"], max(row["misses"], 1e-2))
                          for row in rows if row["policy"] == policy]
                axes.plot(*zip(*points, strict=True), marker=".", label=policy, **STYLES.get(policy, {}))
            how = "every step" if interval == 1 else f"every {interval} steps, reuse_level {level}"
            axes.set(xscale="log", yscale="log", title=f"{cache}\nsearched {how}", xlabel="size / what a step reads")
            ticks = (0.5, 1, 2, 4, 8, 16, 32, 64)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(True, alpha=0.3)
        line[0].set_ylabel("blocks missed\nper step, layer and KV head")
    grid[0][-1].legend(fontsize=8)
    figure.suptitle(f"{context // 1024}k tokens of text, {content['model']}; the last point is the full cache")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return True


def tokens(text: str) -> int:
    """8192 or 8k, in whole pages."""
    number = int(text[:-1]) * 1024 if text.endswith("k") else int(text)
    if number <= 0 or number % HipConfig.create().page_size:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {HipConfig.create().page_size} tokens")
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .gguf file or a Hugging Face folder")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    parser.add_argument("--text", type=Path, help="a UTF-8 text; by default Python's own language reference")
    parser.add_argument("--contexts", type=tokens, nargs="+", default=[8192, 32768, 65536, 98304])
    parser.add_argument("--all-policies", type=tokens, default=65536, help="context at which all policies run")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 10, 17, 24])
    parser.add_argument("--steps", type=int, default=256, help="decode steps")
    parser.add_argument("--warm-up", type=int, default=64, help="first steps that are not counted")
    parser.add_argument("--multiples", type=float, nargs="+", default=MULTIPLES, help="sizes, of what a step reads")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--traces", type=Path, help="keep the traces in this folder, as .npz")
    parser.add_argument("--states", type=Path, help="file of recorded queries and keys: read if there, else written")
    parser.add_argument("--from", dest="source", type=Path, help="make table and plot of this .json again")
    parsed = parser.parse_args(arguments)
    parsed.config = HipConfig.create()
    if parsed.source is None and parsed.model is None:
        parser.error("--model is needed")
    if not 0 <= parsed.warm_up < parsed.steps:
        parser.error("--warm-up must be less than --steps")
    return parsed


def main(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = measure(arguments) if arguments.source is None else json.loads(arguments.source.read_text("utf-8"))
    if arguments.source is None:
        (arguments.out / "cache_policies.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "cache_policies.md").write_text(markdown(content), encoding="utf-8")
    plot(content, arguments.out / "cache_policies.png")


if __name__ == "__main__":
    try:
        main(parse())
    except HipTrtError as error:
        sys.exit(str(error))
