"""Coflows as SimPy events: `yield transfers.transfer(coflow)` in a process.

The environment's clock counts the ticks of `fluid` (integers). Rates are solved at the end of an instant, after all
other events of its tick, so that whatever starts in it is solved once; only the earliest end of all contention
components is on SimPy's schedule, and it moves only when it changed. Of transfers that end in one tick, the events
succeed in the order of their starts, and after all events that were already due in that tick.
"""

from __future__ import annotations

from collections.abc import Callable

import simpy
from simpy.events import EventPriority

from simulator.network.coflow import Coflow
from simulator.network.flight import Flight
from simulator.network.fluid import Fluid

# SimPy's own are 0 (urgent) and 1 (normal).
LOW = EventPriority(2)


class _Alarm(simpy.Event):
    """An event that is due after `delay`, behind all normal events of that tick; SimPy's Timeout has no priority."""

    def __init__(self, env: simpy.Environment, delay: int, callback: Callable[[simpy.Event], None]) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        self.callbacks.append(callback)
        env.schedule(self, LOW, delay)


class FluidProcess:
    """The coflows of `fluid` in the time of `env`, whose clock must stay an integer: TypeError where it is not."""

    def __init__(self, env: simpy.Environment, fluid: Fluid) -> None:
        self.env = env
        self.fluid = fluid
        self._events: dict[Flight, simpy.Event] = {}
        self._alarm: int | None = None

    def transfer(self, coflow: Coflow) -> simpy.Event:
        """Start `coflow` now; the event succeeds when it has ended, and its value is the `Flight`.

        Raises QuestionError as `Fluid.start` does.
        """
        flight = self.fluid.start(coflow, self._now())
        event = self._events[flight] = self.env.event()
        self._wake(self.fluid.due(flight))
        return event

    def contends(self, coflow: Coflow) -> bool:
        """Whether `coflow`, started now, would share a link with bytes in flight."""
        # Whatever ended before now was told of.
        if self.fluid.now < self._now() - 1:
            self.fluid.advance(self._now() - 1)
        return self.fluid.contends(coflow)

    def _now(self) -> int:
        now = self.env.now
        if isinstance(now, float):
            raise TypeError(f"SimPy's clock reads {now!r}: it counts ticks, so all delays must be integers")
        return now

    def _wake(self, tick: int) -> None:
        if self._alarm is None or tick < self._alarm:
            self._alarm = tick
            _Alarm(self.env, tick - self._now(), self._run)

    def _run(self, _: simpy.Event) -> None:
        now = self._now()
        # An alarm that was overtaken by an earlier one stays on SimPy's schedule and means nothing.
        if now != self._alarm:
            return
        self._alarm = None
        ended = self.fluid.advance(now)
        for flight in ended:
            self._events.pop(flight).succeed(flight)
        if ended and not self.fluid.settled:
            # What the ends set going in this same tick is solved together with the ends.
            self._wake(now)
        elif (tick := self.fluid.next_event()) is not None:
            self._wake(tick)
