"""The walk through a schedule for many plans at once: columns of times, one pass over the actions.

The same longest path as the walk of one plan, with the plans of a block side by side. What an action sends waits in one
of few rows until its neighbour has read it, so that a block stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Passes = tuple[tuple[int, int], ...]
# Plans walked side by side: some hundred rows of this length fit a second-level cache.
BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Steps:
    """Actions as (device, index of the passes, rows read, row written or -1); the passes; how many devices and rows."""

    steps: tuple[tuple[int, int, tuple[int, ...], int], ...]
    passes: tuple[Passes, ...]
    devices: int
    rows: int


def compile_steps(actions: Sequence[tuple[int, Passes, tuple[int, ...]]], devices: int) -> Steps:
    """Steps of a program's actions (device, passes, actions waited for); a row is free again once all have read it."""
    last = [-1] * len(actions)
    for i, (_, _, needs) in enumerate(actions):
        for need in needs:
            last[need] = i
    free: list[int] = []
    at = [-1] * len(actions)
    kinds: dict[Passes, int] = {}
    rows = 0
    out = []
    for i, (device, passes, needs) in enumerate(actions):
        # A pair of passes may wait for one end twice.
        waits = needs if len(needs) < 2 or needs[0] != needs[1] else needs[:1]
        reads = tuple([at[need] for need in waits])
        for need in waits:
            if last[need] == i:
                free.append(at[need])
        row = -1
        if last[i] >= 0:
            if not free:
                free.append(rows)
                rows += 1
            row = at[i] = free.pop()
        out.append((device, kinds.setdefault(passes, len(kinds)), reads, row))
    return Steps(tuple(out), tuple(kinds), devices, rows)


def walk_columns(steps: Steps, duration: Callable[[Passes], Any], hop: Any, n: int) -> Column:
    """Seconds of the longest path of `n` plans; `duration` gives a column for the passes of an action."""
    columns = [np.broadcast_to(duration(p), n) for p in steps.passes]
    hops = np.broadcast_to(hop, n)
    out = np.empty(n)
    add, larger = np.add, np.maximum
    for low in range(0, n, BLOCK):
        high = min(n, low + BLOCK)
        length = [np.ascontiguousarray(c[low:high], dtype=float) for c in columns]
        late = np.ascontiguousarray(hops[low:high], dtype=float)
        clock = list(np.zeros((steps.devices, high - low)))
        sent = list(np.empty((steps.rows, high - low)))
        for device, kind, reads, row in steps.steps:
            now = clock[device]
            for read in reads:
                larger(now, sent[read], out=now)
            add(now, length[kind], out=now)
            if row >= 0:
                add(now, late, out=sent[row])
        out[low:high] = np.max(clock, axis=0)
    return out
