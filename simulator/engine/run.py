"""The engine: every pipeline rank runs its order on SimPy; waiting, overlap and contention are what happens.

The clock counts ticks of a nanosecond. Contract of simultaneous events: SimPy processes events of one instant in the
order in which they were scheduled; device classes are started in order of (stage, group), so that a run is repeatable
to the last bit for a seed.

One process drives one device class: the ranks of a stage (or, unfolded, of one expert group of a stage). What happens
inside a class between two points where others may have to wait is one event (`simulator.engine.device`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import simpy

from hw_profiles.errors import QuestionError
from simulator.engine.device import Device
from simulator.engine.load_patterns import LoadPattern
from simulator.engine.record import Recorder, Spent
from simulator.engine.setup import Run, Setup
from simulator.engine.work import Transfer
from simulator.network.flight import TICK_S
from simulator.workload.orders import BACKWARD, FORWARD, INPUT, WEIGHT, Action, model_stage

# What a pass waits for or sends: pass, model stage, direction (DualPipe), microbatch, group.
Key = tuple[str, int, int, int, int]

__all__ = ["Engine", "Run", "Setup"]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would look through millions of objects that stay, for a tenth of the time.

    What SimPy leaves behind in cycles is a tenth of what a run keeps, and is collected after it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Engine:
    """One simulated step: the clock, what stages send one another, and where groups meet."""

    def __init__(self, setup: Setup, transport: Callable[[simpy.Environment], Any]) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self.transport = transport(self.env)
        self.record = Recorder()
        count = setup.stages * setup.groups
        self.spent = [Spent() for _ in range(count)]
        self.memory: list[tuple[list[float], list[float]]] = [
            ([0.0], [setup.base_bytes[i // setup.groups]]) for i in range(count)
        ]
        self.finished = [-1.0] * count
        self.waiting: dict[int, str] = {}
        self.rows: dict[Key, int] = {}
        self._arrivals: dict[Key, simpy.Event] = {}
        self._meetings: dict[tuple[object, ...], tuple[int, simpy.Event]] = {}

    def run(self) -> Run:
        """Simulate; QuestionError naming who waits for whom if nothing can happen any more before all are done."""
        for p in range(self.setup.stages):
            for g in range(self.setup.groups):
                self.env.process(Device(self, p, g).run())
        with _uncollected():
            self.env.run()
        stuck = [i for i, t in enumerate(self.finished) if t < 0]
        if stuck:
            lines = "; ".join(f"{self._name(i)} waits for {self.waiting.get(i, 'nothing known')}" for i in stuck[:3])
            more = f" and {len(stuck) - 3} more" if len(stuck) > 3 else ""
            raise QuestionError(f"the step cannot end: {lines}{more}")
        return Run(max(self.finished) + self.setup.host_s, self.spent, self.record, self.memory, self.finished)

    def _name(self, index: int) -> str:
        stage, group = divmod(index, self.setup.groups)
        return f"stage {stage}" + (f", group {group}" if self.setup.groups > 1 else "")

    # The clock -------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the start of the step."""
        return float(self.env.now * TICK_S)

    def pause(self, seconds: float) -> simpy.Event:
        """An event after `seconds`, on the clock's integer ticks: ties never hang on rounding."""
        return self.env.timeout(round(seconds / TICK_S))

    # Between stages --------------------------------------------------------------------------------------------------

    def need(self, p: int, g: int, a: Action) -> Key | None:
        """Key of what `a` must have received: activations from the stage before, or gradients from the stage after."""
        schedule = self.setup.schedule
        stage = model_stage(schedule, p, a.chunk, self.setup.stages)
        direction = a.chunk if schedule == "dualpipe" else 0
        if a.kind == FORWARD:
            return (FORWARD, stage - 1, direction, a.microbatch, g) if stage > 0 else None
        if a.kind in (BACKWARD, INPUT) and stage < self.setup.model_stages - 1:
            return (INPUT, stage + 1, direction, a.microbatch, g)
        return None

    def arrival(self, key: Key) -> simpy.Event:
        """The event of something's arrival, made by whoever comes first."""
        event = self._arrivals.get(key)
        if event is None:
            event = self._arrivals[key] = self.env.event()
        return event

    def received(self, key: Key) -> None:
        """Forget an arrival that was waited for."""
        self._arrivals.pop(key, None)

    def announce(self, p: int, g: int, a: Action, row: int) -> None:
        """What `a` produced is on its way to the neighbour, and there after a hop."""
        if a.kind == WEIGHT:
            return
        schedule = self.setup.schedule
        stage = model_stage(schedule, p, a.chunk, self.setup.stages)
        kind = FORWARD if a.kind == FORWARD else INPUT
        if stage == (self.setup.model_stages - 1 if kind == FORWARD else 0):
            return
        key = (kind, stage, a.chunk if schedule == "dualpipe" else 0, a.microbatch, g)
        self.rows[key] = row
        arrival = self._arrivals.pop(key, None)
        if arrival is None:
            self._arrivals[key] = self.pause(self.setup.hop_s)
        else:
            self.env.process(self._deliver(arrival))

    def _deliver(self, arrival: simpy.Event) -> Generator[simpy.Event, Any, None]:
        yield self.pause(self.setup.hop_s)
        arrival.succeed()

    # On the network --------------------------------------------------------------------------------------------------

    def send(self, p: int, g: int, t: Transfer, pattern: LoadPattern | None = None) -> simpy.Event:
        """Start a transfer of one class; `pattern` are the loads of its ranks where they are uneven."""
        event: simpy.Event = self.transport.transfer(t, p, g, pattern)
        return event

    def shared(self, p: int, g: int, t: Transfer, key: tuple[object, ...]) -> simpy.Event:
        """A transfer that all groups of a stage make together: it starts when the last of them is there."""
        if self.setup.groups == 1:
            return self.send(p, g, t)
        seen, event = self._meetings.get(key) or (0, self.env.event())
        self._meetings[key] = (seen + 1, event)
        if seen + 1 == self.setup.groups:

            def tell(done: simpy.Event) -> None:
                event.succeed(done.value)

            self.send(p, -1, t).callbacks.append(tell)
        return event
