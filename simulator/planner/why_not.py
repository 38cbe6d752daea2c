"""Why not the plans beside the winner: each differs from it in one field by one step, and says what rejected it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.planner.constraints import Constraint
from simulator.planner.space import Space
from simulator.planner.table import CHOICES, FIELDS, code, overrides, value, with_plan
from simulator.results.forecast import Forecast
from simulator.results.plans import Rejection

PARTS = {
    "compute_s": "compute",
    "all_to_all_s": "all-to-all",
    "communication_s": "other communication",
    "host_s": "host",
    "imbalance_s": "imbalance",
    "bubble_s": "bubble",
}
# Below this, relative, two forecasts are the same.
SAME = 1e-9


def neighbours(space: Space, plan: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields and values one step from `plan` within the space: the next smaller and larger degree, every other name."""
    for field in FIELDS:
        values = space.values[field]
        here = code(field, plan[field])
        if field in CHOICES:
            yield from ((field, value(field, v)) for v in values if v != here)
            continue
        ordered = sorted(values)
        at = ordered.index(here) if here in ordered else 0
        yield from ((field, value(field, ordered[i])) for i in (at - 1, at + 1) if 0 <= i < len(ordered))


def measure(answer: Forecast, name: str, plan: Mapping[str, Any]) -> float:
    """What a constraint's name is in a forecast; NaN for dollars without a price."""
    usd = answer.cost.usd_per_1b_tokens
    known = {
        "step_time_s": answer.step_time_s,
        "memory_peak_bytes": answer.memory.peak_bytes,
        "mfu": answer.mfu,
        "usd_per_1b_tokens": float("nan") if usd is None else usd,
        "tokens_per_s": answer.tokens_per_s,
        "devices": answer.job.devices,
    }
    return float(known[name]) if name in known else float(code(name, plan[name]))


def rejections(
    job: Job,
    cluster: Cluster,
    space: Space,
    winner: Mapping[str, Any],
    constraints: Sequence[Constraint],
    objective: str,
    source: Sequence[str],
) -> tuple[Rejection, ...]:
    """Every neighbour of `winner`, and the rule, bytes, constraint or seconds that rejected it, by the closed form.

    `source` are the words that name the job in the command that shows it: its file, and what was set beside.
    """
    best = forecast_on(with_plan(job, winner), cluster, "search")
    out = []
    for field, other in neighbours(space, winner):
        plan = {**winner, field: other}
        kind, said, by = _reason(job, cluster, plan, best, constraints, objective)
        out.append(Rejection(field, winner[field], other, kind, said, by, command(job, plan, source)))
    order = {"cost": 0, "constraint": 1, "memory": 2, "rule": 3, "equal": 4}
    return tuple(sorted(out, key=lambda r: (order[r.kind], r.by if r.by is not None else 0.0)))


def command(job: Job, plan: Mapping[str, Any], source: Sequence[str]) -> str:
    """The command that forecasts a plan of the job that `source` names, by the closed form."""
    changes = [part for text in overrides(job, plan) for part in ("--set", text)]
    return shlex.join(["moecast", "forecast", *source, "--engine", "closed-form", *changes])


def _reason(
    job: Job,
    cluster: Cluster,
    plan: Mapping[str, Any],
    best: Forecast,
    constraints: Sequence[Constraint],
    objective: str,
) -> tuple[str, str, float | None]:
    try:
        answer = forecast_on(with_plan(job, plan), cluster, "search")
    except QuestionError as error:
        return "rule", str(error), None
    memory = answer.memory
    if not memory.fits:
        over = memory.peak_bytes - memory.capacity_bytes
        worst = _grown(best.memory.worst, memory.worst)
        return "memory", f"{over / 2**30:.3g} GiB too many on a device; {worst}", over
    for c in constraints:
        found = measure(answer, c.name, plan)
        if not c.holds(found):
            miss = abs(found - c.bound)
            return "constraint", f"{c.text}: it has {c.said(found)}", miss
    if objective == "memory":
        more = memory.peak_bytes - best.memory.peak_bytes
        if abs(more) <= SAME * best.memory.peak_bytes:
            return "equal", "takes as much memory", more
        return "cost", f"{more / 2**30:+.3g} GiB on a device; {_grown(best.memory.worst, memory.worst)}", more
    more = answer.step_time_s - best.step_time_s
    if abs(more) <= SAME * best.step_time_s:
        return "equal", "takes as long", more
    grown = {said: getattr(answer.parts, n) - getattr(best.parts, n) for n, said in PARTS.items()}
    part = max(grown, key=lambda said: grown[said])
    return "cost", f"{more / best.step_time_s * 100:+.1f} % a step; {part} {grown[part]:+.3g} s", more


def _grown(before: Any, after: Any) -> str:
    """The part of a device's memory that grew most."""
    names = [n for n in type(after).__slots__ if n.endswith("_bytes")]
    grown = {n: getattr(after, n) - getattr(before, n) for n in names}
    most = max(grown, key=lambda n: grown[n])
    return f"{most.removesuffix('_bytes').replace('_', ' ')} {grown[most] / 2**30:+.3g} GiB"
