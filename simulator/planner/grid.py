"""A grid of plans: rows of degrees under every one of some flags, each formula called as seldom as it can be.

- kinds of layers are priced once for the flags that change them, whatever is sharded or overlapped;
- passes once for what a microbatch sees (ZeRO 1 and no sharding look alike to it, and so does their overlap);
- the walk through the schedule once for all flags side by side;
- what happens once a step, for every flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.analysis.closed_form import after_s, hop_s, launched_s, pipeline_s
from simulator.analysis.stage_formula import StageFormula, StageResult
from simulator.costs.piece_times import PieceTime, Timer
from simulator.job.rules import Degrees
from simulator.network.columns import ColumnNetwork
from simulator.numbers import Number, largest, minimum
from simulator.planner.flags import GROUPS, Flags
from simulator.planner.shapes import Kind, Pipeline, kinds_of
from simulator.planner.table import CHOICES, Column
from simulator.planner.validity import Sieve
from simulator.workload.habits import Habits, habits_of
from simulator.workload.memory import Footprint, footprints, stage_memory
from simulator.workload.schedules import Beside, StageTimes
from simulator.workload.stages import Workload, build_workload

if TYPE_CHECKING:
    from simulator.planner.array_form import ArrayForm


@dataclass(slots=True)
class _Priced:
    """Kinds of layers under the flags that change them."""

    workload: Workload
    timer: Timer
    times: list[PieceTime]
    hop: Number
    footprints: list[Footprint]


class Grid:
    """Rows whose pipelines have equally many kinds of stages, under all `flags`.

    `pipelines[which]` are the rows' own; all are pipelined or none is, all have one microbatch or none has.
    """

    def __init__(
        self,
        form: ArrayForm,
        place: Sequence[int],
        core: Sequence[Column],
        flags: Sequence[Flags],
        pipelines: Sequence[Pipeline],
        which: NDArray[np.intp],
    ) -> None:
        self.form, self.pipelines, self.which, self.n = form, pipelines, which, len(which)
        self.kinds = kinds_of(pipelines, which)
        self.jobs = {f: form.plan(place, f) for f in flags}
        self.degrees: dict[int, Degrees] = {}
        for f in flags:
            if f.shard not in self.degrees:
                self.degrees[f.shard] = form.degrees(place, core, f, Sieve(self.n), self.jobs[f])
        self.any = next(iter(self.degrees.values()))
        self.load = form.busiest(self.any, self.n)
        _, first, at = np.unique(np.stack(core[:GROUPS]), axis=1, return_index=True, return_inverse=True)
        self.network = ColumnNetwork(form.network, first, at.reshape(-1))
        self.accumulates = bool(np.any(self.any.microbatches > 1))
        self._habits: dict[tuple[Any, ...], Habits] = {}
        self._priced: dict[tuple[int, ...], _Priced] = {}
        self._memory: dict[tuple[int, ...], Number] = {}
        self._least: dict[tuple[int, ...], Number] = {}
        self._passes: dict[tuple[Any, ...], list[StageResult]] = {}
        self._seen = {f: self._sees(f) for f in flags}
        self._ends: dict[tuple[Any, ...], Column] = {}

    def habits(self, f: Flags) -> Habits:
        """Habits of the job's stack under these flags."""
        if f.rules not in self._habits:
            kind = self.form.cluster.chip.kind
            self._habits[f.rules] = habits_of(self.jobs[f], kind, accumulates=self.accumulates)
        return self._habits[f.rules]

    def priced(self, f: Flags) -> _Priced:
        """Work and times of every kind of layer."""
        # Our own trainer's program looks its table up differently under FSDP, and reduces in another format.
        key = (*f.layers, f.shard if self.form.own else 0)
        if key not in self._priced:
            job, degrees, habits = self.jobs[f], self.degrees[f.shard], self.habits(f)
            work = build_workload(job, degrees, habits)
            where = (self.form.cluster, degrees, habits, self.form.kernels, self.load, self.network)
            timer = Timer(job, *where, detail=False)
            times = [timer.time(p) for p in work.pieces]
            sizes = footprints(job, degrees, habits, work)
            self._priced[key] = _Priced(work, timer, times, hop_s(timer, degrees, work), sizes)
        return self._priced[key]

    def formula(self, f: Flags) -> StageFormula:
        """The formula of a stage under these flags."""
        where = (self.form.cluster, self.degrees[f.shard], self.habits(f), self.form.kernels)
        return StageFormula(self.jobs[f], *where, self.priced(f).timer)

    def _sees(self, f: Flags) -> tuple[Any, ...]:
        """What a microbatch sees of the flags: others with the same have the same passes."""
        shard = CHOICES["plan.shard"][f.shard]
        often = shard in ("gradients", "parameters") and self.accumulates
        return (
            f.layers,
            f.all_to_all if self.form.job.model.moes or self.form.own else 0,
            f.shard if often or shard == "parameters" or self.form.own else 0,
            f.gradients if often else 0,
            f.parameters if shard == "parameters" else 0,
        )

    def _add_up(self, f: Flags) -> list[StageResult]:
        """Passes of every kind of stage."""
        formula, times = self.formula(f), self.priced(f).times
        held = [_held(times, kind) for kind in self.kinds]
        return [formula.passes(own, *(twin or [[]])) for own, *twin in held]

    def _walk(self) -> dict[tuple[Any, ...], Column]:
        """When pipeline and launches are over, [rows], for everything that a microbatch may see."""
        flags = {seen: f for f, seen in self._seen.items()}
        variants = list(self._passes)
        f = flags[variants[0]]
        stacked = [_stacked([self._passes[v][k] for v in variants], self.n) for k in range(len(self.kinds))]
        hops = np.stack([np.broadcast_to(self.priced(flags[v]).hop, self.n) for v in variants])
        ends = np.empty((len(variants), self.n))
        microbatches = np.broadcast_to(self.any.microbatches, self.n)
        for i, pipe in enumerate(self.pipelines):
            walked = np.where(self.which == i, minimum(microbatches, 2 * pipe.stages), 0)
            for m in np.unique(walked[walked > 0]).tolist():
                rows = np.flatnonzero(walked == m)
                taken = [_taken(s, rows) for s in stacked]
                stages = [taken[k] for k in pipe.kind_of]
                tall: Any = np.tile(microbatches[rows], len(variants))
                degrees = replace(self.any, pipeline=pipe.stages, virtual_stages=pipe.virtual, microbatches=tall)
                hop = hops[:, rows].reshape(-1)
                over = pipeline_s(self.jobs[f], degrees, stages, self.priced(f).times, pipe.workload, hop)
                launched = launched_s(self.jobs[f], self.form.cluster, degrees, self.habits(f), stages)
                ends[:, rows] = np.maximum(over, launched).reshape(len(variants), len(rows))
        return dict(zip(variants, ends, strict=True))

    def answers(self, f: Flags) -> tuple[Number, Number, Number]:
        """Seconds of a step, bytes at its fullest instant, model FLOPs of a step, [rows]."""
        if not self._ends:
            for seen, one in {seen: one for one, seen in self._seen.items()}.items():
                self._passes[seen] = self._add_up(one)
            self._ends = self._walk()
        job, degrees, stages = self.jobs[f], self.degrees[f.shard], self._passes[self._seen[f]]
        formula = self.formula(f)
        for s in stages:
            s.tail_s = formula.tail(s)
        once = self.form.cluster.chip.host_step_overhead_us.value * 1e-6
        firsts = [(kind.first, s) for kind, s in zip(self.kinds, stages, strict=True)]
        step = self._ends[self._seen[f]] + after_s(job, degrees, firsts) + once
        flops = sum(kind.stages * s.model_flops for kind, s in zip(self.kinds, stages, strict=True))
        return step, self.peak(f), flops * (degrees.data * degrees.tensor * degrees.context)

    def peak(self, f: Flags) -> Number:
        """Bytes of the fullest stage; of equal stages the first has most microbatches in flight (`in_flight`)."""
        key = (*f.layers, f.shard)
        if key not in self._memory:
            job, degrees, habits, sizes = self.jobs[f], self.degrees[f.shard], self.habits(f), self.priced(f).footprints
            peaks = []
            for kind in self.kinds:
                held = [pair for own in _held(sizes, kind) for pair in own]
                peaks.append(stage_memory(job, degrees, habits, held, kind.first, self.form.reserve).peak_bytes)
            self._memory[key] = largest(peaks)
        return self._memory[key]

    def least_s(self, f: Flags) -> Number:
        """A lower bound of the step, seconds: what its busiest device computes, no communication, no bubble."""
        key = f.layers
        if key not in self._least:
            times, m = self.priced(f).times, self.any.microbatches
            each = [[sum(n * t.compute_s for t, n in own) for own in _held(times, kind)] for kind in self.kinds]
            # DualPipe's devices run half of the microbatches of either copy.
            self._least[key] = largest([m * sum(own) / len(own) for own in each])
        return self._least[key]


def _held(each: Sequence[Any], kind: Kind) -> list[list[tuple[Any, Any]]]:
    """What a kind of stage and its mirror, where it has one, hold: pieces with how often, but for those of no row."""
    return [[(x, n) for x, n in zip(each, own, strict=True) if np.ndim(n) or n] for own in kind.held]


def _stacked(variants: Sequence[StageResult], n: int) -> StageResult:
    """The passes of a kind of stage under all variants, [variants, rows]."""

    def column(parts: Sequence[Number]) -> Any:
        return np.stack([np.broadcast_to(np.asarray(x, dtype=float), n) for x in parts])

    def times(parts: Sequence[StageTimes | None]) -> StageTimes:
        known = [t for t in parts if t is not None]
        beside = [t.beside for t in known if t.beside is not None]
        joined = None
        if beside:
            compute = [column([b.compute[i] for b in beside]) for i in range(3)]
            ends = column([b.forward for b in beside]), column([b.backward for b in beside])
            joined = Beside(*ends, (compute[0], compute[1], compute[2]), beside[0].slow)
        inputs, weights = [t.backward_input for t in known], [t.backward_weight for t in known]
        return StageTimes(column([t.forward for t in known]), column(inputs), column(weights), joined)

    kernels = [column([s.kernels[i] for s in variants]) for i in range(3)]
    pieces = {name: times([s.piece_times[name] for s in variants]) for name in variants[0].piece_times}
    passes = times([s.times for s in variants])
    return StageResult(times=passes, kernels=(kernels[0], kernels[1], kernels[2]), piece_times=pieces)


def _taken(stage: StageResult, rows: NDArray[np.intp]) -> StageResult:
    """Some rows of all variants below one another, [variants x rows]."""

    def column(x: Any) -> Any:
        return x[:, rows].reshape(-1)

    def times(t: StageTimes | None) -> StageTimes:
        assert t is not None
        b = t.beside
        if b is not None:
            c = b.compute
            b = Beside(column(b.forward), column(b.backward), (column(c[0]), column(c[1]), column(c[2])), b.slow)
        return StageTimes(column(t.forward), column(t.backward_input), column(t.backward_weight), b)

    k = stage.kernels
    pieces = {name: times(t) for name, t in stage.piece_times.items()}
    return StageResult(times=times(stage.times), kernels=(column(k[0]), column(k[1]), column(k[2])), piece_times=pieces)
