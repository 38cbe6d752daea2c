"""Two jobs side by side: each forecast, shared out among op classes, and the differences, which add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw_profiles.cluster import Cluster
from simulator.analysis.attribution import PARTS, REST, attribute
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.results.comparison import Comparison, Difference, Share, Side
from simulator.results.forecast import Forecast


def compare(
    a: tuple[Job, Cluster, Path | None], b: tuple[Job, Cluster, Path | None], engine: str = "closed-form"
) -> Comparison:
    """Where the second step differs from the first; each job with its cluster and the folder of the files it names.

    Rows are op classes within parts of the step, and sum to the difference of the step times. QuestionError as
    `forecast`.
    """
    forecasts, shares = [], []
    for job, cluster, folder in (a, b):
        answer = forecast_on(job, cluster, cluster.chip.name, engine, folder=folder)
        forecasts.append(answer)
        shares.append(attribute(job, cluster, answer))
    return Comparison(
        a=_side(forecasts[0]),
        b=_side(forecasts[1]),
        engine=engine,
        parts=_differences(*(_by_part(s) for s in shares)),
        rows=_differences(*shares),
        changed=changed_fields(a[0], b[0]),
    )


def _by_part(shares: Sequence[Share]) -> list[Share]:
    return [Share(part, "", sum(s.seconds for s in shares if s.part == part)) for part in (*PARTS, REST)]


def _differences(a: Sequence[Share], b: Sequence[Share]) -> tuple[Difference, ...]:
    """Rows of both, part after part; within a part the largest difference first."""
    first, second = ({(s.part, s.name): s.seconds for s in shares} for shares in (a, b))
    rows = [Difference(*key, first.get(key, 0.0), second.get(key, 0.0)) for key in dict.fromkeys([*first, *second])]
    order = {part: i for i, part in enumerate((*PARTS, REST))}
    return tuple(sorted(rows, key=lambda r: (order[r.part], -abs(r.difference_s), r.name)))


def _side(f: Forecast) -> Side:
    return Side(
        name=f.job.name,
        model=f.job.model,
        cluster=f.job.cluster,
        devices=f.job.devices,
        tokens_per_step=f.job.tokens_per_step,
        step_time_s=f.step_time_s,
        tokens_per_s_per_device=f.tokens_per_s_per_device,
        mfu=f.mfu,
        memory_peak_bytes=f.memory.peak_bytes,
        memory_capacity_bytes=f.memory.capacity_bytes,
        usd_per_1b_tokens=f.cost.usd_per_1b_tokens,
    )


def changed_fields(a: Job, b: Job) -> tuple[tuple[str, Any, Any], ...]:
    """Fields that differ, with both values, in the order of the schema; None where one job has no such field."""
    hidden: Any = {"name": True, "model": {"notes", "source", "published"}, "training": {"run", "learning"}}
    first, second = (_flat(job.model_dump(mode="json", exclude=hidden)) for job in (a, b))
    names = dict.fromkeys([*first, *second])
    return tuple((n, first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        out |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) and inner else {name: inner}
    return out
