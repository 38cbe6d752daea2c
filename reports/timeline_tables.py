"""The tables beside the figures of `timeline`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reports import tables, units
from reports.parts import signed_percent
from reports.timeline import TOP_LINKS, shown_classes, working
from simulator.results.forecast import Events
from simulator.results.links import LinkUse
from simulator.results.timeline import STREAMS, Timeline

_COMPUTE = STREAMS.index("compute")


def classes(timeline: Timeline) -> str:
    """What each device class spends the step on; the columns sum to it."""
    rows = []
    step, several = timeline.step_s, len(set(timeline.replicas)) > 1
    for c in shown_classes(timeline):
        mine = timeline.device == c
        work, busy = _covered(timeline, working(timeline, c)), _covered(timeline, mine)
        stream = _covered(timeline, mine & (timeline.stream == _COMPUTE))
        row = [timeline.classes[c], units.percent(units.share(work, step))]
        # What is a rounding error reads as nothing.
        for value in (work, busy - stream, stream - work, step - busy):
            row.append(units.seconds(value) if value > 1e-6 * step else "0 s")
        rows.append([*row, f"{timeline.replicas[c]:,}"] if several else row)
    head = ["class", "busy", "", "communicates", "imbalance", "waits"]
    caption = "" if several or timeline.replicas[0] == 1 else f"Each stands for {timeline.replicas[0]:,} devices; "
    return _narrow(
        tables.table(
            [*head, "devices"] if several else head,
            rows,
            numbers=range(1, 7),
            caption=f"{caption}busy: in a pass or an update; imbalance includes the host's part",
        )
    )


def _narrow(table: str) -> str:
    """A table whose names stay on one line: half a page is little for seven columns."""
    return table.replace("<table>", '<table class="narrow">', 1)


def _covered(timeline: Timeline, rows: NDArray[np.bool_]) -> float:
    """Seconds in which at least one of these rows runs."""
    order = np.argsort(timeline.start_s[rows], kind="stable")
    start, end = timeline.start_s[rows][order], timeline.end_s[rows][order]
    if not len(start):
        return 0.0
    # What an earlier row already covers counts once.
    before = np.concatenate(([0.0], np.maximum.accumulate(end)[:-1]))
    return float(np.maximum(end - np.maximum(start, before), 0).sum())


def memory(timeline: Timeline, capacity_bytes: float) -> str:
    """Start, peak and its time per device class; what does not fit is marked."""
    rows: list[tuple[str, ...]] = []
    loud = []
    for c in shown_classes(timeline):
        if c >= len(timeline.memory) or not len(timeline.memory[c][0]):
            continue
        times, values = timeline.memory[c]
        at = int(values.argmax())
        if capacity_bytes and values[at] > capacity_bytes:
            loud.append(len(rows))
        rows.append(
            (
                timeline.classes[c],
                units.memory(float(values[0])),
                units.memory(float(values[at])),
                units.seconds(float(times[at])) if times[at] > 0 else "0 s",
                units.percent(units.share(float(values[at]), capacity_bytes)),
            )
        )
    head = ("class", "at the start", "peak", "first at", "of capacity")
    return _narrow(tables.table(head, rows, numbers=range(1, 5), loud=loud))


def links(busiest: Sequence[LinkUse]) -> str:
    """Bytes, rate and use of the busiest links."""
    rows = [
        (u.name, u.level, units.traffic(u.bytes), f"{units.traffic(u.bytes_per_s)}/s", units.percent(u.utilisation))
        for u in sorted(busiest, key=lambda use: -use.utilisation)[:TOP_LINKS]
    ]
    return tables.table(("link", "level", "bytes", "full rate", "busy"), rows, numbers=(2, 3, 4))


def critical_path(events: Events) -> str:
    """Seconds and share of each kind of work on the critical path."""
    total = sum(events.critical_path_s.values())
    rows = [(k, units.seconds(v), units.percent(units.share(v, total))) for k, v in events.critical_path_s.items()]
    rows.append(("path", units.seconds(total), units.percent(1.0)))
    return tables.table(("on the path", "time", "share"), rows, numbers=(1, 2))


def formula(events: Events, step_s: float) -> str:
    """Both answers, what lies between them, and the spread over draws of the routing."""
    rows = [
        ("closed form", units.seconds(events.closed_form_step_time_s)),
        ("events", f"{units.seconds(step_s)} ({signed_percent(events.difference)})"),
        *(("the formula missed" if i == 0 else "", said) for i, said in enumerate(events.missed)),
    ]
    if not events.missed:
        rows.append(("the formula missed", "nothing: the two agree within 2 %"))
    rows += [(f"{name} of the draws", units.seconds(value)) for name, value in (events.percentiles_s or {}).items()]
    if events.out_of_memory_probability is not None:
        rows.append(("out of memory", f"{units.percent(events.out_of_memory_probability)} of the draws"))
    rows.append(("device classes", "one group stands for all equal ones" if events.folded else "every group by itself"))
    rows.append(("seed", str(events.seed)))
    return tables.facts(rows)
