"""A process that exports again and again, each time in a child that is killed: python killed_exports.py MODEL SCRATCH.

A line in JSON on standard input is one export: {"arguments": of hip-trt, "folder": ..., "operations": n} has it killed,
as by kill -9, before file operation n in the folder; "seconds" in place of "operations", after so long; neither, not at
all. The answer is a line with the child's exit status, minus 9 if it was killed, and its number of file operations.

Children are forked from a process that has imported everything and traced a model like theirs, MODEL: that is what an
export of a tiny model takes longest for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"}


class Counter:
    """An audit hook."""

    def __init__(self, folder: str, last: int | None, report: int) -> None:
        self.folder, self.last, self.report, self.count = folder, last, report, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and isinstance(arguments[0], str | os.PathLike):
            if not os.fspath(arguments[0]).startswith(self.folder):
                return
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            os.pwrite(self.report, f"{self.count:9}".encode(), 0)


def child(request: dict[str, Any], report: int) -> None:
    from hip_trt.cli.app import app

    sys.addaudithook(Counter(request["folder"], request.get("operations"), report))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        status = app(request["arguments"], standalone_mode=False) or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 99
    os._exit(int(status))


def trace_once() -> None:
    """Let children find traced what this process has traced: the same model each time."""
    from hip_trt.export import graph, onnx_export

    traces: list[graph.Trace] = []

    def trace(*args: Any, **options: Any) -> graph.Trace:
        if not traces:
            traces.append(graph.trace(*args, **options))
        return graph.Trace(traces[0].model.clone(), traces[0].weights)

    onnx_export.trace = trace


def main(checkpoint: str, scratch: str) -> None:
    import tensorrt_rtx

    from hip_trt.export import export_onnx

    del tensorrt_rtx
    trace_once()
    export_onnx(checkpoint, scratch)
    report = os.open(f"/proc/self/fd/{os.memfd_create('operations')}", os.O_RDWR)
    for line in sys.stdin:
        request = json.loads(line)
        os.pwrite(report, b"%9d" % 0, 0)
        if (process := os.fork()) == 0:
            child(request, report)
        if "seconds" in request:
            time.sleep(request["seconds"])
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps({"status": status, "operations": int(os.pread(report, 9, 0))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
