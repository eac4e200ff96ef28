"""Results that appear whole or not at all.

Long work writes into a hidden folder beside its results (:func:`staging`), and :meth:`Staging.publish` renames the
finished files into place. A failure, Ctrl-C or a polite kill removes the hidden folder; one left by a process that was
killed outright is removed by the next export into the same folder.

Several files cannot be renamed at once. So what is to be moved is first written down in the hidden folder, and from
then on it counts as done: whoever comes across it unfinished finishes it (:func:`staging`) or refuses to read the
folder (:func:`require_whole`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Annotated, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from hip_trt.errors import EngineError, ExportError

_PREFIX, _SUFFIX = ".hip-trt-", ".partial"
_LOCK, _COMMIT = "lock", "commit"
_REPLACED = ".old"
_CHUNK = 1 << 22
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
)


class _Holder(BaseModel):
    """Who works in a hidden folder; its lock file holds it.

    Attributes:
        started: when the process began, in the system's own clock ticks; 0 where it does not say.
        exclusive: whether others that ask for the folder alone are refused.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    started: int
    exclusive: bool

    @classmethod
    def here(cls, *, exclusive: bool) -> _Holder:
        pid = os.getpid()
        return cls(host=socket.gethostname(), pid=pid, started=_started(pid), exclusive=exclusive)

    @property
    def runs(self) -> bool:
        """Whether the process may still be there; always true of another machine's."""
        return self.host != socket.gethostname() or _started(self.pid) == self.started


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("not the name of a file")
    return name


_Name = Annotated[str, AfterValidator(_plain)]


class _Commit(BaseModel):
    """Files of a hidden folder that are to be moved into the target folder, and files there that go then."""

    model_config = ConfigDict(frozen=True)

    names: tuple[_Name, ...]
    obsolete: tuple[_Name, ...] = ()


_held: ContextVar[tuple[Path, ...]] = ContextVar("_held", default=())
"""Hidden folders of this very call and of those that called it."""


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
        cut lost. Other processes that publish into the same folder wait. Once the first name has changed, nothing but
        the end of the process keeps the others from following, and then the next :func:`staging` has them follow.

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
                old = [path.name for path in self.target.iterdir() if obsolete and obsolete.fullmatch(path.name)]
                commit = _Commit(names=tuple(names), obsolete=tuple(name for name in old if name not in names))
                if len(commit.names) + len(commit.obsolete) > 1:
                    _write_commit(self.path, commit)
                _finish(self.path, self.target, commit)
        return [self.target / name for name in names]


@contextmanager
def staging(target: str | Path, *, exclusive: bool = False) -> Iterator[Staging]:
    """Make a :class:`Staging` folder in ``target``, which is created if need be, and remove it in any event.

    Also removes what killed processes left in ``target``, once their publication, if it had begun, is finished; folders
    of live ones are locked and left alone. SIGTERM and SIGHUP end the block as Ctrl-C does, provided that nobody else
    handles them.

    Args:
        target: the folder that results go to.
        exclusive: have it alone among all who ask for that. A block within such a block has it too.

    Raises:
        ExportError: the folder cannot be made or written, or the disk is full, now or within the block; or another
            process has it alone.
    """
    target = Path(target)
    created = [folder for folder in (target, *target.parents) if not os.path.exists(folder)]
    try:
        with _interruptible(), ExitStack() as stack:
            with explained_write_errors(target):
                target.mkdir(parents=True, exist_ok=True)
                path = stack.enter_context(_hidden_folder(target, exclusive=exclusive))
            with explained_write_errors(target, only_full=True):
                yield Staging(path, target)
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise


def replaced_name(name: str) -> str:
    """Where, in a staging folder, a folder of the target is put aside while another takes its place.

    It comes back if nothing has.
    """
    return f"{name}{_REPLACED}"


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


def require_whole(folder: str | Path) -> None:
    """Check that no publication into a folder is half done; one that is going on is waited for.

    Raises:
        EngineError: a process was killed in the middle of one.
    """
    folder = Path(folder)
    if not any(_commits(folder)):
        return
    with _locked(folder, shared=True):
        if any(_commits(folder)):
            raise EngineError(
                f"{folder}: incomplete: an export into it was killed while it replaced files.",
                "Run that export again.",
            )


def _commits(folder: Path) -> Iterator[Path]:
    return folder.glob(f"{_PREFIX}*{_SUFFIX}/{_COMMIT}")


def _write_commit(path: Path, commit: _Commit) -> None:
    (path / f"{_COMMIT}.new").write_text(commit.model_dump_json(), encoding="utf-8")
    _sync(path / f"{_COMMIT}.new")
    os.replace(path / f"{_COMMIT}.new", path / _COMMIT)
    _sync(path)


def _finish(path: Path, target: Path, commit: _Commit) -> None:
    """Do what is left of a publication."""
    for name in commit.names:
        if os.path.lexists(path / name):
            os.replace(path / name, target / name)
    _sync(target)
    for name in commit.obsolete:
        (target / name).unlink(missing_ok=True)
    (path / _COMMIT).unlink(missing_ok=True)


@contextmanager
def _hidden_folder(target: Path, *, exclusive: bool) -> Iterator[Path]:
    """A new staging folder that holds its lock for as long as its process lives."""
    holder = _Holder.here(exclusive=exclusive)
    with _locked(target):
        for path in target.glob(f"{_PREFIX}*{_SUFFIX}"):
            other = _live_holder(path)
            if other is None:
                _sweep(path, target)
            elif exclusive and other.exclusive and path.resolve() not in _held.get():
                raise ExportError(
                    f"{target}: another export (process {other.pid} on {other.host}) is writing into it.",
                    "Wait until it has finished, or choose another folder for --out.",
                )
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=target))
        (path / _LOCK).write_text(holder.model_dump_json(), encoding="utf-8")
        lock = _lock(path / _LOCK)
    token = _held.set((*_held.get(), path.resolve()))
    with lock:
        try:
            yield path
        finally:
            _held.reset(token)
            with suppress(OSError), _locked(target):
                _sweep(path, target)


def _lock(path: Path) -> BinaryIO:
    file = open(path, "rb")  # noqa: SIM115
    with suppress(OSError):  # a file system without locks: then the process's number tells
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _live_holder(path: Path) -> _Holder | None:
    """Who works in a staging folder; None if its process is gone."""
    try:
        with open(path / _LOCK, "rb") as lock:
            holder = _Holder.model_validate_json(lock.read())
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder
            except OSError:  # a file system without locks
                return holder if holder.runs else None
            return None
    except (FileNotFoundError, ValidationError):
        return None  # killed before it wrote it


def _sweep(path: Path, target: Path) -> None:
    """Remove a staging folder, once a publication that has begun is finished, and what was put aside is put back."""
    if path.is_symlink():  # none of ours
        return
    with suppress(FileNotFoundError, ValidationError):  # the latter: none of ours
        _finish(path, target, _Commit.model_validate_json((path / _COMMIT).read_bytes()))
    for old in path.glob(f"*{_REPLACED}"):
        if not os.path.lexists(target / old.name.removesuffix(_REPLACED)):
            os.rename(old, target / old.name.removesuffix(_REPLACED))
    shutil.rmtree(path, ignore_errors=True)


def _started(pid: int) -> int:
    """When a process began, in clock ticks since the system did; 0 if it does not run, or the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
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
