"""The hosts' tables of one request as one: what only a comparison of hosts shows, and whom it names as slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from simulator.calibration.tables import read_table
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable

# A host is slow where the quicker of its pairs takes this many times what the median host's does.
SLOW = 1.5


def joined(paths: Sequence[Path], name: str) -> MeasurementTable:
    """One table of all hosts' rows.

    A step, and a collective, is one row. Of a step it is the median host. A collective within a step is timed on each
    host from when that host is ready, so that the quickest row waited least for others: it is the collective, and what
    the others took longer was waiting, which their rows of ops say.
    """
    tables = [read_table(path) for path in paths]
    jobs = {key: job for t in tables for key, job in t.jobs.items()}
    together: dict[str, list[Measurement]] = defaultdict(list)
    for table in tables:
        for row in table.rows:
            together[row.id.rpartition("@")[0]].append(row)
    out: list[Measurement] = []
    for key, rows in together.items():
        seconds = [r.seconds or 0.0 for r in rows]
        if rows[0].kind == "op":
            least = min(seconds)
            out += [
                replace(r, note=f"waited {s - least:.9f} s of it for other devices") if r.level == NETWORK else r
                for r, s in zip(rows, seconds, strict=True)
            ]
            continue
        alone = rows[0].kind == "collective" and rows[0].level
        wanted = min(seconds) if rows[0].kind == "collective" and not alone else median(seconds)
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
