"""Files that people name: kept inside their folder, read up to a limit, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from hw_profiles.errors import QuestionError


def inside(name: str, folder: Path, start: str, rule: str = "must lie in the job's folder") -> Path:
    """`name` under `folder`; QuestionError, `start` and `rule`, where it leaves it, or where it is no path at all."""
    path = folder / name
    try:
        if ".." in Path(name).parts:
            rule += ", without '..'"
        elif Path(name).is_absolute():
            rule += "; it begins at the root"
        elif path.resolve().is_relative_to(folder.resolve()):
            path.exists()
            return path
        else:
            rule += "; it is a link out of it"
    except (OSError, RuntimeError, ValueError):
        rule = "not a path: it has a loop, a NUL character or a name too long"
    raise QuestionError(f"{start}: {rule}")


def read_bytes(path: Path, most: int, start: str) -> bytes:
    """What is in the file `path`; QuestionError, beginning with `start`, where there is none or more than `most`."""
    try:
        if not path.is_file():
            raise QuestionError(f"{start}: {'not a file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > most else file.read(most + 1)
    except OSError as error:
        raise QuestionError(f"{start}: {str(error.strerror).lower()}") from None
    if max(size, len(data)) > most:
        raise QuestionError(f"{start}: {max(size, len(data)):,} bytes; at most {most:,} are read")
    return data


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` into `path` whole or not at all, even where the machine stops.

    OSError, naming `path`, where it cannot be written, or where a folder or a device is in its place: it is renamed
    there, and must not take theirs.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is there and is not a file", str(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:  # in the name of the file that was asked for
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
