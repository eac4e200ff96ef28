"""Results that appear whole or not at all.

Long work writes into a hidden folder beside its results (:func:`staging`), and :meth:`Staging.publish` renames the
finished files into place. A failure, Ctrl-C or a polite kill removes the hidden folder; one left by a process that was
killed outright is removed by the next export into the same folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from hip_trt.errors import ExportError

_PREFIX, _SUFFIX = ".hip-trt-", ".partial"
_LOCK = "lock"
_CHUNK = 1 << 22
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
)


class Staging:
    """A hidden folder on the file system of the results.

    Attributes:
        path: the hidden folder; write unfinished files here.
        target: the folder that results go to.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target = path, target

    def publish(self, names: Sequence[str], *, obsolete: re.Pattern[str] | None = None) -> list[Path]:
        """Move finished files into the target folder, in this order, each replacing its predecessor atomically.

        All contents reach the disk before the first name changes, so a file named last never refers to one that a power
        cut lost. Other processes that publish into the same folder wait.

        Args:
            names: names within :attr:`path`, which files keep.
            obsolete: files of the target folder with such names, other than ``names``, are removed at the end.

        Returns:
            The files' final paths.
        """
        with explained_write_errors(self.target):
            for name in names:
                _sync(self.path / name)
            with _locked(self.target):
                for name in names:
                    os.replace(self.path / name, self.target / name)
                _sync(self.target)
                if obsolete is not None:
                    for old in self.target.iterdir():
                        if obsolete.fullmatch(old.name) and old.name not in names:
                            old.unlink()
        return [self.target / name for name in names]


@contextmanager
def staging(target: str | Path) -> Iterator[Staging]:
    """Make a :class:`Staging` folder in ``target``, which is created if need be, and remove it in any event.

    Also removes what killed processes left in ``target``; folders of live ones are locked and left alone. SIGTERM and
    SIGHUP end the block as Ctrl-C does, provided that nobody else handles them.

    Raises:
        ExportError: the folder cannot be made or written, or the disk is full, now or within the block.
    """
    target = Path(target)
    created = [folder for folder in (target, *target.parents) if not os.path.exists(folder)]
    try:
        with _interruptible(), ExitStack() as stack:
            with explained_write_errors(target):
                target.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(target)
                path = stack.enter_context(_locked_folder(target))
            with explained_write_errors(target, only_full=True):
                yield Staging(path, target)
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Write one file atomically; text as UTF-8."""
    path = Path(path)
    with staging(path.parent) as stage:
        (stage.path / path.name).write_bytes(data.encode() if isinstance(data, str) else data)
        return stage.publish([path.name])[0]


def sha256(path: str | Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file's contents, in hexadecimal; ``advance`` is told the bytes read since it was last called."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def require_space(folder: str | Path, size: int) -> None:
    """Raise ExportError unless ``size`` bytes are free on the file system of an existing folder."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ExportError(
            f"{folder}: {format_size(size)} are needed, and {format_size(free)} are free.",
            "Free some space or choose another --out.",
        )


@contextmanager
def explained_write_errors(target: str | Path, *, only_full: bool = False) -> Iterator[None]:
    """Turn the OSErrors of writing into one-line ExportErrors.

    Args:
        target: where writing goes.
        only_full: explain only a full disk, in a block that also reads.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(
                f"{target}: writing failed: {error.strerror}.", "Free some space or choose another --out."
            ) from None
        if error.errno in _UNWRITABLE and not only_full:
            raise ExportError(
                f"{target}: cannot be written: {error.strerror}.", "Make it writable or choose another --out."
            ) from None
        raise


def format_size(count: float) -> str:
    """Bytes for people: 1.5 GB; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    """A new staging folder that holds its lock for as long as its process lives."""
    path, lock = _make_locked_folder(target)
    with lock:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _make_locked_folder(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=target))
        lock = open(path / _LOCK, "wb")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks: leftovers then stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / _LOCK).exists():  # else taken for a leftover before it was locked
            return path, lock
        lock.close()


def _remove_leftovers(target: Path) -> None:
    """Remove staging folders whose process is gone: their lock is free."""
    for path in target.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), open(path / _LOCK, "rb") as lock:  # an OSError: held by a live process
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Flush a file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, as SIGINT does, so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the main thread
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
