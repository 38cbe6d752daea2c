"""Where the time of a traced step went: the wall time of each device shared out over scopes, exactly.

Loops and calls enclose what they run and are left out. At each instant a device's time is shared equally by the
instructions that run there then, so that the parts and the gaps between them add up to the device's window.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hw_profiles.errors import WorkFailed
from trainer.hlo_collectives import Collective
from trainer.hlo_scopes import PHASES, phase_of, scopes_of
from trainer.hlo_text import Computation, Module
from trainer.xplane import Event, Execution

UNNAMED, GAPS = "unnamed", "gaps"
_ENCLOSING = {"while", "call", "conditional", "async-start", "async-done", "async-update", "tuple", "get-tuple-element"}


@dataclass(frozen=True, slots=True)
class Place:
    """What an instruction's time counts as: scope, pass, and the collective that it is (None for compute)."""

    scope: str
    phase: str
    collective: Collective | None = None


class Program:
    """The instructions of a compiled program by name, each with its place."""

    def __init__(self, module: Module, collectives: Iterable[Collective]) -> None:
        self.module = module
        self._collectives = {c.name: c for c in collectives}
        self._places: dict[str, Place | None] = {}
        self._known = {name: c for c in module.computations.values() for name in c.instructions}

    def place(self, op: str) -> Place | None:
        """The place of an instruction; None for one that only encloses others. KeyError for an unknown name."""
        if op not in self._places:
            self._places[op] = self._find(op, self._known[op])
        return self._places[op]

    def knows(self, op: str) -> bool:
        """Whether the program has an instruction of this name."""
        return op in self._known

    def _find(self, op: str, computation: Computation) -> Place | None:
        instruction = computation.instructions[op]
        if instruction.opcode in _ENCLOSING:
            return None
        collective = self._collectives.get(op.removesuffix("-done")) or self._collectives.get(op)
        if collective is not None:
            return Place(collective.scopes[0] if collective.scopes else UNNAMED, collective.phase, collective)
        # A fusion without a name of its own, or with one that holds no scope, is what most of its instructions are.
        names = [instruction.op_name]
        if not scopes_of(instruction.op_name):
            names = [
                inner.op_name
                for called in instruction.called("calls", "to_apply")
                for inner in self.module.computation(called).instructions.values()
                if scopes_of(inner.op_name)
            ] or names
        votes = Counter((scope, phase_of(name)) for name in names for scope in scopes_of(name)[:1])
        if not votes:
            return Place(UNNAMED, phase_of(instruction.op_name))
        most = max(votes.values())
        scope, phase = min((v for v, n in votes.items() if n == most), key=lambda v: (-PHASES.index(v[1]), v[0]))
        return Place(scope, phase)


@dataclass(frozen=True, slots=True)
class Share:
    """Of one device in one step: seconds and events of a scope and pass; `waited_s` of collectives, for the others."""

    seconds: float
    calls: int
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a collective on one device: seconds since its last member arrived."""

    collective: Collective
    seconds: float


def check_program(found: Execution, program: Program, where: str) -> None:
    """WorkFailed where events are of instructions that the program does not have: another job's trace."""
    for events in found.devices.values():
        for event in events:
            if not program.knows(event.op):
                raise WorkFailed(f"{where}: has an instruction {event.op!r:.60} that the job's program has not")


Part = tuple[str, str, bool]


def shares(found: Execution, program: Program) -> dict[int, dict[Part, Share]]:
    """Per device the seconds of every (scope, pass, whether of a collective), and the gaps as (`gaps`, '', False)."""
    arrivals = _arrivals(found, program)
    out: dict[int, dict[Part, Share]] = {}
    for device, events in found.devices.items():
        leaves = [e for e in events if program.place(e.op) is not None]
        seconds: dict[Part, float] = defaultdict(float)
        waited: dict[Part, float] = defaultdict(float)
        calls: Counter[Part] = Counter()
        for event, own in zip(leaves, partition(leaves), strict=True):
            place = program.place(event.op)
            assert place is not None
            key = (place.scope, place.phase, place.collective is not None)
            seconds[key] += own
            calls[key] += 1
            if place.collective is not None:
                last = arrivals[device, id(event)]
                waited[key] += min(own, max(0.0, min(last, event.end_ns) - event.start_ns) * 1e-9)
        begin, end = found.window_ns(device)
        gaps = (end - begin) * 1e-9 - sum(seconds.values())
        out[device] = {k: Share(s, calls[k], waited[k]) for k, s in seconds.items()}
        out[device][GAPS, "", False] = Share(max(gaps, 0.0), max(1, len(leaves)))
    return out


def collective_calls(found: Execution, program: Program) -> list[Call]:
    """Every call of a collective on every device, timed from when the last member of its group arrived."""
    arrivals = _arrivals(found, program)
    out = []
    for device, events in found.devices.items():
        for event in events:
            place = program.place(event.op)
            if place is not None and place.collective is not None and (device, id(event)) in arrivals:
                begun = max(event.start_ns, arrivals[device, id(event)])
                if event.end_ns > begun:
                    out.append(Call(place.collective, (event.end_ns - begun) * 1e-9))
    return out


# Collectives on weights and gradients by their kind; what else there is carries activations.
_STATES = {"all-gather": "parameters", "reduce-scatter": "gradients", "all-reduce": "gradients"}
# Closer intervals of one kind are drawn as one.
JOINED_NS = 20_000.0


def intervals(found: Execution, program: Program) -> list[tuple[int, str, float, float]]:
    """A step as (device, kind, start, end) in seconds from its first event, in the words of a forecast's timeline.

    Waiting for the last member of a collective's group is `imbalance`.
    """
    arrivals, out = _arrivals(found, program), []
    for device in sorted(found.devices):
        parts: list[tuple[str, float, float]] = []
        for event in found.devices[device]:
            place = program.place(event.op)
            if place is None:
                continue
            if place.collective is None:
                kind = "optimizer" if place.scope == "optimizer.update" else _pass(place.phase)
                parts.append((kind, event.start_ns, event.end_ns))
                continue
            last = min(max(arrivals[device, id(event)], event.start_ns), event.end_ns)
            parts.append(("imbalance", event.start_ns, last))
            parts.append((_STATES.get(place.collective.kind, "all-to-all"), last, event.end_ns))
        out += [
            (device, kind, (a - found.start_ns) * 1e-9, (b - found.start_ns) * 1e-9)
            for kind, a, b in _joined(sorted(parts, key=lambda p: p[1]))
        ]
    return out


def _pass(phase: str) -> str:
    return "forward" if phase == "forward" else "backward"


def _joined(parts: Iterable[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    out: list[tuple[str, float, float]] = []
    for kind, start, end in parts:
        if end <= start:
            continue
        if out and out[-1][0] == kind and start - out[-1][2] < JOINED_NS:
            out[-1] = (kind, out[-1][1], max(end, out[-1][2]))
        else:
            out.append((kind, start, end))
    return out


def _arrivals(found: Execution, program: Program) -> dict[tuple[int, int], float]:
    """When the last member of its group arrived at each collective event, by device and event, all on one clock."""
    runs: dict[tuple[str, int], dict[int, Event]] = defaultdict(dict)
    for device, events in found.everywhere.items():
        seen: Counter[str] = Counter()
        for event in events:
            place = program.place(event.op)
            if place is not None and place.collective is not None:
                runs[event.op, seen[event.op]][device] = event
                seen[event.op] += 1
    out: dict[tuple[int, int], float] = {}
    for (op, _), members in runs.items():
        place = program.place(op)
        assert place is not None and place.collective is not None
        groups = place.collective.groups or (tuple(sorted(members)),)
        for group in groups:
            there = [d for d in group if d in members]
            if there:
                last = max(members[d].start_ns for d in there)
                out |= {(d, id(members[d])): last for d in there}
        for device, event in members.items():
            out.setdefault((device, id(event)), event.start_ns)
    return out


def partition(events: Sequence[Event]) -> list[float]:
    """Seconds of each event, an instant in which n of them run counting 1/n for each; they sum to their union."""
    marks = sorted(
        [(e.start_ns, 1, i) for i, e in enumerate(events)] + [(e.end_ns, 0, i) for i, e in enumerate(events)]
    )
    out, running, before = [0.0] * len(events), set[int](), 0.0
    for at, starts, i in marks:
        if running and at > before:
            each = (at - before) / len(running) * 1e-9
            for j in running:
                out[j] += each
        before = at
        if starts:
            running.add(i)
        else:
            running.discard(i)
    return out
