"""A folder of files at an address: of this machine, or of any file system that fsspec knows (s3://, gs://, memory://).

A file is there whole or not at all: written aside and renamed, or, where a store puts objects whole, put.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from hw_profiles.errors import QuestionError, WorkFailed, nearest
from hw_profiles.files import read_bytes, write_whole

# Stores whose objects appear at once, with all their bytes.
PUT_WHOLE = {"abfs", "abfss", "az", "gcs", "gs", "memory", "oss", "s3", "s3a"}
MOST_BYTES = 1 << 32


class Folder(Protocol):
    """Files by name; a name may have one folder in it."""

    address: str

    def names(self, under: str = "") -> list[str]:
        """Names of what is in it, or in a folder of it, in order; hidden ones left out."""
        ...

    def read(self, name: str) -> bytes | None:
        """What is in a file; None where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, whole or not at all."""
        ...


def folder_at(address: str) -> Folder:
    """The folder at a path or address; QuestionError where there can be none."""
    if address.startswith("file://"):
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise QuestionError(f"{address}: names a machine; file:// addresses look like file:///folder")
        return LocalFolder(Path(unquote(parts.path)), address)
    if "://" in address:
        return RemoteFolder(address)
    return LocalFolder(Path(address), address)


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path, address: str) -> None:
        self.path, self.address = path, address
        if path.exists() and not path.is_dir():
            raise QuestionError(f"{address}: is a file; results are written to a folder")

    def names(self, under: str = "") -> list[str]:
        """See `Folder`."""
        folder = self.path / under
        return sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        path = self.path / name
        return read_bytes(path, MOST_BYTES, str(path)) if path.exists() else None

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


class RemoteFolder:
    """A folder that fsspec reaches."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        protocol = address.partition("://")[0]
        core: Any = _fsspec(address)
        try:
            self.fs, path = core.core.url_to_fs(self.address)
        except ImportError as error:
            needs = " ".join(str(error).split())
            raise QuestionError(f"{address}: its file system needs a package that is not here: {needs}") from None
        except ValueError as error:
            hint = nearest(protocol, core.available_protocols())
            raise QuestionError(f"{address}: {' '.join(str(error).split())}{hint}") from None
        self.path = path.rstrip("/")
        self.put = protocol in PUT_WHOLE

    def names(self, under: str = "") -> list[str]:
        """See `Folder`."""
        folder = f"{self.path}/{under}".rstrip("/")
        with self._told():
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        # Some stores list a folder's own marker, too.
        names = {p.rstrip("/").rpartition("/")[2] for p in found if p.rstrip("/") != folder}
        return sorted(n for n in names if n and n[0] != ".")

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        with self._told():
            try:
                return bytes(self.fs.cat_file(f"{self.path}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        path = f"{self.path}/{name}"
        folder, _, last = path.rpartition("/")
        with self._told():
            if self.put:
                self.fs.pipe_file(path, data)
                return
            self.fs.makedirs(folder, exist_ok=True)
            aside = f"{folder}/.{last}.part"
            self.fs.pipe_file(aside, data)
            self.fs.mv(aside, path)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a file system raises (each has errors of its own) as one line that names the address."""
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())
            raise WorkFailed(f"{self.address}: {type(error).__name__}: {said:.300}") from None


def _fsspec(address: str) -> Any:
    try:
        import fsspec
    except ImportError:
        raise QuestionError(f"{address}: addresses need fsspec: pip install fsspec") from None
    return fsspec
