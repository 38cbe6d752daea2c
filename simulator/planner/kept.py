"""Plans that a search keeps: the best, and the front of step time and memory, in orders that are total.

Of equal plans the one with the smaller codes comes first, so what is kept depends on the plans that were offered, never
on the order in which they came. Parts of a space can be searched anywhere, at any time, and joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.planner.table import FIELDS, Column

NUMBERS = ("step_time_s", "memory_peak_bytes", "mfu", "usd_per_1b_tokens", "tokens_per_s")
# Codes of plans by their place among those that are offered.
Codes = Callable[[NDArray[np.intp]], NDArray[np.int64]]


@dataclass(slots=True)
class Kept:
    """Plans that are kept: codes, [plans, fields in the order of FIELDS], and numbers, [plans, NUMBERS]."""

    codes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, len(FIELDS)), dtype=np.int64))
    numbers: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, len(NUMBERS))))

    def joined(self, codes: NDArray[np.int64], numbers: NDArray[np.float64]) -> Kept:
        """These and more."""
        return Kept(np.concatenate([self.codes, codes]), np.concatenate([self.numbers, numbers]))

    def taken(self, rows: Any) -> Kept:
        """Some of these."""
        return Kept(self.codes[rows], self.numbers[rows])

    def column(self, name: str) -> Column:
        """One of `NUMBERS`."""
        return self.numbers[:, NUMBERS.index(name)]


class Winners:
    """The `top` best by the number `by`, and the front, of all plans that are offered."""

    def __init__(self, by: str, top: int) -> None:
        self.by, self.top, self.best, self.front = by, top, Kept(), Kept()

    @property
    def worst(self) -> float:
        """What a plan must not exceed to be among the best."""
        return np.inf if len(self.best.codes) < self.top else float(self.best.column(self.by)[-1])

    def front_step(self, memory: Column) -> Column:
        """Least step time of the front's plans that are no larger; infinite where there is none."""
        # The front is in order of memory, its step times fall.
        at = np.searchsorted(self.front.column("memory_peak_bytes"), memory, side="right")
        return np.asarray(np.concatenate([[np.inf], self.front.column("step_time_s")])[at])

    def offer(self, numbers: NDArray[np.float64], codes: Codes) -> None:
        """Plans by their `NUMBERS`, [plans, NUMBERS]; `codes` gives those of the few that are kept."""
        if not len(numbers):
            return
        by = numbers[:, NUMBERS.index(self.by)]
        wanted = by <= self.worst
        if len(by) > self.top:
            wanted &= by <= np.partition(by, self.top - 1)[self.top - 1]
        chosen = np.flatnonzero(wanted)
        if len(chosen):
            self.best = self._ranked(self.best.joined(codes(chosen), numbers[chosen]))
        near = np.flatnonzero(numbers[:, 0] <= self.front_step(numbers[:, 1]))
        chosen = near[_on_front(numbers[near, 1], numbers[near, 0])]
        if len(chosen):
            self.front = _fronted(self.front.joined(codes(chosen), numbers[chosen]))

    def offer_kept(self, kept: Kept) -> None:
        """Plans whose codes are known."""
        self.offer(kept.numbers, lambda rows: kept.codes[rows])

    def rows(self) -> Kept:
        """Best and front, each plan once, by their codes."""
        both = self.best.joined(self.front.codes, self.front.numbers)
        return both.taken(np.unique(both.codes, axis=0, return_index=True)[1])

    def _ranked(self, kept: Kept) -> Kept:
        """The `top` best, in order."""
        order = np.lexsort((*kept.codes.T[::-1], kept.column("memory_peak_bytes"), kept.column(self.by)))
        return kept.taken(order[: self.top])


def _on_front(memory: Column, step: Column) -> NDArray[np.intp]:
    """Plans that no other beats, in order of memory; equal ones are all there."""
    order = np.lexsort((step, memory))
    memory, step = memory[order], step[order]
    least = np.concatenate([[np.inf], np.minimum.accumulate(step)[:-1]])[: len(order)]
    new = np.concatenate([[True], (memory[1:] != memory[:-1]) | (step[1:] != step[:-1])])[: len(order)]
    return np.asarray(order[(new & (step < least))[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]])


def _fronted(kept: Kept) -> Kept:
    """The front in order of memory; of equal plans the one with the smaller codes."""
    step, memory = kept.column("step_time_s"), kept.column("memory_peak_bytes")
    order = np.lexsort((*kept.codes.T[::-1], step, memory))
    step = step[order]
    least = np.concatenate([[np.inf], np.minimum.accumulate(step)[:-1]])
    return kept.taken(order[step < least])
