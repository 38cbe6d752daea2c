"""What every command shares: exit codes, and words on a terminal while something takes its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


class Bar:
    """What a progress bar can be told; it shows nothing where standard error is a file or a pipe."""

    def __init__(self, shown: Any = None, task: Any = None) -> None:
        self._shown, self._task = shown, task

    def say(self, text: str) -> None:
        """What is being done now."""
        if self._shown is not None:
            self._shown.update(self._task, said=text)

    def advance(self, steps: int = 1) -> None:
        """Some of it is done."""
        if self._shown is not None:
            self._shown.advance(self._task, steps)


@contextmanager
def bar(doing: str, total: int, *, visible: bool = True) -> Iterator[Bar]:
    """A progress bar on a terminal, with what is being done and the time left; of several processes one has it."""
    if not visible or not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.fields[said]}", markup=False)
    columns = (
        TextColumn(doing),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        said,
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Bar(shown, shown.add_task("", total=total, said=""))


@contextmanager
def counting(doing: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for many small things, told how many are done of how many, with their rate and the time left.

    What was done when it is first told is no work of this run, and counts for no rate.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=6), count, TextColumn("{task.fields[left]}"))
    first: list[tuple[int, float]] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None, visible=False, left="")

        def tell(done: int, total: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((done, now))
            rate = (done - first[0][0]) / max(now - first[0][1], 1e-9)
            left = f"{rate:,.0f}/s, {(total - done) / rate:,.0f} s left" if rate > 0 else ""
            progress.update(task, completed=done, total=total, visible=True, left=left)

        yield tell
