"""One device class: it runs its order, action by action, and notes where its time goes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import simpy

from simulator.engine.load_patterns import LoadPattern
from simulator.engine.record import COMPUTE, HOST, KIND, NETWORK
from simulator.engine.work import ChunkWork, PassWork, Transfer
from simulator.network.flight import TICK_S
from simulator.workload.orders import BACKWARD, FORWARD, INPUT, WEIGHT, Action, model_stage

if TYPE_CHECKING:
    from simulator.engine.run import Engine

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
Steps = Generator[simpy.Event, Any, int]


class Device:
    """The process of one class: stage `p`, group `g`."""

    def __init__(self, engine: Engine, p: int, g: int) -> None:
        self.engine, self.setup, self.p, self.g = engine, engine.setup, p, g
        self.index = p * self.setup.groups + g
        self.work = self.setup.devices[p]
        self.order = self.setup.orders[p]
        self.spent = engine.spent[self.index]
        # When the host has launched all kernels so far: it never waits for the device, and runs ahead of it.
        self.launched = 0.0
        self.straggle = self.setup.straggler(p, g)
        # Reductions under way: transfer, event.
        self.pending: list[tuple[Transfer, simpy.Event]] = []
        # Events of the gathers of each chunk's layers.
        self.gathered: dict[int, list[list[simpy.Event]]] = {}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for i, action in enumerate(self.order):
            for a in _both(action):
                if a.kind == FORWARD:
                    self.first.setdefault(a.chunk, i)
                if a.kind in (BACKWARD, WEIGHT):
                    self.last[a.chunk] = i

    def run(self) -> Generator[simpy.Event, Any, None]:
        """The whole step of this class."""
        engine = self.engine
        row = yield from self._alone(self.work.gathers, "gather", -1)
        if _beside(self.work.gathers):
            # Updated weights are on their way from the start of the step, chunk by chunk and layer by layer.
            for c in sorted(self.first, key=lambda c: self.first[c]):
                layers = self.work.chunks[c].layers
                share = layers / max(1, self.work.buckets)
                parts = [_part(t, share) for t in self.work.gathers]
                self.gathered[c] = self._chain(parts, layers, ("gather", self.p, c))
        for i, action in enumerate(self.order):
            before, since = row, engine.now()
            actions = _both(action)
            for a in actions:
                key = engine.need(self.p, self.g, a)
                if key is None:
                    continue
                arrival = engine.arrival(key)
                engine.waiting[self.index] = f"microbatch {a.microbatch} of stage {key[1]} ({key[0]})"
                if not arrival.processed:
                    yield arrival
                    if engine.now() > since:
                        before, since = engine.rows.get(key, -1), engine.now()
                engine.received(key)
            engine.waiting[self.index] = f"its own {action.kind} of microbatch {action.microbatch}"
            row = yield from self._execute(i, actions, before)
            for a in actions:
                engine.announce(self.p, self.g, a, row)
        yield from self._finish(row)
        engine.finished[self.index] = engine.now()

    # An action -------------------------------------------------------------------------------------------------------

    def _execute(self, i: int, actions: tuple[Action, ...], before: int) -> Steps:
        """Run one action (or a forward and a backward together); returns the row that ended last."""
        engine, spent = self.engine, self.spent
        passes = [(a, one) for a in actions for one in _passes(self.work.chunks[a.chunk], a)]
        self._remember(actions, FORWARD)
        compute = sum(one.compute_s for _, one in passes) * self.straggle
        kernels, begun = sum(one.kernels for _, one in passes), self.launched
        self.launched += self.setup.launch_s * kernels
        if kernels:
            before = yield from self._launches(begun, begun + self.setup.launch_s, actions[0], before)
        start = engine.now()
        running = [
            (t, engine.send(self.p, self.g, t, self._pattern(a, t)))
            for a, one in passes
            for t in one.transfers
            if t.overlapped
        ]
        needed, reductions, layers = self._bound(i, actions)
        if needed or reductions:
            yield from self._sliced(actions[0], compute, needed, reductions, layers)
            waited = max(0.0, engine.now() - start - compute)
            # Gathers that a layer had to wait for are exposed communication.
            spent.other_s += waited
            if needed and waited:
                begin, start = start, start + waited
                before = self._add(NETWORK, KIND["parameters"], actions[0], begin, start, before)
        else:
            yield engine.pause(compute)
        spent.compute_s += compute
        if running:
            yield from self._slowed(running, start, compute)
        kind = KIND["forward and backward"] if len(actions) > 1 else PASS_KIND[actions[0].kind]
        row = self._add(COMPUTE, kind, actions[0], start, engine.now(), before)
        if kernels:
            # The last kernel cannot start before it is launched.
            row = yield from self._launches(begun, self.launched + compute / kernels, actions[0], row)
        if running:
            row = yield from self._hidden(running, actions[0], before, row)
        for a, t in ((a, t) for a, one in passes for t in one.transfers if not t.overlapped):
            begin = engine.now()
            event = engine.send(self.p, self.g, t, self._pattern(a, t))
            yield event
            self._charge(t, engine.now() - begin, event)
            row = self._add(NETWORK, TRANSFER_KIND[t.name], actions[0], begin, engine.now(), row)
        row = yield from self._rest(passes, actions[0], row)
        self._remember(actions, BACKWARD)
        return row

    def _launches(self, begun: float, time_s: float, label: Action, row: int) -> Steps:
        """Wait until `time_s` for kernels that the host has been launching since `begun`; the row that ended last."""
        begin = self.engine.now()
        if not self.setup.launch_s or time_s - begin <= TICK_S:
            return row
        yield self.engine.pause(time_s - begin)
        self.spent.host_s += self.engine.now() - begin
        self._add(HOST, KIND["launch"], label, begun, self.launched, -1)
        return self._add(COMPUTE, KIND["host"], label, begin, self.engine.now(), row)

    def _slowed(
        self, running: list[tuple[Transfer, simpy.Event]], start: float, compute: float
    ) -> Generator[simpy.Event, Any, None]:
        """Compute takes longer by the profile's factor for as long as transfers ran beside it."""
        ended = max((self._span(e)[1] for _, e in running if e.processed), default=start)
        together = compute if any(not e.processed for _, e in running) else min(compute, ended - start)
        slow = self.setup.slowdown * together
        if slow > 0:
            yield self.engine.pause(slow)
            if any(t.name == "all-to-all" for t, _ in running):
                self.spent.all_to_all_s += slow
            else:
                self.spent.other_s += slow

    def _hidden(self, running: list[tuple[Transfer, simpy.Event]], label: Action, before: int, row: int) -> Steps:
        """Wait for overlapped transfers; all-to-all first: where both are late, its wait counts as its own."""
        last = None
        for t, event in sorted(running, key=lambda x: x[0].name != "all-to-all"):
            if not event.processed:
                begin = self.engine.now()
                yield event
                self._charge(t, self.engine.now() - begin, event)
                last = event
        for t, event in running:
            begin, end = self._span(event)
            mine = self._add(NETWORK, TRANSFER_KIND[t.name], label, begin, end, before)
            row = mine if event is last else row
        return row

    def _rest(self, passes: list[tuple[Action, PassWork]], label: Action, row: int) -> Steps:
        """Serial collectives of tensor and context groups, host traffic, and the wait for the busiest expert rank."""
        hot = 0.0
        for a, one in passes:
            if one.hot_s:
                hot += one.hot_s * self.setup.excess(self.g, *self._place(a))
        parts = (
            ("tensor", sum(one.serial_s for _, one in passes)),
            ("host", sum(one.host_s for _, one in passes)),
            ("imbalance", hot),
        )
        total = sum(seconds for _, seconds in parts)
        if total <= 0:
            return row
        begin = self.engine.now()
        yield self.engine.pause(total)
        for name, seconds in parts:
            if seconds > 0:
                stream = NETWORK if name == "tensor" else COMPUTE
                row = self._add(stream, KIND[name], label, begin, begin + seconds, row)
                begin += seconds
        self.spent.other_s += parts[0][1]
        self.spent.host_s += parts[1][1]
        self.spent.imbalance_s += parts[2][1]
        return row

    # What happens once a step ----------------------------------------------------------------------------------------

    def _bound(self, i: int, actions: tuple[Action, ...]) -> tuple[list[list[simpy.Event]], list[Transfer], int]:
        """Gathers that each layer of this action needs, reductions that each starts, and the number of layers."""
        needed: list[list[simpy.Event]] = []
        reductions: list[Transfer] = []
        layers = 1
        for a in actions:
            own = self.work.chunks[a.chunk].layers
            share = own / max(1, self.work.buckets)
            if a.kind == FORWARD and self.gathered and self.first[a.chunk] == i:
                layers = max(layers, own)
                needed = self.gathered[a.chunk]
            if a.kind in (BACKWARD, WEIGHT) and _beside(self.work.reductions) and self.last[a.chunk] == i:
                layers = max(layers, own)
                reductions += [_part(t, share) for t in self.work.reductions]
        return needed, reductions, layers

    def _sliced(
        self,
        label: Action,
        compute: float,
        needed: list[list[simpy.Event]],
        reductions: list[Transfer],
        layers: int,
    ) -> Generator[simpy.Event, Any, None]:
        """Compute layer by layer, for the step's first forward and last backward of a chunk."""
        engine = self.engine
        for layer in range(layers):
            for event in needed[layer] if layer < len(needed) else ():
                if not event.processed:
                    yield event
            begin, under_way = engine.now(), [e for _, e in self.pending if not e.processed]
            yield engine.pause(compute / layers)
            # Reductions of the layers before ran beside this one, for as long as they lasted.
            until = max((self._span(e)[1] if e.processed else engine.now() for e in under_way), default=begin)
            if until > begin:
                yield engine.pause(self.setup.slowdown * (until - begin))
            for j, t in enumerate(reductions):
                one = _part(t, 1 / layers)
                event = engine.shared(self.p, self.g, one, ("reduce", self.p, label.chunk, j, layer))
                self.pending.append((one, event))

    def _chain(self, transfers: list[Transfer], layers: int, key: tuple[object, ...]) -> list[list[simpy.Event]]:
        """Start the gathers of all layers one after the other; the events of each layer."""
        engine = self.engine
        events = [[engine.env.event() for _ in transfers] for _ in range(layers)]

        def feed(j: int, t: Transfer) -> Generator[simpy.Event, Any, None]:
            for layer in range(layers):
                yield engine.shared(self.p, self.g, _part(t, 1 / layers), (*key, j, layer))
                events[layer][j].succeed()

        for j, t in enumerate(transfers):
            engine.env.process(feed(j, t))
        return events

    def _alone(self, transfers: list[Transfer], name: str, row: int) -> Steps:
        """Transfers that nothing hides, one after the other."""
        if _beside(transfers):
            return row
        for j, t in enumerate(transfers):
            begin = self.engine.now()
            event = self.engine.shared(self.p, self.g, t, (name, self.p, j))
            yield event
            self._charge(t, self.engine.now() - begin, event)
            row = self._add(NETWORK, TRANSFER_KIND[t.name], None, begin, self.engine.now(), row)
        return row

    def _finish(self, row: int) -> Generator[simpy.Event, Any, None]:
        """Wait for the reductions, then update the weights."""
        engine = self.engine
        engine.waiting[self.index] = "the reduction of its gradients"
        row = yield from self._alone(self.work.reductions, "reduce", row)
        begin, last = engine.now(), None
        for _, event in self.pending:
            if not event.processed:
                yield event
                last = event
        self.spent.other_s += engine.now() - begin
        after = row
        for t, event in self.pending:
            mine = self._add(NETWORK, TRANSFER_KIND[t.name], None, *self._span(event), after)
            row = mine if event is last else row
        begin = engine.now()
        yield engine.pause(self.work.update_s)
        self.spent.compute_s += self.work.update_s
        self._add(COMPUTE, KIND["optimizer"], None, begin, engine.now(), row)

    # Notes -----------------------------------------------------------------------------------------------------------

    def _span(self, event: simpy.Event) -> tuple[float, float]:
        """When a finished transfer began to move and ended, seconds."""
        span: tuple[float, float] = self.engine.transport.span(event)
        return span

    def _place(self, a: Action) -> tuple[int, int]:
        """Model stage and number of the microbatch of an action; DualPipe counts microbatches from both ends."""
        stage = model_stage(self.setup.schedule, self.p, a.chunk, self.setup.stages)
        return stage, 2 * a.microbatch + a.chunk if self.setup.schedule == "dualpipe" else a.microbatch

    def _pattern(self, a: Action, t: Transfer) -> LoadPattern | None:
        return self.setup.pattern(self.g, *self._place(a)) if t.hot else None

    def _charge(self, t: Transfer, seconds: float, event: simpy.Event) -> None:
        """Note a wait for a finished transfer; what an even all-to-all would not have taken is imbalance."""
        if t.name == "all-to-all":
            uneven = seconds * self.engine.transport.uneven_share(event) if t.hot else 0.0
            self.spent.imbalance_s += uneven
            self.spent.all_to_all_s += seconds - uneven
        else:
            self.spent.other_s += seconds

    def _add(self, stream: int, kind: int, a: Action | None, begin: float, end: float, before: int) -> int:
        chunk, microbatch = (0, -1) if a is None else (a.chunk, a.microbatch)
        return self.engine.record.add(self.index, stream, kind, chunk, microbatch, begin, end, before)

    def _remember(self, actions: tuple[Action, ...], kind: str) -> None:
        """Memory: a forward keeps its chunk's activations from its start, the end of a backward frees them."""
        freed = kind == BACKWARD
        kinds = (BACKWARD, WEIGHT) if freed else (FORWARD,)
        change = sum(self.work.chunks[a.chunk].kept_bytes for a in actions if a.kind in kinds)
        if change:
            times, bytes_ = self.engine.memory[self.index]
            times.append(self.engine.now())
            bytes_.append(bytes_[-1] - change if freed else bytes_[-1] + change)


def _both(action: Action) -> tuple[Action, ...]:
    return (action,) if action.pair is None else (action, action.pair)


def _passes(chunk: ChunkWork, a: Action) -> tuple[PassWork, ...]:
    if a.kind == FORWARD:
        return (chunk.forward,)
    if a.kind == BACKWARD:
        return chunk.input, chunk.weight
    return (chunk.input if a.kind == INPUT else chunk.weight,)


def _beside(transfers: list[Transfer]) -> bool:
    return bool(transfers) and transfers[0].overlapped


def _part(t: Transfer, share: float) -> Transfer:
    return replace(t, bytes=t.bytes * share, calls=t.calls * share, out_bytes=t.out_bytes * share)
