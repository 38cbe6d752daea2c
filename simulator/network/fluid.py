"""Coflows in flight over shared links: who progresses how fast, and when each is done.

Time is an integer count of ticks of 1 ns (see `flight`). Within one tick, first everything that is due ends, then what
is ready begins, and rates are solved once, when time moves on. Coflows that end in one tick are handed out in the order
in which they were started.

Parts that share a link, directly or through others, form a contention component; a start or an end changes the rates in
its own component only. Rates are remembered by the templates (the `Part` objects, by identity) in a component.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from math import inf

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.network.coflow import Coflow, Part
from simulator.network.fairness import Template, solve
from simulator.network.flight import TICK_S, Blocked, Flight, ticks

# Beyond so many remembered rates, or uses of links by remembered templates (about 100 MB), memory is made anew.
KEPT_RATES = 1 << 16
KEPT_USES = 1 << 22


class _Running:
    """A part in flight: `left` is the fraction not yet moved at its component's `since`."""

    __slots__ = ("flight", "left", "part", "template")

    def __init__(self, template: Template, flight: Flight, part: int) -> None:
        self.template = template
        self.flight = flight
        self.part = part
        self.left = 1.0


class _Component:
    """Parts that contend, with the rates (fractions/s) they keep until one of them ends or another comes."""

    __slots__ = ("bound_by", "due", "ends", "mask", "rates", "running", "since")

    running: list[_Running]
    rates: list[float]
    bound_by: list[int]
    mask: int
    since: int
    ends: list[int]
    due: int


class Fluid:
    """The coflows in flight over links of `bandwidth` (L; bytes/s).

    `remember=False` solves anew every time, for tests. `solves` counts solver calls.
    """

    def __init__(self, bandwidth: NDArray[np.float64], *, remember: bool = True) -> None:
        self.bandwidth = np.array(bandwidth, dtype=np.float64)
        if self.bandwidth.ndim != 1 or not ((self.bandwidth >= 0) & (self.bandwidth < inf)).all():
            raise QuestionError("bandwidth: one finite number of bytes/s for each link, zero or more")
        self.now = 0
        self.solves = 0
        self._remember = remember
        self._serial = count()
        self._orders = count()
        self._templates: dict[Part, Template] = {}
        self._uses = 0
        self._rates: dict[tuple[int, ...], tuple[list[float], list[int]]] = {}
        self._forgotten = np.zeros(len(self.bandwidth))
        # Ticks at which something happens, a flight getting ready or a component's first end, and in which order.
        self._agenda: list[tuple[int, int, Flight | _Component]] = []
        self._entry = count()
        self._components: dict[_Component, None] = {}
        self._mask = 0
        # Parts without a component: they came, or lost a neighbour, since rates were last solved.
        self._loose: list[_Running] = []

    @property
    def settled(self) -> bool:
        """Whether rates need no solving as things stand."""
        return not self._loose

    def start(self, coflow: Coflow, now: int) -> Flight:
        """Start `coflow` in tick `now`: its first byte moves after its latency, in the order of starts.

        Raises QuestionError if `now` is past, for a latency below zero, and for a part that `Template` refuses.
        """
        if now < self.now:
            raise QuestionError(f"{coflow.name}: start in tick {now}: it is tick {self.now} already")
        if not 0.0 <= coflow.latency_s < inf:
            raise QuestionError(f"{coflow.name}: latency_s = {coflow.latency_s}: finite, not negative")
        for part in coflow.parts:
            if part not in self._templates:
                self._learn(coflow)
                break
        flight = Flight(coflow, next(self._orders), now)
        heappush(self._agenda, (flight.ready, next(self._entry), flight))
        return flight

    def next_event(self) -> int | None:
        """The next tick in which anything changes if nothing else starts; None when nothing is in flight."""
        if self._loose:
            self._settle()
        agenda = self._agenda
        while agenda:
            tick, _, item = agenda[0]
            if type(item) is Flight or item in self._components:
                return tick
            heappop(agenda)
        return None

    def advance(self, now: int) -> list[Flight]:
        """Take time to tick `now`, and hand out the flights that ended on the way, by end and then by start.

        Rates of what begins or ends in `now` itself are solved later, when time moves on. Raises QuestionError if `now`
        is past.
        """
        if now < self.now:
            raise QuestionError(f"advance to tick {now}: it is tick {self.now} already")
        ended: list[Flight] = []
        agenda, components = self._agenda, self._components
        while True:
            if self._loose and self.now < now:
                self._settle()
            if not agenda or agenda[0][0] > now:
                break
            tick = self.now = agenda[0][0]
            first = len(ended)
            while agenda and agenda[0][0] == tick:
                item = heappop(agenda)[2]
                if isinstance(item, Flight):
                    self._begin(item, ended)
                elif item in components:
                    self._end(item, ended)
            if len(ended) > first + 1:
                ended[first:] = sorted(ended[first:], key=lambda flight: flight.order)
        self.now = now
        return ended

    def next_completion(self) -> tuple[int, list[Flight]] | None:
        """Take time to the next tick in which flights end: the tick and the flights; None when none is in flight."""
        while (tick := self.next_event()) is not None:
            if ended := self.advance(tick):
                return tick, ended
        return None

    def finish(self) -> list[Flight]:
        """Take time on until nothing is in flight; the flights that ended, by end and then by start."""
        ended: list[Flight] = []
        while (tick := self.next_event()) is not None:
            ended += self.advance(tick)
        return ended

    def contends(self, coflow: Coflow) -> bool:
        """Whether `coflow`, started now, would share a link with bytes in flight; QuestionError as for `start`."""
        self._learn(coflow)
        mask = 0
        for part in coflow.parts:
            mask |= self._templates[part].mask
        return bool(mask & self._mask) or any(mask & item.template.mask for item in self._loose)

    def link_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link (L) up to now; over bandwidth x time, the link's utilisation."""
        out = self._forgotten.copy()
        for template in self._templates.values():
            if template.done:
                out[template.links] += template.done * template.bytes
        for item in self._loose:
            out[item.template.links] += (1.0 - item.left) * item.template.bytes
        for component in self._components:
            elapsed_s = (self.now - component.since) * TICK_S
            for item, rate in zip(component.running, component.rates, strict=True):
                left = max(0.0, item.left - elapsed_s * rate)
                out[item.template.links] += (1.0 - left) * item.template.bytes
        return out

    def blocked(self) -> list[Blocked]:
        """The parts that others hold back just now, in order of starts."""
        if self._loose:
            self._settle()
        out = []
        for component in self._components:
            running = component.running
            for item, rate, link in zip(running, component.rates, component.bound_by, strict=True):
                speed = rate / item.template.solo
                if speed < 1.0 - 1e-9:
                    others = {
                        r.flight.order: r.flight for r in running if r is not item and r.template.mask >> link & 1
                    }
                    flights = tuple(others[order] for order in sorted(others))
                    level = item.template.part.level
                    out.append(Blocked(item.flight, item.part, level, speed, link, flights))
        return sorted(out, key=lambda b: (b.flight.order, b.part))

    def _learn(self, coflow: Coflow) -> None:
        if self._uses > KEPT_USES:
            self._forget()
        for part in coflow.parts:
            if part not in self._templates:
                try:
                    template = Template(part, self.bandwidth, next(self._serial))
                except QuestionError as error:
                    raise QuestionError(f"{coflow.name}: {error}") from None
                self._templates[part] = template
                self._uses += template.links.size

    def _forget(self) -> None:
        """Drop the templates that are not in flight, and all rates; what they moved stays counted."""
        kept = {part for _, _, item in self._agenda if isinstance(item, Flight) for part in item.coflow.parts}
        for item in [*self._loose, *(r for component in self._components for r in component.running)]:
            kept.update(item.flight.coflow.parts)
        for part, template in list(self._templates.items()):
            if part not in kept:
                self._forgotten[template.links] += template.done * template.bytes
                del self._templates[part]
        self._uses = sum(template.links.size for template in self._templates.values())
        self._rates.clear()

    def _begin(self, flight: Flight, ended: list[Flight]) -> None:
        if not flight.coflow.parts:
            flight.ended = self.now
            ended.append(flight)
        else:
            self._next_phase(flight, ended)

    def _next_phase(self, flight: Flight, ended: list[Flight]) -> None:
        flight.phase += 1
        size = flight.phase_left = flight.sizes[flight.phase]
        first = len(flight.coflow.parts) - flight.parts_left
        for part in range(first, first + size):
            self._enter(flight, part, ended)

    def _enter(self, flight: Flight, part: int, ended: list[Flight]) -> None:
        template = self._templates[flight.coflow.parts[part]]
        if template.mask:
            self._loose.append(_Running(template, flight, part))
        else:
            self._leave(flight, part, ended)

    def _leave(self, flight: Flight, part: int, ended: list[Flight]) -> None:
        flight.part_ended[part] = self.now
        flight.parts_left -= 1
        flight.phase_left -= 1
        if not flight.parts_left:
            flight.ended = self.now
            ended.append(flight)
        elif not flight.phase_left:
            self._next_phase(flight, ended)

    def _end(self, component: _Component, ended: list[Flight]) -> None:
        for item, tick in zip(self._dissolve(component), component.ends, strict=True):
            if tick == component.due:
                item.template.done += 1
                self._leave(item.flight, item.part, ended)
            else:
                self._loose.append(item)

    def _dissolve(self, component: _Component) -> list[_Running]:
        """The parts of `component`, brought up to now, without it."""
        del self._components[component]
        self._mask ^= component.mask
        elapsed_s = (self.now - component.since) * TICK_S
        if elapsed_s:
            for item, rate in zip(component.running, component.rates, strict=True):
                item.left = max(0.0, item.left - elapsed_s * rate)
        return component.running

    def _settle(self) -> None:
        """Group the loose parts, with the components they touch, by shared links, and solve each group."""
        loose, self._loose = self._loose, []
        touched = 0
        for item in loose:
            touched |= item.template.mask
        if touched & self._mask:
            for component in [c for c in self._components if c.mask & touched]:
                loose += self._dissolve(component)
        groups: list[tuple[int, list[_Running]]] = []
        seen = 0
        for item in loose:
            mask = item.template.mask
            group = [item]
            if mask & seen:
                apart = []
                for other in groups:
                    if other[0] & mask:
                        mask |= other[0]
                        small, group = sorted((group, other[1]), key=len)
                        group += small
                    else:
                        apart.append(other)
                groups = apart
            groups.append((mask, group))
            seen |= mask
        for mask, group in groups:
            self._install(mask, group)

    def _install(self, mask: int, running: list[_Running]) -> None:
        component = _Component()
        if len(running) == 1:
            template = running[0].template
            component.rates, component.bound_by = [template.solo], [template.tightest]
        else:
            running.sort(key=lambda item: item.template.serial)
            component.rates, component.bound_by = self._solve([item.template for item in running])
        component.running, component.mask, component.since = running, mask, self.now
        now = self.now
        component.ends = [now + ticks(item.left / rate) for item, rate in zip(running, component.rates, strict=True)]
        component.due = min(component.ends)
        self._components[component] = None
        self._mask |= mask
        heappush(self._agenda, (component.due, next(self._entry), component))

    def _solve(self, templates: list[Template]) -> tuple[list[float], list[int]]:
        key = tuple([template.serial for template in templates])
        found = self._rates.get(key)
        if found is None:
            rates, bound_by = solve(templates, self.bandwidth)
            self.solves += 1
            found = rates.tolist(), bound_by.tolist()
            if self._remember:
                if len(self._rates) >= KEPT_RATES:
                    self._rates.clear()
                self._rates[key] = found
        return found
