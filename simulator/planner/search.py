"""The search: stream the space, drop what cannot fit or cannot win, keep the best and the front.

Nothing that is dropped could change the answer. A plan's memory is exact before its time is known; a plan that does not
fit is out. A plan whose least time (compute alone, `Grid.least_s`) is longer than the worst of the best so far cannot
be among them, and if a known plan is also no larger, it is not on the front either. `exhaustive` drops nothing by
bounds; both give the same answer (tests/test_planner_search.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from simulator.planner.array_form import ArrayForm, Part, measures
from simulator.planner.constraints import Constraint, all_hold
from simulator.planner.flags import BLOCK, CORE, FLAGS, Flags
from simulator.planner.space import Space
from simulator.planner.table import FIELDS, ORDERS, Column

OBJECTIVES = ("step_time", "tokens_per_usd", "memory")
# A bound is added up in another order than the time that it bounds: that far they may differ by rounding alone.
ROUNDING = 1e-9
NUMBERS = ("step_time_s", "memory_peak_bytes", "mfu", "usd_per_1b_tokens", "tokens_per_s")
Progress = Callable[[int, int], None]
# Told of every part's plans that are feasible: columns of codes by field, and of numbers.
Sink = Callable[[dict[str, Column], dict[str, Column]], None]


@dataclass(slots=True)
class Kept:
    """Plans that are kept: codes, [plans, fields in the order of FIELDS], and numbers, [plans, NUMBERS]."""

    codes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, len(FIELDS)), dtype=np.int64))
    numbers: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, len(NUMBERS))))

    def joined(self, codes: NDArray[np.int64], numbers: NDArray[np.float64]) -> Kept:
        """These and more."""
        return Kept(np.concatenate([self.codes, codes]), np.concatenate([self.numbers, numbers]))

    def taken(self, rows: Any) -> Kept:
        """Some of these."""
        return Kept(self.codes[rows], self.numbers[rows])

    def column(self, name: str) -> Column:
        """One of `NUMBERS`."""
        return self.numbers[:, NUMBERS.index(name)]


@dataclass(slots=True)
class Outcome:
    """Counts of a search, its best plans in order, and its front (no plan is both faster and smaller) by step time."""

    best: Kept
    front: Kept
    searched: int = 0
    valid: int = 0
    too_large: int = 0
    pruned: int = 0
    evaluated: int = 0
    feasible: int = 0
    seconds: float = 0.0
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)


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
        sink: Sink | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.form, self.job, self.cluster, self.space = ArrayForm(job, cluster), job, cluster, space
        self.objective, self.constraints, self.top = objective, tuple(constraints), top
        self.exhaustive, self.sink, self.progress = exhaustive, sink, progress
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
        self.out = Outcome(Kept(), Kept())
        self.nearest = {c.text: (np.inf, np.nan) for c in self.constraints}
        self.smallest = np.inf
        self.per_row = math.prod(len(space.values[name]) for name in FLAGS)

    def run(self) -> Outcome:
        """Search. QuestionError where nothing is left: which field, memory or constraint is to blame, by how much."""
        begin = time.perf_counter()
        out = self.out
        done = 0
        for place in self.space.places():
            flags = self._flags(place)
            alike = [[f for f in flags if f.sequence_parallel == split] for split in (0, 1)]
            for core in self.space.cores():
                for some in alike:
                    rows = self._rows(place, core, bool(some and some[0].sequence_parallel)) if some else ()
                    out.searched += len(rows) * len(some)
                    if len(rows):
                        self._chunk(place, [c[rows] for c in core], some)
                done += len(core[0]) * self.per_row
                if self.progress is not None:
                    self.progress(done, self.space.count)
        if not len(out.best.codes):
            raise QuestionError(self._why_empty())
        out.seconds = time.perf_counter() - begin
        return out

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

    def _chunk(self, place: Sequence[int], core: list[Column], flags: list[Flags]) -> None:
        out, broken = self.out, Counter[tuple[str, str]]()
        judge = None if self.exhaustive else self._alive
        for part in self.form.parts(place, core, flags, broken, judge):
            out.pruned += part.dropped
            if part.answers:
                self._take(place, core, part)
        out.broken.update(broken)
        out.valid += len(core[0]) * len(flags) - sum(broken.values())

    def _alive(self, least_s: Column, memory: Column, ok: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Plans that may be among the best or on the front."""
        fits = self._fits(memory)
        if (ok & ~fits).any():
            self.smallest = min(self.smallest, float(memory[ok & ~fits].min()))
        least = least_s * (1 - ROUNDING)
        alive = least < self._front_step(memory)
        if len(self.out.best.codes) < self.top:
            return fits
        worst = self.out.best.column(self.by).max()
        wins: NDArray[np.bool_] = (memory if self.by == "memory_peak_bytes" else least) <= worst
        return fits & (alive | wins)

    def _fits(self, memory: Column) -> NDArray[np.bool_]:
        own = [c for c in self.constraints if c.name == "memory_peak_bytes"]
        return (memory <= self.form.capacity) & all_hold(own, {"memory_peak_bytes": memory}, len(memory))

    def _front_step(self, memory: Column) -> Column:
        """Least step time of the front's plans that are no larger; infinite where there is none."""
        front = self.out.front
        if not len(front.codes):
            return np.full(len(memory), np.inf)
        # The front is in order of memory, its step times fall.
        at = np.searchsorted(front.column("memory_peak_bytes"), memory, side="right")
        return np.concatenate([[np.inf], front.column("step_time_s")])[at]

    def _take(self, place: Sequence[int], core: Sequence[Column], part: Part) -> None:
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
        if (ok & ~fits).any():
            self.smallest = min(self.smallest, float(found["memory_peak_bytes"][ok & ~fits].min()))
        holds = ok & fits & all_hold(self.constraints, found, len(ok))
        for c in self.constraints if not out.feasible and not holds.any() else ():
            self._nearer(c, found, ok & fits)
        good = np.flatnonzero(holds)
        out.feasible += len(good)
        if not len(good):
            return
        numbers = np.stack([found[name][good] for name in NUMBERS], axis=1)
        if self.sink is not None:
            codes = self._codes(place, core, part, good)
            columns = dict(zip(FIELDS, codes.T, strict=True))
            self.sink(columns, dict(zip(NUMBERS, numbers.T, strict=True)))
        by = numbers[:, NUMBERS.index(self.by)]
        wanted = np.zeros(len(good), dtype=np.bool_)
        if len(good) > self.top:
            wanted |= by <= np.partition(by, self.top - 1)[self.top - 1]
        else:
            wanted[:] = True
        if len(out.best.codes) >= self.top:
            wanted &= by <= out.best.column(self.by).max()
        faster = numbers[:, 0] < self._front_step(numbers[:, 1])
        local = np.flatnonzero(faster)
        front = local[_front(numbers[local, 1], numbers[local, 0])]
        for chosen, into in ((np.flatnonzero(wanted), "best"), (front, "front")):
            if len(chosen):
                kept = getattr(out, into).joined(self._codes(place, core, part, good[chosen]), numbers[chosen])
                setattr(out, into, self._ranked(kept) if into == "best" else _fronted(kept))

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

    def _ranked(self, kept: Kept) -> Kept:
        """The `top` best, in order; equal ones by their codes."""
        order = np.lexsort((*kept.codes.T[::-1], kept.column("memory_peak_bytes"), kept.column(self.by)))
        return kept.taken(order[: self.top])

    def _nearer(self, c: Constraint, found: dict[str, Column], rows: NDArray[np.bool_]) -> None:
        """Remember the plan that comes nearest to a constraint that the whole of a part may break."""
        if c.name in found and rows.any():
            misses = np.where(rows, c.misses_by(found[c.name]), np.inf)
            i = int(misses.argmin())
            if misses[i] < self.nearest[c.text][0]:
                self.nearest[c.text] = (float(misses[i]), float(found[c.name][i]))

    def _why_empty(self) -> str:
        out = self.out
        for c in self.constraints:
            column = np.array(self.space.values[c.name]) if c.of_plan else None
            if column is not None and not c.holds(column).any():
                i = int(c.misses_by(column).argmin())
                return f"--constraint {c.text!r}: no plan of the space holds it; nearest is {c.said(column[i])}"
        if not out.searched:
            return "the constraints on the plan leave no plan of the space: together they exclude all"
        if not out.valid:
            (name, rule), count = out.broken.most_common(1)[0]
            return (
                f"no plan of the space keeps the rules; {name} refused most, {count:,} of {out.searched:,}:"
                f" its values {self._listed(name)} {rule}"
            )
        missed = [(c, *self.nearest[c.text]) for c in self.constraints if self.nearest[c.text][0] > 0]
        for c, by, near in missed:
            if np.isfinite(by):
                return (
                    f"--constraint {c.text!r}: no plan holds it; the nearest has {c.name} {c.said(near)}, {by:.4g} off"
                )
        of = min([self.form.capacity, *(c.bound for c in self.constraints if c.name == "memory_peak_bytes")])
        if np.isfinite(self.smallest) and self.smallest > of:
            over = self.smallest - of
            limits = [c.text for c in self.constraints if c.name == "memory_peak_bytes"]
            what = f"--constraint {limits[0]!r}: " if limits and of < self.form.capacity else ""
            return (
                f"{what}none of {out.valid:,} plans fits: the smallest needs {self.smallest:.4g} bytes a device,"
                f" {over:.4g} more than {of:.4g}"
            )
        return f"no plan holds all constraints together: {', '.join(c.text for c in self.constraints)}"

    def _listed(self, name: str) -> str:
        values = self.space.values.get(name, ())
        return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")


def _unpiped(order: int) -> tuple[str, ...]:
    """An order of the axes but for pipeline."""
    return tuple(axis for axis in ORDERS[order] if axis != "pipeline")


def _front(memory: Column, step: Column) -> NDArray[np.intp]:
    """Plans that no other beats in both, in order of memory; of equal ones the first."""
    order = np.lexsort((step, memory))
    least = np.minimum.accumulate(step[order])
    first = np.concatenate([[True], step[order][1:] < least[:-1]])[: len(order)]
    return np.asarray(order[first])


def _fronted(kept: Kept) -> Kept:
    return kept.taken(_front(kept.column("memory_peak_bytes"), kept.column("step_time_s")))
