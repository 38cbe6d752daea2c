"""One clock for the traces of several processes: that of their hosts, as far as what they shared allows it.

Each process's trace has only its own devices, and counts from its own start, which it tells by its host's clock.
Processes tell each other an outline of every traced step. Where a collective would have ended on one device before it
had begun on another, which needs everybody's part, the hosts' clocks are apart: the other clock is shifted by as little
as removes that. So an error of the hosts' clocks of less than about half a short collective stays unseen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hw_profiles.errors import WorkFailed
from trainer.attribution import Program, check_program
from trainer.xplane import Event, Execution

# Of a permute each device needs one other's part only.
NEEDS_ALL = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter")
Devices = Mapping[int, Sequence[Event]]
# A collective's instruction, its how-manieth run, its group.
Meeting = tuple[str, int, int]


def outline(one: Execution, program: Program) -> list[Any]:
    """When the trace began, and of each device its first and last event and all its collectives, as JSON has it."""
    devices = []
    for device, events in one.devices.items():
        last = max(events, key=lambda e: e.end_ns)
        kept = [e for e in events if e is events[0] or e is last or _collective(e, program)]
        devices.append([device, [[e.op, e.start_ns, e.end_ns] for e in kept]])
    return [one.began_ns, devices]


def together(own: Execution, outlines: Iterable[Any], program: Program) -> Execution:
    """`own` with the devices of the other processes' outlines of the same step beside it, on its clock.

    WorkFailed where another process has run instructions that the program has not, or a trace does not say its start.
    """
    others: dict[int, tuple[Event, ...]] = {}
    for began_ns, told in outlines:
        if not (began_ns and own.began_ns):
            raise WorkFailed("a trace does not say when it began: traces of several processes need it")
        theirs = {int(d): tuple(Event(op, a, b) for op, a, b in events) for d, events in told}
        check_program(Execution(own.run, theirs), program, "another process's trace")
        ahead = float(began_ns - own.began_ns)
        least, most = allowed(own.devices, theirs, program)
        # Where nothing suits all of them, the middle.
        ahead = min(max(ahead, least), most) if least <= most else (least + most) / 2
        others |= {
            d: tuple(Event(e.op, e.start_ns + ahead, e.end_ns + ahead) for e in events) for d, events in theirs.items()
        }
    return replace(own, others=others)


def allowed(here: Devices, there: Devices, program: Program) -> tuple[float, float]:
    """The least and the most, nanoseconds, that may be added to the clock there; infinite where nothing was shared."""
    mine, theirs = _meetings(here, program), _meetings(there, program)
    least, most = float("-inf"), float("inf")
    for meeting in mine.keys() & theirs.keys():
        (begun, ended), (began, done) = mine[meeting], theirs[meeting]
        least, most = max(least, begun - done), min(most, ended - began)
    return least, most


def _meetings(devices: Devices, program: Program) -> dict[Meeting, tuple[float, float]]:
    """Of each meeting the last start and the first end on `devices`."""
    found: dict[Meeting, list[Event]] = defaultdict(list)
    for device, events in devices.items():
        seen: Counter[str] = Counter()
        for event in events:
            collective = _collective(event, program)
            if collective is not None and collective.kind in NEEDS_ALL:
                group = next((i for i, members in enumerate(collective.groups) if device in members), 0)
                found[event.op, seen[event.op], group].append(event)
                seen[event.op] += 1
    return {key: (max(e.start_ns for e in es), min(e.end_ns for e in es)) for key, es in found.items()}


def _collective(event: Event, program: Program) -> Any:
    place = program.place(event.op)
    return place.collective if place is not None else None
