"""The closed form over columns: step time, memory, MFU and dollars of many plans of one job on one cluster.

`evaluate(job, cluster, table)` is the interface: plans in, answers out, each row equal to the scalar forecast of that
plan (tests/test_planner_arrays.py: to 1e-9). The formulas are the scalar ones, called with columns; what decides their
control flow (schedule, stages, flags) is the same for all rows of a call. A block is many degrees under many flags:

- kinds of layers are priced once for the flags that change them, whatever is sharded or overlapped;
- passes once for what a microbatch sees (ZeRO 1's or no sharding, and its overlap, are not seen);
- the walk through the schedule once for all flags side by side;
- what happens once a step, for every flag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from simulator.analysis.closed_form import (
    after_s,
    busiest_rank,
    held_pieces,
    hop_s,
    launched_s,
    pipeline_s,
    stage_keys,
)
from simulator.analysis.evidence import price_of
from simulator.analysis.forecast import memory_limits
from simulator.analysis.stage_formula import StageFormula, StageResult
from simulator.costs.piece_times import PieceTime, Timer
from simulator.job.job import Job, Placement
from simulator.job.rules import Degrees, resolve
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import Network
from simulator.network.columns import ColumnNetwork
from simulator.numbers import Number, minimum
from simulator.planner.table import CHOICES, Column, Table, filled, keeps_stages, value, with_plan
from simulator.planner.validity import Sieve
from simulator.workload.habits import Habits, habits_of
from simulator.workload.memory import peak_bytes
from simulator.workload.schedules import Beside, StageTimes
from simulator.workload.stages import Workload, build_workload

# Rows of degrees that are worked on side by side: enough to outweigh the calls, few enough to stay in the cache.
ROWS = 1024
BLOCK = ("plan.schedule", "plan.pipeline", "plan.virtual_stages", "plan.placement.order")
CORE = (
    "plan.tensor", "plan.context", "plan.expert", "plan.expert_tensor", "plan.shard_degree",
    "plan.microbatch_sequences",
)  # fmt: skip


class Flags(NamedTuple):
    """What decides the control flow of the formulas, beside the block; codes into `table.CHOICES`."""

    sequence_parallel: int
    remat: int
    transport: int
    layout: int
    shard: int
    all_to_all: int
    gradients: int
    parameters: int


FLAGS = (
    "plan.sequence_parallel", "training.remat", "training.dispatch.transport", "training.dispatch.layout", "plan.shard",
    "software.overlap.all_to_all", "software.overlap.gradients", "software.overlap.parameters",
)  # fmt: skip


@dataclass(slots=True)
class Answers:
    """Answers of plans: seconds of a step and bytes at the fullest instant, both [flags, rows]; NaN where a rule breaks.

    `model_flops` are of a whole step; `broken` says how many plans each (field, rule) refused.
    """

    step_s: NDArray[np.float64]
    memory_bytes: NDArray[np.float64]
    model_flops: NDArray[np.float64]
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)


class ArrayForm:
    """The closed form of one job on one cluster; remembers the lines of collectives and the loads of ranks."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.kernels, self.network = Kernels(cluster.chip), Network(cluster)
        habits = habits_of(job, cluster.chip.kind)
        self.own, self.peak = habits.own, self.kernels.peak(habits.matmul_dtype)
        self.capacity, self.reserve = memory_limits(cluster, habits)
        self._loads: dict[tuple[float, ...], float] = {}
        price = price_of(cluster.chip)
        self.usd_per_s = None if price is None else price.usd_per_chip_hour * cluster.chips / 3600

    def block(self, place: Sequence[int], core: Sequence[Column], flags: Sequence[Flags]) -> Answers:
        """Answers of all `flags` for all rows of `core` (in the order of `CORE`) under one `BLOCK` of codes."""
        n = len(core[0])
        shape = (len(flags), n)
        out = Answers(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan))
        sieves: dict[tuple[int, int, int], Sieve] = {}
        microbatches: Any = 1
        for f in flags:
            kind = (f.sequence_parallel, f.layout, f.shard)
            if kind not in sieves:
                sieve = sieves[kind] = Sieve(n)
                degrees = self._degrees(place, core, f, sieve)
                microbatches = np.broadcast_to(degrees.microbatches, n)
            for reason, count in sieves[kind].broken.items():
                out.broken[reason] += count
        valid = np.logical_or.reduce([s.ok for s in sieves.values()])
        walked = np.where(valid, minimum(microbatches, 2 * place[1]), 0)
        for m in np.unique(walked).tolist():
            rows = np.flatnonzero(walked == m) if m else ()
            for low in range(0, len(rows), ROWS):
                some_rows = rows[low : low + ROWS]
                part = _Part(self, place, [c[some_rows] for c in core], flags)
                for i, f in enumerate(flags):
                    ok = sieves[f.sequence_parallel, f.layout, f.shard].ok[some_rows]
                    for whole, one in zip((out.step_s, out.memory_bytes, out.model_flops), part.answers(f), strict=True):
                        whole[i, some_rows] = np.where(ok, one, np.nan)
        return out

    def plan(self, place: Sequence[int], f: Flags) -> Job:
        """The job with the flags of a block, and degrees as they were."""
        names = dict(zip(FLAGS, f, strict=True)) | dict(zip(BLOCK, place, strict=True))
        return with_plan(self.job, {name: value(name, number) for name, number in names.items()})

    def _degrees(self, place: Sequence[int], core: Sequence[Column], f: Flags, sieve: Sieve, job: Any = None) -> Degrees:
        """Degrees of the rows; `sieve` drops those that break a rule."""
        schedule, pipeline, virtual, order = (value(n, v) for n, v in zip(BLOCK, place, strict=True))
        tensor, context, expert, expert_tensor, shard_degree, micro = core
        plan = SimpleNamespace(
            data=None, tensor=tensor, context=context, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor,
            sequence_parallel=CHOICES["plan.sequence_parallel"][f.sequence_parallel],
            shard=CHOICES["plan.shard"][f.shard], shard_degree=shard_degree, microbatch_sequences=micro,
            schedule=schedule, virtual_stages=virtual, placement=Placement(order=order),
            stages=self.job.plan.stages if keeps_stages(self.job, pipeline, virtual) else None,
        )  # fmt: skip
        return resolve(job or self.plan(place, f), self.cluster, plan, sieve)

    def busiest(self, degrees: Degrees, n: int) -> Number:
        """Load of the busiest expert rank over the mean, by row."""
        if not self.job.model.moes or self.job.training.capacity != "dropless":
            return 1.0
        names = ("microbatch_sequences", "data", "expert_data", "expert")
        columns = np.stack([np.broadcast_to(getattr(degrees, name), n) for name in names])
        distinct, at = np.unique(columns, axis=1, return_inverse=True)
        loads = []
        for one in distinct.T.tolist():
            key = tuple(one)
            if key not in self._loads:
                self._loads[key] = busiest_rank(self.job, replace(degrees, **dict(zip(names, one, strict=True))))
            loads.append(self._loads[key])
        return np.array(loads)[at.reshape(-1)]


@dataclass(slots=True)
class _Priced:
    """Kinds of layers under the flags that change them."""

    workload: Workload
    timer: Timer
    times: list[PieceTime]
    hop: Number


class _Part:
    """Some rows of a block that walk the same actions, under all its flags."""

    def __init__(self, form: ArrayForm, place: Sequence[int], core: Sequence[Column], flags: Sequence[Flags]) -> None:
        self.form, self.place, self.core = form, place, core
        self.n = len(core[0])
        sieve = Sieve(self.n)
        self.jobs = {f: form.plan(place, f) for f in flags}
        self.degrees: dict[int, Degrees] = {}
        for f in flags:
            if f.shard not in self.degrees:
                self.degrees[f.shard] = form._degrees(place, core, f, sieve, self.jobs[f])
        any_degrees = next(iter(self.degrees.values()))
        self.load = form.busiest(any_degrees, self.n)
        _, first, at = np.unique(np.stack(core[:5]), axis=1, return_index=True, return_inverse=True)
        self.network = ColumnNetwork(form.network, first, at.reshape(-1))
        self.accumulates = bool(np.any(any_degrees.microbatches > 1))
        self._priced: dict[tuple[int, ...], _Priced] = {}
        self._memory: dict[tuple[int, ...], Number] = {}
        self._passes: dict[tuple[Any, ...], list[StageResult]] = {}
        self._variant: dict[Flags, tuple[Any, ...]] = {}
        for f in flags:
            self._add_passes(f)
        self._walk()

    def _habits(self, f: Flags) -> Habits:
        return habits_of(self.jobs[f], self.form.cluster.chip.kind, accumulates=self.accumulates)

    def priced(self, f: Flags) -> _Priced:
        """Work and times of every kind of layer."""
        # Our own trainer's program looks its table up differently under FSDP, and reduces in another format.
        key = (*f[:3], f.layout, f.shard if self.form.own else 0)
        found = self._priced.get(key)
        if found is None:
            job, degrees, habits = self.jobs[f], self.degrees[f.shard], self._habits(f)
            workload = build_workload(job, degrees, habits)
            timer = Timer(
                job, self.form.cluster, degrees, habits, self.form.kernels, self.load, self.network, detail=False
            )
            times = [timer.time(p) for p in workload.pieces]
            found = self._priced[key] = _Priced(workload, timer, times, hop_s(timer, degrees, workload))
        return found

    def formula(self, f: Flags, priced: _Priced) -> StageFormula:
        """The formula of a stage under these flags."""
        return StageFormula(
            self.jobs[f], self.form.cluster, self.degrees[f.shard], self._habits(f), self.form.kernels, priced.timer
        )

    def _add_passes(self, f: Flags) -> None:
        """Passes of every stage, unless other flags that a microbatch cannot tell apart have made them."""
        shard = CHOICES["plan.shard"][f.shard]
        often = shard in ("gradients", "parameters") and self.accumulates
        seen = (
            f[:4],
            f.all_to_all if self.form.job.model.moes or self.form.own else 0,
            f.shard if often or shard == "parameters" or self.form.own else 0,
            f.gradients if often else 0,
            f.parameters if shard == "parameters" else 0,
        )
        self._variant[f] = seen
        if seen not in self._passes:
            priced = self.priced(f)
            formula = self.formula(f, priced)
            keys = stage_keys(self.jobs[f], priced.workload)
            made = {key: formula.passes(*held_pieces(priced.times, key)) for key in dict.fromkeys(keys)}
            self._passes[seen] = [made[key] for key in keys]

    def _walk(self) -> None:
        """Ends of the pipeline and of the launches under all flags side by side."""
        flags = {seen: f for f, seen in reversed(self._variant.items())}
        variants = list(self._passes)
        f = flags[variants[0]]
        degrees, priced = self.degrees[f.shard], self.priced(f)
        m = np.tile(np.broadcast_to(degrees.microbatches, self.n), len(variants))
        stacked = _stacked([self._passes[v] for v in variants], self.n)
        hop = np.concatenate([np.broadcast_to(self.priced(flags[v]).hop, self.n) for v in variants])
        tall = replace(degrees, microbatches=m)
        job, habits = self.jobs[f], self._habits(f)
        pipeline = pipeline_s(job, tall, stacked, priced.times, priced.workload, hop)
        launched = launched_s(job, self.form.cluster, tall, habits, stacked)
        ends = np.broadcast_to(np.maximum(pipeline, launched), self.n * len(variants)).reshape(len(variants), self.n)
        self._ends = dict(zip(variants, ends, strict=True))

    def answers(self, f: Flags) -> tuple[Number, Number, Number]:
        """Seconds of a step, bytes at its fullest instant, model FLOPs."""
        job, degrees, priced, seen = self.jobs[f], self.degrees[f.shard], self.priced(f), self._variant[f]
        formula, stages = self.formula(f, priced), self._passes[seen]
        for s in {id(s): s for s in stages}.values():
            s.tail_s = formula.tail(s)
        once = self.form.cluster.chip.host_step_overhead_us.value * 1e-6
        step = self._ends[seen] + after_s(job, degrees, stages) + once
        held = (*f[:4], f.shard)
        if held not in self._memory:
            self._memory[held] = peak_bytes(job, degrees, self._habits(f), priced.workload, self.form.reserve)
        flops = sum(s.model_flops for s in stages) * (degrees.data * degrees.tensor * degrees.context)
        return step, self._memory[held], flops


def _stacked(variants: Sequence[Sequence[StageResult]], n: int) -> list[StageResult]:
    """The passes of each stage under all variants below one another; equal stages stay one record."""

    def column(parts: Sequence[Number]) -> Column:
        return np.concatenate([np.broadcast_to(np.asarray(x, dtype=float), n) for x in parts])

    def times(parts: Sequence[StageTimes | None]) -> StageTimes:
        known = [t for t in parts if t is not None]
        names = ("forward", "backward_input", "backward_weight")
        beside = [t.beside for t in known if t.beside is not None]
        joined = None
        if beside:
            compute = [column([b.compute[i] for b in beside]) for i in range(3)]
            ends = (column([b.forward for b in beside]), column([b.backward for b in beside]))
            joined = Beside(*ends, (compute[0], compute[1], compute[2]), beside[0].slow)
        return StageTimes(*(column([getattr(t, name) for t in known]) for name in names), joined)

    made: dict[int, StageResult] = {}
    for p, first in enumerate(variants[0]):
        if id(first) not in made:
            same = [v[p] for v in variants]
            kernels = [column([s.kernels[i] for s in same]) for i in range(3)]
            pieces = {name: times([s.piece_times[name] for s in same]) for name in first.piece_times}
            made[id(first)] = StageResult(
                times=times([s.times for s in same]), kernels=(kernels[0], kernels[1], kernels[2]), piece_times=pieces
            )
    return [made[id(s)] for s in variants[0]]


def evaluate(job: Job, cluster: Cluster, table: Table, form: ArrayForm | None = None) -> dict[str, Column]:
    """Answers for the plans of `table` (see `table.py`), a column each, in its order.

    `step_time_s`, `memory_peak_bytes`, `mfu`, `usd_per_1b_tokens` (NaN without a price), `fits`, `ok`; NaN and False
    where a plan breaks a rule. Raises QuestionError for fields or values that no plan has.
    """
    form = form or ArrayForm(job, cluster)
    columns = filled(job, table)
    n = len(columns["plan.tensor"])
    out = {name: np.full(n, np.nan) for name in ("step_time_s", "memory_peak_bytes", "model_flops")}
    places, which = _distinct([columns[name] for name in BLOCK])
    for b, place in enumerate(places):
        rows = np.flatnonzero(which == b)
        cores, core_at = _distinct([columns[name][rows] for name in CORE])
        flags, flag_at = _distinct([columns[name][rows] for name in FLAGS])
        # Where plans are a full grid, all flags of all degrees at once; else flag by flag, only what is asked.
        grid = len(cores) * len(flags) <= 2 * len(rows)
        for some_flags in [range(len(flags))] if grid else [range(i, i + 1) for i in range(len(flags))]:
            here = np.flatnonzero((flag_at >= some_flags[0]) & (flag_at <= some_flags[-1]))
            used, at = np.unique(core_at[here], return_inverse=True)
            answers = form.block(
                place.tolist(), list(cores[used].T), [Flags(*flags[i].tolist()) for i in some_flags]
            )
            picked = (flag_at[here] - some_flags[0], at)
            for name, grid_of in zip(out, (answers.step_s, answers.memory_bytes, answers.model_flops), strict=True):
                out[name][rows[here]] = grid_of[picked]
    return measures(form, out)


def measures(form: ArrayForm, raw: dict[str, Column]) -> dict[str, Column]:
    """MFU, dollars and whether it fits, from step time, memory and model FLOPs."""
    step, memory, flops = raw["step_time_s"], raw["memory_peak_bytes"], raw["model_flops"]
    usd = np.nan if form.usd_per_s is None else form.usd_per_s * 1e9 / form.job.tokens_per_step
    return {
        "step_time_s": step,
        "memory_peak_bytes": memory,
        "mfu": flops / (step * form.cluster.devices * form.peak),
        "usd_per_1b_tokens": step * usd,
        "fits": memory <= form.capacity,
        "ok": ~np.isnan(step),
    }


def _distinct(columns: Sequence[Column]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Distinct rows of `columns`, [distinct, columns], and which one each row is."""
    rows, at = np.unique(np.stack(columns, axis=1).astype(np.int64), axis=0, return_inverse=True)
    return rows, at.reshape(-1)
