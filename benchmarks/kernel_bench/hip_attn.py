"""hip-attn 1.2.9, the paper authors' Triton code, as a peer: each configuration in a process with its own Triton.

Nothing of it is in this repository; benchmarks/README.md says how to unpack it. Whatever goes wrong with it becomes a
reason in the table, never an error of the benchmark.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

NOT_RUN = "not run: no site folder was given"


@dataclass(frozen=True)
class Peer:
    """One configuration of hip-attn.

    Attributes:
        name: of its column.
        entry: "1.1" or "1.2".
        site: folder with hip_attn and the Triton it needs, or None.
        options: fields of the entry point's HiPAttentionArgs.
    """

    name: str
    entry: str
    site: Path | None
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Case:
    """What is timed: a prompt of ``tokens``, or a decode step of ``batch`` sequences of ``tokens``."""

    kind: Literal["prefill", "decode"]
    tokens: int
    batch: int
    seed: int


def peers(site_11: Path | None, site_12: Path | None) -> list[Peer]:
    """The configurations in the tables.

    Of 1.1 the paper's, and one with hip-trt's budget; of 1.2 the defaults, and these without the counters of cache
    accesses that it clears at each call, which in decode cost as much as the attention.
    """
    paper = (("mask_k", 512), ("block_size_q", 64), ("block_size_k", 2))
    wide = (("mask_k", 1024), ("block_size_q", 64), ("block_size_k", 8))
    return [
        Peer("hip-attn 1.1", "1.1", site_11, paper),
        Peer("hip-attn 1.1, k 1024, key block 8", "1.1", site_11, wide),
        Peer("hip-attn 1.2", "1.2", site_12),
        Peer("hip-attn 1.2, no statistics", "1.2", site_12, (("require_cache_statistics", False),)),
    ]


class Worker:
    """The process of one peer, started when first asked, and again after a failure.

    Args:
        log: file for what it prints.
    """

    def __init__(self, peer: Peer, log: Path) -> None:
        self.peer, self._log = peer, log
        self.triton: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._broken: str | None = None

    def ask(self, case: Case, *, warm: bool, seconds: float) -> dict[str, Any]:
        """Its answer to a case: times and error, or {"failed": reason}. See :mod:`kernel_bench.hip_attn_worker`.

        Args:
            warm: run once, so that kernels are compiled, and time nothing.
            seconds: after which it is ended.
        """
        if self._broken:
            return {"failed": self._broken}
        deadline = time.monotonic() + seconds
        if self._process is None:
            self._start()
            ready = self._answer(deadline)
            if "failed" in ready:
                self.stop()
                self._broken = str(ready["failed"])
                return ready
            self.triton = ready["triton"]
        request = {"kind": case.kind, "tokens": case.tokens, "batch": case.batch, "seed": case.seed, "warm": warm}
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answer(deadline)
        except OSError:
            answer = {"failed": f"its process ended, see {self._log.name}"}
        if "failed" in answer:  # after an error on the GPU nothing else works in that process
            self.stop()
        return answer

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        site = self.peer.site
        assert site is not None
        here = Path(__file__).parent.parent
        path = [str(site.resolve()), str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "kernel_bench.hip_attn_worker", "--site", str(site.resolve()), "--entry",
                   self.peer.entry, "--options", json.dumps(dict(self.peer.options))]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self._log.parent,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        self._lines = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()

    def _answer(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            return {"failed": "took too long"}
        if line is None:
            return {"failed": f"its process ended, see {self._log.name}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def time_peers(
    all_peers: Sequence[Peer], cases: Sequence[Case], logs: Path, *, compile_seconds: float,
    record: Callable[[Peer, Case, dict[str, Any]], None],
) -> None:
    """Time every peer on every case, one at a time, after all have compiled their kernels at the same time.

    Args:
        logs: folder for what they print.
        compile_seconds: that peers have for compiling; cases that are not ready by then are not timed.
        record: takes each answer as it comes, see :meth:`Worker.ask`.
    """
    workers = []
    for peer in all_peers:
        if peer.site is None or not peer.site.is_dir():
            reason = NOT_RUN if peer.site is None else f"not run: no folder {peer.site.name}"
            for case in cases:
                record(peer, case, {"failed": reason})
        else:
            name = peer.name.replace(", ", "-").replace(" ", "-")
            workers.append(Worker(peer, logs.resolve() / f"{name}.log"))
    if not workers:
        return
    deadline = time.monotonic() + compile_seconds
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            ready = list(pool.map(lambda worker: _compile(worker, cases, deadline), workers))
        for worker in workers:
            worker.stop()  # what it tuned while others ran beside is forgotten; what it compiled is in Triton's cache
        for worker, prepared in zip(workers, ready, strict=True):
            for case in cases:
                answer = prepared[case]
                if "failed" not in answer:
                    answer = worker.ask(case, warm=False, seconds=90)
                record(worker.peer, case, {**answer, "triton": worker.triton})
            worker.stop()
    finally:
        for worker in workers:
            worker.stop()


def _compile(worker: Worker, cases: Sequence[Case], deadline: float) -> dict[Case, dict[str, Any]]:
    answers: dict[Case, dict[str, Any]] = {}
    for case in cases:
        left = deadline - time.monotonic()
        answers[case] = worker.ask(case, warm=True, seconds=left) if left > 1 else {"failed": "no time left to compile"}
    return answers


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
