"""The critical path: the chain of rows, each letting the next one start, that ends the step.

The step gets shorter only where something on it gets faster; everything else has slack. Rows are nodes, weighted with
their seconds; an edge leads from a row to the one that its end let start, weighted with the seconds in between (a hop
to another stage). The path is the longest one (networkx, in O(rows)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.results.timeline import KINDS, STREAMS, Timeline

HOP = "waiting for hop"
# Something that no row shows let the next one start.
OTHER = "other waiting"
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
    """Rows of the longest path, first to last."""
    import networkx

    start, end, before = timeline.start_s.tolist(), timeline.end_s.tolist(), timeline.predecessor.tolist()
    device, compute = timeline.device.tolist(), (timeline.stream == _COMPUTE).tolist()
    rounding = _rounding(timeline)
    edges: list[tuple[int, int, float]] = []
    last: dict[int, int] = {}
    source = -1
    for i in np.flatnonzero(_in_order(timeline)).tolist():
        own, took = last.get(device[i]), end[i] - start[i]
        # The row before of the same class, where it ended just then or nothing else is named.
        gap = start[i] - end[own] if own is not None else 0.0
        if own is not None and own != before[i] and gap >= -rounding and (before[i] < 0 or gap <= rounding):
            edges.append((own, i, took))
        if before[i] >= 0:
            edges.append((before[i], i, took + max(0.0, start[i] - end[before[i]])))
        elif own is None or gap < -rounding:
            # The step's start lets a class's first row start; should that start late, no row says why.
            edges.append((source, i, end[i]))
        if compute[i]:
            last[device[i]] = i
    graph: Any = networkx.DiGraph()
    graph.add_weighted_edges_from(edges)
    path: list[int] = networkx.dag_longest_path(graph, default_weight=0.0)
    return path[1:] if path[0] == source else path


def _in_order(timeline: Timeline) -> NDArray[np.bool_]:
    """Rows that others may wait for: all but transfers and launches that run beside compute and let nothing start."""
    waits: NDArray[np.bool_] = (timeline.stream == _COMPUTE) | (timeline.predecessor >= 0)
    waits[timeline.predecessor[timeline.predecessor >= 0]] = True
    return waits


def _rounding(timeline: Timeline) -> float:
    """Times within this are equal: the engine's clock ticks in nanoseconds, and parts of a row end between two."""
    return 2e-9 + 1e-12 * timeline.step_s
