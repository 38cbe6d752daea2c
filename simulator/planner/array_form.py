"""The closed form over columns: step time, memory, MFU and dollars of many plans of one job on one cluster.

`evaluate(job, cluster, table)` is the interface: plans in, answers out, each row equal to the scalar forecast of that
plan (tests/test_planner_arrays.py: to 1e-9). The formulas are the scalar ones, called with columns (`grid.py`): rows
are degrees, and all flags are worked out for all rows that are asked for under several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from simulator.analysis.closed_form import busiest_rank
from simulator.analysis.evidence import price_of
from simulator.analysis.forecast import memory_limits
from simulator.job.job import Job, Placement
from simulator.job.rules import Degrees, resolve
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import Network
from simulator.numbers import Number, minimum
from simulator.planner.flags import BLOCK, CORE, FLAGS, Flags
from simulator.planner.grid import Grid
from simulator.planner.shapes import Pipeline, pipeline_of
from simulator.planner.table import CHOICES, Column, Table, filled, value, with_plan
from simulator.planner.validity import Sieve
from simulator.workload.habits import habits_of

# Rows worked on side by side: enough to outweigh the calls, few enough to stay in the processor's cache.
ROWS = 2048
NAMES = ("step_time_s", "memory_peak_bytes", "model_flops")


@dataclass(slots=True)
class Answers:
    """Answers of plans, [flags, rows]: seconds of a step, bytes at the fullest instant, model FLOPs of a step.

    NaN where a rule is broken; `broken` says how many plans each (field, rule) refused.
    """

    step_s: NDArray[np.float64]
    memory_bytes: NDArray[np.float64]
    model_flops: NDArray[np.float64]
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(slots=True)
class Part:
    """Answers of some `rows`: flags with seconds, bytes and FLOPs of each row; and how many plans a judge dropped."""

    rows: NDArray[np.intp]
    answers: list[tuple[Flags, Column, Column, Column]]
    dropped: int


# Keeps rows by a lower bound of their seconds, their exact bytes, and which of them keep the rules.
Judge = Callable[[Column, Column, NDArray[np.bool_]], NDArray[np.bool_]]


class ArrayForm:
    """The closed form of one job on one cluster; remembers lines of collectives, loads of ranks, and pipelines."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.kernels, self.network = Kernels(cluster.chip), Network(cluster)
        habits = habits_of(job, cluster.chip.kind)
        self.own, self.peak = habits.own, self.kernels.peak(habits.matmul_dtype)
        self.capacity, self.reserve = memory_limits(cluster, habits)
        self._loads: dict[tuple[float, ...], float] = {}
        self._pipelines: dict[tuple[str, int, int], Pipeline] = {}
        price = price_of(cluster.chip)
        self.usd_per_s = None if price is None else price.usd_per_chip_hour * cluster.chips / 3600

    def block(self, place: Sequence[int], core: Sequence[Column], flags: Sequence[Flags]) -> Answers:
        """Answers of all `flags` for all rows of `core` (columns in the order of `CORE`) under one `BLOCK` of codes."""
        shape = (len(flags), len(core[0]))
        out = Answers(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan))
        for part in self.parts(place, core, flags, out.broken):
            for f, *found in part.answers:
                for whole, one in zip((out.step_s, out.memory_bytes, out.model_flops), found, strict=True):
                    whole[flags.index(f), part.rows] = one
        return out

    def parts(
        self,
        place: Sequence[int],
        core: Sequence[Column],
        flags: Sequence[Flags],
        broken: Counter[tuple[str, str]],
        judge: Judge | None = None,
    ) -> Iterator[Part]:
        """The same in parts of up to `ROWS` rows, so that memory stays flat; rules that refuse plans go to `broken`.

        A `judge` sees memory and least time of plans before the rest of their cost is worked out, and drops some.
        """
        sieves, microbatches = self.sieve(place, core, flags)
        for f in flags:
            broken.update(sieves[f.rules].broken)
        valid = np.flatnonzero(np.logical_or.reduce([s.ok for s in sieves.values()]))
        if not len(valid):
            return
        schedule = CHOICES["plan.schedule"][place[0]]
        stages, virtual = (core[CORE.index(name)][valid] for name in ("plan.pipeline", "plan.virtual_stages"))
        pairs, which = np.unique(np.stack([stages, virtual]), axis=1, return_inverse=True)
        which = which.reshape(-1)
        pipelines = [self.pipeline(schedule, *one) for one in pairs.T.tolist()]
        kinds = np.array([len(p.first) for p in pipelines])[which]
        # What is the same for rows that are worked on together: pipelined or not, one microbatch or several, kinds.
        group = kinds * 4 + (stages > 1) * 2 + (microbatches[valid] > 1)
        walked = minimum(microbatches[valid], 2 * stages)
        for g in np.unique(group).tolist():
            rows = np.flatnonzero(group == g)
            # Rows that walk the same actions stand together, so that few walks are cut.
            rows = rows[np.lexsort((walked[rows], which[rows]))]
            for low in range(0, len(rows), ROWS):
                here = rows[low : low + ROWS]
                ok = {key: s.ok[valid[here]] for key, s in sieves.items()}
                yield from self._part(place, core, flags, (pipelines, which), valid, here, ok, judge)

    def _part(
        self,
        place: Sequence[int],
        core: Sequence[Column],
        flags: Sequence[Flags],
        shapes: tuple[list[Pipeline], NDArray[np.intp]],
        valid: NDArray[np.intp],
        here: NDArray[np.intp],
        ok: dict[tuple[int, int, int], NDArray[np.bool_]],
        judge: Judge | None,
    ) -> Iterator[Part]:
        pipelines, which = shapes

        def grid_of(rows: NDArray[np.intp], some: Sequence[Flags]) -> Grid:
            at, present = np.unique(which[rows], return_inverse=True)
            return Grid(self, place, [c[valid[rows]] for c in core], some, [pipelines[i] for i in at], present)

        grid, masks = grid_of(here, flags), {f: ok[f.rules] for f in flags}
        if judge is not None:
            alive: dict[tuple[int, ...], NDArray[np.bool_]] = {}
            for f in flags:
                key = (*f.layers, f.shard)
                if key not in alive:
                    alive[key] = judge(np.broadcast_to(grid.least_s(f), len(here)), grid.peak(f), masks[f])
            plans = sum(int(np.count_nonzero(m)) for m in masks.values())
            masks = {f: m & alive[*f.layers, f.shard] for f, m in masks.items()}
            left = [f for f in flags if masks[f].any()]
            kept = np.logical_or.reduce([masks[f] for f in left]) if left else np.zeros(len(here), dtype=np.bool_)
            yield Part(valid[here], [], plans - sum(int(np.count_nonzero(m)) for m in masks.values()))
            if not left:
                return
            if len(left) < len(flags) or not kept.all():
                here, flags = here[kept], left
                masks = {f: masks[f][kept] for f in left}
                grid = grid_of(here, flags)
        answers = []
        for f in flags:
            step, memory, flops = (np.where(masks[f], one, np.nan) for one in grid.answers(f))
            answers.append((f, step, memory, flops))
        yield Part(valid[here], answers, 0)

    def sieve(
        self, place: Sequence[int], core: Sequence[Column], flags: Sequence[Flags]
    ) -> tuple[dict[tuple[int, int, int], Sieve], Column]:
        """Which rows keep the rules under the flags that rules read; and the microbatches of each row."""
        n = len(core[0])
        sieves: dict[tuple[int, int, int], Sieve] = {}
        microbatches: Any = 1
        for f in flags:
            if f.rules not in sieves:
                sieves[f.rules] = Sieve(n)
                microbatches = self.degrees(place, core, f, sieves[f.rules]).microbatches
        return sieves, np.broadcast_to(microbatches, n)

    def pipeline(self, schedule: str, stages: int, virtual: int) -> Pipeline:
        """Kinds of stages, remembered."""
        key = (schedule, stages, virtual)
        if key not in self._pipelines:
            self._pipelines[key] = pipeline_of(self.job, *key)
        return self._pipelines[key]

    def plan(self, place: Sequence[int], f: Flags) -> Job:
        """The job with the flags of a block; its degrees are as they were."""
        names = dict(zip(FLAGS, f, strict=True)) | dict(zip(BLOCK, place, strict=True))
        return with_plan(self.job, {name: value(name, number) for name, number in names.items()})

    def degrees(
        self, place: Sequence[int], core: Sequence[Column], f: Flags, sieve: Sieve, job: Job | None = None
    ) -> Degrees:
        """Degrees of the rows; `sieve` drops those that break a rule."""
        schedule, order = (value(n, v) for n, v in zip(BLOCK, place, strict=True))
        columns = {name.rpartition(".")[2]: column for name, column in zip(CORE, core, strict=True)}
        plan = SimpleNamespace(
            data=None, stages=None, schedule=schedule, placement=Placement(order=order),
            sequence_parallel=CHOICES["plan.sequence_parallel"][f.sequence_parallel],
            shard=CHOICES["plan.shard"][f.shard], **columns,
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


def evaluate(job: Job, cluster: Cluster, table: Table, form: ArrayForm | None = None) -> dict[str, Column]:
    """Answers for the plans of `table` (see `table.py`), a column each, in its order.

    `step_time_s`, `memory_peak_bytes`, `mfu`, `usd_per_1b_tokens` (NaN without a price), `fits`, `ok`; NaN and False
    where a plan breaks a rule. Raises QuestionError for fields or values that no plan has.
    """
    form = form or ArrayForm(job, cluster)
    columns = filled(job, table)
    out = {name: np.full(len(columns["plan.tensor"]), np.nan) for name in NAMES}
    places, which = distinct([columns[name] for name in BLOCK])
    for b, place in enumerate(places):
        rows = np.flatnonzero(which == b)
        cores, core_at = distinct([columns[name][rows] for name in CORE])
        flags, flag_at = distinct([columns[name][rows] for name in FLAGS])
        # Where plans are a full grid, all flags of all degrees at once; else flag by flag, only what is asked.
        grid = len(cores) * len(flags) <= 2 * len(rows)
        for asked in [range(len(flags))] if grid else [range(i, i + 1) for i in range(len(flags))]:
            here = np.flatnonzero((flag_at >= asked[0]) & (flag_at <= asked[-1]))
            used, at = np.unique(core_at[here], return_inverse=True)
            answers = form.block(place.tolist(), list(cores[used].T), [Flags(*flags[i].tolist()) for i in asked])
            picked = (flag_at[here] - asked[0], at)
            for name, found in zip(NAMES, (answers.step_s, answers.memory_bytes, answers.model_flops), strict=True):
                out[name][rows[here]] = found[picked]
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


def distinct(columns: Sequence[Column]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Distinct rows of `columns`, [distinct, columns], and which one each row is."""
    rows, at = np.unique(np.stack(columns, axis=1).astype(np.int64), axis=0, return_inverse=True)
    return rows, at.reshape(-1)
