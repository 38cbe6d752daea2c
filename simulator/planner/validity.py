"""Rules over columns: which rows keep them, and how many rows each rule dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.job.rules import Refusal
from simulator.numbers import Number


class Sieve(Refusal):
    """Drops rows where `job.rules` would refuse a plan; a row counts for the first rule that it breaks.

    `ok` are the rows that are left, `broken` how many each (field, rule) dropped.
    """

    def __init__(self, n: int) -> None:
        self.ok: NDArray[np.bool_] = np.ones(n, dtype=np.bool_)
        self.broken: Counter[tuple[str, str]] = Counter()

    def need(self, ok: Number, field: str, value: object, rule: str, *numbers: Any) -> None:
        """Drop the rows that are not `ok`."""
        if isinstance(ok, bool) and ok:
            return
        bad = self.ok & ~np.broadcast_to(np.asarray(ok, dtype=np.bool_), self.ok.shape)
        dropped = int(np.count_nonzero(bad))
        if dropped:
            self.broken[field, rule.format(*("..." if np.ndim(x) else x for x in numbers))] += dropped
            self.ok &= ~bad
