"""Pipeline schedules in closed form: step time, and microbatches whose activations a stage keeps.

A schedule is the orders of `simulator.workload.orders`; a step is the longest path through them. The closed form walks
that path for the first 2 P microbatches, hops included, and lets the slowest device set the pace of the rest: exact on
equal stages, and against the whole path within 1 % (1F1B, ZB-H1, DualPipe) or 3 % (interleaved) when stages differ
by 25 % either way (tests/test_schedules.py). The papers' bubble formulas are not enough: they hold for equal stages
only, ZB-H1's and DualPipe's only where the passes take equal time.

GPipe (arXiv:1811.06965) has an exact formula: sum f + (M-1) max f, and the same for the backward passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from simulator.numbers import Number, largest, maximum, minimum, where
from simulator.workload.orders import BACKWARD, FORWARD, INPUT, ORDERS, WEIGHT, Action, model_stage


@dataclass(frozen=True, slots=True)
class Beside:
    """Seconds of communication beside a stage's forward and backward, and the compute of its passes that hides it.

    `compute` is of the forward, the input and the weight gradient; `slow` is what compute loses while both run (0.1: a
    tenth). What an action exposes depends on its passes together: DualPipe hides a forward's behind a backward too.
    """

    forward: Number
    backward: Number
    compute: tuple[Number, Number, Number]
    slow: float


def hidden(communication: Number, compute: Number, slow: float) -> Number:
    """Exposed seconds of communication beside compute, with what the compute loses while both run."""
    return maximum(communication, compute + slow * minimum(communication, compute)) - compute


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one microbatch on one stage (all its virtual stages): forward, input gradient, weight gradient.

    `beside` is what they do not hold yet, where it depends on the passes that run together (DualPipe).
    """

    forward: Number
    backward_input: Number
    backward_weight: Number
    beside: Beside | None = None

    @property
    def total(self) -> Number:
        """Seconds of a microbatch, forward and backward."""
        return self.forward + self.backward_input + self.backward_weight


def in_flight(schedule: str, stage: Number, stages: Number, microbatches: Number, virtual: Number) -> Number:
    """Microbatches (of the whole stage) whose activations stage `stage` keeps at its fullest, the first most.

    Interleaved counts chunks: (P - p - 1) 2 + (V - 1) P + 1 of M V chunks, each 1/V of the stage
    (Megatron-LM's warm-up).
    """
    most: Number = stages - stage
    if schedule == "gpipe":
        most = microbatches
    elif schedule == "interleaved":
        most = (2 * (stages - stage - 1) + (virtual - 1) * stages + 1) / virtual
    elif schedule == "dualpipe":
        most = stages + 1
    elif schedule == "zb-h1":
        # Weight gradients run late: a stage keeps what 1F1B's first stage does.
        most = stages
    return where(stages == 1, 1.0, minimum(microbatches, most) * 1.0)


@dataclass(frozen=True, slots=True)
class _Program:
    """A schedule's actions in an order in which all they wait for comes first, as flat columns.

    An action runs on `device` for the summed times of its `passes` (pass index, model stage); it waits for up to two
    earlier actions, over a hop.
    """

    actions: tuple[tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]], ...]
    devices: int


_PLAIN = (int, float)
_PASS = {FORWARD: 0, BACKWARD: 1, INPUT: 2, WEIGHT: 3}


@lru_cache(maxsize=64)
def _program(schedule: str, stages: int, microbatches: int, virtual: int) -> _Program:
    """The program of a schedule; ValueError where its orders wait for one another in a circle.

    A device runs on until it needs what is not made yet, and goes on when that is made.
    """
    dual = schedule == "dualpipe"
    chunks = stages if dual else stages * virtual
    orders = [ORDERS[schedule](p, stages, microbatches, virtual) for p in range(stages)]
    at = [0] * stages
    # Where in the program each pass of a microbatch ends: forwards, then backwards, of either direction.
    done: list[int] = [-1] * (2 * 2 * chunks * microbatches)
    waiting: dict[int, int] = {}
    ready = deque(range(stages))
    out: list[tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]]] = []
    while ready:
        p = ready.popleft()
        order = orders[p]
        for i in range(at[p], len(order)):
            passes: tuple[tuple[int, int], ...] = ()
            needs: tuple[int, ...] = ()
            makes: list[int] = []
            action: Action | None = order[i]
            while action is not None:
                stage = model_stage(schedule, p, action.chunk, stages)
                passes = (*passes, (_PASS[action.kind], stage))
                if action.kind != WEIGHT:
                    forward = action.kind == FORWARD
                    row = 4 * action.microbatch + 2 * (dual and action.chunk) + forward
                    makes.append(row * chunks + stage)
                    neighbour = stage - 1 if forward else stage + 1
                    if 0 <= neighbour < chunks:
                        needs = (*needs, row * chunks + neighbour)
                action = action.pair
            missing = next((key for key in needs if done[key] < 0), -1)
            if missing >= 0:
                waiting[missing], at[p] = p, i
                break
            for key in makes:
                done[key] = len(out)
                if key in waiting:
                    ready.append(waiting.pop(key))
            out.append((p, passes, tuple([done[key] for key in needs])))
        else:
            at[p] = len(order)
    if waiting:
        raise ValueError(f"{schedule} with {stages} stages and {microbatches} microbatches waits for itself")
    return _Program(tuple(out), stages)


def pipeline_time(schedule: str, times: list[StageTimes], microbatches: Number, virtual: int, hop: Number) -> Number:
    """Seconds from the first forward to the end of the last backward, gradient reduction excluded.

    `times` are those of each model stage in the order of its layers (for interleaved: P V of them). Microbatches in
    columns must agree on how many are walked, min(M, 2P); ValueError otherwise.
    """
    stages = len(times) // virtual
    if stages == 1:
        return microbatches * sum(t.total for t in times)
    if schedule == "gpipe":
        forwards, backwards = [t.forward for t in times], [t.backward_input + t.backward_weight for t in times]
        more = microbatches - 1
        rest = sum(backwards) + more * largest(backwards) + 2 * hop * (stages - 1)
        return sum(forwards) + more * largest(forwards) + rest
    walked = _walked(microbatches, stages)
    if schedule == "dualpipe":
        # Every device runs the forward of either copy together with a backward of the other.
        twins = [(times[i], times[stages - 1 - i]) for i in range(stages // 2)]
        busiest = largest([(_together(a, b) + _together(b, a)) / 2 for a, b in _distinct(twins)])
    else:
        held = [tuple(times[v * stages + p] for v in range(virtual)) for p in range(stages)]
        busiest = largest([sum(t.total for t in own) for own in _distinct(held)])
    if any(not isinstance(t.forward, _PLAIN) for t in times):
        path = _walk_columns(schedule, stages, walked, virtual, times, hop)
    else:
        path = _walk(_program(schedule, stages, walked, virtual), times, hop)
    return path + (microbatches - walked) * busiest


def _walked(microbatches: Number, stages: int) -> int:
    """Microbatches that are walked, the same for all rows."""
    if isinstance(microbatches, int):
        return min(microbatches, 2 * stages)
    least, most = (int(min(m, 2 * stages)) for m in (microbatches.min(), microbatches.max()))
    if least != most:
        raise ValueError(f"columns walk {least} to {most} microbatches of {stages} stages together")
    return most


@lru_cache(maxsize=512)
def _steps(schedule: str, stages: int, microbatches: int, virtual: int) -> Any:
    from simulator.workload.walks import compile_steps

    return compile_steps(_program(schedule, stages, microbatches, virtual).actions, stages)


def _walk_columns(
    schedule: str, stages: int, walked: int, virtual: int, times: list[StageTimes], hop: Number
) -> Number:
    """The walk of many plans; equal stages share their columns."""
    from simulator.workload.walks import walk_columns

    known: dict[tuple[tuple[int, int], ...], Number] = {}

    def duration(passes: tuple[tuple[int, int], ...]) -> Number:
        key = tuple((kind, id(times[stage])) for kind, stage in passes)
        if key not in known:
            own = [(kind, times[stage]) for kind, stage in passes]
            length: Number = sum(_length(t, kind) for kind, t in own)
            known[key] = length if own[0][1].beside is None else length + _shown(own)
        return known[key]

    rows = max(getattr(t.forward, "size", 1) for t in times)
    return walk_columns(_steps(schedule, stages, walked, virtual), duration, hop, rows)


def _length(times: StageTimes, kind: int) -> Number:
    """Seconds of one pass of a stage, by its index in `_PASS`."""
    backward, weight = times.backward_input, times.backward_weight
    return (times.forward, backward + weight, backward, weight)[kind]


def _walk(program: _Program, times: list[StageTimes], hop: Number) -> Number:
    """Length of the longest path through a program."""
    lengths = [(t.forward, t.backward_input + t.backward_weight, t.backward_input, t.backward_weight) for t in times]
    clock: list[Number] = [0.0] * program.devices
    ends: list[Number] = []
    for device, passes, needs in program.actions:
        begin = clock[device]
        for need in needs:
            begin = maximum(begin, ends[need] + hop)
        for kind, stage in passes:
            begin = begin + lengths[stage][kind]
        if times[passes[0][1]].beside is not None:
            begin = begin + _shown([(kind, times[stage]) for kind, stage in passes])
        clock[device] = begin
        ends.append(begin)
    return largest(clock)


def _together(forward: StageTimes, backward: StageTimes) -> Number:
    """Seconds of a forward of one stage beside the backward of another."""
    both = forward.forward + backward.backward_input + backward.backward_weight
    if forward.beside is None:
        return both
    return both + _shown([(_PASS[FORWARD], forward), (_PASS[BACKWARD], backward)])


# Which computes of `Beside` a pass has: all of a backward's communication goes with its input gradient.
_COMPUTES = ((0,), (1, 2), (1,), (2,))


def _shown(passes: list[tuple[int, StageTimes]]) -> Number:
    """Exposed seconds of the communication of passes that run together."""
    communication: Number = 0.0
    compute: Number = 0.0
    slow = 0.0
    for kind, times in passes:
        beside = times.beside
        assert beside is not None
        communication = communication + (beside.forward, beside.backward, beside.backward, 0.0)[kind]
        compute = compute + sum(beside.compute[i] for i in _COMPUTES[kind])
        slow = beside.slow
    return hidden(communication, compute, slow)


def _distinct(held: Sequence[tuple[StageTimes, ...]]) -> list[tuple[StageTimes, ...]]:
    """Each combination of stages once, by identity: equal stages share their record."""
    return list({tuple(map(id, own)): own for own in held}.values())
