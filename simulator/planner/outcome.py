"""What a search of a space, or of a part of it, has found: counts, the best and the front, and the nearest misses."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from simulator.planner.kept import Kept, Winners

COUNTS = ("searched", "valid", "too_large", "pruned", "evaluated", "feasible")


@dataclass(slots=True)
class Outcome:
    """Counts of a search, its best plans in order, and its front (no plan is both faster and smaller) by memory.

    `nearest` has, by constraint, how far the nearest plan misses it and that plan's number, as long as none is
    feasible; `smallest` are the bytes of the smallest plan that does not fit.
    """

    winners: Winners
    searched: int = 0
    valid: int = 0
    too_large: int = 0
    pruned: int = 0
    evaluated: int = 0
    feasible: int = 0
    seconds: float = 0.0
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)
    nearest: dict[str, tuple[float, float]] = field(default_factory=dict)
    smallest: float = math.inf

    @property
    def best(self) -> Kept:
        """The best plans, in order."""
        return self.winners.best

    @property
    def front(self) -> Kept:
        """The front, in order of memory."""
        return self.winners.front

    def miss(self, constraint: str, by: float, number: float) -> None:
        """A plan that misses a constraint by so much; of equally near ones the smaller number is kept."""
        if math.isfinite(by):
            self.nearest[constraint] = min(self.nearest.get(constraint, (math.inf, math.inf)), (by, number))

    def add(self, kept: Kept, record: dict[str, Any]) -> None:
        """What another part found: its plans, and its `record`. The order of parts makes no difference."""
        self.winners.offer_kept(kept)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + record[name])
        for of, rule, count in record["broken"]:
            self.broken[of, rule] += count
        for constraint, (by, number) in record["nearest"].items():
            self.miss(constraint, by, number)
        if record["smallest"] is not None:
            self.smallest = min(self.smallest, record["smallest"])

    def record(self) -> dict[str, Any]:
        """All but the plans and the seconds, as plain numbers, texts, lists and mappings, in one order."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        return counts | {
            "broken": [[*key, n] for key, n in sorted(self.broken.items())],
            "nearest": {text: list(pair) for text, pair in sorted(self.nearest.items())},
            "smallest": self.smallest if math.isfinite(self.smallest) else None,
        }

    def most_broken(self) -> list[tuple[tuple[str, str], int]]:
        """(Field, rule) and how many plans broke it, most first."""
        return sorted(self.broken.items(), key=lambda item: (-item[1], item[0]))
