"""What every command shares: exit codes, and words on a terminal while something takes its time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO, FAILED, INTERRUPTED = 3, 4, 130


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Say on a terminal what takes its time; nothing where standard error is a file or a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(doing):
        yield
