"""A timeline as a trace that ui.perfetto.dev (and chrome://tracing) opens: Chrome's JSON trace event format.

One process per device class; its compute, network and host streams are threads. Arrows lead from the row of another
class that a row waited for. Times become whole nanoseconds, so that rows which touch do not overlap by rounding.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from hw_profiles.files import write_whole
from simulator.results.timeline import KINDS, STREAMS, Timeline

_COMPUTE = STREAMS.index("compute")
Event = dict[str, Any]


def write_perfetto(timeline: Timeline, path: Path, title: str) -> None:
    """Writes the trace to `path`, whole or not at all, compressed if the name ends with .gz; same input, same bytes."""
    text = json.dumps(trace(timeline, title), separators=(",", ":"), ensure_ascii=False) + "\n"
    data = text.encode()
    if path.name.endswith(".gz"):
        # No time of writing in the header.
        data = gzip.compress(data, mtime=0)
    write_whole(path, data)


def trace(timeline: Timeline, title: str) -> dict[str, Any]:
    """The trace as plain data: names first, then all events by time."""
    start, end = _nanoseconds(timeline.start_s), _nanoseconds(timeline.end_s)
    thread, names = _threads(timeline, start, end)
    events = [*_slices(timeline, start, end, thread), *_arrows(timeline, start, end, thread), *_memory(timeline)]
    # Slices before the arrows and counters of the same instant; a longer slice before those inside it.
    events.sort(key=lambda e: (e["ts"], "XCsf".index(e["ph"]), -e.get("dur", 0.0), e["pid"], e["tid"]))
    return {
        "displayTimeUnit": "ms",
        "otherData": {"title": title, "step_s": timeline.step_s, "notes": list(timeline.notes)},
        "traceEvents": _metadata(timeline, names) + events,
    }


def _nanoseconds(times_s: Any) -> list[int]:
    whole: list[int] = np.rint(np.asarray(times_s, np.float64) * 1e9).astype(np.int64).tolist()
    return whole


def _threads(timeline: Timeline, start: list[int], end: list[int]) -> tuple[list[int], dict[tuple[int, int], str]]:
    """Thread of each row, and thread names by (class, thread).

    Slices of one thread must not cross: transfers that run at the same time get lanes of their own.
    """
    free: dict[tuple[int, int], list[int]] = {}
    thread = [0] * len(timeline)
    names: dict[tuple[int, int], str] = {}
    for i in sorted(range(len(timeline)), key=lambda i: (start[i], end[i], i)):
        device, stream = int(timeline.device[i]), int(timeline.stream[i])
        lanes = free.setdefault((device, stream), [])
        # A nanosecond of overlap is rounding.
        lane = next((k for k, until in enumerate(lanes) if start[i] >= until - 1), len(lanes))
        if lane == len(lanes):
            lanes.append(0)
        start[i] = max(start[i], lanes[lane])
        lanes[lane] = end[i] = max(start[i], end[i])
        # Compute is thread 1; further lanes follow the network's first, so that the order on screen is fixed.
        thread[i] = 1 + stream + len(STREAMS) * lane
        names[device, thread[i]] = STREAMS[stream] + (f" {lane + 1}" if lane else "")
    return thread, names


def _metadata(timeline: Timeline, names: dict[tuple[int, int], str]) -> list[Event]:
    out: list[Event] = []
    for p, (name, replicas) in enumerate(zip(timeline.classes, timeline.replicas, strict=True)):
        many = f" (each of {replicas:,} devices)" if replicas > 1 else ""
        out.append({"ph": "M", "pid": p, "tid": 0, "name": "process_name", "args": {"name": name + many}})
        out.append({"ph": "M", "pid": p, "tid": 0, "name": "process_sort_index", "args": {"sort_index": p}})
    for (p, tid), name in sorted(names.items()):
        out.append({"ph": "M", "pid": p, "tid": tid, "name": "thread_name", "args": {"name": name}})
        out.append({"ph": "M", "pid": p, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
    return out


def _slices(timeline: Timeline, start: list[int], end: list[int], thread: list[int]) -> list[Event]:
    device, kind, stream = timeline.device.tolist(), timeline.kind.tolist(), timeline.stream.tolist()
    chunk, microbatch = timeline.chunk.tolist(), timeline.microbatch.tolist()
    out = []
    for i in range(len(timeline)):
        # Work that is done once a step belongs to no microbatch.
        args = {"microbatch": microbatch[i], "chunk": chunk[i]} if microbatch[i] >= 0 else {}
        out.append(
            {
                "ph": "X",
                "pid": device[i],
                "tid": thread[i],
                "ts": start[i] / 1000,
                "dur": (end[i] - start[i]) / 1000,
                "name": KINDS[kind[i]],
                "cat": STREAMS[stream[i]],
                "args": args,
            }
        )
    return out


def _arrows(timeline: Timeline, start: list[int], end: list[int], thread: list[int]) -> list[Event]:
    """From the end of the row of another class that let a row start, to that row."""
    device, before = timeline.device.tolist(), timeline.predecessor.tolist()
    out = []
    for i in range(len(timeline)):
        j = before[i]
        if j < 0 or device[j] == device[i]:
            continue
        # An arrow belongs to the slice around its time, which the slice's very end is not.
        leaves = max(start[j], end[j] - 1)
        one = {"cat": "hop", "name": "waits for", "id": i}
        out.append({"ph": "s", "pid": device[j], "tid": thread[j], "ts": leaves / 1000, **one})
        out.append({"ph": "f", "bp": "e", "pid": device[i], "tid": thread[i], "ts": start[i] / 1000, **one})
    return out


def _memory(timeline: Timeline) -> list[Event]:
    """A counter of bytes per class."""
    return [
        {"ph": "C", "pid": p, "tid": 0, "ts": t / 1000, "name": "memory", "args": {"bytes": round(b)}}
        for p, (times, values) in enumerate(timeline.memory)
        for t, b in zip(_nanoseconds(times), values.tolist(), strict=True)
    ]
