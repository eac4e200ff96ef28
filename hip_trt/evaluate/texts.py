"""Real texts, as packages ship them. Nothing is fetched: a text is found in what is installed, or read from a file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hip_trt.errors import EnvironmentProblem, RuntimeInputError

NODE_MANUAL = Path("/usr/share/doc/nodejs/api")
"""Where packages of Node.js put its manual."""


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Attributes:
        name: short, for tables.
        content: all of it.
        source: what it is.
    """

    name: str
    content: str
    source: str

    @property
    def sha256(self) -> str:
        """The first 12 hexadecimal digits of its SHA-256, as UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:12]


def bible() -> Text:
    """The King James Bible of Debian's package bible-kjv, verse after verse, without verse numbers.

    Raises:
        EnvironmentProblem: the program is not installed.
    """
    if shutil.which("bible") is None:
        raise EnvironmentProblem(
            "The text bible: there is no program `bible`.",
            "Install Debian's package bible-kjv, or name a file with --text.",
        )
    verses = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    content = re.sub(r"^\w+?\d+:\d+ ", "", verses, flags=re.MULTILINE)
    return Text("bible", content, "King James Bible, Debian's bible-kjv")


def code() -> Text:
    """Python source: modules of the standard library, in the order of their names, tests left out."""
    import ast

    root = Path(ast.__file__).parent
    files = sorted(
        path for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"} & set(path.parts)
    )
    content = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return Text("code", content, "Python's standard library, source")


def manual() -> Text:
    """Python's language reference, as help() prints it."""
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    return Text("manual", content, "Python's language reference, from pydoc_data")


def node() -> Text:
    """The manual of Node.js in Markdown, as its packages install it.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    files = sorted(NODE_MANUAL.glob("*.md"))
    if not files:
        raise EnvironmentProblem(
            f"The text node: there is no {NODE_MANUAL}/*.md.",
            "Install Node.js from a package that has its manual (nodejs), or name a file with --text.",
        )
    content = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return Text("node", content, "manual of Node.js")


SHIPPED: dict[str, Callable[[], Text]] = {"bible": bible, "code": code, "manual": manual, "node": node}
"""By name. ``code`` and ``manual`` come with every Python."""


def from_file(path: str | Path) -> Text:
    """A UTF-8 text; its name is the file's without suffix.

    Raises:
        RuntimeInputError: it cannot be read, or is not UTF-8.
    """
    path = Path(path)
    try:
        return Text(path.stem, path.read_text(encoding="utf-8-sig"), path.name)
    except OSError as error:
        raise RuntimeInputError(f"--text {path}: cannot be read: {error.strerror}.", "Name a UTF-8 text.") from None
    except UnicodeDecodeError as error:
        raise RuntimeInputError(f"--text {path}: not UTF-8: {error.reason}.", "Name a UTF-8 text.") from None


def gather(names: Sequence[str] = (), files: Sequence[str | Path] = ()) -> list[Text]:
    """Texts by name and from files, those named first.

    Args:
        names: of :data:`SHIPPED`.
        files: UTF-8 texts.

    Raises:
        RuntimeInputError: there is no such name, two texts have one name, or a file cannot be read.
        EnvironmentProblem: a text is not installed; it says what to install.
    """
    unknown = [name for name in names if name not in SHIPPED]
    if unknown:
        raise RuntimeInputError(
            f"--texts: {unknown[0]!r} is not known.",
            f"Give some of {', '.join(SHIPPED)}, with commas between them, or name a file with --text.",
        )
    found = [*(SHIPPED[name]() for name in names), *map(from_file, files)]
    twice = {text.name for text in found if [other.name for other in found].count(text.name) > 1}
    if twice:
        raise RuntimeInputError(f"--text: two texts are called {min(twice)}.", "Rename a file.")
    return found


def choose(names: Sequence[str] = (), files: Sequence[str | Path] = ()) -> list[Text]:
    """What :func:`gather` gives; the texts that are installed where neither names nor files are given."""
    return gather(names or ([] if files else installed()), files)


def installed() -> list[str]:
    """Names of the texts that are installed here."""
    return [name for name in SHIPPED if _is_installed(name)]


def _is_installed(name: str) -> bool:
    if name == "bible":
        return shutil.which("bible") is not None
    return name != "node" or (NODE_MANUAL.is_dir() and any(_markdown(NODE_MANUAL)))


def _markdown(folder: Path) -> Iterator[str]:
    return (name for name in os.listdir(folder) if name.endswith(".md"))
