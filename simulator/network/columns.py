"""The lines of collectives for many plans at once: each distinct group's once, spread over the rows that have it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.network.collectives import Network, Rate
from simulator.numbers import Number

Index = NDArray[np.intp]


class ColumnNetwork(Network):
    """A network whose groups are columns, one row a plan.

    `first` are rows of which each stands for a distinct set of degrees, and `at` says for every row which.
    """

    def __init__(self, base: Network, first: Index, at: Index) -> None:
        super().__init__(base.cluster)
        self.base, self.first, self.at = base, first, at
        self._columns: dict[tuple[object, ...], Rate] = {}

    def rate(self, kind: str, size: Number, stride: Number, between: Number = 1.0) -> Rate:
        """Lines in columns; `level` is empty, since rows differ."""
        n = len(self.first)
        groups = [np.broadcast_to(x[self.first] if np.ndim(x) else x, n) for x in (size, stride, between)]
        key = (kind, *(g.tobytes() for g in groups))
        found = self._columns.get(key)
        if found is None:
            lines = [self.base.rate(kind, *one) for one in zip(*(g.tolist() for g in groups), strict=True)]
            found = self._columns[key] = self._spread(lines)
        return found

    def _spread(self, lines: list[Rate]) -> Rate:
        """One rate in columns; lines with fewer protocols repeat their last."""

        def column(values: list[Any]) -> Number:
            return np.array(values, dtype=float)[self.at]

        main = [(x.latency_s, x.seconds_per_byte) for x in lines]
        most = max(len(x.smaller) for x in lines)
        padded = [(*x.smaller, *[m] * (most - len(x.smaller))) for x, m in zip(lines, main, strict=True)]
        smaller = tuple((column([p[i][0] for p in padded]), column([p[i][1] for p in padded])) for i in range(most))
        return Rate(column([m[0] for m in main]), column([m[1] for m in main]), "", smaller)
