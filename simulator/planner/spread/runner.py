"""What a runner is, and how often a part may fail before a search gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence

from hw_profiles.errors import WorkFailed

# Works out parts of the question in a text, by number: each with its file, in any order. Closed when it is done with.
Runner = Callable[[str, Sequence[int]], Generator[tuple[int, bytes], None, None]]
MOST = 3


class Tries:
    """Failures of parts, counted."""

    def __init__(self) -> None:
        self._failed: Counter[int] = Counter()

    def failed(self, part: int, why: str) -> None:
        """One more failure of a part; WorkFailed, naming it, at the third."""
        self._failed[part] += 1
        if self._failed[part] >= MOST:
            raise WorkFailed(f"part {part} of the search failed {MOST} times; the last time: {why}")
