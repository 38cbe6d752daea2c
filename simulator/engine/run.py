"""The engine: every pipeline rank runs its order on SimPy; waiting, overlap and contention are what happens.

The clock counts ticks of a nanosecond. Contract of simultaneous events: SimPy processes events of one instant in the
order in which they were scheduled; device classes are started in order of (stage, group), so that a run is repeatable
to the last bit for a seed.

One process drives one device class: the ranks of a stage (or, unfolded, of one expert group of a stage). What happens
inside a class between two points where others may have to wait is one event.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import simpy

from hw_profiles.errors import QuestionError
from simulator.engine.orders import BACKWARD, FORWARD, INPUT, WEIGHT, Action, model_stage
from simulator.engine.record import COMPUTE, KIND, NETWORK, Recorder, Spent
from simulator.engine.work import ChunkWork, DeviceWork, PassWork, Transfer
from simulator.network.flight import TICK_S

PASS_KIND = {
    FORWARD: KIND["forward"],
    BACKWARD: KIND["backward"],
    INPUT: KIND["input gradient"],
    WEIGHT: KIND["weight gradient"],
}
TRANSFER_KIND = {
    "all-to-all": KIND["all-to-all"],
    "parameters": KIND["parameters"],
    "gradients": KIND["gradients"],
}


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs, priced and resolved.

    `excess(group, stage, microbatch)` is the busiest expert rank's load over the mean, minus one, averaged over the
    layers with experts of a model stage. `slowdown` is what overlapped communication costs the compute beside it (0.1:
    a tenth longer). `straggler(stage, group)` multiplies compute. `base_bytes` are the bytes a rank always holds.
    """

    schedule: str
    orders: list[list[Action]]
    devices: list[DeviceWork]
    microbatches: int
    virtual: int
    hop_s: float
    slowdown: float
    groups: int
    replicas: int
    excess: Callable[[int, int, int], float]
    straggler: Callable[[int, int], float]
    base_bytes: list[float]
    host_s: float


@dataclass(slots=True)
class Run:
    """What a run leaves: end of the step, seconds by part and class, rows, memory curves per class."""

    step_s: float
    spent: list[Spent]
    recorder: Recorder
    memory: list[tuple[list[float], list[float]]]
    finished_s: list[float]


class Engine:
    """One simulated step."""

    def __init__(self, setup: Setup, transport: Callable[[simpy.Environment], Any]) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self.transport = transport(self.env)
        self.record = Recorder()
        self.stages = len(setup.devices)
        self.model_stages = self.stages * setup.virtual if setup.schedule != "dualpipe" else self.stages
        count = self.stages * setup.groups
        self.spent = [Spent() for _ in range(count)]
        self.memory: list[tuple[list[float], list[float]]] = [
            ([0.0], [setup.base_bytes[i // setup.groups]]) for i in range(count)
        ]
        self.finished = [-1.0] * count
        self._arrivals: dict[tuple[str, int, int, int, int], simpy.Event] = {}
        self._rows: dict[tuple[str, int, int, int, int], int] = {}
        self._meetings: dict[tuple[object, ...], tuple[int, simpy.Event]] = {}
        self._waiting: dict[int, str] = {}

    def run(self) -> Run:
        """Simulate; QuestionError naming who waits for whom if nothing can happen any more before all are done."""
        for p in range(self.stages):
            for g in range(self.setup.groups):
                self.env.process(self._device(p, g))
        self.env.run()
        stuck = [i for i, t in enumerate(self.finished) if t < 0]
        if stuck:
            lines = "; ".join(f"{self._name(i)} waits for {self._waiting.get(i, 'nothing known')}" for i in stuck[:3])
            more = f" and {len(stuck) - 3} more" if len(stuck) > 3 else ""
            raise QuestionError(f"the step cannot end: {lines}{more}")
        return Run(max(self.finished) + self.setup.host_s, self.spent, self.record, self.memory, self.finished)

    def _name(self, index: int) -> str:
        stage, group = divmod(index, self.setup.groups)
        return f"stage {stage}" + (f", group {group}" if self.setup.groups > 1 else "")

    # Dependencies between stages -------------------------------------------------------------------------------------

    def _need(self, p: int, g: int, a: Action) -> tuple[str, int, int, int, int] | None:
        """Key of what `a` must have received: activations from the stage before, or gradients from the stage after."""
        schedule = self.setup.schedule
        stage = model_stage(schedule, p, a.chunk, self.stages)
        direction = a.chunk if schedule == "dualpipe" else 0
        if a.kind == FORWARD:
            return (FORWARD, stage - 1, direction, a.microbatch, g) if stage > 0 else None
        if a.kind in (BACKWARD, INPUT) and stage < self.model_stages - 1:
            return (INPUT, stage + 1, direction, a.microbatch, g)
        return None

    def _announce(self, p: int, g: int, a: Action, row: int) -> None:
        """What `a` produced is on its way to the neighbour, and there after a hop."""
        if a.kind == WEIGHT:
            return
        schedule = self.setup.schedule
        stage = model_stage(schedule, p, a.chunk, self.stages)
        kind = FORWARD if a.kind == FORWARD else INPUT
        last = self.model_stages - 1 if kind == FORWARD else 0
        if stage == last:
            return
        key = (kind, stage, a.chunk if schedule == "dualpipe" else 0, a.microbatch, g)
        self._rows[key] = row
        arrival = self._arrivals.pop(key, None)
        if arrival is None:
            self._arrivals[key] = self._pause(self.setup.hop_s)
        else:
            self.env.process(self._deliver(arrival))

    def _deliver(self, arrival: simpy.Event) -> Generator[simpy.Event, Any, None]:
        yield self._pause(self.setup.hop_s)
        arrival.succeed()

    def _arrival(self, key: tuple[str, int, int, int, int]) -> simpy.Event:
        event = self._arrivals.get(key)
        if event is None:
            event = self._arrivals[key] = self.env.event()
        return event

    def _meet(self, key: tuple[object, ...]) -> tuple[bool, simpy.Event]:
        """Rendezvous of all groups of a stage: (whether the caller came last, the event to wait for)."""
        seen, event = self._meetings.get(key) or (0, self.env.event())
        self._meetings[key] = (seen + 1, event)
        return seen + 1 == self.setup.groups, event

    # One device class ------------------------------------------------------------------------------------------------

    def _device(self, p: int, g: int) -> Generator[simpy.Event, Any, None]:
        setup, index = self.setup, p * self.setup.groups + g
        work, order = setup.devices[p], setup.orders[p]
        last = {a.chunk: i for i, action in enumerate(order) for a in _both(action) if a.kind in (BACKWARD, WEIGHT)}
        first = {
            a.chunk: i for i, action in reversed(list(enumerate(order))) for a in _both(action) if a.kind == FORWARD
        }
        pending: list[simpy.Event] = []
        previous = yield from self._alone(p, g, work.gathers, "gather", -1)
        for i, action in enumerate(order):
            actions = _both(action)
            before, wait_from = previous, self._now()
            for a in actions:
                key = self._need(p, g, a)
                if key is not None:
                    arrival = self._arrival(key)
                    self._waiting[index] = f"microbatch {a.microbatch} of stage {key[1]} ({key[0]})"
                    if not arrival.processed:
                        yield arrival
                        if self._now() > wait_from:
                            before, wait_from = self._rows.get(key, -1), self._now()
                    self._arrivals.pop(key, None)
            slices = self._slices(work, first, last, i, actions)
            self._waiting[index] = f"its own {action.kind} of microbatch {action.microbatch}"
            previous = yield from self._execute(p, g, actions, slices, pending, before)
            for a in actions:
                self._announce(p, g, a, previous)
        yield from self._finish(p, g, work, pending, previous)
        self.finished[index] = self._now()

    def _slices(
        self, work: DeviceWork, first: dict[int, int], last: dict[int, int], i: int, actions: tuple[Action, ...]
    ) -> tuple[list[tuple[str, list[Transfer]]], int]:
        """What must be there before, or starts after, each layer of this action; and in how many layers it is cut."""
        bound: list[tuple[str, list[Transfer]]] = []
        layers = 1
        for a in actions:
            share = work.chunks[a.chunk].layers / max(1, work.buckets)
            if a.kind == FORWARD and _beside(work.gathers) and first[a.chunk] == i:
                layers = max(layers, work.chunks[a.chunk].layers)
                bound.append(("before", [_part(t, share) for t in work.gathers]))
            if a.kind in (BACKWARD, WEIGHT) and _beside(work.reductions) and last[a.chunk] == i:
                layers = max(layers, work.chunks[a.chunk].layers)
                bound.append(("after", [_part(t, share) for t in work.reductions]))
        return bound, layers

    def _execute(
        self,
        p: int,
        g: int,
        actions: tuple[Action, ...],
        slices: tuple[list[tuple[str, list[Transfer]]], int],
        pending: list[simpy.Event],
        before: int,
    ) -> Generator[simpy.Event, Any, int]:
        """Run one action (or a forward and a backward together); returns its row."""
        setup, spent = self.setup, self.spent[p * self.setup.groups + g]
        index, work = p * setup.groups + g, setup.devices[p]
        passes = [(a, one) for a in actions for one in _passes(work.chunks[a.chunk], a)]
        self._remember(index, actions, work, FORWARD)
        straggle = setup.straggler(p, g)
        compute = sum(one.compute_s for _, one in passes) * straggle
        start = self._now()
        beside = [t for _, one in passes for t in one.transfers if t.overlapped]
        serial = [t for _, one in passes for t in one.transfers if not t.overlapped]
        running = [(t, self._send(p, g, t)) for t in beside]
        if slices[0]:
            compute_end = yield from self._sliced(p, g, actions, compute, slices, pending)
        else:
            yield self._pause(compute)
            compute_end = self._now()
        spent.compute_s += compute
        # Gathers that a layer had to wait for are exposed communication.
        spent.other_s += max(0.0, compute_end - start - compute)
        if running:
            yield from self._hidden(running, spent, start, compute)
        kind = KIND["forward and backward"] if len(actions) > 1 else PASS_KIND[actions[0].kind]
        row = self.record.add(index, COMPUTE, kind, actions[0].chunk, actions[0].microbatch, start, self._now(), before)
        for t, event in running:
            self.record.add(
                index,
                NETWORK,
                TRANSFER_KIND[t.name],
                actions[0].chunk,
                actions[0].microbatch,
                start,
                self.transport.ended(event) if event.processed else self._now(),
            )
        for t in serial:
            begin = self._now()
            yield self._send(p, g, t)
            self._charge(spent, t, self._now() - begin)
            row = self._row(index, NETWORK, TRANSFER_KIND[t.name], actions[0], begin, row)
        row = yield from self._rest(p, g, passes, actions[0], row)
        self._remember(index, actions, work, BACKWARD)
        return row

    def _rest(
        self, p: int, g: int, passes: list[tuple[Action, PassWork]], label: Action, row: int
    ) -> Generator[simpy.Event, Any, int]:
        """Serial collectives of tensor and context groups, host traffic, and the wait for the busiest expert rank."""
        setup, index = self.setup, p * self.setup.groups + g
        spent = self.spent[index]
        hot = 0.0
        for a, one in passes:
            if one.hot_s:
                stage = model_stage(setup.schedule, p, a.chunk, self.stages)
                hot += one.hot_s * setup.excess(g, stage, self._microbatch(a))
        parts = (
            ("tensor", sum(one.serial_s for _, one in passes)),
            ("host", sum(one.host_s for _, one in passes)),
            ("imbalance", hot),
        )
        total = sum(seconds for _, seconds in parts)
        if total <= 0:
            return row
        begin = self._now()
        yield self._pause(total)
        for name, seconds in parts:
            if seconds > 0:
                stream = NETWORK if name == "tensor" else COMPUTE
                row = self.record.add(
                    index, stream, KIND[name], label.chunk, label.microbatch, begin, begin + seconds, row
                )
                begin += seconds
        spent.other_s += parts[0][1]
        spent.host_s += parts[1][1]
        spent.imbalance_s += parts[2][1]
        return row

    def _microbatch(self, a: Action) -> int:
        """Index of the microbatch over both of DualPipe's directions."""
        return 2 * a.microbatch + a.chunk if self.setup.schedule == "dualpipe" else a.microbatch

    def _hidden(
        self, running: list[tuple[Transfer, simpy.Event]], spent: Spent, start: float, compute: float
    ) -> Generator[simpy.Event, Any, None]:
        """Wait for overlapped transfers; what runs beside them takes longer by the profile's factor."""
        open_ = [event for _, event in running if not event.processed]
        latest = max((self.transport.ended(event) for _, event in running if event.processed), default=start)
        together = compute if open_ else min(compute, latest - start)
        slow = self.setup.slowdown * together
        if slow > 0:
            yield self._pause(slow)
            spent.all_to_all_s += slow if any(t.name == "all-to-all" for t, _ in running) else 0.0
            spent.other_s += 0.0 if any(t.name == "all-to-all" for t, _ in running) else slow
        # All-to-all first: where both are late, its wait counts as its own.
        for t, event in sorted(running, key=lambda x: x[0].name != "all-to-all"):
            if not event.processed:
                begin = self._now()
                yield event
                self._charge(spent, t, self._now() - begin)

    def _sliced(
        self,
        p: int,
        g: int,
        actions: tuple[Action, ...],
        compute: float,
        slices: tuple[list[tuple[str, list[Transfer]]], int],
        pending: list[simpy.Event],
    ) -> Generator[simpy.Event, Any, float]:
        """Compute layer by layer, for the step's first forward and last backward of a chunk."""
        bound, layers = slices
        gathers: list[list[simpy.Event]] = []
        chunk = actions[0].chunk
        for when, transfers in bound:
            if when == "before":
                gathers = self._chain(p, g, transfers, layers, ("gather", p, chunk))
        for layer in range(layers):
            for event in gathers[layer] if gathers else ():
                if not event.processed:
                    yield event
            begin, under_way = self._now(), [event for event in pending if not event.processed]
            yield self._pause(compute / layers)
            # Reductions of the layers before ran beside this one, for as long as they lasted.
            until = max((self.transport.ended(e) if e.processed else self._now() for e in under_way), default=begin)
            if until > begin:
                yield self._pause(self.setup.slowdown * (until - begin))
            for when, transfers in bound:
                if when == "after":
                    for j, t in enumerate(transfers):
                        pending.append(self._shared(p, g, _part(t, 1 / layers), ("reduce", p, chunk, j, layer)))
        return self._now()

    def _chain(
        self, p: int, g: int, transfers: list[Transfer], layers: int, key: tuple[object, ...]
    ) -> list[list[simpy.Event]]:
        """Start the gathers of all layers one after the other; the events of each layer."""
        events = [[self.env.event() for _ in transfers] for _ in range(layers)]

        def feed(j: int, t: Transfer) -> Generator[simpy.Event, Any, None]:
            for layer in range(layers):
                yield self._shared(p, g, _part(t, 1 / layers), (*key, j, layer))
                events[layer][j].succeed()

        for j, t in enumerate(transfers):
            self.env.process(feed(j, t))
        return events

    def _alone(
        self, p: int, g: int, transfers: list[Transfer], name: str, row: int
    ) -> Generator[simpy.Event, Any, int]:
        """Transfers that nothing hides, one after the other."""
        if _beside(transfers):
            return row
        for j, t in enumerate(transfers):
            begin = self._now()
            yield self._shared(p, g, t, (name, p, j))
            self._charge(self.spent[p * self.setup.groups + g], t, self._now() - begin)
            row = self.record.add(
                p * self.setup.groups + g, NETWORK, TRANSFER_KIND[t.name], 0, -1, begin, self._now(), row
            )
        return row

    def _finish(
        self, p: int, g: int, work: DeviceWork, pending: list[simpy.Event], row: int
    ) -> Generator[simpy.Event, Any, None]:
        """Wait for the reductions, then update the weights."""
        index = p * self.setup.groups + g
        self._waiting[index] = "the reduction of its gradients"
        row = yield from self._alone(p, g, work.reductions, "reduce", row)
        begin = self._now()
        for event in pending:
            if not event.processed:
                yield event
        if self._now() > begin:
            self.spent[index].other_s += self._now() - begin
            row = self.record.add(index, NETWORK, KIND["gradients"], 0, -1, begin, self._now(), row)
        begin = self._now()
        yield self._pause(work.update_s)
        self.spent[index].compute_s += work.update_s
        self.record.add(index, COMPUTE, KIND["optimizer"], 0, -1, begin, self._now(), row)

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """Seconds since the start of the step."""
        return float(self.env.now * TICK_S)

    def _pause(self, seconds: float) -> simpy.Event:
        """An event after `seconds`, on the clock's integer ticks: ties never hang on rounding."""
        return self.env.timeout(round(seconds / TICK_S))

    def _send(self, p: int, g: int, t: Transfer) -> simpy.Event:
        """Start a transfer of one class."""
        event: simpy.Event = self.transport.transfer(t, p, g)
        return event

    def _shared(self, p: int, g: int, t: Transfer, key: tuple[object, ...]) -> simpy.Event:
        """A transfer that all groups of a stage make together: it starts when the last of them is there."""
        if self.setup.groups == 1:
            return self._send(p, g, t)
        complete, event = self._meet(key)
        if complete:

            def tell(done: simpy.Event) -> None:
                event.succeed(done.value)

            self._send(p, -1, t).callbacks.append(tell)
        return event

    def _charge(self, spent: Spent, t: Transfer, seconds: float) -> None:
        if t.name == "all-to-all":
            spent.all_to_all_s += seconds
        else:
            spent.other_s += seconds

    def _row(self, index: int, stream: int, kind: int, a: Action, begin: float, before: int) -> int:
        return self.record.add(index, stream, kind, a.chunk, a.microbatch, begin, self._now(), before)

    def _remember(self, index: int, actions: tuple[Action, ...], work: DeviceWork, kind: str) -> None:
        """Memory: a forward keeps its chunk's activations from its start, the end of a backward frees them."""
        freed = kind == BACKWARD
        kinds = (BACKWARD, WEIGHT) if freed else (FORWARD,)
        change = sum(work.chunks[a.chunk].kept_bytes for a in actions if a.kind in kinds)
        if change:
            times, bytes_ = self.memory[index]
            times.append(self._now())
            bytes_.append(bytes_[-1] - change if freed else bytes_[-1] + change)


def _both(action: Action) -> tuple[Action, ...]:
    return (action,) if action.pair is None else (action, action.pair)


def _passes(chunk: ChunkWork, a: Action) -> tuple[PassWork, ...]:
    return {
        FORWARD: (chunk.forward,),
        BACKWARD: (chunk.input, chunk.weight),
        INPUT: (chunk.input,),
        WEIGHT: (chunk.weight,),
    }[a.kind]


def _beside(transfers: list[Transfer]) -> bool:
    return bool(transfers) and transfers[0].overlapped


def _part(t: Transfer, share: float) -> Transfer:
    return Transfer(t.name, t.kind, t.size, t.stride, t.bytes * share, t.calls * share, t.between, t.overlapped)
