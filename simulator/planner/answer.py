"""From a search to its answer: the best plans as records, re-ranked by events, beside the job as given, and why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.planner.constraints import Constraint
from simulator.planner.kept import NUMBERS, Kept
from simulator.planner.outcome import Outcome
from simulator.planner.search import Search
from simulator.planner.space import Space
from simulator.planner.table import FIELDS, code, get, overrides, row, value, with_plan
from simulator.planner.why_not import rejections
from simulator.results.plans import PlanSearch, RankedPlan

# Told how many of the best have been run by events, and of how many.
Progress = Callable[[int, int], None]


def answer_of(
    search: Search,
    found: Outcome,
    *,
    engine_top: int = 0,
    source: Sequence[str] = ("JOB.yaml",),
    folder: Path | None = None,
    progress: Progress | None = None,
) -> PlanSearch:
    """The answer of a search that has run; the first `engine_top` of its best are ranked anew by events.

    `source` names the job in commands (its file, and what is set beside), `folder` holds what the job names.
    """
    job, cluster = search.job, search.cluster
    best = records(job, found.best)
    best = by_events(job, cluster, best, engine_top, search.objective, folder, progress)
    given, said = _given(job, cluster, "events" if engine_top else "closed-form", folder)
    broken = {f"{name}: {rule}": n for (name, rule), n in found.most_broken()}
    return PlanSearch(
        job=job.name,
        cluster=cluster.name,
        objective=search.objective,
        constraints=tuple(c.text for c in search.constraints),
        capacity_bytes=search.form.capacity,
        space=search.space.count,
        searched=found.searched,
        valid=found.valid,
        too_large=found.too_large,
        pruned=found.pruned,
        evaluated=found.evaluated,
        feasible=found.feasible,
        seconds=found.seconds,
        given=given,
        given_said=said,
        best=tuple(best),
        pareto=tuple(sorted(records(job, found.front), key=lambda p: p.step_time_s)),
        rejected=_why_not(job, cluster, search.space, best[0], search.constraints, search.objective, source),
        broken=broken,
    )


def _why_not(
    job: Job,
    cluster: Cluster,
    space: Space,
    winner: RankedPlan,
    constraints: Sequence[Constraint],
    objective: str,
    source: Sequence[str],
) -> tuple[Any, ...]:
    return rejections(job, cluster, space, winner.plan, constraints, objective, source)


def records(job: Job, kept: Kept) -> list[RankedPlan]:
    """Plans that a search kept, as records, in their order."""
    columns = dict(zip(FIELDS, kept.codes.T, strict=True))
    return [_record(job, row(columns, i), dict(zip(NUMBERS, kept.numbers[i].tolist(), strict=True)))
            for i in range(len(kept.codes))]  # fmt: skip


def _record(job: Job, plan: dict[str, Any], numbers: dict[str, float]) -> RankedPlan:
    usd = numbers["usd_per_1b_tokens"]
    return RankedPlan(
        plan=plan,
        step_time_s=numbers["step_time_s"],
        memory_peak_bytes=numbers["memory_peak_bytes"],
        usd_per_1b_tokens=None if math.isnan(usd) else usd,
        mfu=numbers["mfu"],
        tokens_per_s=numbers["tokens_per_s"],
        engine="closed-form",
        closed_form_step_time_s=numbers["step_time_s"],
        overrides=tuple(overrides(job, plan)),
    )


def by_events(
    job: Job,
    cluster: Cluster,
    best: list[RankedPlan],
    count: int,
    objective: str,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> list[RankedPlan]:
    """`best` with the first `count` timed by events and put in that order; memory is the formula's either way."""
    out = []
    for i, plan in enumerate(best[:count]):
        answer = forecast_on(with_plan(job, plan.plan), cluster, "search", engine="events", folder=folder)
        out.append(
            replace(
                plan,
                step_time_s=answer.step_time_s,
                usd_per_1b_tokens=answer.cost.usd_per_1b_tokens,
                mfu=answer.mfu,
                tokens_per_s=answer.tokens_per_s,
                engine="events",
            )
        )
        if progress is not None:
            progress(i + 1, min(count, len(best)))
    if objective != "memory":
        out.sort(key=lambda p: p.step_time_s)
    return out + best[count:]


def _given(job: Job, cluster: Cluster, engine: str, folder: Path | None) -> tuple[RankedPlan | None, str]:
    """The job as it was given, by the engine that the best were ranked by; None, and why, where it is no plan."""
    try:
        answer = forecast_on(job, cluster, "search", engine=engine, folder=folder)
    except QuestionError as error:
        return None, str(error)
    formula = answer.step_time_s if answer.events is None else answer.events.closed_form_step_time_s
    record = RankedPlan(
        plan={field: value(field, code(field, get(job, field))) for field in FIELDS},
        step_time_s=answer.step_time_s,
        memory_peak_bytes=answer.memory.peak_bytes,
        usd_per_1b_tokens=answer.cost.usd_per_1b_tokens,
        mfu=answer.mfu,
        tokens_per_s=answer.tokens_per_s,
        engine=engine,
        closed_form_step_time_s=formula,
        overrides=(),
    )
    return record, "" if answer.memory.fits else "does not fit"
