"""A space in parts: which plans a part holds follows from the space alone, never from who searches it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw_profiles.errors import QuestionError
from simulator.planner.flags import BLOCK, CORE, FLAGS
from simulator.planner.space import Space

# About two seconds of one core: what is lost with a killed worker. Smaller parts price the same kinds of layers and
# walk the same pipelines more often.
PLANS_PER_PART = 1 << 22
MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of about `plans` combinations: rows `low` to `high` of degrees under all flags, at one of the places."""

    places: int
    rows: int
    per_row: int
    plans: int

    @property
    def step(self) -> int:
        """Rows of a part."""
        return max(1, self.plans // self.per_row)

    @property
    def per_place(self) -> int:
        """Parts of one place."""
        return -(-self.rows // self.step)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.places * self.per_place

    def __getitem__(self, i: int) -> tuple[int, int, int]:
        """Place, first row and the row after the last of part `i`."""
        place, k = divmod(i, self.per_place)
        return place, k * self.step, min(self.rows, (k + 1) * self.step)

    def size(self, i: int) -> int:
        """Combinations in part `i`."""
        _, low, high = self[i]
        return (high - low) * self.per_row


def parts_of(space: Space, plans: int = PLANS_PER_PART) -> Parts:
    """The parts of a space; QuestionError for more than can be handled."""
    sizes = {names: math.prod(len(space.values[n]) for n in names) for names in (BLOCK, CORE, FLAGS)}
    parts = Parts(sizes[BLOCK], sizes[CORE], sizes[FLAGS], plans)
    if parts.count > MOST_PARTS:
        raise QuestionError(
            f"--part-plans {plans:,}: makes {parts.count:,} parts of {space.count:,} plans; at most {MOST_PARTS:,}"
        )
    return parts
