"""One clock for the traces of several processes: a collective ends on all of its devices at about the same time.

Each process's trace has a clock of its own and only its own devices. Processes tell each other an outline of every
traced step; the clock of another is then set so that the ends of what both took part in agree (their median). What is
left is how unequally a library ends a collective, tens of microseconds on a host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from trainer.attribution import Program, check_program
from trainer.xplane import Event, Execution

Devices = Mapping[int, Sequence[Event]]


def outline(one: Execution, program: Program) -> list[Any]:
    """Of each device its first and last event and all its collectives, as JSON has it: what other processes need."""
    out = []
    for device, events in one.devices.items():
        last = max(events, key=lambda e: e.end_ns)
        kept = [e for e in events if e is events[0] or e is last or _collective(e, program)]
        out.append([device, [[e.op, e.start_ns, e.end_ns] for e in kept]])
    return out


def together(own: Execution, outlines: Iterable[Any], program: Program) -> Execution:
    """`own` with the devices of the other processes' outlines of the same step beside it, on its clock.

    Where two processes share no collective, their steps are taken to begin together. WorkFailed where another process
    has run instructions that the program has not.
    """
    others: dict[int, tuple[Event, ...]] = {}
    for told in outlines:
        theirs = {int(d): tuple(Event(op, a, b) for op, a, b in events) for d, events in told}
        check_program(Execution(own.run, theirs), program, "another process's trace")
        ahead = _ahead(own.devices, theirs, program)
        others |= {
            d: tuple(Event(e.op, e.start_ns + ahead, e.end_ns + ahead) for e in events) for d, events in theirs.items()
        }
    return replace(own, others=others)


def _ahead(here: Devices, there: Devices, program: Program) -> float:
    """What has to be added to the clock there, nanoseconds."""
    mine, theirs = _ends(here, program), _ends(there, program)
    apart = [mine[key] - theirs[key] for key in mine if key in theirs]
    if apart:
        return float(median(apart))
    return min(e[0].start_ns for e in here.values()) - min(e[0].start_ns for e in there.values())


def _ends(devices: Devices, program: Program) -> dict[tuple[str, int, int], float]:
    """When each call of a collective ended last on `devices`, by instruction, its how-manieth run, and group."""
    out: dict[tuple[str, int, int], float] = {}
    for device, events in devices.items():
        seen: Counter[str] = Counter()
        for event in events:
            found = _collective(event, program)
            if found is None:
                continue
            group = next((i for i, members in enumerate(found.groups) if device in members), 0)
            key = event.op, seen[event.op], group
            out[key] = max(out.get(key, event.end_ns), event.end_ns)
            seen[event.op] += 1
    return out


def _collective(event: Event, program: Program) -> Any:
    place = program.place(event.op)
    return place.collective if place is not None else None
