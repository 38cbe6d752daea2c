"""Differences of two steps in words: which rows are worth showing, for terminal and page."""

from __future__ import annotations

from reports import units
from simulator.results.comparison import Comparison, Difference

PART_WORDS = {
    "compute_s": "compute",
    "all_to_all_s": "all-to-all",
    "communication_s": "communication",
    "host_s": "host",
    "imbalance_s": "imbalance",
    "bubble_s": "bubble",
    "rest": "rounding",
}
# Of the longer step; smaller rows are summed up as `others` of their part.
SHOWN_FROM = 0.002
NOTHING = 1e-9


def signed_seconds(value_s: float) -> str:
    """+1.23 s, -45.6 ms, 0 s."""
    return "0 s" if value_s == 0 else f"{'+' if value_s > 0 else '-'}{units.seconds(abs(value_s))}"


def shown_rows(c: Comparison) -> list[Difference]:
    """Parts (no name) in order, each followed by the op classes that differ enough; the small ones as `others`."""
    longer = max(c.a.step_time_s, c.b.step_time_s)
    out = []
    for part in c.parts:
        if max(abs(part.a_s), abs(part.b_s), abs(part.difference_s)) <= NOTHING * longer:
            continue
        out.append(part)
        rows = [r for r in c.rows if r.part == part.part and r.name]
        large = [r for r in rows if abs(r.difference_s) >= SHOWN_FROM * longer]
        small = [r for r in rows if r not in large]
        out += large
        if large and small:
            a, b = (sum(getattr(r, side) for r in small) for side in ("a_s", "b_s"))
            if max(abs(a), abs(b)) > NOTHING * longer:
                out.append(Difference(part.part, "1 other" if len(small) == 1 else f"{len(small)} others", a, b))
    return out
