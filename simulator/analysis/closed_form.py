"""The closed form: step time of a job from formulas, without events.

Stages (`stage_formula`) are put together by the pipeline formula; gradient reduction, optimiser and host follow. What
the formulas leave out (contention between collectives, real rendezvous, jitter) is the events engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.analysis.launches import launch_bound, launch_waits
from simulator.analysis.stage_formula import StageFormula, StageResult
from simulator.costs.piece_times import PieceTime, Timer, launch_s
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.numbers import Number, largest, maximum, some, where
from simulator.results.forecast import Parts
from simulator.workload.habits import Habits
from simulator.workload.routing import busiest_over_mean, dirichlet_busiest, zipf_busiest
from simulator.workload.schedules import StageTimes, pipeline_time
from simulator.workload.stages import Workload


@dataclass(slots=True)
class ClosedForm:
    """Result of the closed form: the step, its parts, and each stage."""

    step_s: Number
    parts: Parts
    stages: list[StageResult]
    piece_times: list[PieceTime]


def busiest_rank(job: Job, degrees: Degrees) -> float:
    """Load of the busiest expert rank over the mean under the job's routing model; 1 where capacity pads every rank."""
    routing = job.training.routing
    if not job.model.moes or degrees.expert == 1 or job.training.capacity != "dropless":
        return 1.0
    worst = 1.0
    for moe in job.model.moes:
        if moe.router.kind == "expert_choice":
            # Experts choose their tokens: every one is exactly full.
            continue
        length = max(job.batch.encoder_length, job.batch.decoder_length)
        tokens = degrees.microbatch_sequences * length * degrees.data / degrees.expert_data
        placed = (tokens, routing.placement, routing.replicas)
        if routing.model == "chance":
            worst = max(worst, float(busiest_over_mean(tokens, moe, degrees.expert)))
        elif routing.model == "zipf":
            assert routing.exponent is not None
            worst = max(worst, zipf_busiest(moe, degrees.expert, routing.exponent, *placed))
        elif routing.model == "dirichlet":
            assert routing.concentration is not None
            worst = max(worst, dirichlet_busiest(moe, degrees.expert, routing.concentration, *placed))
        elif routing.model == "replay":
            raise QuestionError("training.routing.model = replay: recorded loads need --engine events")
    return worst


def closed_form(
    job: Job,
    cluster: Cluster,
    degrees: Degrees,
    habits: Habits,
    workload: Workload,
    kernels: Kernels,
    busiest: float | None = None,
) -> ClosedForm:
    """Step time and parts of `job`.

    `busiest` is the busiest expert rank's load over the mean where it is known (recorded routing); else the routing
    model's expectation. QuestionError for what formulas cannot answer.
    """
    load = busiest_rank(job, degrees) if busiest is None else busiest
    timer = Timer(job, cluster, degrees, habits, kernels, load)
    times = [timer.time(p) for p in workload.pieces]
    formula = StageFormula(job, cluster, degrees, habits, kernels, timer)
    results: dict[tuple[tuple[int, ...], ...], StageResult] = {}
    for key in stage_keys(job, workload):
        if key not in results:
            results[key] = formula.result(*held_pieces(times, key))
    stages = [results[key] for key in stage_keys(job, workload)]
    hop = hop_s(timer, degrees, workload)
    pipeline = pipeline_s(job, degrees, stages, times, workload, hop)
    launched = launched_s(job, cluster, degrees, habits, stages)
    after = after_s(job, degrees, list(enumerate(stages)))
    free, step = pipeline + after, maximum(pipeline, launched) + after
    once = cluster.chip.host_step_overhead_us.value * 1e-6
    host = once + step - free
    step = step + once
    n = len(stages)

    def mean(name: str) -> Number:
        return sum(getattr(s, name) for s in stages) / n

    compute, a2a, other, imbalance = mean("compute_s"), mean("all_to_all_s"), mean("other_s"), mean("imbalance_s")
    host = host + mean("host_s")
    busy = compute + a2a + other + imbalance + host
    # Reductions that the pipeline's slack hides are not exposed after all: the parts may not exceed the step.
    excess = maximum(busy - step, 0.0)
    other = other - excess
    # One stage waits for nobody: what is left there is rounding.
    bubble = maximum(step - busy, 0.0) if degrees.pipeline > 1 else 0.0
    return ClosedForm(step, Parts(compute, a2a, other, host, imbalance, bubble), stages, times)


StageKey = tuple[tuple[int, ...], ...]


def stage_keys(job: Job, workload: Workload) -> list[StageKey]:
    """What each stage holds: equal keys are equal stages."""
    return [workload.held_counts(p, job.plan.schedule) for p in range(len(workload.counts))]


def held_pieces(
    times: Sequence[PieceTime], key: StageKey
) -> tuple[list[tuple[PieceTime, int]], list[tuple[PieceTime, int]]]:
    """The pieces of a stage with their counts, and those of DualPipe's second copy."""
    own, *twin = ([(t, n) for t, n in zip(times, counts, strict=True) if n] for counts in key)
    return own, twin[0] if twin else []


def pipeline_s(
    job: Job,
    degrees: Degrees,
    stages: Sequence[StageResult],
    times: Sequence[PieceTime],
    workload: Workload,
    hop: Number,
) -> Number:
    """Seconds from the first forward to the end of the last backward."""
    virtual = degrees.virtual_stages
    each = [s.times for s in stages if s.times is not None] if virtual == 1 else _chunk_times(stages, times, workload)
    return pipeline_time(job.plan.schedule, each, degrees.microbatches, virtual, hop)


def _ahead_s(job: Job, degrees: Degrees, stage: StageResult, p: Number) -> Number:
    """How long before stage 0 stage `p` ends its last backward pass: p backward passes."""
    schedule = job.plan.schedule
    if schedule == "zb-h1" or (schedule == "dualpipe" and degrees.pipelined):
        return 0.0
    assert stage.times is not None
    return p * (stage.times.backward_input + stage.times.backward_weight) / degrees.virtual_stages


def after_s(job: Job, degrees: Degrees, stages: Sequence[tuple[Number, StageResult]]) -> Number:
    """Seconds between the end of the pipeline and the end of the step: what no stage's slack hides.

    Of equal stages the first has the least slack: the others may be left out of `stages`, (index, stage).
    """
    return maximum(largest([s.tail_s - _ahead_s(job, degrees, s, p) for p, s in stages]), 0.0)


def launched_s(job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, stages: Sequence[StageResult]) -> Number:
    """When the pipeline can end at the earliest because hosts launch kernel after kernel; 0 where they never lag.

    Hosts wait for nobody: a stage ends no sooner than its kernels are launched, and the stages before it follow.
    """
    dual = job.plan.schedule == "dualpipe" and degrees.pipelined
    each = launch_s(job, cluster.chip, habits)
    out: Number = 0.0
    quiet: dict[tuple[int, ...], bool] = {}
    for p, s in enumerate(stages):
        held = (s, stages[-1 - p]) if dual else (s,)
        key = tuple(map(id, held))
        copies = [(c.times, c.kernels) for c in held]
        if key not in quiet:
            quiet[key] = not some(launch_waits(copies, each))
        if not quiet[key]:
            bound = launch_bound(job.plan.schedule, p, degrees, copies, each)
            out = maximum(out, where(bound > 0, bound + _ahead_s(job, degrees, s, p), 0.0))
    return out


def _chunk_times(stages: Sequence[StageResult], times: Sequence[PieceTime], workload: Workload) -> list[StageTimes]:
    """Times of the virtual stages in the order of the model: the sums of their pieces'; equal ones are one record."""
    known: dict[tuple[object, ...], StageTimes] = {}
    out = []
    for v in range(len(workload.chunk_counts[0])):
        for stage, chunks in zip(stages, workload.chunk_counts, strict=True):
            key = (id(stage), *chunks[v])
            if key not in known:
                own = [(n, stage.piece_times[t.piece.name]) for t, n in zip(times, chunks[v], strict=True) if n]
                known[key] = StageTimes(
                    sum(n * x.forward for n, x in own),
                    sum(n * x.backward_input for n, x in own),
                    sum(n * x.backward_weight for n, x in own),
                )
            out.append(known[key])
    return out


def hop_s(timer: Timer, degrees: Degrees, workload: Workload) -> Number:
    """Seconds that a microbatch takes from one stage to the next."""
    if not degrees.pipelined:
        return 0.0
    _, rate = timer.rate("pipeline", "permute")
    return rate.seconds(largest([p.work.boundary_bytes for p in workload.pieces if p.is_layer]))
