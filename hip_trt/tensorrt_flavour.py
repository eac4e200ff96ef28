"""The seam to TensorRT, in either of its flavours: the modules ``tensorrt`` and ``tensorrt_rtx``.

Both have the same interfaces for what this toolkit does; a :class:`Flavour` holds what differs, and the few things that
must happen once per process (the logger, plugin libraries).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

from hip_trt.errors import EngineError, EnvironmentProblem, PluginError
from hip_trt.gpu import ComputeCapability, Gpu, current_gpu
from hip_trt.shared_name import add_shared_name

FlavourName = Literal["tensorrt", "tensorrt-rtx"]
RuntimeChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]

_MODULES: Final[dict[FlavourName, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_LEAST: Final = ComputeCapability(8, 0)
"""Oldest GPUs that the kernels run on."""

_logger = logging.getLogger("hip_trt.tensorrt")


@dataclass
class MessageLog:
    """What TensorRT said within a :meth:`Flavour.messages` block."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def cause(self, fallback: str) -> str:
        """The first error, on one line; it is what the others follow from."""
        return one_line(self.errors[0]) if self.errors else fallback


class Flavour:
    """One installed TensorRT module.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        module: the Python module, ``tensorrt`` or ``tensorrt_rtx``.
        version: its version, such as "1.7.1.116".
    """

    def __init__(self, name: FlavourName, module: ModuleType) -> None:
        self.name = name
        self.module: Any = module
        self.version: str = module.__version__
        self._sinks: list[MessageLog] = []
        self._plugins: dict[Path, object] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built for named compute capabilities, with no GPU; otherwise for the GPU at hand."""
        return self.name == "tensorrt-rtx"

    @property
    def compute_capabilities(self) -> tuple[ComputeCapability, ...]:
        """Those that an engine can be built for ahead of time, ascending; empty where the GPU at hand decides.

        They are read from TensorRT's own enumeration; the ones that the kernels do not run on are left out.
        """
        if not self.ahead_of_time:
            return ()
        named = (name.removeprefix("SM") for name in self.module.ComputeCapability.__members__ if name[:2] == "SM")
        found = (ComputeCapability(int(digits[:-1]), int(digits[-1])) for digits in named)
        return tuple(sorted(capability for capability in found if capability >= _LEAST))

    def runs_on(self, capability: ComputeCapability) -> bool:
        """Whether this flavour runs on GPUs of this compute capability at all."""
        if not self.ahead_of_time:
            return capability >= _LEAST
        return covers(self.compute_capabilities, capability)

    @functools.cached_property
    def logger(self) -> Any:
        """The ``ILogger`` to hand to TensorRT, which accepts one for the life of the process.

        Messages go to the open :meth:`messages` blocks and, as details, to the Python logger "hip_trt.tensorrt".
        """
        sinks, base, severity = self._sinks, self.module.ILogger, self.module.ILogger.Severity

        class Logger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, level: Any, message: str) -> None:
                for sink in tuple(sinks):
                    if level in (severity.INTERNAL_ERROR, severity.ERROR):
                        sink.errors.append(message)
                    elif level == severity.WARNING:
                        sink.warnings.append(message)
                _logger.debug("%s", message)

        return Logger()

    @contextmanager
    def messages(self) -> Iterator[MessageLog]:
        """Collect TensorRT's errors and warnings while the block runs."""
        sink = MessageLog()
        self._sinks.append(sink)
        try:
            yield sink
        finally:
            self._sinks.remove(sink)

    def load_plugin(self, library: str | Path) -> None:
        """Register a plugin library's creators with TensorRT, once; it stays registered until the process ends.

        Raises:
            PluginError: the library is missing or cannot be loaded, or its creators are registered already from
                elsewhere.
        """
        path = Path(library).resolve()
        with self._lock:
            if path in self._plugins:
                return
            if not path.is_file():
                raise PluginError(f"{path}: no such plugin library.", "Install hip-trt again.")
            try:
                ctypes.CDLL(str(path))  # TensorRT does not say why a library cannot be loaded; the linker does
            except OSError as error:
                raise PluginError(f"{path}: cannot be loaded: {error}.", "Install hip-trt again.") from None
            with self.messages() as log:
                self.logger  # noqa: B018 - must exist before TensorRT has something to say
                handle = self.module.get_plugin_registry().load_library(str(path))
            if handle is None:
                cause = log.cause("its creators are registered already, or it has none")
                raise PluginError(f"{path}: TensorRT {self.version} refuses the plugin library: {cause}.")
            self._plugins[path] = handle


def covers(built_for: Sequence[ComputeCapability], capability: ComputeCapability) -> bool:
    """Whether a TensorRT-RTX engine built for some compute capabilities runs on another.

    It runs on exactly those, and, where 12.0 is among them, on later ones: "8.0, 8.6, 8.9, 12.0, and later", says the
    TensorRT-RTX documentation, "CPU-Only AOT and TensorRT-RTX Engines".
    """
    newest = ComputeCapability(12, 0)
    return capability in built_for or (newest in built_for and capability > newest)


def installed() -> tuple[FlavourName, ...]:
    """Names of the flavours that can be imported, ``tensorrt`` first; imports nothing."""
    return tuple(name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None)


def install_command(name: FlavourName) -> str:
    """What a user types to get a flavour."""
    return f"pip install 'hip-trt[{name}]'"


def nothing_in_common_remedy() -> str:
    """What to do where TensorRT-RTX builds for none of the GPUs that the plugin has kernels for, as for Hopper's."""
    return (
        f"TensorRT-RTX does not run on Hopper and some others: for those {install_command('tensorrt')}, and --runtime "
        "tensorrt on a machine with that GPU. For GPUs of its own: install hip-trt again without "
        "HIP_TRT_CUDA_ARCHITECTURES."
    )


def find_flavour(choice: RuntimeChoice = "auto", *, gpu: Gpu | None = None) -> Flavour:
    """The flavour to use.

    Args:
        choice: a flavour, or "auto": ``tensorrt`` if it is installed and there is a GPU, which it needs even to build;
            otherwise ``tensorrt-rtx``.
        gpu: the GPU to decide for; by default this machine's first.

    Raises:
        EnvironmentProblem: it is not installed, or cannot be imported.
        EngineError: there is no such choice.
    """
    present = installed()
    if choice not in ("auto", *_MODULES):
        raise EngineError(f"runtime: {choice!r} is not allowed; it must be auto, {' or '.join(_MODULES)}.")
    if choice != "auto":
        if choice not in present:
            raise EnvironmentProblem(
                f"The Python module {_MODULES[choice]} is not installed.", f"Install it: {install_command(choice)}"
            )
        return _load(choice)
    if not present:
        raise EnvironmentProblem(
            "No TensorRT is installed.",
            f"Without a GPU, or for GeForce and RTX GPUs: {install_command('tensorrt-rtx')}; on Hopper: "
            f"{install_command('tensorrt')}",
        )
    if len(present) > 1 and (gpu or current_gpu()) is None:
        return _load("tensorrt-rtx")
    return _load(present[0])


@functools.cache
def _load(name: FlavourName) -> Flavour:
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise EnvironmentProblem(
            f"The Python module {_MODULES[name]} is installed but cannot be imported: {one_line(str(error))}.",
            f"Install it again: {install_command(name)}",
        ) from None
    if name == "tensorrt-rtx":
        _resolve_bare_name()
    return Flavour(name, module)


def _resolve_bare_name() -> None:
    """Let TensorRT-RTX find itself.

    When it meets a plugin it opens "libtensorrt_rtx.so"; its wheel ships only "libtensorrt_rtx.so.1", and it aborts the
    process when that fails.
    """
    bare = "libtensorrt_rtx.so"
    if _can_open(bare):
        return
    loaded = [path for path in _loaded_libraries() if path.name.startswith(f"{bare}.")]
    try:
        add_shared_name(loaded[0], bare)
    except (OSError, IndexError) as error:
        raise EngineError(
            f"TensorRT-RTX opens {bare} by that name, and it cannot be found: {error}.",
            f"Put a link of that name beside {loaded[0] if loaded else bare + '.1'}.",
        ) from None


def _can_open(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _loaded_libraries() -> list[Path]:
    """Files mapped into this process."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    return sorted(Path(path) for path in paths if path.startswith("/"))


def one_line(message: str) -> str:
    """A message of TensorRT's without line breaks and final stop, to be put into a sentence."""
    return " ".join(message.split()).rstrip(".")
