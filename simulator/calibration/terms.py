"""What the roofline says of each class of ops of a job, apart: launches, arithmetic, memory traffic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from hw_profiles.cluster import Cluster
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.costs.piece_times import Timer, filled
from simulator.costs.reductions import StateCosts
from simulator.job.job import Job
from simulator.job.rules import Degrees, resolve
from simulator.kernels.roofline import BACKWARD, FORWARD, RECOMPUTE, Kernels, class_of
from simulator.workload.habits import Habits, habits_of
from simulator.workload.saved import is_recomputed
from simulator.workload.stages import Workload, build_workload, recompute_names

Pass = tuple[str, str]


@dataclass
class Terms:
    """Seconds of a step of one class and pass on one device, by what they are made of; `largest_s` of one op."""

    launches_s: float = 0.0
    arithmetic_s: float = 0.0
    traffic_s: float = 0.0
    count: float = 0.0

    @property
    def roofline_s(self) -> float:
        """Launches, and the larger of the others."""
        return self.launches_s + max(self.arithmetic_s, self.traffic_s)

    @property
    def size_s(self) -> float:
        """Roofline seconds of one op: by how much larger it is than what was fitted, decides how far to trust it."""
        return self.roofline_s / max(self.count, 1.0)


def terms_of(job: Job, chip: Chip) -> dict[Pass, Terms]:
    """The terms of every class and pass of `job`, mean over its stages, on `chip` without its fitted classes."""
    cluster = resolve_cluster(job.cluster, chip=chip.model_copy(update={"op_classes": {}}))
    degrees, habits, workload = _built(job, cluster)
    kernels, names = Kernels(cluster.chip), recompute_names(job)
    out: dict[Pass, Terms] = defaultdict(Terms)
    stages = len(workload.counts)

    def add(key: Pass, times: float, terms: tuple[float, float, float]) -> None:
        found = out[key]
        found.launches_s += times * terms[0]
        found.arithmetic_s += times * terms[1]
        found.traffic_s += times * terms[2]
        found.count += times

    for counts in workload.counts:
        for piece, n in zip(workload.pieces, counts, strict=True):
            times = n * degrees.microbatches / stages
            for op in piece.work.ops:
                name = class_of(op.scope)
                passes = [FORWARD, BACKWARD]
                if piece.is_layer and is_recomputed(op, names) and not op.dead_on_recompute:
                    passes.append(RECOMPUTE)
                for phase in passes:
                    add((name, phase), times, tuple(float(x) for x in kernels.terms(op, phase)))  # type: ignore[arg-type]
    costs = StateCosts(job, cluster, degrees, habits, kernels, Timer(job, cluster, degrees, habits, kernels, 1.0))
    for counts in workload.counts:
        pairs = list(zip(workload.pieces, counts, strict=True))
        dense = sum(n * p.dense_parameters for p, n in pairs)
        expert = sum(n * p.expert_parameters for p, n in pairs)
        seconds = float(costs.update_s(dense, expert)) - kernels.overhead_s
        add(("optimizer.update", FORWARD), 1 / stages, (kernels.overhead_s, 0.0, seconds))
    return dict(out)


def _built(job: Job, cluster: Cluster) -> tuple[Degrees, Habits, Workload]:
    degrees = resolve(job, cluster)
    habits = habits_of(job, cluster.chip.kind, accumulates=degrees.microbatches > 1)
    return degrees, habits, build_workload(job, degrees, habits)


def fillable_s(job: Job, chip: Chip) -> float:
    """Seconds of a step's calls that other groups of a host could fill with compute, one device, mean over stages.

    0 for devices on several hosts or links of their own, where nothing is known to share cores.
    """
    cluster = resolve_cluster(job.cluster, chip=chip)
    if len(cluster.levels) != 1:
        return 0.0
    degrees, habits, workload = _built(job, cluster)
    timer = Timer(job, cluster, degrees, habits, Kernels(cluster.chip), 1.0)
    devices = cluster.levels[0].devices
    of_piece = [
        sum(float(filled(c, devices) * (c.forward + c.backward) * c.seconds) for c in timer.time(piece).comms)
        for piece in workload.pieces
    ]
    each = (n * s for counts in workload.counts for n, s in zip(counts, of_piece, strict=True))
    return sum(each) * float(degrees.microbatches) / len(workload.counts)


def scaled(terms: Mapping[Pass, Terms], factor: float) -> dict[Pass, Terms]:
    """The same work on a device that is slower by `factor`."""
    return {
        key: Terms(t.launches_s * factor, t.arithmetic_s * factor, t.traffic_s * factor, t.count)
        for key, t in terms.items()
    }
