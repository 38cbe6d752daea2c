"""Search of the placement: every order of the mesh axes over the devices, priced by the closed form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Axis, Job, Placement


@dataclass(frozen=True, slots=True)
class Placed:
    """One order of the axes, neighbours in the fastest network first, and what a step costs with it."""

    order: tuple[Axis, ...]
    step_time_s: float
    all_to_all_s: float
    exposed_communication_s: float


def placements(job: Job) -> list[Placed]:
    """All orders that differ, fastest first; axes of degree 1 make no difference and keep their default place.

    Raises QuestionError where the job itself is wrong.
    """
    cluster = resolve_cluster(job.cluster)
    default = Placement().order
    degree = {"tensor": job.plan.tensor, "context": job.plan.context, "pipeline": job.plan.pipeline, "data": 2}
    seen: set[tuple[str, ...]] = set()
    out = []
    for order in permutations(default):
        split = tuple(a for a in order if degree[a] > 1)
        if split in seen:
            continue
        seen.add(split)
        plan = job.plan.model_copy(update={"placement": Placement(order=order)})
        try:
            answer = forecast_on(job.model_copy(update={"plan": plan}), cluster, "placement")
        except QuestionError:
            if order == default:
                raise
            # Experts' axes have to be neighbours: an order that parts them is none for this job.
            continue
        parts = answer.parts
        out.append(
            Placed(order, answer.step_time_s, answer.all_to_all.time_s, parts.all_to_all_s + parts.communication_s)
        )
    return sorted(out, key=lambda p: (p.step_time_s, p.order != default, p.order))
