"""One row of a measurement table: what somebody timed (or counted), where, and how often. No computation.

Every source becomes rows of this one schema (docs/measurements.md): our trainer's traces and benchmarks, other people's
profiles, logs and tables. Seconds, bytes and FLOPs are per device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Of the schema; a table of a newer one is refused. 2 has the column `nodes`.
VERSION = 2

# step: a whole training step. op: everything of one scope and pass in a step. kernel: one product, stream or launch of
# a shape. collective: one call. memory: bytes, not seconds. compiler-estimate: seconds that a compiler states.
KINDS = ("step", "op", "kernel", "collective", "memory", "compiler-estimate")
PASSES = ("", "forward", "recompute", "backward")
# The level of an `op` row that is what its scope sends, waiting included; `waited_s` reads that from its note.
NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured thing.

    `id` names it within its table. `name` is what was measured: a scope (`simulator/job/scopes.py`) for `op` rows;
    the kind of collective (all_to_all); product, grouped_product, attention, stream, launch for kernels; peak for
    memory. `shape` is [groups, rows, depth, columns] of a product, [arrays] of a merged collective, and free
    elsewhere. `bytes` of a collective are nccl-tests' size; of a `memory` row they are the result, and `seconds` is
    None. `seconds` is the `statistic` of `samples` timings, `p10_s` and `p90_s` their spread, of all `calls` in a
    step together for `op` rows. `group_size` devices take part in a collective, `stride` apart; `devices` were at
    work at the same time, on `nodes` hosts (of a collective alone on CPUs: in so many processes). `device` is None for
    a statistic over all. `job_hash` names a job that the table carries.
    """

    id: str
    source: str
    date: str
    chip: str
    software: str
    kind: str
    name: str
    seconds: float | None = None
    phase: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    bytes: float | None = None
    flops: float | None = None
    calls: float = 1.0
    group_size: int = 1
    stride: int = 1
    level: str = ""
    devices: int = 1
    nodes: int = 1
    device: int | None = None
    statistic: str = "median"
    samples: int = 1
    p10_s: float | None = None
    p90_s: float | None = None
    job_hash: str = ""
    note: str = ""

    @property
    def taking(self) -> str:
        """The measurement it is part of, which its id names before a colon; a job may be measured several times."""
        return self.id.partition(":")[0] if ":" in self.id else ""

    @property
    def devices_per_node(self) -> int:
        """Devices of one host that were at work at the same time."""
        return self.devices // self.nodes

    @property
    def waited_s(self) -> float:
        """Of an `op` row on the network: seconds of it that waited for other devices to arrive."""
        words = self.note.split()
        return float(words[1]) if self.level == NETWORK and words[:1] == ["waited"] else 0.0


@dataclass(frozen=True, slots=True)
class MeasurementTable:
    """Rows, the jobs (as mappings, by hash) that they speak of, and files that go with it (routing, by job hash).

    `timelines` are one traced step each, by job hash: (device, kind, start, end) in seconds from its first event, the
    kinds those of a forecast's timeline.
    """

    rows: tuple[Measurement, ...]
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routing: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    timelines: Mapping[str, Sequence[tuple[int, str, float, float]]] = field(default_factory=dict)


def arrays_of(row: Measurement) -> int:
    """Of how many arrays a collective was merged."""
    return row.shape[0] if row.kind == "collective" and row.shape else 1


# What makes a row the same measurement wherever it is copied to: not its id, which tables number anew, nor its date.
IDENTITY = (
    "source", "chip", "software", "kind", "name", "seconds", "phase", "shape", "dtype", "bytes", "group_size", "stride",
    "devices", "device", "statistic", "job_hash",
)  # fmt: skip
HASH_DIGITS = 16


def row_hash(fields: Mapping[str, Any]) -> str:
    """A short SHA-256 (64 bits, hexadecimal) of a row's identifying fields, in no order, empty ones left out.

    Numbers hash by value, so that `8`, `8.0` and 8 are one; a list (a shape) as numbers joined by `x`.
    """
    said = sorted(f"{name}={text}" for name, value in fields.items() if (text := _canonical(value)))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:HASH_DIGITS]


def measurement_hash(row: Measurement) -> str:
    """`row_hash` of a measurement: what a calibrated profile lists of the rows that it was fitted on."""
    return row_hash({name: getattr(row, name) for name in IDENTITY})


def _canonical(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return "x".join(_canonical(v) for v in value)
    text = str(value).strip()
    try:
        return repr(float(text))
    except ValueError:
        return text
