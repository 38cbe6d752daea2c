"""What a skewed router does to a step, over many draws of who is popular: percentiles, and the risk to memory.

The engine runs one draw. For the others the closed form's pipeline takes each stage's mean excess load of that draw,
and the ratio to the engine's own draw scales its step: a hundred draws cost less than one run.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simulator.analysis.closed_form import ClosedForm
from simulator.engine.loads import ExpertLoads
from simulator.engine.setup import Setup
from simulator.job.job import Job
from simulator.results.forecast import Memory
from simulator.workload.habits import overlap_of
from simulator.workload.schedules import StageTimes, in_flight, pipeline_time
from simulator.workload.stages import Workload

# Popularity is drawn once per layer and step, so that a few microbatches show a draw's mean.
MICROBATCHES = 2
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def _mean_excess(loads: ExpertLoads, stages: int) -> list[float]:
    count = loads.plan.microbatches
    return [sum(loads.excess(0, s, m) for m in range(count)) / count for s in range(stages)]


def _pipeline(job: Job, setup: Setup, formula: ClosedForm, excess: list[float], hidden: bool) -> float:
    """Seconds of the pipeline when stage s has this excess; per device for interleaved, chunks averaged.

    `hidden`: all-to-alls run beside compute.
    """
    times = []
    for p, stage in enumerate(formula.stages):
        assert stage.times is not None
        chunks = setup.devices[p].chunks[: setup.virtual]
        hot_f, hot_b = (
            sum(
                (x.hot_s + (0.0 if hidden else x.hot_network_s)) * excess[v * setup.stages + p]
                for v, x in enumerate(passes)
            )
            for passes in ([c.forward for c in chunks], [c.input for c in chunks])
        )
        t = stage.times
        times.append(
            StageTimes(
                float(t.forward - stage.hot_forward_s + hot_f),
                float(t.backward_input - stage.hot_backward_s + hot_b),
                float(t.backward_weight),
                t.beside,
            )
        )
    schedule = "1f1b" if job.plan.schedule == "interleaved" else job.plan.schedule
    return float(pipeline_time(schedule, times, setup.microbatches, 1, setup.hop_s))


def percentiles(
    job: Job, chip_kind: str, setup: Setup, formula: ClosedForm, loads: ExpertLoads, step_s: float, samples: int
) -> dict[str, float]:
    """p50, p95 and p99 of the step over `samples` draws, seconds; `loads` is the draw that took `step_s`."""
    few = ExpertLoads(replace(loads.plan, microbatches=min(MICROBATCHES, loads.plan.microbatches), groups=1), 0)
    hidden = overlap_of(job, chip_kind).all_to_all
    base = _pipeline(job, setup, formula, _mean_excess(loads, setup.model_stages), hidden)
    steps = [
        step_s * _pipeline(job, setup, formula, _mean_excess(few.resample(seed), setup.model_stages), hidden) / base
        for seed in range(1, samples + 1)
    ]
    return {name: float(np.quantile(steps, q)) for name, q in QUANTILES.items()}


def out_of_memory(
    job: Job, setup: Setup, workload: Workload, loads: ExpertLoads, memory: Memory, samples: int
) -> float:
    """Share of draws in which some rank's experts keep more rows than the memory left over holds.

    A rank's expert activations grow with its load, summed over the stage's layers and its microbatches in flight.
    """
    few = ExpertLoads(replace(loads.plan, microbatches=1, groups=1), 0)
    hot = max((sum(op.saved_bytes for op in p.work.ops if op.hot) for p in workload.pieces), default=0.0)
    spare = [memory.capacity_bytes - m.peak_bytes for m in memory.by_stage]
    by_stage: dict[int, list[int]] = {}
    for i, layer in enumerate(few.plan.layers):
        by_stage.setdefault(layer.stage % setup.stages, []).append(i)
    over = 0
    for seed in range(1, samples + 1):
        drawn = few.resample(seed)
        for stage, layers in by_stage.items():
            loads_of = np.array([drawn.rank_loads(i, 0, 0) for i in layers])
            excess = (loads_of / loads_of.mean(axis=1, keepdims=True) - 1).sum(axis=0).max()
            flight = in_flight(job.plan.schedule, stage, setup.stages, setup.microbatches, setup.virtual)
            if hot * excess * flight > spare[stage]:
                over += 1
                break
    return over / samples
