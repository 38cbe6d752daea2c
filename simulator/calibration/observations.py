"""From rows of a measurement table to what a fit needs: per job and repetition, a step's compute by class of op.

The profiler slows what it watches, so that a trace says how a step divides, and the timed steps how long it is. What is
left of a step once its host and its collectives are taken off is compute. It is shared out in proportion to the traced
seconds of each class; the gaps between instructions go by their number, and time spent waiting for other devices goes
with the compute that made them late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from simulator.kernels.roofline import class_of
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable, arrays_of

# Instructions of no scope are the stacks of a scan over layers, for the most part (trainer/attribution.py).
UNNAMED, GAPS, WINDOW, SAVED = "unnamed", "gaps", "window", "layers.saved"
Pass = tuple[str, str]


@dataclass(frozen=True)
class Sent:
    """One kind of collective of a step: group, bytes and seconds of a call, how many were timed, and arrays of each."""

    kind: str
    size: int
    stride: int
    bytes: float
    seconds: float
    samples: int = 1
    arrays: int = 1


@dataclass(frozen=True)
class Observed:
    """One job as it was measured once, per device.

    `job_hash` is the table's name of the job, which a later version of the schema may hash otherwise.
    `compute_s` are seconds of a step by (class, pass), summing to the step less host and collectives. `traced` says
    whether there was a trace; without one `compute_s` is empty.
    """

    name: str
    job: Job
    chip: str
    devices: int
    step_s: float
    sent_s: float
    compute_s: Mapping[Pass, float]
    collectives: tuple[Sent, ...]
    all_to_all_s: float
    memory: Mapping[str, float] = field(default_factory=dict)
    job_hash: str = ""

    @property
    def traced(self) -> bool:
        """Whether there was a trace of it."""
        return bool(self.compute_s)


def observed(tables: Iterable[MeasurementTable], host_s: Mapping[int, float]) -> list[Observed]:
    """All measured jobs of `tables`; `host_s` are seconds of the host in a step by devices at work (0 if unknown).

    QuestionError for rows of a job that their table does not carry.
    """
    out = []
    for table in tables:
        groups: dict[str, list[Measurement]] = defaultdict(list)
        for row in table.rows:
            if row.job_hash:
                groups[row.taking or row.id].append(row)
        for name, rows in groups.items():
            found = _one(name, rows, table, host_s)
            if found is not None:
                out.append(found)
    return out


def _one(name: str, rows: list[Measurement], table: MeasurementTable, host_s: Mapping[int, float]) -> Observed | None:
    steps = [r for r in rows if r.kind == "step"]
    if not steps or steps[0].seconds is None:
        return None
    first = steps[0]
    if first.job_hash not in table.jobs:
        raise QuestionError(f"{table.name}: {first.id}: the table does not carry its job ({first.job_hash[:12]})")
    job = job_from_mapping(table.jobs[first.job_hash], where=f"{table.name}: the job of {first.id}")
    devices = first.devices
    ops = [r for r in rows if r.kind == "op" and r.name != WINDOW and r.seconds is not None]
    seen = {r.device for r in ops}
    sent = [r for r in ops if r.level == NETWORK]
    moved = _mean(sent, seen, lambda r: (r.seconds or 0.0) - r.waited_s)
    collectives = tuple(
        Sent(r.name, r.group_size, r.stride, r.bytes or 0.0, r.seconds, r.samples, arrays_of(r)) for r in rows
        if r.kind == "collective" and r.seconds is not None
    )  # fmt: skip
    exchanged = _mean([r for r in sent if "all_to_all" in r.name or r.name == "embedding.exchange"], seen,
                      lambda r: (r.seconds or 0.0) - r.waited_s)  # fmt: skip
    memory = {r.name: r.bytes for r in rows if r.kind == "memory" and r.bytes is not None}
    left = (first.seconds or 0.0) - host_s.get(devices, 0.0) - moved
    compute = _shared_out([r for r in ops if r.level != NETWORK], seen, max(left, 0.0)) if ops else {}
    return Observed(
        name, job, first.chip, devices, first.seconds or 0.0, moved, compute, collectives, exchanged, memory,
        first.job_hash,
    )  # fmt: skip


def _mean(rows: list[Measurement], devices: set[int | None], of: Any) -> float:
    """Sum of `of` over the rows of a device, mean over devices."""
    return float(sum(of(r) for r in rows)) / max(1, len(devices))


def _shared_out(rows: list[Measurement], devices: set[int | None], whole_s: float) -> dict[Pass, float]:
    """`whole_s` by class and pass, as the traced rows of compute divide it."""
    seconds: dict[Pass, list[float]] = defaultdict(list)
    calls: dict[Pass, list[float]] = defaultdict(list)
    gaps = 0.0
    for r in rows:
        if r.name == GAPS:
            gaps += (r.seconds or 0.0) / len(devices)
            continue
        key = (SAVED if r.name == UNNAMED else class_of(r.name), r.phase or "forward")
        seconds[key].append(r.seconds or 0.0)
        calls[key].append(r.calls)
    all_calls = sum(sum(c) for c in calls.values()) / len(devices)
    traced = {
        key: sum(s) / len(devices) + gaps * (sum(calls[key]) / len(devices)) / all_calls for key, s in seconds.items()
    }
    total = sum(traced.values())
    return {key: s / total * whole_s for key, s in traced.items()} if total else {}


def host_seconds(tables: Iterable[MeasurementTable]) -> dict[int, float]:
    """Seconds from Python's call of a program to its end that are not the program's, by devices at work."""
    found: dict[int, list[float]] = defaultdict(list)
    for table in tables:
        for row in table.rows:
            if row.kind == "kernel" and row.name == "program_launch" and row.seconds is not None:
                found[row.devices].append(row.seconds)
    return {devices: mean(seconds) for devices, seconds in found.items()}
