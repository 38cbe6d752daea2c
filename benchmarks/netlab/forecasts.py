"""What the simulator says of a case: collectives alone, steps on the plan's own graph, and the busiest link."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netlab.plan import Plan, graph
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import job_from_mapping
from simulator.network.graph_file import topology_from_file
from simulator.network.templates import Templates, solo_seconds
from simulator.results.measurement import Measurement, MeasurementTable


@dataclass(frozen=True)
class Score:
    """One measured thing of a case, before (the shipped profile) and after (the calibrated one)."""

    case: str
    what: str
    bytes: float
    measured_s: float
    before_s: float
    after_s: float

    @property
    def error_before(self) -> float:
        """Forecast over measurement, less one."""
        return self.before_s / self.measured_s - 1

    @property
    def error_after(self) -> float:
        """The same of the calibrated profile."""
        return self.after_s / self.measured_s - 1


def write_graph(plan: Plan, folder: Path) -> Path:
    """The plan as a file for `--topology`."""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', plan.name)}.json"
    path.write_text(json.dumps(graph(plan), indent=1), encoding="utf-8")
    return path


def collective_seconds(row: Measurement, cluster: Mapping[str, Any], topology: Path, chip: Chip | None) -> float:
    """One collective alone."""
    found = resolve_cluster(cluster, chip=chip)
    drawn = topology_from_file(topology)
    made = Templates(found, drawn).collective(row.name, row.group_size, row.stride, row.bytes or 0.0, groups="all")
    return solo_seconds(made, drawn)


def scores(case: str, table: MeasurementTable, topology: Path, before: Chip | None, after: Chip) -> list[Score]:
    """A score of every collective over all hosts, and of every whole step, in `table`."""
    out = []
    for row in table.rows:
        job = table.jobs[row.job_hash]
        if row.kind == "collective" and row.level and row.group_size == row.devices:
            first, second = (collective_seconds(row, job["cluster"], topology, c) for c in (before, after))
            out.append(Score(case, row.name, row.bytes or 0.0, row.seconds or 0.0, first, second))
        elif row.kind == "step":
            options = EventOptions(graph=topology)
            asked = job_from_mapping(job, where=row.id)
            one, two = (forecast(asked, chip=c, options=options).step_time_s for c in (before, after))
            out.append(Score(case, f"step {asked.name}", 0.0, row.seconds or 0.0, one, two))
    return out


def busiest_link(job: Mapping[str, Any], topology: Path, chip: Chip) -> tuple[str, float]:
    """The link that is busiest in a step of `job`, and the share of the step that it is (what `link-load` shows)."""
    asked = job_from_mapping(dict(job), where="job")
    found = forecast(asked, chip=chip, options=EventOptions(graph=topology))
    assert found.events is not None
    top = found.events.links[0]
    return top.name, top.utilisation
