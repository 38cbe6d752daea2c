"""What is remembered of parts and coflows: templates, rates of those that met, and the course of a coflow alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.network.coflow import Coflow, Part
from simulator.network.fairness import Alike, Template, alike, pair_rates, solve
from simulator.network.flight import SLACK, TICK_S, TICKS_PER_S
from simulator.network.geometry import Geometry
from simulator.network.regions import Alone

# Beyond so many remembered rates, or uses of links by remembered templates (270 MB of bytes), room is made.
KEPT_RATES = 1 << 18
KEPT_USES = 1 << 25


class Known:
    """Templates of parts by identity, and what follows from them, over links of `bandwidth` (L; bytes/s).

    `solves` counts solver calls; with `remember` off every question is solved anew.
    """

    def __init__(self, bandwidth: NDArray[np.float64], geometry: Geometry, remember: bool) -> None:
        self.bandwidth, self.geometry, self.remember = bandwidth, geometry, remember
        self.solves = 0
        self.templates: dict[Part, Template] = {}
        self._serial = count()
        self._uses, self._most = 0, KEPT_USES
        self._rates: dict[tuple[int, ...], tuple[list[float], list[int]]] = {}
        # Each coflow's links; and its course alone.
        self._spans: dict[Coflow, tuple[int, int]] = {}
        self._courses: dict[Coflow, Alone] = {}
        self._forgotten = np.zeros(bandwidth.size)

    # Templates -------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether it is time to `forget`."""
        return self._uses > self._most

    def learn(self, coflow: Coflow) -> None:
        """Make the templates of a coflow's parts; raises QuestionError as `Template` does, naming the coflow."""
        if coflow in self._spans:
            return
        for part in coflow.parts:
            if part not in self.templates:
                try:
                    self._add(Template(part, self.bandwidth, next(self._serial), self.geometry))
                except QuestionError as error:
                    raise QuestionError(f"{coflow.name}: {error}") from None

    def _add(self, template: Template) -> None:
        self.templates[template.part] = template
        self._uses += template.links.size

    def forget(self, flying: Collection[Part]) -> None:
        """Drop the templates whose bytes have been sent, unless they are in flight; what they moved stays counted.

        Those that were made ahead stay: somebody will send them.
        """
        kept = {*flying, *(part for part, template in self.templates.items() if not template.done)}
        for part, template in list(self.templates.items()):
            if part not in kept:
                self._forgotten[template.links] += template.done * template.bytes
                del self.templates[part]
        self._uses = sum(template.links.size for template in self.templates.values())
        # Where most of it has to stay, looking again soon would be in vain.
        self._most = max(KEPT_USES, 2 * self._uses)
        serials = {template.serial for template in self.templates.values()}
        self._rates = {key: found for key, found in self._rates.items() if serials.issuperset(key)}
        for known in (self._spans, self._courses):
            for coflow in [c for c in known if any(p not in self.templates for p in c.parts)]:
                del known[coflow]
        lists = {id(template.part.links) for template in self.templates.values()}
        self.geometry.lists = {key: found for key, found in self.geometry.lists.items() if key in lists}

    def sent_bytes(self) -> NDArray[np.float64]:
        """Bytes of finished parts on each link (L)."""
        out = self._forgotten.copy()
        by_list: dict[int, list[Template]] = {}
        for template in self.templates.values():
            if template.done:
                by_list.setdefault(id(template.links), []).append(template)
        for same in by_list.values():
            out[same[0].links] += np.array([t.done for t in same]) @ np.array([t.bytes for t in same])
        return out

    def span(self, coflow: Coflow) -> tuple[int, int]:
        """The region of a coflow that was learnt, and all its links there, those of all phases, as bits."""
        found = self._spans.get(coflow)
        if found is None:
            mask, numbers = 0, set()
            for part in coflow.parts:
                template = self.templates[part]
                mask |= template.mask
                if template.mask:
                    numbers.add(template.region)
            if len(numbers) > 1:
                raise ValueError(f"{coflow.name}: in regions {sorted(numbers)}")
            found = self._spans[coflow] = (numbers.pop() if numbers else 0, mask)
        return found

    # Rates -----------------------------------------------------------------------------------------------------------

    def rates(self, templates: list[Template]) -> tuple[list[float], list[int]]:
        """Rates of parts of one region in flight together, in order of serials, and the links that bind them."""
        key = tuple([template.serial for template in templates])
        found = self._rates.get(key)
        if found is None:
            number = templates[0].region
            rates, bound_by = solve(templates, self.geometry.bandwidth[number], self.geometry.links[number])
            self.solves += 1
            found = rates.tolist(), bound_by.tolist()
            if self.remember:
                if len(self._rates) >= KEPT_RATES:
                    self._rates.clear()
                self._rates[key] = found
        return found

    def prepare(self, coflows: Sequence[Coflow]) -> None:
        """Learn many coflows, and the rates that each has alone in its phases: at once that costs less."""
        shapes: dict[tuple[object, ...], list[Coflow]] = {}
        for coflow in coflows:
            shape = (coflow.phase_sizes(), *(id(p.links) for p in coflow.parts))
            shapes.setdefault(shape, []).append(coflow)
        rest = [c for same in shapes.values() if not self._prepare_alike(same) for c in same]
        for coflow in rest:
            self.learn(coflow)
        if not self.remember:
            return
        wanted: dict[int, dict[tuple[int, ...], list[Template]]] = {}
        for coflow in rest:
            for phase in self._phases(coflow):
                mine = [t for t in phase if t.mask]
                if len(mine) > 1 and len({t.region for t in mine}) == 1 and _is_joined([t.mask for t in mine]):
                    mine.sort(key=_serial_of)
                    key = tuple([t.serial for t in mine])
                    if key not in self._rates:
                        wanted.setdefault(mine[0].region, {})[key] = mine
        for number, sets in wanted.items():
            problems = [i for i, s in enumerate(sets.values()) for _ in s]
            together = [t for s in sets.values() for t in s]
            solved = solve(together, self.geometry.bandwidth[number], self.geometry.links[number], problems)
            self.solves += 1
            rates, bound_by = (values.tolist() for values in solved)
            at = 0
            for key in sets:
                end = at + len(key)
                self._rates[key] = rates[at:end], bound_by[at:end]
                at = end

    def _prepare_alike(self, coflows: list[Coflow]) -> bool:
        """Do so for coflows of equal phases over the same links, of one part or two; False where they are not such."""
        first = coflows[0]
        if not first.parts or max(first.phase_sizes()) > 2 or not self.remember:
            return False
        parts = [p for c in coflows for p in c.parts]
        if len(set(parts)) < len(parts) or any(p in self.templates for p in parts):
            return False
        columns = []
        for j in range(len(first.parts)):
            column = alike([c.parts[j] for c in coflows], self.bandwidth, self.geometry)
            if column is None:
                return False
            columns.append(column)
        if len({c.listed[4] for c in columns}) > 1:
            return False
        templates = [c.templates(self._serial) for c in columns]
        clock_B, at, mask = np.zeros(len(coflows), dtype=np.int64), 0, 0
        ends = []
        for size in first.phase_sizes():
            phase, mine = columns[at : at + size], templates[at : at + size]
            at += size
            took = [_ticks(1.0 / c.solo_B) for c in phase]
            if size == 2 and phase[0].listed[3] & phase[1].listed[3]:
                a, b, bound_a, bound_b = pair_rates(*phase)
                self.solves += 1
                found = zip(
                    zip(a.tolist(), b.tolist(), strict=True),
                    zip(bound_a.tolist(), bound_b.tolist(), strict=True),
                    strict=True,
                )
                for x, y, (rates, bound_by) in zip(*mine, found, strict=True):
                    self._rates[x.serial, y.serial] = list(rates), list(bound_by)
                took = _ends_of_pairs(a, b, *phase)
            ends += [clock_B + t for t in took]
            clock_B = clock_B + np.maximum.reduce(took)
            for c in phase:
                mask |= c.listed[3]
        span = columns[0].listed[4], mask
        rows = zip(coflows, clock_B.tolist(), np.array(ends).T.tolist(), strict=True)
        for coflow, last, own in rows:
            self._spans[coflow] = span
            self._courses[coflow] = Alone(*span, own, last)
        for t in (t for made in templates for t in made):
            self._add(t)
        return True

    def _phases(self, coflow: Coflow) -> list[list[Template]]:
        out, first = [], 0
        for size in coflow.phase_sizes():
            out.append([self.templates[p] for p in coflow.parts[first : first + size]])
            first += size
        return out

    # Alone -----------------------------------------------------------------------------------------------------------

    def course(self, coflow: Coflow) -> Alone | None:
        """When the parts of a coflow end if it meets nobody, where that is known."""
        return self._courses.get(coflow)

    def keep(self, coflow: Coflow, course: Alone) -> None:
        """Remember a course."""
        self._courses[coflow] = course


def _ticks(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """`ticks` of several."""
    return np.ceil(seconds * TICKS_PER_S - SLACK).astype(np.int64)


def _ends_of_pairs(
    rate_a: NDArray[np.float64], rate_b: NDArray[np.float64], a: Alike, b: Alike
) -> list[NDArray[np.int64]]:
    """Ticks after which the parts of pairs end: who is left when the other ends has the links to itself."""
    took = [_ticks(1.0 / rate_a), _ticks(1.0 / rate_b)]
    due = np.minimum(*took)
    for i, (rate, x) in enumerate(((rate_a, a), (rate_b, b))):
        left = np.maximum(0.0, 1.0 - due * TICK_S * rate)
        took[i] = np.where(took[i] > due, due + _ticks(left / x.solo_B), took[i])
    return took


def _serial_of(template: Template) -> int:
    return template.serial


def _is_joined(masks: list[int]) -> bool:
    """Whether all share links, directly or through others."""
    joined, left = masks[0], masks[1:]
    while near := [m for m in left if m & joined]:
        left = [m for m in left if not m & joined]
        for m in near:
            joined |= m
    return not left
