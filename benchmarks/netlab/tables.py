"""The hosts' tables of one request as one: what only a comparison of hosts shows, and whom it names as slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from simulator.calibration.tables import read_table
from simulator.results.measurement import Measurement, MeasurementTable

# A host is slow where the quicker of its pairs takes this many times what the median host's does.
SLOW = 1.5


def joined(paths: Sequence[Path], name: str) -> MeasurementTable:
    """One table of all hosts' rows of collectives alone: each is one row, of the median host."""
    tables = [read_table(path) for path in paths]
    jobs = {key: job for t in tables for key, job in t.jobs.items()}
    together: dict[str, list[Measurement]] = defaultdict(list)
    for table in tables:
        for row in table.rows:
            together[row.id.rpartition("@")[0]].append(row)
    out = []
    for key, rows in together.items():
        wanted = median(r.seconds or 0.0 for r in rows)
        row = min(rows, key=lambda r: abs((r.seconds or 0.0) - wanted))
        out.append(replace(row, id=key, device=None))
    return MeasurementTable(tuple(out), jobs, {}, name)


def pair_seconds(paths: Sequence[Path]) -> dict[int, float]:
    """For each host, seconds of an exchange with the quicker of its partners: what its own link allows."""
    found: dict[int, list[float]] = defaultdict(list)
    for path in paths:
        for row in read_table(path).rows:
            if row.kind == "collective" and row.group_size == 2 and row.device is not None and row.seconds is not None:
                found[row.device].append(row.seconds)
    return {host: min(seconds) for host, seconds in found.items()}


def slow_host(seconds: Mapping[int, float]) -> tuple[int | None, float]:
    """The host that is slow with all its partners, if there is one, and how many times the median host it takes."""
    worst = max(seconds, key=lambda host: seconds[host])
    ratio = seconds[worst] / median(seconds.values())
    return (worst if ratio > SLOW else None), ratio
