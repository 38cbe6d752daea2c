"""What a reader finds in a file, and what it has to be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulator.results.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Told:
    """What a file does not say of itself, or says otherwise: empty fields are taken from the file where it has them.

    `columns` maps columns of the measurement table to those of a CSV file, `unit` is that of its times. `collective`
    and `group_size` are of nccl-tests, `devices` of training logs, `warmup` how many of their first lines to leave out
    (None: by the rule). `process` and `stack` are of traces: which processes are devices, and whose scopes to use.
    """

    chip: str
    source: str = ""
    date: str = ""
    software: str = ""
    job_hash: str = ""
    kind: str = ""
    collective: str = ""
    group_size: int | None = None
    devices: int | None = None
    warmup: int | None = None
    process: str = ""
    stack: str = "decoder"
    clocks_apart: bool = False
    unit: str = "s"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of one file, what is noteworthy about them in words, and for traces what the devices did."""

    file: str
    format: str
    rows: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    profile: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts of rows by kind in place of the rows."""
        kinds: dict[str, int] = {}
        for row in self.rows:
            kinds[row.kind] = kinds.get(row.kind, 0) + 1
        made = {"file": self.file, "format": self.format, "rows": kinds, "notes": list(self.notes)}
        return made | ({"profile": dict(self.profile)} if self.profile is not None else {})


def labelled(told: Told, path: Path, date: str, software: str) -> Measurement:
    """A row with what all rows of a file share; the file's own date and software where nothing else was told."""
    return Measurement(
        id="", source=told.source or path.name, date=told.date or date, chip=told.chip,
        software=told.software or software, kind="", name="", job_hash=told.job_hash,
    )  # fmt: skip


def numbered(rows: Sequence[Measurement], path: Path) -> tuple[Measurement, ...]:
    """The rows with ids: the file's name and their place in it."""
    return tuple(replace(row, id=f"{path.name}:{i}") for i, row in enumerate(rows))


def quantile(values: Sequence[float], q: float) -> float:
    """The `q` quantile of `values`, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
