"""Decode throughput with the KV cache in GPU memory and in host memory, on the access pattern of real text.

    python benchmarks/offload_decode.py --model SmolLM2-135M-Instruct.Q4_1.gguf [--lengths 16k 64k 128k] [--out DIR]

A model of Llama-3.1-8B's geometry, batch 1, bfloat16: every matrix product of its layers with random weights, and
HipAttention over rows that SmolLM2 gave on real text (offload_bench/recorded.py says how). For each length: resident,
and offloaded with caches of --share of the resident cache, searched from the top in every step, and in every 8th, 32nd
and 64th. Steps are replayed CUDA graphs. Outputs and kept nodes of both are compared bit for bit, step by step; then
both are timed in turn, --rounds times, as the time of both may shift together by some percent: what is kept is the
median of the rounds. Resident is also timed alone, before there is anything of the other and after it is gone. Where
the resident cache does not fit on the GPU, the offloaded one is timed alone. Writes offload_decode.json, .md and .png,
after each length; --append keeps what the file has of other lengths.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernel_bench.environment import describe
from offload_bench.decoder import HEAD_DIM, KV_HEADS, Decoder, Weights, fill_pools
from offload_bench.recorded import STRETCH, Recording, load, real_text, record
from torch import Tensor

from hip_trt import library as binding
from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.offload.offloaded_cache import OffloadedCache
from hip_trt.offload.settings import Offload
from hip_trt.offload.sizes import Geometry
from hip_trt.offload.statistics import OffloadStats

BUS_BYTES_PER_S = 51e9
"""Kernel reads of host memory, measured on an H200 in blocks of 1 KiB or more."""

INTERVALS = (1, 8, 32, 64)

_BEGUN = time.perf_counter()


def say(what: str) -> None:
    print(f"{time.perf_counter() - _BEGUN:6.1f} s  {what}", file=sys.stderr, flush=True)


def measure(decoder: Decoder, interval: int, steps: int, warm_up: int, cache: OffloadedCache | None) -> dict[str, Any]:
    """Tokens per second over ``steps`` steps after ``warm_up`` others, which fill the caches."""
    decoder.restart()
    for step in range(warm_up):
        decoder.step(refresh=step % interval == 0)
    if cache is not None:
        cache.reset_stats()
    event: Any = torch.cuda.Event  # has no types
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for step in range(warm_up, warm_up + steps):
        decoder.step(refresh=step % interval == 0)
    end.record()
    end.synchronize()
    milliseconds = start.elapsed_time(end) / steps
    result: dict[str, Any] = {"ms": milliseconds, "tokens_per_s": 1e3 / milliseconds}
    if cache is not None:
        cache.count_tokens(steps)
        result |= report(cache.stats(), milliseconds)
    return result


def report(stats: OffloadStats, milliseconds: float) -> dict[str, Any]:
    """What the caches did in the timed steps."""
    return {
        "key_hit_ratio": stats.all_keys.hit_ratio, "value_hit_ratio": stats.all_values.hit_ratio,
        "bus_bytes_per_token": stats.bus_bytes_per_token,
        "bus_share": stats.bus_bytes_per_token / (milliseconds * 1e-3) / BUS_BYTES_PER_S,
        "gpu_bytes": stats.gpu_bytes, "host_bytes": stats.host_bytes,
        "missed_bytes_per_token":
            (stats.all_keys.misses + stats.all_values.misses) * stats.block_bytes / max(stats.tokens, 1),
    }


def same_bits(one: Decoder, other: Decoder, interval: int, steps: int) -> int:
    """Steps after which outputs and nodes of both are equal, bit for bit; all of them, or it is an error."""
    one.restart()
    other.restart()
    for step in range(steps):
        for decoder in (one, other):
            decoder.step(refresh=step % interval == 0)
        if not (torch.equal(one.output.view(torch.int16), other.output.view(torch.int16))
                and torch.equal(one.nodes, other.nodes)):
            sys.exit(f"step {step}: offloaded and resident differ")
    return steps


def run_length(
    library: Library, config: HipConfig, recording: Recording, tokens: int, layers: int, weights: list[Weights],
    offload: Offload, options: argparse.Namespace,
) -> dict[str, Any]:
    """One length, resident and offloaded."""
    device = torch.device("cuda")
    committed = tokens - recording.steps
    slots = tokens // config.page_size + 1
    generator = torch.Generator().manual_seed(options.seed)
    table = torch.randperm(slots, generator=generator).int().to(device)[None]
    geometry = Geometry(layers, KV_HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, 1, slots, slots, config)
    cut = Recording(recording.keys[:, -tokens:], recording.values[:, -tokens:], recording.queries)
    row: dict[str, Any] = {"tokens": tokens, "layers": layers, "config": config.model_dump(mode="json"), "runs": {}}
    row["resident_bytes"] = layers * 2 * geometry.pool_bytes
    warm_up = recording.steps - options.steps

    def pools() -> tuple[Tensor, Tensor]:
        keys, values = (torch.empty(geometry.pool_shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        return keys, values

    resident = None
    say(f"{tokens // 1024}k tokens, leaf_branch {config.leaf_branch}: resident")
    if 1.2 * row["resident_bytes"] < torch.cuda.mem_get_info()[0]:  # caches have to fit too, and what fills pools
        pairs = [pools() for _ in range(layers)]
        for layer, pair in enumerate(pairs):
            fill_pools(cut, layer, pair, table, committed)
        resident = Decoder(library, config, cut, pairs, weights, table, committed)
        row["resident_alone"] = [
            measure(resident, 8, options.steps, warm_up, None)["tokens_per_s"] for _ in range(options.rounds)
        ]
    say("host memory")
    begun = time.perf_counter()
    with OffloadedCache(geometry, offload, device=device, library=library) as cache:
        row["bank_s"] = time.perf_counter() - begun
        say("rows")
        through = pools()
        for layer in range(layers):
            fill_pools(cut, layer, through, table, committed)
            for to, pool in zip(cache.pools(layer), through, strict=True):
                to.copy_(pool)
        del through
        cache.forget()
        banks = [cache.pools(layer) for layer in range(layers)]
        offloaded = Decoder(library, config, cut, banks, weights, table, committed)
        say("bits")
        if resident is not None:
            row["equal_steps"] = same_bits(resident, offloaded, 8, min(options.checked, recording.steps))
        for interval in INTERVALS:
            say(f"searched every {interval} steps")
            rounds: list[dict[str, Any]] = []
            for _ in range(options.rounds):
                one = {"resident": measure(resident, interval, options.steps, warm_up, None)} if resident else {}
                rounds.append({**one, "offloaded": measure(offloaded, interval, options.steps, warm_up, cache)})
            row["runs"][str(interval)] = middle(rounds)
        del offloaded, banks
    if resident is not None:
        row["resident_alone"].append(measure(resident, 8, options.steps, warm_up, None)["tokens_per_s"])
    return row


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round whose share kept, or else whose time, is the median, with what all rounds gave."""
    for each in rounds:
        if "resident" in each:
            each["offloaded"]["kept"] = each["resident"]["ms"] / each["offloaded"]["ms"]
    in_order = sorted(rounds, key=lambda each: each["offloaded"].get("kept", -each["offloaded"]["ms"]))
    chosen = in_order[len(in_order) // 2]
    chosen["offloaded"]["rounds"] = [each["offloaded"].get("kept") for each in rounds]
    return chosen


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, one line a length and interval."""
    lines = [
        "| tokens | leaf_branch | layers | searched every | resident, tokens/s | offloaded, tokens/s | kept "
        "| GPU bytes of KV | key hits | value hits | MB missed per token | MB over the bus per token | of the bus |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        for interval, runs in row["runs"].items():
            one, other = runs.get("resident"), runs["offloaded"]
            cells = [
                f"{row['tokens'] // 1024}k", row["config"]["leaf_branch"], row["layers"], f"{interval} steps",
                f"{one['tokens_per_s']:.1f}" if one else "-", f"{other['tokens_per_s']:.1f}",
                f"{other['kept']:.1%}" if one else "-",
                f"{other['gpu_bytes'] / row['resident_bytes']:.1%}", f"{other['key_hit_ratio']:.1%}",
                f"{other['value_hit_ratio']:.1%}", f"{other['missed_bytes_per_token'] / 1e6:.2f}",
                f"{other['bus_bytes_per_token'] / 1e6:.2f}",
                f"{other['bus_share']:.0%}",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time and GPU bytes over length."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({row["config"]["leaf_branch"] for row in rows}, reverse=True)
    figure, panels = pyplot.subplots(1, len(widths) + 1, figsize=(5 * len(widths) + 5, 4))
    for panel, width in zip(panels, widths, strict=False):
        mine = [row for row in rows if row["config"]["leaf_branch"] == width]
        for interval, color in zip(INTERVALS, ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True):
            for place, style in (("resident", "--"), ("offloaded", "-")):
                there = [row for row in mine if place in row["runs"][str(interval)]]
                panel.plot([row["tokens"] for row in there],
                           [row["runs"][str(interval)][place]["ms"] / row["layers"] * 32 for row in there], style,
                           color=color, marker="o", label=f"{place}, searched every {interval}")
        panel.set(xscale="log", xlabel="tokens", ylabel="ms per token, 32 layers", ylim=(0, None),
                  title=f"leaf_branch {width}")
        panels[-1].plot([row["tokens"] for row in mine],
                        [row["runs"]["8"]["offloaded"]["gpu_bytes"] / row["layers"] * 32 / 2**30 for row in mine],
                        marker="o", label=f"offloaded, leaf_branch {width}")
    first = [row for row in rows if row["config"]["leaf_branch"] == widths[0]]
    panels[-1].plot([row["tokens"] for row in first],
                    [row["resident_bytes"] / row["layers"] * 32 / 2**30 for row in first], "k--", marker="o",
                    label="resident")
    panels[-1].set(xscale="log", yscale="log", xlabel="tokens", ylabel="GiB, 32 layers", title="GPU memory of KV")
    for panel in panels:
        panel.set_xticks(sorted({row["tokens"] for row in rows}),
                         [f"{tokens // 1024}k" for tokens in sorted({row["tokens"] for row in rows})])
        panel.set_xticks([], minor=True)
        panel.grid(True, alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Of a row in the table: by length, widest leaves first."""
    return row["tokens"], -row["config"]["leaf_branch"]


def _length(text: str) -> int:
    number = int(text.lower().removesuffix("k")) * (1024 if text.lower().endswith("k") else 1)
    if number % STRETCH:
        raise argparse.ArgumentTypeError(f"{text}: lengths are multiples of {STRETCH} tokens")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as .gguf")
    parser.add_argument("--library", type=Path, help="plugin library; the installed one by default")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--lengths", type=_length, nargs="+", default=[n * 1024 for n in (16, 64, 128)])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--share", type=float, help="caches, as a share of the resident cache; else the defaults")
    parser.add_argument("--key-share", type=float, help="cache of keys, as a share of keys and values together")
    parser.add_argument("--value-share", type=float, help="cache of values, likewise")
    parser.add_argument("--name", default="offload_decode", help="of the files written")
    parser.add_argument("--append", action="store_true", help="to the rows that the file has")
    parser.add_argument("--leaf-branch", type=int, nargs="+", default=[HipConfig.create().leaf_branch])
    parser.add_argument("--decode-mask-k", type=int, default=HipConfig.create().decode_mask_k)
    parser.add_argument("--stride-k", type=int, default=1, help="above 1 portable kernels decode, on every GPU")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are timed in turn")
    parser.add_argument("--steps", type=int, default=128, help="steps that are timed; as many before fill the caches")
    parser.add_argument("--checked", type=int, default=64, help="steps whose bits are compared first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    library = Library(options.library) if options.library else binding.load()
    device = torch.device("cuda")
    say("reading the model")
    model, tokenizer = load(options.model, device)
    stretches = max(options.lengths) // STRETCH
    say("recording")
    tokens = torch.tensor(tokenizer(real_text(5 * stretches * STRETCH)).input_ids)
    if len(tokens) < stretches * STRETCH:
        sys.exit(f"the text has {len(tokens):,} tokens, and {stretches * STRETCH:,} are wanted")
    tokens = tokens[: stretches * STRETCH].view(stretches, STRETCH).to(device)
    recording = record(model, tokens, steps=2 * options.steps)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    weights = [Weights.random(device) for _ in range(options.layers)]
    if options.share is None:
        offload = Offload.create(key_cache=options.key_share, value_cache=options.value_share)
    else:
        offload = Offload.of_share(options.share)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if options.append and (options.out / f"{options.name}.json").exists():
        rows = json.loads((options.out / f"{options.name}.json").read_text())["rows"]
    for length in options.lengths:
        for leaf_branch in options.leaf_branch:
            config = HipConfig.create(
                leaf_branch=leaf_branch, decode_mask_k=options.decode_mask_k, stride_k=options.stride_k
            )
            row = run_length(
                library, config, recording, length, options.layers, weights[: options.layers], offload, options
            )
            rows = sorted(
                [*(old for old in rows if _place(old) != _place(row)), row], key=_place
            )
            gc.collect()
            torch.cuda.empty_cache()
            content = {"environment": describe(library.path), "bus_bytes_per_s": BUS_BYTES_PER_S, "rows": rows}
            (options.out / f"{options.name}.json").write_text(json.dumps(content, indent=1))
            (options.out / f"{options.name}.md").write_text(markdown(rows))
            print(markdown([row]).split("\n", 2)[2], end="", flush=True)
    plot(rows, options.out / f"{options.name}.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
