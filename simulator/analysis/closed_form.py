"""The closed form: step time of a job from formulas, without events.

Per stage and microbatch: compute at balanced load, exposed communication, the wait for the busiest expert rank. The
pipeline formula puts the stages together; gradient reduction, optimiser and host follow. What the formulas leave out
(contention between collectives, real rendezvous, jitter) is the events engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.analysis.piece_times import CommTime, PieceTime, Timer
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.numbers import Number, maximum, minimum
from simulator.results.forecast import Parts
from simulator.workload.habits import Habits
from simulator.workload.memory import Shards
from simulator.workload.routing import busiest_over_mean, dirichlet_busiest, zipf_busiest
from simulator.workload.schedules import StageTimes, pipeline_time
from simulator.workload.stages import Workload


@dataclass(slots=True)
class StageResult:
    """Seconds of a whole step on one device of one stage, by kind; all-to-all and other are exposed seconds."""

    compute_s: Number = 0.0
    all_to_all_s: Number = 0.0
    all_to_all_total_s: Number = 0.0
    all_to_all_bytes: Number = 0.0
    other_s: Number = 0.0
    imbalance_s: Number = 0.0
    host_s: Number = 0.0
    tail_s: Number = 0.0
    executed_flops: Number = 0.0
    model_flops: Number = 0.0
    times: StageTimes | None = None
    comms: list[tuple[CommTime, float, Number]] = field(default_factory=list)


@dataclass(slots=True)
class ClosedForm:
    """Result of the closed form: the step, its parts, and each stage."""

    step_s: Number
    parts: Parts
    stages: list[StageResult]
    piece_times: list[PieceTime]


def busiest_rank(job: Job, degrees: Degrees, workload: Workload) -> float:
    """Load of the busiest expert rank over the mean under the job's routing model; 1 where capacity pads every rank."""
    routing = job.training.routing
    if not job.model.moes or degrees.expert == 1 or job.training.capacity != "dropless":
        return 1.0
    worst = 1.0
    for moe in job.model.moes:
        tokens = max((p.routed_tokens for p in workload.pieces if p.routed_tokens), default=0.0) * degrees.expert
        if routing.model == "chance":
            worst = max(worst, float(busiest_over_mean(tokens, moe, degrees.expert)))
        elif routing.model == "zipf":
            assert routing.exponent is not None
            worst = max(worst, zipf_busiest(moe, degrees.expert, routing.exponent))
        elif routing.model == "dirichlet":
            assert routing.concentration is not None
            worst = max(worst, dirichlet_busiest(moe, degrees.expert, routing.concentration))
        elif routing.model == "replay":
            raise QuestionError("training.routing.model = replay: recorded loads need the events engine, not yet here")
    return worst


class _Stage:
    """Adds up one stage's pieces."""

    def __init__(
        self, job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, kernels: Kernels, timer: Timer
    ) -> None:
        self.job, self.cluster, self.degrees, self.habits, self.kernels, self.timer = (
            job,
            cluster,
            degrees,
            habits,
            kernels,
            timer,
        )
        self.slow = cluster.chip.overlap_slowdown.value - 1
        self.shards = Shards.of(degrees)

    def _hide(self, communication: Number, compute: Number, overlap: bool) -> Number:
        """Exposed seconds of communication beside compute, with what the compute loses while both run."""
        if not overlap:
            return communication
        return maximum(communication - compute, 0.0) + self.slow * minimum(communication, compute)

    def result(self, pieces: list[tuple[PieceTime, int]]) -> StageResult:
        """The stage's step."""
        out = StageResult()
        micro, overlap = self.degrees.microbatches, self.job.software.overlap
        f = bi = bw = 0.0
        forward_wait = backward_wait = 0.0
        dense = expert = 0.0
        for t, n in pieces:
            f, bi, bw = f + n * t.forward_s, bi + n * t.backward_input_s, bw + n * t.backward_weight_s
            a2a_f = self._hide(t.forward_all_to_all_s, t.forward_s, overlap.all_to_all)
            a2a_b = self._hide(t.backward_all_to_all_s, t.backward_input_s + t.backward_weight_s, overlap.all_to_all)
            gather_f, gather_b = self._gather(out, t, n)
            out.all_to_all_s += n * micro * (a2a_f + a2a_b)
            out.all_to_all_total_s += n * micro * (t.forward_all_to_all_s + t.backward_all_to_all_s)
            out.other_s += n * micro * (t.forward_other_s + t.backward_other_s + gather_f + gather_b)
            out.imbalance_s += n * micro * t.hot_s
            out.host_s += n * micro * t.host_s
            out.executed_flops += n * micro * t.executed_flops
            out.model_flops += n * micro * t.model_flops
            forward_wait += n * (a2a_f + t.forward_other_s + gather_f + t.hot_s / 3)
            backward_wait += n * (a2a_b + t.backward_other_s + gather_b + 2 * t.hot_s / 3 + t.host_s)
            dense, expert = dense + n * t.piece.dense_parameters, expert + n * t.piece.expert_parameters
            exposed = (a2a_f + a2a_b) / maximum(t.forward_all_to_all_s + t.backward_all_to_all_s, 1e-30)
            for c in t.comms:
                calls = n * micro * (c.forward + c.backward)
                share = exposed if c.kind == "all_to_all" else 1.0
                out.comms.append((c, calls, share))
                if c.kind == "all_to_all":
                    out.all_to_all_bytes += calls * c.bytes
        per_micro = self._reduce_each(out, dense, expert, bi + bw)
        out.times = StageTimes(f + forward_wait, bi + backward_wait + per_micro, bw)
        update = self._update(dense, expert)
        out.compute_s = micro * (f + bi + bw) + update
        out.tail_s = update + self._reduce_once(out, dense, expert, f, bi + bw)
        return out

    def _gather(self, out: StageResult, t: PieceTime, n: int) -> tuple[Number, Number]:
        """Exposed seconds of gathering a piece's sharded weights, forward and backward, one microbatch."""
        if self.job.plan.shard != "parameters" or (self.shards.dense == 1 and self.shards.expert == 1):
            return 0.0, 0.0
        overlap, name = self.job.software.overlap.parameters, t.piece.name.partition("[")[0]
        if name == "embedding":
            # A table split over D is looked up in place; the result is exchanged, not the table.
            return 0.0, 0.0
        seconds: Number = 0.0
        passes = 2 if t.piece.is_layer else 1
        for axis, size, parameters in (
            ("replica", self.shards.dense, t.piece.dense_parameters),
            ("expert_data", self.shards.expert, t.piece.expert_parameters),
        ):
            bytes_ = parameters * self.habits.gather_bytes
            if size > 1 and parameters:
                rate = self.timer.rate_of("all_gather", size, axis)
                one = rate.seconds(bytes_)
                seconds = seconds + one
                scope = f"{name}.{'experts' if axis == 'expert_data' else 'parameters'}.all_gather"
                comm = CommTime(scope, "all_gather", size, bytes_, 1.0, passes - 1.0, one, rate.level)
                exposed = self._hide(one * passes, t.compute_s, overlap) / maximum(one * passes, 1e-30)
                out.comms.append((comm, n * self.degrees.microbatches * passes, exposed))
        forward = self._hide(seconds, t.forward_s, overlap)
        backward = self._hide(seconds, t.backward_input_s + t.backward_weight_s, overlap) if passes == 2 else 0.0
        return forward, backward

    def _reductions(self, dense: Number, expert: Number) -> list[tuple[CommTime, Number]]:
        """The collectives that reduce a stage's gradients once, with their seconds."""
        d, zero, habits = self.degrees, self.job.plan.shard, self.habits
        out = []
        for axis, size, shard, parameters, what in (
            ("replica", d.data * d.context, self.shards.dense, dense, "gradients"),
            ("expert_data", d.expert_data, self.shards.expert, expert, "experts.gradients"),
        ):
            bytes_ = parameters * habits.reduction_bytes
            if size <= 1 or not parameters:
                continue
            if zero in ("gradients", "parameters") and shard > 1 and not self._reduces_whole(shard):
                rate = self.timer.rate_of("reduce_scatter", shard, axis)
                out.append(
                    (
                        CommTime(
                            f"{what}.reduce_scatter",
                            "reduce_scatter",
                            shard,
                            bytes_,
                            0,
                            1,
                            rate.seconds(bytes_),
                            rate.level,
                        ),
                        0.0,
                    )
                )
                if size > shard:
                    rate = self.timer.rate_of("all_reduce", size // shard, axis, shard)
                    part = bytes_ / shard
                    out.append(
                        (
                            CommTime(
                                f"{what}.all_reduce",
                                "all_reduce",
                                size // shard,
                                part,
                                0,
                                1,
                                rate.seconds(part),
                                rate.level,
                            ),
                            0.0,
                        )
                    )
            elif zero == "optimizer":
                rate = self.timer.rate_of("reduce_scatter", size, axis)
                out.append(
                    (
                        CommTime(
                            f"{what}.reduce_scatter",
                            "reduce_scatter",
                            size,
                            bytes_,
                            0,
                            1,
                            rate.seconds(bytes_),
                            rate.level,
                        ),
                        0.0,
                    )
                )
            else:
                rate = self.timer.rate_of("all_reduce", size, axis)
                out.append(
                    (
                        CommTime(
                            f"{what}.all_reduce", "all_reduce", size, bytes_, 0, 1, rate.seconds(bytes_), rate.level
                        ),
                        0.0,
                    )
                )
        return out

    def _reduces_whole(self, shard: int) -> bool:
        """XLA:TPU all-reduces wide FSDP gradients (v5e, v5p, v6e, seen at 64 ways; facts/aot.md), TPU 7x does not."""
        chip = self.cluster.chip
        return self.habits.xla and chip.kind == "tpu" and chip.name != "tpu7x" and shard > 8

    def _reduce_each(self, out: StageResult, dense: Number, expert: Number, backward: Number) -> Number:
        """Exposed seconds a microbatch of reductions that run after every one (ZeRO 2 and 3)."""
        if self.job.plan.shard not in ("gradients", "parameters") or self.degrees.microbatches == 1:
            return 0.0
        comms = self._reductions(dense, expert)
        total = sum(c.seconds for c, _ in comms)
        exposed = self._hide(total, backward, self.job.software.overlap.gradients)
        for c, _ in comms:
            out.comms.append((c, self.degrees.microbatches, exposed / maximum(total, 1e-30)))
        out.other_s += self.degrees.microbatches * exposed
        return exposed

    def _reduce_once(
        self, out: StageResult, dense: Number, expert: Number, forward: Number, backward: Number
    ) -> Number:
        """Exposed seconds of the reductions at the end of the step, and of ZeRO 1's gather of new weights."""
        exposed: Number = 0.0
        overlap = self.job.software.overlap
        if self.job.plan.shard in ("none", "optimizer") or self.degrees.microbatches == 1:
            comms = self._reductions(dense, expert)
            total = sum(c.seconds for c, _ in comms)
            # The last layer's gradients are ready only when the backward pass ends: one part in about 32 stays exposed.
            exposed = maximum(self._hide(total, backward, overlap.gradients), total / 32)
            for c, _ in comms:
                out.comms.append((c, 1, exposed / maximum(total, 1e-30)))
        if self.job.plan.shard == "optimizer":
            for axis, size, parameters, what in (
                ("replica", self.shards.dense, dense, "parameters"),
                ("expert_data", self.shards.expert, expert, "experts.parameters"),
            ):
                if size > 1 and parameters:
                    bytes_ = parameters * self.habits.gather_bytes
                    rate = self.timer.rate_of("all_gather", size, axis)
                    seconds = rate.seconds(bytes_)
                    shown = maximum(self._hide(seconds, forward, overlap.parameters), seconds / 32)
                    exposed = exposed + shown
                    out.comms.append(
                        (
                            CommTime(f"{what}.all_gather", "all_gather", size, bytes_, 1, 0, seconds, rate.level),
                            1,
                            shown / maximum(seconds, 1e-30),
                        )
                    )
        out.other_s += exposed
        return exposed

    def _update(self, dense: Number, expert: Number) -> Number:
        """Seconds of the optimiser: gradients read, states and weights read and written, on this device's shard."""
        s = self.shards if self.job.plan.shard != "none" else Shards(1, 1)
        h = self.habits
        second = 0.0 if h.factored_second_moment else h.second_moment_bytes
        each = h.gradient_bytes + 2 * (h.first_moment_bytes + second + h.master_bytes) + 2 * h.parameter_bytes
        return self.kernels.stream_s(each * (dense / s.dense + expert / s.expert))


def closed_form(
    job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, workload: Workload, kernels: Kernels
) -> ClosedForm:
    """Step time and parts of `job`; QuestionError for what formulas cannot answer (recorded routing)."""
    timer = Timer(job, cluster, degrees, habits, kernels, busiest_rank(job, degrees, workload))
    times = [timer.time(p) for p in workload.pieces]
    stage = _Stage(job, cluster, degrees, habits, kernels, timer)
    results: dict[tuple[int, ...], StageResult] = {}
    stages = []
    for counts in workload.counts:
        key = tuple(counts)
        if key not in results:
            results[key] = stage.result([(t, n) for t, n in zip(times, counts, strict=True) if n])
        stages.append(results[key])
    hop = _hop(timer, degrees, workload)
    per_stage = [s.times for s in stages if s.times is not None]
    pipeline = pipeline_time(job.plan.schedule, per_stage, degrees.microbatches, job.plan.virtual_stages, hop)
    # Stage p ends its last backward p backward passes before stage 0: reductions use that slack.
    step: Number = 0.0
    for p, s in enumerate(stages):
        assert s.times is not None
        ahead = p * (s.times.backward_input + s.times.backward_weight) / job.plan.virtual_stages
        step = maximum(step, pipeline - ahead + s.tail_s)
    step = maximum(step, pipeline)
    host = cluster.chip.host_step_overhead_us.value * 1e-6
    step = step + host
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


def _hop(timer: Timer, degrees: Degrees, workload: Workload) -> Number:
    if degrees.pipeline == 1:
        return 0.0
    _, rate = timer.rate("pipeline", "permute")
    bytes_ = max(p.work.boundary_bytes for p in workload.pieces if p.is_layer)
    return rate.seconds(bytes_)
