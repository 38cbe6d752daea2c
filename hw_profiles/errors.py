"""The errors a user can cause, so that every floor of the house raises the same ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuestionError(ValueError):
    """The question is wrong: one line naming field, value and rule. The command line exits with 2."""


class WorkFailed(RuntimeError):
    """The work failed though the question was right (a run died, a disk is full): one line. Exit code 4."""


class Interrupted(KeyboardInterrupt):
    """Somebody stopped a run, which saved what it had first: one line. Exit code 130."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
