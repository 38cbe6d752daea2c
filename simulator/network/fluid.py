"""Coflows in flight over shared links: who progresses how fast, and when each is done.

Time is an integer count of ticks of 1 ns (see `flight`). Within one tick, first everything that is due ends, then what
is ready begins, and rates are solved once, when time moves on. Coflows that end in one tick are handed out in the order
in which they were started.

Parts that share a link, directly or through others, form a contention component; a start or an end changes the rates in
its own component only. Rates are remembered by the templates (the `Part` objects, by identity) in a component.

A coflow that nobody shares a link with when it starts is run once by itself, and only its end is put on the agenda,
for as long as nobody comes: its whole course is a function of its start. Who comes finds it as it would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.network.coflow import Coflow
from simulator.network.flight import TICK_S, Blocked, Flight, ticks
from simulator.network.geometry import Geometry
from simulator.network.known import Known
from simulator.network.regions import Alone, Component, Region, Running


class Fluid:
    """The coflows in flight over links of `bandwidth` (L; bytes/s).

    `remember=False` solves anew every time and runs nothing ahead, for tests. `solves` counts solver calls. No coflow
    may be in two of the regions of links (L) that are given.
    """

    def __init__(
        self,
        bandwidth: NDArray[np.float64],
        *,
        remember: bool = True,
        regions: NDArray[np.int64] | None = None,
    ) -> None:
        self.bandwidth = np.array(bandwidth, dtype=np.float64)
        if self.bandwidth.ndim != 1 or not ((self.bandwidth >= 0) & (self.bandwidth < inf)).all():
            raise QuestionError("bandwidth: one finite number of bytes/s for each link, zero or more")
        self.now = 0
        self._remember = remember
        self._orders = count()
        self._geometry = Geometry(self.bandwidth, regions)
        self._known = Known(self.bandwidth, self._geometry, remember)
        self._regions = [Region() for _ in self._geometry.links]
        # Ticks at which something happens: a flight gets ready, one that is alone ends, a component has its first end.
        self._agenda: list[tuple[int, int, Flight | Component]] = []
        self._entry = count()
        # Parts without a component: they came, or lost a neighbour, since rates were last solved.
        self._loose: list[Running] = []

    @property
    def solves(self) -> int:
        """How often rates were solved."""
        return self._known.solves

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
        self._learn(coflow)
        flight = Flight(coflow, next(self._orders), now)
        number, mask = self._known.span(coflow)
        if mask and self._remember:
            region = self._regions[number]
            if not _touched(region.others, mask) and not any(a.mask & mask for a in region.alone.values()):
                course = self._known.course(coflow) or self._course(coflow)
                region.alone[flight] = course
                heappush(self._agenda, (flight.ready + course.last, next(self._entry), flight))
                return flight
        self._wait(flight, number, mask)
        return flight

    def _wait(self, flight: Flight, number: int, mask: int) -> None:
        self._regions[number].others[flight] = mask
        heappush(self._agenda, (flight.ready, next(self._entry), flight))

    def _learn(self, coflow: Coflow) -> None:
        if self._known.full:
            self._known.forget({p for r in self._regions for f in (*r.others, *r.alone) for p in f.coflow.parts})
        self._known.learn(coflow)

    # Alone -----------------------------------------------------------------------------------------------------------

    def _aside(self, flight: Flight, now: int) -> Fluid:
        """Another fluid, with this flight alone in it, which starts in tick `now`."""
        other = Fluid.__new__(Fluid)
        other.__dict__.update(self.__dict__)
        number, mask = self._known.span(flight.coflow)
        other._remember, other.now = True, now
        other._agenda, other._loose, other._regions = [], [], list(self._regions)
        other._regions[number] = Region()
        other._wait(flight, number, mask)
        return other

    def _course(self, coflow: Coflow) -> Alone:
        flight = Flight(coflow, -1, 0)
        first = flight.ready
        other = self._aside(flight, 0)
        other.finish()
        for part in coflow.parts:
            # Nothing has moved yet.
            if self._known.templates[part].mask:
                self._known.templates[part].done -= 1
        ends = [(end or 0) - first for end in flight.part_ended]
        course = Alone(*self._known.span(coflow), ends, max(ends))
        self._known.keep(coflow, course)
        return course

    def due(self, flight: Flight) -> int:
        """The first tick in which a flight that was just started needs looking at."""
        course = self._regions[self._known.span(flight.coflow)[0]].alone.get(flight)
        return flight.ready if course is None else flight.ready + course.last

    def _join(self, region: Region, flight: Flight, ended: list[Flight], begun: bool) -> None:
        """A flight that was alone becomes one among others, as it is just now; `begun`: if it gets ready now, it is."""
        course = region.alone.pop(flight)
        if flight.ready > self.now or (flight.ready == self.now and not begun):
            self._wait(flight, course.region, course.mask)
            return
        other = self._aside(flight, flight.ready)
        ended += other.advance(self.now)
        mine = other._regions[course.region]
        if flight in mine.others:
            region.others[flight] = course.mask
        for component in mine.components:
            region.components[component] = None
            region.mask |= component.mask
            heappush(self._agenda, (component.due, next(self._entry), component))
        self._loose += other._loose

    def _meet(self, number: int, mask: int, ended: list[Flight], begun: bool = True) -> None:
        """Whoever is alone on these links no longer is."""
        region = self._regions[number]
        if region.alone:
            for flight in [f for f, a in region.alone.items() if a.mask & mask]:
                self._join(region, flight, ended, begun)

    def _meet_all(self) -> None:
        for number in range(len(self._regions)):
            self._meet(number, -1, [])

    # The course of time ----------------------------------------------------------------------------------------------

    def next_event(self) -> int | None:
        """The next tick in which anything changes if nothing else starts; None when nothing is in flight."""
        if self._loose:
            self._settle()
        agenda = self._agenda
        while agenda:
            tick, _, item = agenda[0]
            if self._holds(tick, item):
                return tick
            heappop(agenda)
        return None

    def _holds(self, tick: int, item: Flight | Component) -> bool:
        """Whether an entry of the agenda still stands: components dissolve, and flights stop being alone."""
        if isinstance(item, Component):
            return item in self._regions[item.region].components
        number, _ = self._known.span(item.coflow)
        region = self._regions[number]
        return item in region.alone or (item.phase < 0 and tick == item.ready and item in region.others)

    def advance(self, now: int) -> list[Flight]:
        """Take time to tick `now`, and hand out the flights that ended on the way, by end and then by start.

        Rates of what begins or ends in `now` itself are solved later, when time moves on. Raises QuestionError if `now`
        is past.
        """
        if now < self.now:
            raise QuestionError(f"advance to tick {now}: it is tick {self.now} already")
        ended: list[Flight] = []
        agenda = self._agenda
        while True:
            if self._loose and self.now < now:
                self._settle()
            if not agenda or agenda[0][0] > now:
                break
            tick = self.now = agenda[0][0]
            first = len(ended)
            while agenda and agenda[0][0] == tick:
                item = heappop(agenda)[2]
                if not self._holds(tick, item):
                    continue
                if isinstance(item, Component):
                    self._end(item, ended)
                else:
                    self._begin(item, ended)
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
        number, mask = self._known.span(coflow)
        region = self._regions[number]
        self._meet(number, mask, [], begun=False)
        return bool(mask & region.mask) or any(
            mask & item.template.mask for item in self._loose if item.template.region == number
        )

    def prepare(self, coflows: Sequence[Coflow]) -> None:
        """Solve the rates that each of these will have alone in its phases: many at once cost less than one by one."""
        self._known.prepare(coflows)

    def link_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link (L) up to now; over bandwidth x time, the link's utilisation."""
        self._meet_all()
        out = self._known.sent_bytes()
        for item in self._loose:
            out[item.template.links] += (1.0 - item.left) * item.template.bytes
        for component in (c for region in self._regions for c in region.components):
            elapsed_s = (self.now - component.since) * TICK_S
            for item, rate in zip(component.running, component.rates, strict=True):
                left = max(0.0, item.left - elapsed_s * rate)
                out[item.template.links] += (1.0 - left) * item.template.bytes
        return out

    def blocked(self) -> list[Blocked]:
        """The parts that others hold back just now, in order of starts."""
        self._meet_all()
        if self._loose:
            self._settle()
        out = []
        for component in (c for region in self._regions for c in region.components):
            running = component.running
            for item, rate, link in zip(running, component.rates, component.bound_by, strict=True):
                speed = rate / item.template.solo
                if speed < 1.0 - 1e-9:
                    place = int(self._geometry.place_L[link])
                    others = {
                        r.flight.order: r.flight for r in running if r is not item and r.template.mask >> place & 1
                    }
                    flights = tuple(others[order] for order in sorted(others))
                    level = item.template.part.level
                    out.append(Blocked(item.flight, item.part, level, speed, link, flights))
        return sorted(out, key=lambda b: (b.flight.order, b.part))

    def _begin(self, flight: Flight, ended: list[Flight]) -> None:
        number, mask = self._known.span(flight.coflow)
        region = self._regions[number]
        course = region.alone.pop(flight, None)
        if course is not None:
            # It was alone to its end.
            for part in flight.coflow.parts:
                self._known.templates[part].done += 1
            flight.part_ended = [flight.ready + end for end in course.ends]
            flight.parts_left = flight.phase_left = 0
            flight.ended = self.now
            ended.append(flight)
            return
        self._meet(number, mask, ended)
        if flight.coflow.parts:
            self._next_phase(flight, ended)
        else:
            del region.others[flight]
            flight.ended = self.now
            ended.append(flight)

    def _next_phase(self, flight: Flight, ended: list[Flight]) -> None:
        flight.phase += 1
        size = flight.phase_left = flight.sizes[flight.phase]
        first = len(flight.coflow.parts) - flight.parts_left
        for part in range(first, first + size):
            self._enter(flight, part, ended)

    def _enter(self, flight: Flight, part: int, ended: list[Flight]) -> None:
        template = self._known.templates[flight.coflow.parts[part]]
        if template.mask:
            self._loose.append(Running(template, flight, part))
        else:
            self._leave(flight, part, ended)

    def _leave(self, flight: Flight, part: int, ended: list[Flight]) -> None:
        flight.part_ended[part] = self.now
        flight.parts_left -= 1
        flight.phase_left -= 1
        if not flight.parts_left:
            del self._regions[self._known.span(flight.coflow)[0]].others[flight]
            flight.ended = self.now
            ended.append(flight)
        elif not flight.phase_left:
            self._next_phase(flight, ended)

    def _end(self, component: Component, ended: list[Flight]) -> None:
        for item, tick in zip(self._dissolve(component), component.ends, strict=True):
            if tick == component.due:
                item.template.done += 1
                self._leave(item.flight, item.part, ended)
            else:
                self._loose.append(item)

    def _dissolve(self, component: Component) -> list[Running]:
        """The parts of `component`, brought up to now, without it."""
        region = self._regions[component.region]
        del region.components[component]
        region.mask ^= component.mask
        elapsed_s = (self.now - component.since) * TICK_S
        if elapsed_s:
            for item, rate in zip(component.running, component.rates, strict=True):
                item.left = max(0.0, item.left - elapsed_s * rate)
        return component.running

    def _settle(self) -> None:
        """Group the loose parts, with the components they touch, by shared links, and solve each group."""
        loose, self._loose = self._loose, []
        by_region: dict[int, list[Running]] = {}
        for item in loose:
            by_region.setdefault(item.template.region, []).append(item)
        for number, mine in by_region.items():
            self._settle_region(number, mine)

    def _settle_region(self, number: int, loose: list[Running]) -> None:
        region = self._regions[number]
        touched = 0
        for item in loose:
            touched |= item.template.mask
        if touched & region.mask:
            for component in [c for c in region.components if c.mask & touched]:
                loose += self._dissolve(component)
        groups: list[tuple[int, list[Running]]] = []
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
            self._install(number, mask, group)

    def _install(self, number: int, mask: int, running: list[Running]) -> None:
        component = Component()
        if len(running) == 1:
            template = running[0].template
            component.rates, component.bound_by = [template.solo], [template.tightest]
        else:
            running.sort(key=lambda item: item.template.serial)
            component.rates, component.bound_by = self._known.rates([item.template for item in running])
        component.running, component.since = running, self.now
        component.region, component.mask = number, mask
        now = self.now
        component.ends = [now + ticks(item.left / rate) for item, rate in zip(running, component.rates, strict=True)]
        component.due = min(component.ends)
        region = self._regions[number]
        region.components[component] = None
        region.mask |= mask
        heappush(self._agenda, (component.due, next(self._entry), component))


def _touched(flights: dict[Flight, int], mask: int) -> bool:
    return any(mask & own for own in flights.values())
