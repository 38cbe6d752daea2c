"""The step by events: set the engine up from a job, run it, and read step time and parts off the timeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.analysis.closed_form import ClosedForm
from simulator.analysis.critical_path import critical_path
from simulator.analysis.draws import out_of_memory, percentiles
from simulator.analysis.event_options import EventOptions
from simulator.costs.piece_times import Timer, launch_s
from simulator.costs.reductions import StateCosts
from simulator.engine.load_patterns import Patterns, load_patterns, no_pattern
from simulator.engine.loads import expert_loads
from simulator.engine.run import Engine, Run, Setup
from simulator.engine.transport import Layout, Shared, Solo
from simulator.engine.work import WorkBuilder
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import Network
from simulator.results.forecast import Events, Memory, Parts, StageMemory
from simulator.results.timeline import KINDS, Timeline
from simulator.workload.habits import Habits
from simulator.workload.orders import ORDERS
from simulator.workload.stages import Workload


@dataclass(slots=True)
class EventResult:
    """The step by events; `all_to_all_s` is all their time on a device, hidden or not, mean over classes."""

    step_s: float
    parts: Parts
    timeline: Timeline
    run: Run
    all_to_all_s: float
    events: Events | None = None


def by_events(
    job: Job,
    cluster: Cluster,
    degrees: Degrees,
    habits: Habits,
    workload: Workload,
    kernels: Kernels,
    formula: ClosedForm,
    memory: Memory,
    options: EventOptions | None,
    folder: Path | None = None,
) -> EventResult:
    """The step of `job` by events, with what the closed form missed.

    Raises QuestionError where the step cannot end, or an option names what is not there.
    """
    chosen = options or EventOptions()
    for device, factor in chosen.stragglers.items():
        if not 0 <= device < cluster.devices:
            raise QuestionError(f"straggler {device}: devices are 0 to {cluster.devices - 1}")
        if not 0 < factor < float("inf"):
            raise QuestionError(f"straggler {device} = {factor}: a factor is a positive number")
    groups = 1 if chosen.fold and not chosen.stragglers else _groups(job, degrees)
    passes = 2 * degrees.microbatches * degrees.pipeline * job.plan.virtual_stages * groups
    if passes > MOST_PASSES:
        raise QuestionError(
            f"the step has {passes:,} passes of microbatches; events run at most {MOST_PASSES:,}:"
            " use larger microbatches, or --engine closed-form"
        )
    if chosen.load_vectors is not None and chosen.load_vectors < 1:
        raise QuestionError(f"load_vectors = {chosen.load_vectors}: 1 or more, or none for every microbatch its own")
    loads = None
    excess: Callable[[int, int, int], float] = even
    pattern: Patterns = no_pattern
    if job.model.moes and degrees.expert > 1:
        loads = expert_loads(job, degrees, groups, chosen.seed, folder=folder)
        excess, pattern = loads.excess, load_patterns(loads, chosen.load_vectors)
    setup = set_up(job, cluster, degrees, habits, workload, kernels, formula, memory.by_stage, excess, chosen)
    setup = replace(setup, pattern=pattern)
    result = run_events(setup, transport_of(job, cluster, degrees, setup, chosen))
    difference = result.step_s / float(formula.step_s) - 1
    spread = risk = None
    dropless = job.training.capacity == "dropless"
    if loads is not None and dropless and job.training.routing.model in ("zipf", "dirichlet"):
        spread = percentiles(job, cluster.chip.kind, setup, formula, loads, result.step_s, chosen.samples)
        risk = out_of_memory(job, setup, workload, loads, memory, chosen.samples)
    result.events = Events(
        closed_form_step_time_s=float(formula.step_s),
        difference=difference,
        missed=missed(formula.parts, result.parts, float(formula.step_s)) if abs(difference) > 0.02 else (),
        seed=chosen.seed,
        folded=setup.groups == 1,
        percentiles_s=spread,
        out_of_memory_probability=risk,
        critical_path_s=critical_path(result.timeline).seconds,
        links=result.timeline.links,
    )
    return result


# About two minutes and some gigabytes here.
MOST_PASSES = 1_000_000

# What a difference in each part of the step says about the formula.
REASONS = {
    "compute_s": "slower devices (stragglers), which formulas do not know",
    "all_to_all_s": "all-to-alls beside other traffic, or hidden more or less than layer by layer",
    "communication_s": "gradients and weights sharing links, or late for a stage that needs them",
    "imbalance_s": "the draw of the routing differs from its expectation",
    "host_s": "kernels launched later than the device could start them",
    "bubble_s": "waiting in the pipeline: unequal stages, hops, or the slowest group",
}


def missed(formula: Parts, events: Parts, step_s: float) -> tuple[str, ...]:
    """The parts of the step that differ by more than half a per cent of it, largest first, with what that means."""
    changes = {name: getattr(events, name) - getattr(formula, name) for name in REASONS}
    large = sorted((n for n, d in changes.items() if abs(d) > 0.005 * step_s), key=lambda n: -abs(changes[n]))
    return tuple(f"{n.removesuffix('_s')} {100 * changes[n] / step_s:+.1f} % of the step: {REASONS[n]}" for n in large)


def even(group: int, stage: int, microbatch: int) -> float:
    """No excess load anywhere."""
    del group, stage, microbatch
    return 0.0


def set_up(
    job: Job,
    cluster: Cluster,
    degrees: Degrees,
    habits: Habits,
    workload: Workload,
    kernels: Kernels,
    formula: ClosedForm,
    memory: tuple[StageMemory, ...],
    excess: Callable[[int, int, int], float],
    options: EventOptions,
) -> Setup:
    """Everything the engine needs, from what the closed form already priced."""
    timer = Timer(job, cluster, degrees, habits, kernels, 1.0)
    costs = StateCosts(job, cluster, degrees, habits, kernels, timer)
    devices = WorkBuilder(job, degrees, habits, workload, formula.piece_times, costs).devices()
    schedule = job.plan.schedule if degrees.pipeline > 1 else "1f1b"
    virtual = job.plan.virtual_stages
    stages = degrees.pipeline
    # Under DualPipe the microbatches are counted from both ends.
    orders = [ORDERS[schedule](p, stages, degrees.microbatches, virtual) for p in range(stages)]
    groups = 1 if options.fold and not options.stragglers else _groups(job, degrees)
    hop = 0.0
    if stages > 1:
        _, rate = timer.rate("pipeline", "permute")
        hop = rate.seconds(max(p.work.boundary_bytes for p in workload.pieces if p.is_layer))
    per_stage = degrees.data * degrees.tensor * degrees.context

    def straggler(stage: int, group: int) -> float:
        if not options.stragglers:
            return 1.0
        # A group waits for its slowest member at every exchange.
        return max(
            (f for d, f in options.stragglers.items() if _class_of(d, degrees, groups) == (stage, group)), default=1.0
        )

    return Setup(
        schedule=schedule,
        orders=orders,
        devices=devices,
        microbatches=degrees.microbatches,
        virtual=virtual,
        hop_s=hop,
        slowdown=cluster.chip.overlap_slowdown.value - 1,
        groups=groups,
        replicas=per_stage // groups,
        excess=excess,
        straggler=straggler,
        base_bytes=[m.peak_bytes - m.activations_bytes for m in memory],
        host_s=cluster.chip.host_step_overhead_us.value * 1e-6,
        launch_s=launch_s(job, cluster.chip, habits),
    )


def _groups(job: Job, degrees: Degrees) -> int:
    """Groups of a stage that run apart from one another: expert groups, or data ranks of a dense model."""
    return degrees.expert_data if job.model.moes and degrees.expert > 1 else degrees.data * degrees.context


def _class_of(device: int, degrees: Degrees, groups: int) -> tuple[int, int]:
    stage = device // degrees.strides["pipeline"] % degrees.pipeline
    inside = (
        device // degrees.strides["expert"] // degrees.expert
        if groups == degrees.expert_data
        else device // degrees.tensor
    )
    return stage, inside % groups


def run_events(setup: Setup, transport: Callable[[Any], Any]) -> EventResult:
    """Run the engine, and take the parts of the step from what its classes spent."""
    engine = Engine(setup, transport)
    run = engine.run()
    n = len(run.spent)

    def mean(name: str) -> float:
        return float(sum(getattr(s, name) for s in run.spent) / n)

    step = run.step_s
    compute, a2a, other, imbalance = mean("compute_s"), mean("all_to_all_s"), mean("other_s"), mean("imbalance_s")
    host = mean("host_s") + setup.host_s
    left = step - compute - a2a - other - imbalance - host
    bubble = max(left, 0.0) if len(setup.devices) > 1 or setup.groups > 1 else 0.0
    stages = len(setup.devices)
    names = tuple(
        f"stage {p}" + (f", group {g}" if setup.groups > 1 else "") for p in range(stages) for g in range(setup.groups)
    )
    links, network = engine.transport.links(step), engine.transport.drawing(step)
    timeline = run.recorder.timeline(step, names, (setup.replicas,) * n, run.memory, links, network)
    rows = timeline.kind == KINDS.index("all-to-all")
    exchanged = float((timeline.end_s[rows] - timeline.start_s[rows]).sum()) / n
    return EventResult(step, Parts(compute, a2a, other, host, imbalance, bubble), timeline, run, exchanged)


def transport_of(
    job: Job, cluster: Cluster, degrees: Degrees, setup: Setup, options: EventOptions
) -> Callable[[Any], Any]:
    """How transfers move: sharing the links of the topology, or each at its solo rate."""
    if not options.contention:
        return lambda env: Solo(env, Network(cluster))
    wanted = job.training.dispatch.transport
    transport: Literal["collective", "deepep", "hybridep"] = "collective"
    if wanted == "deepep" or wanted == "hybridep":
        transport = wanted
    layout = Layout(cluster, degrees.pipeline, degrees.strides["pipeline"], transport, options.graph)
    return lambda env: Shared(env, setup, layout, options.slow_links)
