"""A coflow between its start and its end, and the clock: integer ticks of 1 ns.

Counted in whole ticks, what ends together ends in one tick, whatever the rounding of sums. A duration is rounded up, so
that nothing ends before its last byte has crossed, but for a thousandth of a tick that rounding may need.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

from simulator.network.coflow import Coflow

TICKS_PER_S = 1_000_000_000
TICK_S = 1.0 / TICKS_PER_S
# What misses a tick by less is done in it: far below any duration, far above the rounding of seconds (1e-7 ns in 1 s).
SLACK = 1e-3


def ticks(seconds: float) -> int:
    """The first tick by which `seconds` have passed."""
    return ceil(seconds * TICKS_PER_S - SLACK)


class Flight:
    """One coflow between its start and its end; all times are ticks, None while they lie ahead.

    `order` counts starts; bytes move from `ready` on, after the latency; `part_ended` has the end of each part.
    """

    __slots__ = (
        "coflow",
        "ended",
        "order",
        "part_ended",
        "parts_left",
        "phase",
        "phase_left",
        "ready",
        "sizes",
        "started",
    )

    def __init__(self, coflow: Coflow, order: int, started: int) -> None:
        self.coflow = coflow
        self.order = order
        self.started = started
        self.ready = started + ticks(coflow.latency_s)
        self.ended: int | None = None
        self.part_ended: list[int | None] = [None] * len(coflow.parts)
        self.parts_left = len(coflow.parts)
        self.sizes = coflow.phase_sizes()
        # The phase under way, and how many of its parts are.
        self.phase, self.phase_left = -1, 0

    def __repr__(self) -> str:
        return f"<Flight {self.order} {self.coflow.name}: {self.started} to {self.ended}>"

    @property
    def seconds(self) -> float:
        """From the start to the end, latency included; infinite while in flight."""
        return inf if self.ended is None else (self.ended - self.started) * TICK_S


@dataclass(frozen=True, slots=True)
class Blocked:
    """A part that others hold back: its rate over its rate alone, the full link, and who else sends over that link."""

    flight: Flight
    part: int
    level: str
    speed: float
    link: int
    others: tuple[Flight, ...]
