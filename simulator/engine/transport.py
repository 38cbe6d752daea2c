"""How the engine's transfers move: alone at their own rate, or sharing the links of a real topology."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simpy
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.engine.load_patterns import LoadPattern, no_pattern
from simulator.engine.setup import Setup
from simulator.engine.uneven import Uneven
from simulator.engine.work import Transfer
from simulator.network.coflow import Coflow, Part
from simulator.network.collectives import Network
from simulator.network.drawing import draw
from simulator.network.flight import TICK_S
from simulator.network.fluid import Fluid
from simulator.network.folding import fold
from simulator.network.geometry import joined_links
from simulator.network.graph_file import topology_from_file
from simulator.network.templates import Templates
from simulator.network.transfers import FluidProcess
from simulator.results.links import Drawing, LinkUse

Array = NDArray[np.float64]


class Solo:
    """Every transfer at its rate alone: the closed form's view of the network.

    A class sends what runs in the background one collective after the other, since all of it shares its cards.
    """

    def __init__(self, env: simpy.Environment, network: Network) -> None:
        self.env, self.network = env, network
        self._free: dict[tuple[int, bool], dict[int, int]] = {}

    def seconds(self, t: Transfer, excess: float = 0.0) -> tuple[float, float]:
        """Seconds of a transfer, its calls in turn at the solo rate; and what the busiest rank's excess adds.

        The excess load takes the rate of large messages, and no longer than an even load of its size would.
        """
        if not t.calls:
            return 0.0, 0.0
        rate, each = self.network.rate(t.kind, t.size, t.stride, t.between), t.bytes / t.calls
        even = float(rate.seconds(each))
        return t.calls * even, t.calls * excess * min(even, each * rate.seconds_per_byte)

    def transfer(self, t: Transfer, stage: int, group: int, pattern: LoadPattern | None = None) -> simpy.Event:
        """Start it now; the event fires at its end."""
        # All-to-alls that nothing hides do not wait for what runs in the background.
        lanes = self._free.setdefault((stage, t.name == "all-to-all" and not t.overlapped), {})
        # Group -1 is all groups together: they share the lane that it holds.
        before = max(lanes.values(), default=0) if group == -1 else max(lanes.get(group, 0), lanes.get(-1, 0))
        now = int(self.env.now)
        begin = max(now, before)
        even, more = self.seconds(t, pattern.excess if pattern else 0.0)
        end = lanes[group] = begin + round((even + more) / TICK_S)
        return self.env.timeout(end - now, value=(begin, end, more / (even + more) if more else 0.0))

    def links(self, step_s: float) -> tuple[LinkUse, ...]:
        """No links are looked at here."""
        del step_s
        return ()

    def drawing(self, step_s: float) -> Drawing | None:
        """Nor drawn."""
        del step_s
        return None

    def span(self, event: simpy.Event) -> tuple[float, float]:
        """When a transfer began to move and ended, seconds."""
        begin, end, _ = event.value  # type: ignore[misc]
        return float(begin * TICK_S), float(end * TICK_S)

    def uneven_share(self, event: simpy.Event) -> float:
        """The share of a finished transfer's time that an even one would not have taken."""
        share: float = event.value[2]  # type: ignore[index]
        return share


class Shared:
    """Transfers as coflows that share the links of the real topology, bandwidth-fair per flow.

    The groups of a stage that make the same transfer are one coflow. Links that all coflows load alike are folded into
    one, unless links are slowed by name (`slow_links`: whole words of a link's name, factor on its bandwidth).

    An uneven all-to-all goes to the experts and then back, each way with the bytes of its pattern; a class sends those
    one after the other, as its library's stream does. It is cut into classes of flows where others share its links.
    """

    def __init__(self, env: simpy.Environment, setup: Setup, layout: Layout, slow_links: dict[str, float]) -> None:
        self.env, self.setup, self.layout = env, setup, layout
        graph = None if layout.graph is None else topology_from_file(layout.graph)
        self.templates = Templates(layout.cluster, graph)
        topology = self.templates.topology
        bandwidth = topology.bandwidth_bytes_per_s.copy()
        for name, factor in slow_links.items():
            # Whole words: "node 1" is not node 10.
            wanted = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
            found = [i for i in range(topology.links) if wanted.search(topology.link_name(i))]
            if not found:
                raise QuestionError(f"slow link {name!r}: no link of {layout.cluster.name} has this in its name")
            if not 0 < factor < float("inf"):
                raise QuestionError(f"slow link {name!r} = {factor}: a factor is a positive number")
            bandwidth[found] *= factor
        asked = sorted({self._question(t, p, g) for p, g, t in self._all()})
        unit = [self._unit(*q) for q in asked]
        probes = [Coflow("probe", "all_to_all", parts) for parts in self._probes()]
        self._place: NDArray[np.int64] | None = None
        if slow_links:
            self.kept = self._class = np.arange(topology.links)
            folded = [*unit, *probes]
        else:
            folded, bandwidth, self.kept, self._class = fold([*unit, *probes], bandwidth)
            unit = folded[: len(unit)]
            self._place = np.full(topology.links, -1)
            self._place[self.kept] = np.arange(self.kept.size)
        self._units = dict(zip(asked, unit, strict=True))
        self._even: dict[tuple[Transfer, int, int], tuple[Coflow, float]] = {}
        self._last: dict[tuple[int, int], simpy.Event] = {}
        self.fluid = Fluid(bandwidth, regions=joined_links(folded, bandwidth.size))
        self.process = FluidProcess(env, self.fluid)
        self._counted: tuple[int, Array] = -1, np.zeros(0)
        self.uneven = Uneven(self.fluid, self._parts, self._place)

    def _all(self) -> Iterator[tuple[int, int, Transfer]]:
        """Every transfer that can happen: (stage, group or -1 for all, transfer)."""
        for p, work in enumerate(self.setup.devices):
            own = [t for c in work.chunks for one in (c.forward, c.input, c.weight) for t in one.transfers]
            for g in range(self.setup.groups):
                yield from ((p, g, t) for t in own)
            group = -1 if self.setup.groups > 1 else 0
            yield from ((p, group, t) for t in (*work.reductions, *work.gathers))

    def _probes(self) -> Iterator[tuple[Part, ...]]:
        """Uneven all-to-alls with loads that nothing else has: links that these load alike, all patterns do."""
        seen = set()
        for p, g, t in self._all():
            key = (t.size, t.stride, t.between, p, g)
            if t.hot and t.size > 1 and key not in seen and self.setup.pattern is not no_pattern:
                seen.add(key)
                loads = np.random.default_rng(0).uniform(0.5, 1.5, t.size)
                yield from (self._parts(t, p, g, [loads], way, fine=False)[0] for way in (True, False))

    def _question(self, t: Transfer, stage: int, group: int) -> tuple[str, int, int, float, int, int]:
        return t.kind, t.size, t.stride, t.between, stage, group

    def _unit(self, kind: str, size: int, stride: int, between: float, stage: int, group: int) -> Coflow:
        """The coflow of one byte a rank, of the groups of a stage: all of them, or an expert group's own."""
        if size <= 1:
            return Coflow("nothing", kind, ())
        mine, share = self._groups(kind, size, stride, stage, group)
        transport = self.layout.transport if kind == "all_to_all" else "collective"
        unit = self.templates.shape(kind, size, stride, mine, transport, between)
        return unit if share == 1.0 else replace(unit, parts=_scaled(unit.parts, share))

    def _groups(self, kind: str, size: int, stride: int, stage: int, group: int) -> tuple[tuple[int, ...], float]:
        """The groups of a stage that a class's collective stands for, and its share of their bytes."""
        members = self.templates.members(size, stride)
        mine = np.flatnonzero(self.layout.stages_of(members[:, 0]) == stage).tolist()
        if group < 0 or self.setup.groups == 1:
            return tuple(mine), 1.0
        if kind == "all_to_all" and len(mine) == self.setup.groups:
            return (mine[group],), 1.0
        # Groups of the engine that are not this collective's groups each start an equal share of all of it.
        return tuple(mine), 1 / self.setup.groups

    def _parts(
        self, t: Transfer, stage: int, group: int, loads: list[Array], to_experts: bool, fine: bool
    ) -> list[tuple[Part, ...]]:
        """Parts of one byte a rank, for each of several loads of the ranks."""
        mine, share = self._groups(t.kind, t.size, t.stride, stage, group)
        ask, end = (t.size, t.stride, mine), (to_experts, self.layout.transport, t.between)
        if fine:
            several = [self.templates.uneven(*ask, x, *end, fine) for x in loads]
        else:
            several = self.templates.uneven_several(*ask, np.array(loads), *end)
        return several if share == 1.0 else [_scaled(parts, share) for parts in several]

    def transfer(self, t: Transfer, stage: int, group: int, pattern: LoadPattern | None = None) -> simpy.Event:
        """Start it now; the event fires at its end. Uneven all-to-alls of a class follow each other."""
        if pattern is None or t.size == 1:
            return self.process.transfer(self._coflow(t, stage, group, None, fine=False))
        before, lane = self._last.get((stage, group)), (stage, group)
        if before is None or before.processed:
            event = self._last[lane] = self._start(t, stage, group, pattern)
            return event
        done = self._last[lane] = self.env.event()

        def start(_: simpy.Event) -> None:
            def tell(ended: simpy.Event) -> None:
                done.succeed(ended.value)

            self._start(t, stage, group, pattern).callbacks.append(tell)

        before.callbacks.append(start)
        return done

    def _start(self, t: Transfer, stage: int, group: int, pattern: LoadPattern) -> simpy.Event:
        coflow = self._coflow(t, stage, group, pattern, fine=False)
        if self.process.contends(coflow):
            coflow = self._coflow(t, stage, group, pattern, fine=True)
        return self.process.transfer(coflow)

    def _coflow(self, t: Transfer, stage: int, group: int, pattern: LoadPattern | None, fine: bool) -> Coflow:
        found = self._even.get((t, stage, group))
        if found is None:
            unit = self._units[self._question(t, stage, group)]
            wait, factor = 0.0, 0.0
            if t.bytes > 0 and unit.parts:
                wait, factor = self.templates.start(t.kind, t.size, t.stride, t.between, t.bytes / t.calls)
            parts = _scaled(unit.parts, t.bytes * factor) if factor else ()
            even = replace(unit, name=t.name, parts=parts, latency_s=wait * t.calls)
            found = self._even[t, stage, group] = even, factor
        even, factor = found
        if pattern is None or not even.parts:
            return even
        return self.uneven.coflow(t, stage, group, pattern, fine, even, factor)

    def uneven_share(self, event: simpy.Event) -> float:
        """The share of a finished transfer's time that an even one would not have taken, both alone."""
        flight: Any = event.value
        share: float = flight.coflow.meta.get("uneven", 0.0)
        return share

    def span(self, event: simpy.Event) -> tuple[float, float]:
        """When a transfer began to move and ended, seconds."""
        flight: Any = event.value
        return flight.started * TICK_S, flight.ended * TICK_S

    def links(self, step_s: float, most: int = 20) -> tuple[LinkUse, ...]:
        """The links that carried most for their bandwidth, one of each folded class."""
        carried = self._carried()
        busy = carried / (self.fluid.bandwidth * step_s)
        topology = self.templates.topology
        order = np.argsort(-busy, kind="stable")[:most]
        return tuple(
            LinkUse(
                topology.link_name(int(self.kept[i])),
                topology.level_names[int(topology.level[self.kept[i]])],
                float(carried[i]),
                float(self.fluid.bandwidth[i]),
                float(busy[i]),
            )
            for i in order.tolist()
            if carried[i] > 0
        )

    def _carried(self) -> Array:
        """Bytes that have crossed each kept link up to now; summed once at the end of a step."""
        now = int(self.env.now)
        if self._counted[0] != now:
            self._counted = now, self.fluid.link_bytes()
        return self._counted[1]

    def drawing(self, step_s: float) -> Drawing | None:
        """The network with the share of the step that its links are busy, folded ones as those that stand for them.

        None where nobody sends anything.
        """
        if not self.kept.size:
            return None
        busy = self._carried() / (self.fluid.bandwidth * step_s)
        return draw(self.templates.topology, np.where(self._class >= 0, busy[self._class], 0.0))


def _scaled(parts: tuple[Part, ...], factor: float) -> tuple[Part, ...]:
    return tuple(Part(p.level, p.links, p.bytes * factor, p.flows, p.largest_flow_bytes * factor) for p in parts)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where stages sit on a cluster, which library carries the all-to-alls, and the file of a fabric of one's own."""

    cluster: Cluster
    stages: int
    stage_stride: int
    transport: Literal["collective", "deepep", "hybridep"]
    graph: Path | None = None

    def stages_of(self, devices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pipeline ranks of devices."""
        return devices // self.stage_stride % self.stages
