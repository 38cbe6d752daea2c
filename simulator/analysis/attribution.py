"""A step by op class: the seconds of every part of a forecast shared out among the ops that make it.

The closed form knows what each op computes and what each collective exposes. What a part has beyond these (the
pipeline's slack hides a reduction; events slow compute beside communication) is one row, `not by op`, so that the rows
always add up to the step.
"""

from __future__ import annotations

from collections import defaultdict

from hw_profiles.cluster import Cluster
from simulator.analysis.closed_form import ClosedForm, closed_form
from simulator.costs.piece_times import Timer
from simulator.costs.reductions import StateCosts
from simulator.job.job import Job
from simulator.job.rules import Degrees, resolve
from simulator.kernels.roofline import Kernels, class_of
from simulator.results.comparison import Share
from simulator.results.forecast import Forecast
from simulator.workload.habits import habits_of
from simulator.workload.stages import Workload, build_workload

NOT_BY_OP = "not by op"
PARTS = ("compute_s", "all_to_all_s", "communication_s", "host_s", "imbalance_s", "bubble_s")
WITH_OPS = PARTS[:3]
# Parts of a step are means that were added in another order: what is left is rounding, or a wait that no part has.
REST = "rest"


def attribute(job: Job, cluster: Cluster, forecast: Forecast) -> tuple[Share, ...]:
    """Seconds of `forecast`'s step by part and op class, mean over devices; they add up to the step exactly.

    `forecast` is that of `job` on `cluster`, by either engine.
    """
    degrees = resolve(job, cluster)
    habits = habits_of(job, cluster.chip.kind, accumulates=degrees.microbatches > 1)
    workload = build_workload(job, degrees, habits)
    kernels = Kernels(cluster.chip)
    # Ops are counted at balanced load: what a busy rank adds is the part `imbalance`, whatever it is.
    formula = closed_form(job, cluster, degrees, habits, workload, kernels, 1.0)
    timer = Timer(job, cluster, degrees, habits, kernels, 1.0)
    costs = StateCosts(job, cluster, degrees, habits, kernels, timer)
    found = {
        "compute_s": _compute(job, degrees, workload, formula, costs),
        "all_to_all_s": _exposed(formula, True),
        "communication_s": _exposed(formula, False),
    }
    out = []
    for part in PARTS:
        whole = float(getattr(forecast.parts, part))
        if part not in WITH_OPS:
            out.append(Share(part, "", whole))
            continue
        rows = [Share(part, name, seconds) for name, seconds in found[part].items()]
        left = whole - sum(r.seconds for r in rows)
        out += sorted(rows, key=lambda r: -r.seconds)
        out.append(Share(part, NOT_BY_OP, left))
    out.append(Share(REST, "", forecast.step_time_s - sum(r.seconds for r in out)))
    return tuple(out)


def _compute(
    job: Job, degrees: Degrees, workload: Workload, formula: ClosedForm, costs: StateCosts
) -> dict[str, float]:
    """Seconds of a step by op class: all passes, mean over stages."""
    out: defaultdict[str, float] = defaultdict(float)
    stages = len(formula.stages)
    for p, stage in enumerate(formula.stages):
        own = workload.held_counts(p, job.plan.schedule)[0]
        for times, n in zip(formula.piece_times, own, strict=True):
            for op in times.ops if n else ():
                each = op.forward_s + op.backward_s + op.recompute_s
                out[class_of(op.scope)] += float(n * degrees.microbatches * each) / stages
        out["optimizer.update"] += float(costs.update_s(stage.dense_parameters, stage.expert_parameters)) / stages
    return {name: seconds for name, seconds in out.items() if seconds}


def _exposed(formula: ClosedForm, all_to_all: bool) -> dict[str, float]:
    """Exposed seconds of a step by collective: all-to-alls or all others, mean over stages."""
    out: defaultdict[str, float] = defaultdict(float)
    for stage in formula.stages:
        for comm, calls, share in stage.comms:
            if (comm.kind == "all_to_all") == all_to_all:
                out[class_of(comm.scope)] += float(comm.seconds * calls * share) / len(formula.stages)
    return {name: seconds for name, seconds in out.items() if seconds}
