"""Documents for a run to learn from, in an order that every machine agrees on.

Without `data.files` they are the sources of Python's standard library, which every machine that runs this has. Of
them we leave out what is not the same everywhere: installed packages, tests, and the parts that Linux distributions
ship apart or Python has since dropped (`SPLIT_OFF`), and what the build wrote for one machine (`_sysconfigdata*`).
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hw_profiles.errors import QuestionError
from hw_profiles.files import inside
from simulator.job.learning import Data
from trainer.data.tables import jsonl_texts, parquet_texts

FIELD = "training.learning.data"
# All tokens of a run stay in memory, at 2 to 4 bytes each.
MAX_BYTES = 2**30
MAX_FILES = 100_000
MAX_STDLIB_BYTES = 2**25

NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
SPLIT_OFF = frozenset({"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"})


class Document(NamedTuple):
    """A text, and where it came from in words for an error."""

    where: str
    text: str


class Source(NamedTuple):
    """A file to read, its name in words, and a stamp (size, time of change) that tells a changed file.

    `lenient` passes over a file that is not UTF-8, as Python's library has one or two.
    """

    path: Path
    where: str
    stamp: tuple[int, int]
    lenient: bool = False


def find_sources(data: Data, folder: Path) -> tuple[Source, ...]:
    """The files of a run in the order they are read: as listed in `data.files`, folders by sorted path within them.

    `folder` is the job's. Raises QuestionError for a file that is missing, lies outside it, or is listed twice.
    """
    if data.files is None:
        return _standard_library()
    if not data.files:
        raise QuestionError(f"{FIELD}.files = []: names no file; leave it out to read Python's standard library")
    out: list[Source] = []
    seen: set[Path] = set()
    for name in data.files:
        start = f"{FIELD}.files = {name!r:.80}"
        for path, where in _expand(name, folder, start):
            real = path.resolve()
            if real in seen:
                # A document in both splits would make the evaluation worthless.
                raise QuestionError(f"{where}: is listed twice")
            seen.add(real)
            status = path.stat()
            out.append(Source(path, where, (status.st_size, status.st_mtime_ns)))
            if len(out) > MAX_FILES:
                raise QuestionError(f"{start}: more than {MAX_FILES:,} files")
    if sum(source.stamp[0] for source in out) > MAX_BYTES:
        raise QuestionError(f"{FIELD}.files: together more than the {MAX_BYTES:,} bytes that are read")
    return tuple(out)


def read_documents(sources: tuple[Source, ...], field: str) -> Iterator[Document]:
    """The documents of `sources` that are not empty: a text file is one, so is a line of JSONL or a row of Parquet.

    Raises QuestionError naming file, line or row, and rule for anything that is not UTF-8 text in `field`.
    """
    total = 0
    for source in sources:
        for document in _read(source, field):
            total += len(document.text)
            if total > MAX_BYTES:
                raise QuestionError(f"{document.where}: the text is longer than the {MAX_BYTES:,} characters read")
            if document.text:
                yield document


def _standard_library() -> tuple[Source, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    out, total = [], 0
    found: list[tuple[str, Path]] = []
    for top, folders, files in os.walk(root):
        # Not looked into at all: installed packages can be tens of thousands of files.
        folders[:] = [f for f in folders if f not in NOT_THE_LIBRARY | SPLIT_OFF and not f.startswith("config-")]
        for name in files:
            path = Path(top) / name
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                found.append((path.relative_to(root).as_posix(), path))
    for relative, path in sorted(found):
        status = path.stat()
        total += status.st_size
        if total > MAX_STDLIB_BYTES:
            break
        out.append(Source(path, f"standard library, {relative}", (status.st_size, status.st_mtime_ns), True))
    if not out:
        raise QuestionError(f"{FIELD}.files: this Python has no sources of its standard library; name files")
    return tuple(out)


def _expand(name: str, folder: Path, start: str) -> list[tuple[Path, str]]:
    """The file `name`, or all files under the folder `name` in sorted order, and how errors call them."""
    path = inside(name, folder, start)
    if path.is_file():
        return [(path, start)]
    if not path.is_dir():
        raise QuestionError(f"{start}: {'not a file' if path.exists() else 'no such file in the folder of the job'}")
    found: list[tuple[str, Path]] = []

    def fail(error: OSError) -> None:
        raise QuestionError(f"{start}: {str(error.strerror).lower()}")

    for top, folders, files in os.walk(path, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for entry in [*folders, *files]:
            if entry.startswith("."):
                continue
            inner = Path(top) / entry
            relative = inner.relative_to(path).as_posix()
            inside(inner.relative_to(folder).as_posix(), folder, f"{start}, {relative!r:.80}")
            if entry in folders:
                if inner.is_symlink():
                    raise QuestionError(f"{start}, {relative!r:.80}: is a link to a folder; list that folder itself")
                continue
            if not inner.is_file():
                raise QuestionError(f"{start}, {relative!r:.80}: not a file")
            found.append((relative, inner))
        if len(found) > MAX_FILES:
            raise QuestionError(f"{start}: more than {MAX_FILES:,} files")
    if not found:
        raise QuestionError(f"{start}: the folder holds no file")
    return [(inner, f"{start}, {relative!r:.80}") for relative, inner in sorted(found)]


def _read(source: Source, field: str) -> Iterator[Document]:
    path, where, _, lenient = source
    try:
        if path.suffix == ".parquet":
            yield from (Document(f"{where}, row {n}", text) for n, text in parquet_texts(path, field, where))
            return
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise QuestionError(f"{where}: {str(error.strerror or error).lower():.80}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        yield from (Document(f"{where}, line {n}", text) for n, text in jsonl_texts(content, field, where))
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if lenient:
            return
        raise QuestionError(f"{where}, line {line}: not a text file (UTF-8)") from None
    if "\0" in text:
        raise QuestionError(f"{where}: not a text file (NUL byte)")
    yield Document(where, text)
