"""The critical path: the chain of rows, each letting the next one start, that ends the step.

The step gets shorter only where something on it gets faster; everything else has slack. Rows are nodes, weighted with
their seconds; an edge leads from a row to the one that its end let start, weighted with the seconds in between (a hop
to another stage). The path is the longest one, found in one pass over the rows; tests compare it with networkx's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.results.timeline import KINDS, STREAMS, Timeline

HOP = "waiting for hop"
# Something that no row shows let the next one start.
OTHER = "other waiting"
# Stands for the step's start where a row waits for no other.
START = -1
_COMPUTE = STREAMS.index("compute")


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """Indices of the rows on the path in order, seconds by kind of work and waiting (longest first), and their sum."""

    rows: tuple[int, ...]
    seconds: dict[str, float]
    total_s: float


def critical_path(timeline: Timeline) -> CriticalPath:
    """The longest path to the end of the step; its seconds sum to `timeline.step_s`.

    A row names the row whose end let it start; where its own class's row before ended at the same instant, the path may
    lead through either. The time after the last row is the host's.
    """
    if not len(timeline):
        return CriticalPath((), {"host": timeline.step_s} if timeline.step_s > 0 else {}, timeline.step_s)
    chain = _longest(timeline)
    rounding = _rounding(timeline)
    seconds: dict[str, float] = {}
    clock, previous = 0.0, -1
    for i in chain:
        start, end = float(timeline.start_s[i]), float(timeline.end_s[i])
        if start - clock > rounding:
            crosses = previous >= 0 and timeline.device[previous] != timeline.device[i]
            _add(seconds, HOP if crosses else OTHER, start - clock)
            clock = start
        _add(seconds, KINDS[timeline.kind[i]], end - clock)
        clock, previous = end, i
    _add(seconds, "host", timeline.step_s - clock)
    ordered = dict(sorted(seconds.items(), key=lambda item: (-item[1], item[0])))
    return CriticalPath(tuple(chain), ordered, sum(ordered.values()))


def _add(seconds: dict[str, float], name: str, value_s: float) -> None:
    if value_s > 0:
        seconds[name] = seconds.get(name, 0.0) + value_s


def _longest(timeline: Timeline) -> list[int]:
    """Rows of the longest path, first to last.

    Rows are recorded after those that let them start: their order is one in which lengths add up, in a single pass.
    """
    rows, befores, seconds = edges(timeline)
    length, through = [-1.0] * len(timeline), [START] * len(timeline)
    for row, before, took in zip(rows, befores, seconds, strict=True):
        reached = took if before == START else length[before] + took
        if reached > length[row]:
            length[row], through[row] = reached, before
    chain = [length.index(max(length))]
    while through[chain[-1]] != START:
        chain.append(through[chain[-1]])
    return chain[::-1]


def edges(timeline: Timeline) -> tuple[list[int], list[int], list[float]]:
    """What rows wait for, in order of rows: row, the row before it or START, and seconds from the end of that one."""
    start, end, before = timeline.start_s.tolist(), timeline.end_s.tolist(), timeline.predecessor.tolist()
    device, compute = timeline.device.tolist(), (timeline.stream == _COMPUTE).tolist()
    rounding = _rounding(timeline)
    rows: list[int] = []
    befores: list[int] = []
    seconds: list[float] = []

    def add(row: int, by: int, took: float) -> None:
        rows.append(row)
        befores.append(by)
        seconds.append(took)

    last: dict[int, int] = {}
    for i in np.flatnonzero(_in_order(timeline)).tolist():
        own, took, named = last.get(device[i]), end[i] - start[i], before[i]
        # The row before of the same class, where it ended just then or nothing else is named.
        gap = start[i] - end[own] if own is not None else 0.0
        if own is not None and own != named and gap >= -rounding and (named < 0 or gap <= rounding):
            add(i, own, took)
        if named >= 0:
            add(i, named, took + max(0.0, start[i] - end[named]))
        elif own is None or gap < -rounding:
            # The step's start lets a class's first row start; should that start late, no row says why.
            add(i, START, end[i])
        if compute[i]:
            last[device[i]] = i
    return rows, befores, seconds


def _in_order(timeline: Timeline) -> NDArray[np.bool_]:
    """Rows that others may wait for: all but transfers and launches that run beside compute and let nothing start."""
    waits: NDArray[np.bool_] = (timeline.stream == _COMPUTE) | (timeline.predecessor >= 0)
    waits[timeline.predecessor[timeline.predecessor >= 0]] = True
    return waits


def _rounding(timeline: Timeline) -> float:
    """Times within this are equal: the engine's clock ticks in nanoseconds, and parts of a row end between two."""
    return 2e-9 + 1e-12 * timeline.step_s
