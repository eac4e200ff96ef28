"""A process in which a model folder can do nothing in secret: python closed_guard.py FOLDER FAKES < commands in JSON.

Every command of hip-trt that standard input names, a list of arguments a line, runs here with sockets, other programs,
code of the folder, pickles and questions refused by an audit hook, which notes them as well, as libraries swallow
errors. Prints a JSON object a command: arguments, exit status, messages, and what was refused.

FAKES is a folder of packages that fetch when they are asked to (kernels, peft), which says so with an audit event.
"""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
PROGRAMS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"}
OTHERS = {"builtins.input", "hip_trt.tests.fetched"}

ALLOWED_PROGRAMS = {
    "nvidia-smi": "doctor and the builder ask it for GPUs and drivers",
    "c++": "doctor asks whether there is a compiler", "g++": "likewise", "gcc": "likewise", "cc": "likewise",
    "nvcc": "likewise", "cmake": "likewise", "ninja": "likewise",
    "lscpu": "ONNX Runtime and studies name the machine", "ldconfig": "Triton and ctypes look for libraries",
    "uname": "Python's platform names the machine",
}


class Guard:
    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder) + os.sep
        self.refused: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (why := self._why(event, arguments)) is not None:
            self.refused.append(f"{event}: {why}")
            raise RuntimeError(f"refused by the test: {event}: {why}")

    def _why(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in NETWORK or event in OTHERS:
            return str(arguments)
        if event in PROGRAMS:
            program = arguments[0]
            return None if os.path.basename(os.fsdecode(program)) in ALLOWED_PROGRAMS else str(arguments[:2])
        if event == "exec":
            return self._inside(arguments[0].co_filename, everything=True)
        if event == "compile":
            return self._inside(arguments[1], everything=True)
        if event in ("open", "ctypes.dlopen", "import"):
            return self._inside(arguments[1] if event == "import" else arguments[0])
        return None

    def _inside(self, path: Any, *, everything: bool = False) -> str | None:
        """The path if it is code of the folder; ``everything``: or any other file of it."""
        if not isinstance(path, str | bytes) or not path:
            return None
        name = os.path.realpath(os.fsdecode(path))
        if not name.startswith(self.folder) or not os.path.exists(name):  # <string>, say, is no file
            return None
        return name if everything or name.endswith((".py", ".pyc", ".so", ".bin", ".pkl", ".pt")) else None


def main(folder: str, fakes: str) -> None:
    commands = [json.loads(line) for line in sys.stdin]
    sys.path.insert(0, fakes)
    sys.stdin = io.StringIO("y\n" * 100)
    guard = Guard(folder)
    sys.addaudithook(guard)
    from hip_trt.cli.app import app

    for command in commands:
        guard.refused = []
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = app(command, standalone_mode=False)
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
                status = 99
        record = {"command": command, "status": status or 0, "messages": err.getvalue(), "refused": guard.refused}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
