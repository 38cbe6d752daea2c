"""When a stage can end at the earliest because its host launches one kernel after the other.

Host and device are a flow shop of two machines with one order: the longest path launches up to some kernel and runs all
from there on (Johnson 1954). Kernels of a pass are taken as equally long, so that the path turns at the first or the
last of one. What a path has launched before an action, and runs after it, is linear in the passes that came before: of
actions of one kind in steady alternation only the first and the last can be where the longest path turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from simulator.job.rules import Degrees
from simulator.numbers import Number, maximum, some
from simulator.workload.orders import BACKWARD, FORWARD, INPUT, ORDERS, WEIGHT
from simulator.workload.schedules import StageTimes

PARTS = {FORWARD: (0,), BACKWARD: (1, 2), INPUT: (1,), WEIGHT: (2,)}
# Seconds and kernels of a microbatch's forward, input gradient and weight gradient.
Stage = tuple[StageTimes | None, tuple[Number, Number, Number]]
Counts = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A kind of action where a path may turn: its own passes, those before it, and whether it is a forward.

    Counts are of the forward, the input and the weight gradient of each copy of a stage, in passes of a microbatch.
    """

    own: Counts
    before: Counts
    forward: bool


def _enumerated(schedule: str, p: int, stages: int, microbatches: int, virtual: int) -> tuple[list[_Turn], Counts]:
    """Ends of every run of equal steps in the order of stage `p`, and the passes of the whole order."""
    copies = 2 if schedule == "dualpipe" else 1
    share = 1 / virtual if copies == 1 else 1.0
    done: Counts = (0.0,) * (3 * copies)
    seen: dict[tuple[Counts, bool], list[Counts]] = {}
    for action in ORDERS[schedule](p, stages, microbatches, virtual):
        own = [0.0] * (3 * copies)
        for a in (action,) if action.pair is None else (action, action.pair):
            for i in PARTS[a.kind]:
                own[3 * (a.chunk if copies == 2 else 0) + i] += share
        seen.setdefault((tuple(own), action.kind == FORWARD), []).append(done)
        done = tuple(x + y for x, y in zip(done, own, strict=True))
    turns = []
    for (passes, forward), places in seen.items():
        steps = [tuple(round((y - x) / share) for x, y in zip(a, b, strict=True)) for a, b in pairwise(places)]
        for i, place in enumerate(places):
            if i in (0, len(places) - 1) or steps[i - 1] != steps[i]:
                turns.append(_Turn(passes, place, forward))
    return turns, done


@lru_cache(maxsize=4096)
def turns_of(schedule: str, p: int, stages: int, microbatches: int, virtual: int) -> tuple[tuple[_Turn, ...], Counts]:
    """Where the longest path of stage `p` can turn, and the passes of its whole order.

    From 4 P microbatches on, a further round of 2 P only lengthens the runs: long orders are read off two short ones.
    """
    first = 4 * stages + microbatches % (2 * stages)
    if microbatches <= first + 2 * stages:
        turns, whole = _enumerated(schedule, p, stages, microbatches, virtual)
        return tuple(turns), whole
    near, near_whole = _enumerated(schedule, p, stages, first, virtual)
    far, far_whole = _enumerated(schedule, p, stages, first + 2 * stages, virtual)
    rounds = (microbatches - first) / (2 * stages)

    def on(a: Counts, b: Counts) -> Counts:
        return tuple(x + (y - x) * rounds for x, y in zip(a, b, strict=True))

    turns = [_Turn(a.own, on(a.before, b.before), a.forward) for a, b in zip(near, far, strict=True)]
    return tuple(turns), on(near_whole, far_whole)


def launch_waits(copies: Sequence[Stage], each_s: float) -> Number:
    """Whether some pass of a stage takes its host longer than its device."""
    out: Number = False
    for times, kernels in copies if each_s else ():
        assert times is not None
        device = (times.forward, times.backward_input, times.backward_weight)
        for own in ((0,), (1, 2), (1,), (2,)):
            out = out | (sum(each_s * kernels[i] for i in own) > sum(device[i] for i in own))
    return out


def launch_bound(schedule: str, p: int, degrees: Degrees, copies: Sequence[Stage], each_s: float) -> Number:
    """Seconds until stage `p` has run its order when a launch takes `each_s`; 0 where launches are never waited for.

    `copies` are the stage's, and for DualPipe its mirrored twin's; all numbers, or columns of as many plans.
    """
    waits = launch_waits(copies, each_s)
    if not some(waits):
        return 0.0
    seconds: list[Number] = []
    launches: list[Number] = []
    for times, kernels in copies:
        assert times is not None
        seconds += (times.forward, times.backward_input, times.backward_weight)
        launches += (each_s * k for k in kernels)
    chosen = schedule if degrees.pipeline > 1 else "1f1b"
    where_ = (chosen, p, degrees.pipeline)
    virtual = degrees.virtual_stages
    if isinstance(waits, bool):
        return _longest(turns_of(*where_, degrees.microbatches, virtual), seconds, launches, each_s, *where_)
    import numpy as np

    out = np.zeros(len(waits))
    microbatches = np.broadcast_to(degrees.microbatches, len(waits))
    for m in np.unique(microbatches[waits]).tolist():
        rows = np.flatnonzero(waits & (microbatches == m))
        taken = [[x[rows] if np.ndim(x) else x for x in column] for column in (seconds, launches)]
        out[rows] = _longest(turns_of(*where_, m, virtual), taken[0], taken[1], each_s, *where_)
    return out


def _longest(
    turns: tuple[tuple[_Turn, ...], Counts],
    seconds: Sequence[Number],
    launches: Sequence[Number],
    each_s: float,
    schedule: str,
    p: int,
    stages: int,
) -> Number:
    """The longest of the paths that turn at `turns`."""

    def total(counts: Counts, of: Sequence[Number]) -> Number:
        return sum(n * x for n, x in zip(counts, of, strict=True) if n)

    places, everything = turns
    whole = total(everything, seconds)
    fill = (stages - 1 - p) * (seconds[0] + seconds[1] + seconds[2])
    out: Number = 0.0
    for turn in places:
        device, host = total(turn.own, seconds), total(turn.own, launches)
        launched, left = total(turn.before, launches), whole - total(turn.before, seconds)
        # Under GPipe what a stage forwards goes on to the last stage and back before its own backwards.
        more = fill if schedule == "gpipe" and turn.forward else 0.0
        out = maximum(out, launched + each_s + left + more)
        out = maximum(out, launched + host + device * each_s / maximum(host, each_s) + left - device + more)
    return out
