"""Speed of one decode step of one layer: HiP, searched from the top and from reused nodes, beside dense attention.

    python benchmarks/kernel_decode.py --out build/benchmarks [--library libhip_trt_plugin.so] [--lengths 32768 131072]

Llama-3.1-8B geometry (32 query heads, 8 key/value heads, head size 128), bfloat16, random data, HipConfig's defaults.
Times are per step inside a replayed CUDA graph, medians over replays, over inputs that are rotated so that none is in
the L2 cache by the time it is used again. Peers are PyTorch's scaled_dot_product_attention with its FlashAttention-2
and cuDNN backends, on keys and values without pages. A step's output is checked before it is timed.
Writes kernel_decode.json, kernel_decode.md and kernel_decode.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hip_trt import library as binding
from hip_trt.config import HipConfig
from hip_trt.library import Library
from hip_trt.reference import select_blocks, sparse_attention

QUERY_HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
SCALE = HEAD_DIM**-0.5
COPY_BYTES_PER_US = 4.3e6
"""Device copy, bytes read plus written, measured on an H200: what the roofline column is a share of."""

CASES = ((8192, 1), (16384, 1), (32768, 1), (131072, 1), (1 << 20, 1), (32768, 16), (131072, 16))
SET_BYTES = 400 << 20
"""Inputs are rotated over at least this much of what is read, several times the L2 cache."""


class Step:
    """One decode step: a batch of sequences of ``length`` committed tokens, in pages of a pool that steps share."""

    def __init__(self, library: Library, config: HipConfig, keys: Tensor, values: Tensor, pages: Tensor, length: int):
        batch, device = len(pages), keys.device

        def random(heads: int) -> Tensor:
            return torch.randn(batch, heads, 1, HEAD_DIM, dtype=DTYPE, device=device)

        nodes = torch.full((batch, KV_HEADS, config.decode_mask_blocks), -1, dtype=torch.int32, device=device)
        self.inputs = {
            "query": random(QUERY_HEADS), "key": random(KV_HEADS), "value": random(KV_HEADS),
            "past_key": keys, "past_value": values, "page_table": pages.clone(),  # a tensor of its own: aligned
            "past_lengths": torch.full((batch,), length, dtype=torch.int32, device=device),
            "query_lengths": torch.ones(batch, dtype=torch.int32, device=device), "past_nodes": nodes,
            "refresh_mask": torch.ones(1, dtype=torch.int32, device=device),
        }
        self.output, self.nodes = torch.empty_like(self.inputs["query"]), torch.empty_like(nodes)
        self._library, self._config = library, config
        self._workspace = torch.empty(1 << 26, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._library.attention(
            **self.inputs, config=self._config, scale=SCALE, output=self.output, present_key=self.inputs["past_key"],
            present_value=self.inputs["past_value"], present_nodes=self.nodes, workspace=self._workspace,
        )

    def reuse(self) -> None:
        """From now on start from the nodes that the last call kept."""
        self.inputs["past_nodes"].copy_(self.nodes)
        self.inputs["refresh_mask"].zero_()

    def check(self) -> None:
        """Compare one head group of the first sequence with the reference, on the CPU, on the blocks it chooses."""
        self()
        inputs = self.inputs
        length = int(inputs["past_lengths"][0])
        rows = [
            torch.cat([inputs[f"past_{name}"][inputs["page_table"][0].long(), 0].flatten(0, 1)[:length],
                       inputs[name][0, 0]]).float().cpu() for name in ("key", "value")
        ]
        queries = inputs["query"][0, : QUERY_HEADS // KV_HEADS].float().cpu()
        refresh, positions = bool(inputs["refresh_mask"][0]), torch.tensor([length])
        blocks, _ = select_blocks(queries, rows[0], positions, config=self._config, decode=True,
                                  past_nodes=None if refresh else inputs["past_nodes"][0, 0].long().cpu())
        expected = sparse_attention(queries, *rows, blocks, positions, block_k=self._config.block_k, scale=SCALE)
        error = (self.output[0, : len(queries)].float().cpu() - expected).norm() / expected.norm()
        # Scores that differ by rounding alone may choose another block.
        assert error < 3e-2, f"relative error {float(error)} at {length} tokens"


def bytes_read(config: HipConfig, length: int, *, reused: bool) -> int:
    """Keys scored and keys and values attended by one step of one sequence: what has to be read at the least."""
    budget, block, row = config.decode_mask_blocks, config.block_k, HEAD_DIM * DTYPE.itemsize
    window = (length - config.window_tokens + 1) // block
    sink = -(-config.sink_tokens // block)
    sizes = [1, config.leaf_branch]
    while True:
        counts = [-(-window // size) - sink // size for size in sizes]
        if counts[-1] <= budget * config.branch:
            break
        sizes.append(sizes[-1] * config.branch)
    if window - sink <= budget:
        scored = 0
    elif counts[0] <= budget * config.leaf_branch:
        scored = counts[0]
    elif reused:
        scored = (budget + 2) * config.leaf_branch
    else:
        scored = counts[-1] + (len(sizes) - 2) * budget * config.branch + budget * config.leaf_branch
    attended = sink + min(budget, window - sink) + (length // block - window + 1)
    return KV_HEADS * block * row * (scored + 2 * attended)


def time_steps(steps: Sequence[Callable[[], Any]], *, replays: int = 15) -> float:
    """Median microseconds per step inside a replayed graph of at least 32 steps."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    rounds = max(1, 32 // len(steps))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for step in steps:
                step()
    times = []
    for replay in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / (rounds * len(steps)))
    return statistics.median(times)


def time_dense(length: int, batch: int, backend: SDPBackend) -> float | None:
    """Dense attention of a step, or None where the backend refuses."""
    bytes_each = 2 * batch * KV_HEADS * length * HEAD_DIM * DTYPE.itemsize

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, HEAD_DIM, dtype=DTYPE, device="cuda")

    sets = [(random(QUERY_HEADS, 1), random(KV_HEADS, length), random(KV_HEADS, length))
            for _ in range(max(1, min(8, SET_BYTES // bytes_each)))]
    with sdpa_kernel(backend):
        try:
            return time_steps([lambda s=s: scaled_dot_product_attention(*s, enable_gqa=True) for s in sets], replays=7)
        except RuntimeError:
            return None


def measure(library: Library, config: HipConfig, length: int, batch: int, *, check: bool) -> dict[str, Any]:
    """One row of the table."""
    reads = bytes_read(config, length, reused=False) * batch
    sets = max(2, min(16, -(-SET_BYTES // reads)))
    slots = length // config.page_size + 1
    sets = max(1, min(sets, (24 << 30) // (2 * batch * slots * config.page_size * KV_HEADS * HEAD_DIM * 2)))
    pages = torch.randperm(sets * batch * slots, device="cuda").int().view(sets, batch, slots)
    keys, values = (torch.empty(pages.numel(), KV_HEADS, config.page_size, HEAD_DIM, dtype=DTYPE, device="cuda")
                    .normal_() for _ in range(2))
    steps = [Step(library, config, keys, values, pages[i], length) for i in range(sets)]
    row: dict[str, Any] = {"tokens": length, "batch": batch, "sets": sets}
    for mode in ("searched", "reused"):
        if check:
            steps[0].check()
        row[mode] = time_steps(steps)
        least = batch * bytes_read(config, length, reused=mode == "reused")
        row[f"{mode}_bytes"], row[f"{mode}_roofline"] = least, least / COPY_BYTES_PER_US / row[mode]
        for step in steps:
            step.reuse()
    del steps, keys, values
    torch.cuda.empty_cache()
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        row[name] = time_dense(length, batch, backend)
        torch.cuda.empty_cache()
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, one line a case."""
    lines = ["| tokens | batch | searched, µs | reused, µs | FlashAttention-2, µs | cuDNN, µs | cuDNN / searched "
             "| cuDNN / reused | of copy bandwidth |", "|---" * 9 + "|"]
    for row in rows:
        dense = row["cudnn"]
        ratios = [f"{dense / row[mode]:.1f}" if dense else "" for mode in ("searched", "reused")]
        cells = [f"{row['tokens']:,}", row["batch"], *(f"{row[mode]:.1f}" for mode in ("searched", "reused")),
                 *(f"{row[name]:.0f}" if row[name] else "refused" for name in ("fa2", "cudnn")), *ratios,
                 f"{row['searched_roofline']:.0%} / {row['reused_roofline']:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over length, batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    single = [row for row in rows if row["batch"] == 1]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, label in (("fa2", "FlashAttention-2"), ("cudnn", "cuDNN"), ("searched", "HiP, searched"),
                        ("reused", "HiP, reused nodes")):
        points = [(row["tokens"], row[name]) for row in single if row[name]]
        axes.loglog(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="tokens", ylabel="µs per layer and step", title="Decode, batch 1")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="plugin library; the installed one by default")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for results")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--no-check", action="store_true", help="do not compare outputs with the reference first")
    options = parser.parse_args()
    library = Library(options.library) if options.library else binding.load()
    rows = []
    for length, batch in CASES:
        if not options.lengths or length in options.lengths:
            rows.append(measure(library, HipConfig(), length, batch, check=not options.no_check))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    (options.out / "kernel_decode.json").write_text(json.dumps(result, indent=1))
    (options.out / "kernel_decode.md").write_text(markdown(rows))
    plot(rows, options.out / "kernel_decode.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
