"""The search: stream the space, drop what cannot fit or cannot win, keep the best and the front.

Nothing that is dropped could change the answer. A plan's memory is exact before its time is known; a plan that does not
fit is out. A plan whose least time (compute alone, `Grid.least_s`) is longer than the worst of the best so far cannot
be among them, and if a known plan is also no larger, it is not on the front either. `exhaustive` drops nothing by
bounds; both give the same answer (tests/test_planner_search.py).

A space is searched in parts, each for itself: what a part drops hangs on its own plans alone, so a part has one
outcome, whoever searches it, whenever, after whichever others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from simulator.planner.array_form import ArrayForm, Part, measures
from simulator.planner.constraints import Constraint, all_hold
from simulator.planner.empty import why_empty
from simulator.planner.flags import BLOCK, CORE, FLAGS, Flags
from simulator.planner.kept import NUMBERS, Kept, Winners
from simulator.planner.outcome import Outcome
from simulator.planner.parts import PLANS_PER_PART, parts_of
from simulator.planner.space import Space
from simulator.planner.table import FIELDS, ORDERS, Column

OBJECTIVES = ("step_time", "tokens_per_usd", "memory")
# A bound is added up in another order than the time that it bounds: that far they may differ by rounding alone.
ROUNDING = 1e-9
Progress = Callable[[int, int], None]
# Told of plans that are feasible, as they come.
Sink = Callable[[Kept], None]


class Search:
    """One search over `space`; `run` does it."""

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        space: Space,
        *,
        objective: str = "step_time",
        constraints: Sequence[Constraint] = (),
        top: int = 20,
        exhaustive: bool = False,
        plans_per_part: int = PLANS_PER_PART,
        progress: Progress | None = None,
    ) -> None:
        self.form, self.job, self.cluster, self.space = ArrayForm(job, cluster), job, cluster, space
        self.objective, self.constraints, self.top = objective, tuple(constraints), top
        self.exhaustive, self.progress = exhaustive, progress
        self.parts = parts_of(space, plans_per_part)
        self._places = space.places()
        if objective == "tokens_per_usd" and self.form.usd_per_s is None:
            chip = cluster.chip.name
            raise QuestionError(
                f"--objective tokens_per_usd: no price for {chip} in its profile; give one under prices in a copy of it"
                f" (moecast chips {chip}) and name that with --profile"
            )
        priced = [c for c in self.constraints if c.name == "usd_per_1b_tokens"]
        if priced and self.form.usd_per_s is None:
            raise QuestionError(f"--constraint {priced[0].text!r}: no price for {cluster.chip.name} in its profile")
        # Time, MFU, dollars and tokens a second say the same on one cluster: all but memory follow the step.
        self.by = "memory_peak_bytes" if objective == "memory" else "step_time_s"
        self.out = self.nothing()

    def run(self) -> Outcome:
        """Search all parts. QuestionError where nothing is left: which field, memory or constraint, by how much."""
        begin = time.perf_counter()
        whole, done = self.nothing(), 0
        if self.progress is not None:
            self.progress(0, self.space.count)
        for i in range(self.parts.count):
            found = self.part(i)
            whole.add(found.winners.rows(), found.record())
            done += self.parts.size(i)
            if self.progress is not None:
                self.progress(done, self.space.count)
        return self.finished(whole, begin)

    def nothing(self) -> Outcome:
        """An outcome to add to."""
        return Outcome(Winners(self.by, self.top))

    def finished(self, whole: Outcome, begin: float) -> Outcome:
        """The outcome of all parts since `begin`, by the performance counter; QuestionError where nothing is left."""
        if not whole.feasible:
            raise QuestionError(why_empty(whole, self.space, self.constraints, self.form.capacity))
        whole.seconds = time.perf_counter() - begin
        return whole

    def part(self, i: int, sink: Sink | None = None) -> Outcome:
        """What part `i` of the space holds; `sink` is told of every plan that is feasible."""
        place, low, high = self.parts[i]
        self.out = self.nothing()
        for core in self.space.cores(low, high):
            self._cores(self._places[place], core, sink)
        return self.out

    def _cores(self, place: Sequence[int], core: list[Column], sink: Sink | None) -> None:
        """Search rows of degrees under all flags."""
        flags = self._flags(place)
        for split in (0, 1):
            some = [f for f in flags if f.sequence_parallel == split]
            rows = self._rows(place, core, bool(split)) if some else ()
            self.out.searched += len(rows) * len(some)
            if len(rows):
                self._chunk(place, [c[rows] for c in core], some, sink)

    def _flags(self, place: Sequence[int]) -> list[Flags]:
        """Flags that constraints on the plan alone allow."""
        fixed = dict(zip(BLOCK, place, strict=True))
        flags = self.space.flags()
        columns = {name: np.array([f[i] for f in flags]) for i, name in enumerate(FLAGS)}
        columns |= {name: np.full(len(flags), v) for name, v in fixed.items()}
        holds = all_hold(self.constraints, columns, len(flags))
        return [f for f, ok in zip(flags, holds, strict=True) if ok]

    def _rows(self, place: Sequence[int], core: Sequence[Column], sequence: bool) -> NDArray[np.intp]:
        """Rows that constraints on the plan alone allow, without repetitions.

        One stage has no schedule, and no place among the axes; one tensor rank splits no sequence (`sequence`: whether
        the flags do).
        """
        columns = dict(zip(CORE, core, strict=True))
        holds = all_hold(self.constraints, columns, len(core[0]))
        orders = [_unpiped(o) for o in self.space.values["plan.placement.order"]]
        repeats = orders.index(_unpiped(place[1])) < self.space.values["plan.placement.order"].index(place[1])
        if repeats or place[0] != self.space.values["plan.schedule"][0]:
            holds &= columns["plan.pipeline"] > 1
        if sequence and 0 in self.space.values["plan.sequence_parallel"]:
            holds &= columns["plan.tensor"] > 1
        return np.flatnonzero(holds)

    def _chunk(self, place: Sequence[int], core: list[Column], flags: list[Flags], sink: Sink | None) -> None:
        out, broken = self.out, Counter[tuple[str, str]]()
        judge = None if self.exhaustive else self._alive
        for part in self.form.parts(place, core, flags, broken, judge):
            out.pruned += part.dropped
            if part.answers:
                self._take(place, core, part, sink)
        out.broken.update(broken)
        out.valid += len(core[0]) * len(flags) - sum(broken.values())

    def _alive(self, least_s: Column, memory: Column, ok: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Plans that may be among the best or on the front."""
        fits = self._fits(memory)
        self._note_smallest(memory[ok & ~fits])
        least = least_s * (1 - ROUNDING)
        wins = (memory if self.by == "memory_peak_bytes" else least) <= self.out.winners.worst
        alive: NDArray[np.bool_] = fits & (wins | (least < self.out.winners.front_step(memory)))
        return alive

    def _fits(self, memory: Column) -> NDArray[np.bool_]:
        own = [c for c in self.constraints if c.name == "memory_peak_bytes"]
        return (memory <= self.form.capacity) & all_hold(own, {"memory_peak_bytes": memory}, len(memory))

    def _note_smallest(self, too_large: Column) -> None:
        if len(too_large):
            self.out.smallest = min(self.out.smallest, float(too_large.min()))

    def _take(self, place: Sequence[int], core: Sequence[Column], part: Part, sink: Sink | None) -> None:
        """Rank the plans of a part."""
        out = self.out
        raw = dict(
            zip(("step_time_s", "memory_peak_bytes", "model_flops"),
                (np.concatenate([a[i] for a in part.answers]) for i in (1, 2, 3)), strict=True)
        )  # fmt: skip
        found = measures(self.form, raw)
        found["tokens_per_s"] = self.job.tokens_per_step / found["step_time_s"]
        found["devices"] = np.full(len(found["step_time_s"]), self.cluster.devices)
        ok, fits = found["ok"], found["fits"]
        out.evaluated += int(np.count_nonzero(ok))
        out.too_large += int(np.count_nonzero(ok & ~fits))
        self._note_smallest(found["memory_peak_bytes"][ok & ~fits])
        holds = ok & fits & all_hold(self.constraints, found, len(ok))
        for c in self.constraints if not out.feasible and not holds.any() else ():
            self._note_nearest(c, found, ok & fits)
        good = np.flatnonzero(holds)
        out.feasible += len(good)
        if not len(good):
            return
        numbers = np.stack([found[name][good] for name in NUMBERS], axis=1)
        if sink is not None:
            sink(Kept(self._codes(place, core, part, good), numbers))
        out.winners.offer(numbers, lambda chosen: self._codes(place, core, part, good[chosen]))

    def _codes(
        self, place: Sequence[int], core: Sequence[Column], part: Part, which: NDArray[np.intp]
    ) -> NDArray[np.int64]:
        """Codes of plans by their place among the answers of a part, flag after flag."""
        flag, row = np.divmod(which, len(part.rows))
        flags = np.array([a[0] for a in part.answers], dtype=np.int64)
        columns = {name: np.full(len(which), v) for name, v in zip(BLOCK, place, strict=True)}
        columns |= {name: c[part.rows[row]] for name, c in zip(CORE, core, strict=True)}
        columns |= {name: flags[flag, i] for i, name in enumerate(FLAGS)}
        return np.stack([columns[name] for name in FIELDS], axis=1).astype(np.int64)

    def _note_nearest(self, c: Constraint, found: dict[str, Column], rows: NDArray[np.bool_]) -> None:
        """Remember the plan that comes nearest to a constraint that the whole of a part may break."""
        if c.name in found and rows.any():
            misses = np.where(rows, c.misses_by(found[c.name]), np.inf)
            near = float(misses.min())
            self.out.miss(c.text, near, float(found[c.name][misses == near].min()))


def _unpiped(order: int) -> tuple[str, ...]:
    """An order of the axes but for pipeline."""
    return tuple(axis for axis in ORDERS[order] if axis != "pipeline")
