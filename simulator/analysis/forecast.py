"""The forecast of one job: resolve, build the work, time it, and write the record down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError, nearest
from hw_profiles.estimates import profile_name
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.closed_form import ClosedForm, busiest_rank, closed_form
from simulator.analysis.event_options import EventOptions
from simulator.analysis.evidence import cost_of, gather_evidence, interval
from simulator.analysis.stage_formula import StageResult
from simulator.costs.piece_times import launch_s
from simulator.job.job import Capacity, Job, RematPolicy
from simulator.job.rules import Degrees, resolve
from simulator.kernels.roofline import Kernels
from simulator.results.forecast import AllToAll, Collective, Flops, Forecast, JobSummary, Memory, OpRow, Routing
from simulator.workload.conventions import full_attention_extra, kaplan_forward_per_sequence
from simulator.workload.habits import Habits, habits_of
from simulator.workload.memory import argument_bytes, stage_memories
from simulator.workload.parameters import count_parameters
from simulator.workload.stages import Workload, build_workload, offload_names

ENGINES = ("events", "closed-form")
CONVENTION = "3 x forward; attention halved for causal masks; logits counted; no recompute, padding or drops"
GIB = 2**30


def forecast(
    job: Job,
    *,
    engine: str = "events",
    chip: Chip | None = None,
    profile: str | None = None,
    options: EventOptions | None = None,
    folder: Path | None = None,
) -> Forecast:
    """The forecast of `job`; `chip` replaces the cluster's chip profile (and `profile` is the name to show for it).

    `engine` is events (the discrete-event engine) or closed-form (formulas only, some milliseconds). Raises
    QuestionError where the job breaks a rule of its model or cluster. A job that does not fit in memory is forecast all
    the same: `forecast.memory.fits` says so. Files that the job names (recorded routing, placements) lie in `folder`.
    """
    if engine not in ENGINES:
        raise QuestionError(f"engine = {engine!r}: known engines: {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    cluster = resolve_cluster(job.cluster, chip=chip)
    return forecast_on(job, cluster, profile or profile_name(cluster.chip), engine, options, folder)


def forecast_on(
    job: Job,
    cluster: Cluster,
    profile: str,
    engine: str = "closed-form",
    options: EventOptions | None = None,
    folder: Path | None = None,
) -> Forecast:
    """The forecast of `job` on an already resolved `cluster`."""
    degrees = resolve(job, cluster)
    habits = habits_of(job, cluster.chip.kind, accumulates=degrees.microbatches > 1)
    workload = build_workload(job, degrees, habits)
    kernels = Kernels(cluster.chip)
    busiest = _recorded_load(job, degrees, options, folder) if engine == "events" else None
    formula = closed_form(job, cluster, degrees, habits, workload, kernels, busiest)
    memory = _memory(job, cluster, degrees, habits, workload)
    step, parts, all_to_all = float(formula.step_s), formula.parts, _all_to_all(formula.stages)
    events = timeline = None
    if engine == "events":
        # NumPy and SimPy are loaded only for an answer that needs them.
        from simulator.analysis.events import by_events

        answer = by_events(job, cluster, degrees, habits, workload, kernels, formula, memory, options, folder)
        step, parts, events, timeline = answer.step_s, answer.parts, answer.events, answer.timeline
        all_to_all = AllToAll(answer.all_to_all_s, parts.all_to_all_s, all_to_all.bytes_per_device)
    tokens = job.tokens_per_step
    ops = _ops(degrees, workload, formula)
    bounds, meaning = interval(job, cluster.chip, ops, step)
    flops = _flops(job, degrees, formula)
    peak = kernels.peak(habits.matmul_dtype)
    return Forecast(
        job=_summary(job, cluster, degrees),
        engine=engine,
        step_time_s=step,
        step_time_interval_s=bounds,
        interval_meaning=meaning,
        sequences_per_s=job.batch.sequences / step,
        tokens_per_s=tokens / step,
        tokens_per_s_per_device=tokens / step / cluster.devices,
        mfu=flops.model_per_step / (step * cluster.devices * peak),
        hfu=flops.executed_per_device / (step * peak),
        flops=flops,
        memory=memory,
        parts=parts,
        all_to_all=all_to_all,
        collectives=_collectives(formula.stages),
        ops=ops,
        routing=_routing(job, degrees, workload, busiest, folder),
        cost=cost_of(cluster, step, tokens),
        evidence=gather_evidence(
            job, cluster, degrees, habits, kernels, _warnings(job, cluster, workload, degrees, habits, formula), profile
        ),
        events=events,
        timeline=timeline,
    )


def _flops(job: Job, degrees: Degrees, result: ClosedForm) -> Flops:
    per_stage = degrees.data * degrees.tensor * degrees.context
    model = sum(s.model_flops for s in result.stages) * per_stage
    executed = sum(s.executed_flops for s in result.stages) / len(result.stages)
    sequences = job.batch.sequences
    full = model + 3 * sequences * full_attention_extra(job.model, job.batch)
    variants = {
        "full_attention_per_token": full / job.tokens_per_step,
        "kaplan_forward_per_sequence": kaplan_forward_per_sequence(job.model, job.batch),
    }
    return Flops(model, executed, model / job.tokens_per_step, model / 3 / sequences, CONVENTION, variants)


def memory_limits(cluster: Cluster, habits: Habits) -> tuple[float, float]:
    """Bytes of a device that a program may fill, and those of them that the framework keeps for itself."""
    chip = cluster.chip
    reserve = chip.framework_reserve_gib.value * GIB / chip.devices_per_chip
    # XLA's report counts the program alone; what the framework keeps for itself lowers the limit instead.
    return (chip.device_memory_bytes - reserve, 0.0) if habits.xla else (chip.device_memory_bytes, reserve)


def _memory(job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, workload: Workload) -> Memory:
    capacity, reserve = memory_limits(cluster, habits)
    stages = stage_memories(job, degrees, habits, workload, reserve)
    meaning = (
        "total of XLA's memory-usage report, against the memory less the framework reserve of the profile"
        if habits.xla
        else "allocator's peak, plus the framework reserve of the profile"
    )
    return Memory(capacity, stages, float(argument_bytes(job, degrees, habits, workload)), meaning)


def _all_to_all(stages: list[StageResult]) -> AllToAll:
    n = len(stages)
    return AllToAll(
        time_s=sum(s.all_to_all_total_s for s in stages) / n,
        exposed_s=sum(s.all_to_all_s for s in stages) / n,
        bytes_per_device=sum(s.all_to_all_bytes for s in stages) / n,
    )


def _collectives(stages: list[StageResult]) -> tuple[Collective, ...]:
    """One row per scope and kind of the stage that communicates most."""
    busiest = max(stages, key=lambda s: sum(c.seconds * calls for c, calls, _ in s.comms))
    rows: dict[tuple[str, str], list[Any]] = {}
    for c, calls, share in busiest.comms:
        if calls:
            row = rows.setdefault((c.scope, c.kind), [c.size, 0.0, 0.0, 0.0, 0.0, c.level])
            row[1] += calls if c.merged else calls * c.parts
            row[2] += calls * c.bytes
            row[3] += calls * c.seconds
            row[4] += calls * c.seconds * share
    out = [Collective(scope, kind, r[0], r[1], r[2], r[3], r[4], r[5]) for (scope, kind), r in rows.items()]
    return tuple(sorted(out, key=lambda c: -c.time_s))


def _ops(degrees: Degrees, workload: Workload, result: ClosedForm) -> tuple[OpRow, ...]:
    """One row per scope and pass of the busiest stage, over a step."""
    stage = max(range(len(result.stages)), key=lambda s: result.stages[s].compute_s)
    rows: dict[tuple[str, str], list[Any]] = {}
    for times, n in zip(result.piece_times, workload.counts[stage], strict=True):
        for op in times.ops:
            calls = n * degrees.microbatches
            for phase, seconds, flops, bytes_, bound in (
                ("forward", op.forward_s, op.forward_flops, op.bytes, op.bound),
                ("recompute", op.recompute_s, op.recompute_flops, op.bytes, op.bound),
                ("backward", op.backward_s, op.backward_flops, op.backward_bytes, op.backward_bound),
            ):
                if calls and seconds:
                    row = rows.setdefault((op.scope, phase), [0.0, 0.0, 0.0, 0.0, bound])
                    row[0] += calls
                    row[1] += calls * flops
                    row[2] += calls * bytes_
                    row[3] += calls * seconds
    out = [OpRow(scope, phase, r[0], r[1], r[2], r[3], r[4]) for (scope, phase), r in rows.items()]
    return tuple(sorted(out, key=lambda o: -o.time_s))


def _recorded_load(job: Job, degrees: Degrees, options: EventOptions | None, folder: Path | None) -> float | None:
    """The busiest rank's load over the mean in recorded routing; None where the routing is a model."""
    if job.training.routing.model != "replay" or not job.model.moes:
        return None
    from simulator.engine.loads import expert_loads

    return expert_loads(job, degrees, 1, options.seed if options else 0, folder=folder).busiest_overall()


def _routing(job: Job, degrees: Degrees, workload: Workload, busiest: float | None, folder: Path | None) -> Routing:
    layers = sum(n for counts in workload.counts for p, n in zip(workload.pieces, counts, strict=True) if p.slots)
    routing, dropped = job.training.routing, 0.0
    if layers and routing.model in ("zipf", "dirichlet", "replay"):
        # NumPy and SciPy only for a router that formulas do not cover.
        from simulator.engine.loads import expected_drops

        dropped = expected_drops(job, degrees, folder=folder)
    elif layers:
        dropped = _drops(workload, layers, routing.model == "even")
    load = busiest_rank(job, degrees) if busiest is None else busiest
    return Routing(routing.model if job.model.moes else "none", dropped, load)


def _drops(workload: Workload, layers: int, even: bool) -> float:
    """Share of assignments that capacity drops, mean over the layers with experts."""
    dropped = 0.0
    for i, piece in enumerate(workload.pieces):
        slots, moe = piece.slots, piece.moe
        if slots is None or moe is None:
            continue
        # However even the router is, what has no slot is dropped.
        least = max(0.0, 1 - slots.per_expert * moe.experts / (slots.group * moe.top_k))
        chance = 0.0 if even or moe.router.kind == "expert_choice" else slots.dropped_fraction
        dropped += max(least, chance) * sum(counts[i] for counts in workload.counts) / layers
    return dropped


def _summary(job: Job, cluster: Cluster, degrees: Degrees) -> JobSummary:
    t, capacity = job.training, job.training.capacity
    count = count_parameters(job.model)
    plan = {
        "data": degrees.data, "tensor": degrees.tensor, "context": degrees.context, "pipeline": degrees.pipeline,
        "expert": degrees.expert, "expert_tensor": degrees.expert_tensor,
        "sequence_parallel": job.plan.sequence_parallel,
        "shard": job.plan.shard, "shard_degree": degrees.shard, "microbatch_sequences": degrees.microbatch_sequences,
        "microbatches": degrees.microbatches, "schedule": job.plan.schedule, "virtual_stages": job.plan.virtual_stages,
        "layers_per_stage": [sum(c.layers for c in chunks) for chunks in degrees.chunks],
    }  # fmt: skip
    return JobSummary(
        name=job.name,
        hash=job.hash,
        model=job.model.name,
        total_parameters=count.total,
        active_parameters=count.active,
        cluster=cluster.name,
        chip=cluster.chip.name,
        devices=cluster.devices,
        chips=cluster.chips,
        plan=plan,
        sequences=job.batch.sequences,
        tokens_per_step=job.tokens_per_step,
        precision=t.precision,
        optimizer=t.optimizer,
        remat="by name" if isinstance(t.remat, RematPolicy) else t.remat,
        capacity=f"factor {capacity.factor:g} of {capacity.basis}" if isinstance(capacity, Capacity) else capacity,
        dispatch=f"{degrees.layout}, {t.dispatch.transport}" if job.model.moes else "none",
        stack=job.software.stack,
    )


def _warnings(
    job: Job, cluster: Cluster, workload: Workload, degrees: Degrees, habits: Habits, formula: ClosedForm
) -> list[str]:
    """What the reader should know about how the question was understood."""
    out = []
    capacity = job.training.capacity
    if isinstance(capacity, Capacity):
        for p in workload.pieces:
            if p.slots is not None and capacity.group_tokens and p.slots.group < capacity.group_tokens:
                out.append(
                    f"capacity is counted over {p.slots.group} tokens in the {p.name.partition('[')[0]}:"
                    " a microbatch has no more"
                    f" (training.capacity.group_tokens asks {capacity.group_tokens})"
                )
    busiest = max(formula.stages, key=lambda s: sum(s.kernels))
    kernels = sum(busiest.kernels) * degrees.microbatches
    launches = launch_s(job, cluster.chip, habits) * kernels
    if launches > busiest.compute_s:
        out.append(
            f"launch-bound: the host needs {launches:.3g} s to launch {kernels:,.0f} kernels a step, the device"
            f" {float(busiest.compute_s):.3g} s to run them; software.graphs: true launches them together"
        )
    if offload_names(job) and cluster.chip.host_link_gb_per_s is None:
        out.append(f"{cluster.chip.name} has no host link in its profile: offloading is taken as free")
    if job.training.dispatch.transport == "fused" and job.model.moes:
        out.append("transport fused is forecast as a library all-to-all: no formula for fused kernels yet")
    if job.plan.schedule == "dualpipe" and job.model.moes and not job.software.overlap.all_to_all:
        out.append("dualpipe without software.overlap.all_to_all: the all-to-alls are taken as exposed")
    return out
