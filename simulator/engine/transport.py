"""How the engine's transfers move: alone at their own rate, or sharing the links of a real topology."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simpy

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.engine.setup import Setup
from simulator.engine.work import Transfer
from simulator.network.coflow import Coflow, Part
from simulator.network.collectives import Network
from simulator.network.flight import TICK_S
from simulator.network.fluid import Fluid
from simulator.network.folding import fold
from simulator.network.graph_file import topology_from_file
from simulator.network.templates import Templates
from simulator.network.transfers import FluidProcess
from simulator.results.links import LinkUse


class Solo:
    """Every transfer at its rate alone: the closed form's view of the network.

    A class sends what runs in the background one collective after the other, since all of it shares its cards.
    """

    def __init__(self, env: simpy.Environment, network: Network) -> None:
        self.env, self.network = env, network
        self._free: dict[tuple[int, bool], dict[int, int]] = {}

    def seconds(self, t: Transfer) -> float:
        """Seconds of a transfer: its calls one after the other at the solo rate."""
        rate = self.network.rate(t.kind, t.size, t.stride, t.between)
        return float(t.calls * rate.seconds(t.bytes / t.calls)) if t.calls else 0.0

    def transfer(self, t: Transfer, stage: int, group: int) -> simpy.Event:
        """Start it now; the event fires at its end."""
        # All-to-alls that nothing hides do not wait for what runs in the background.
        lanes = self._free.setdefault((stage, t.name == "all-to-all" and not t.overlapped), {})
        # Group -1 is all groups together: they share the lane that it holds.
        before = max(lanes.values(), default=0) if group == -1 else max(lanes.get(group, 0), lanes.get(-1, 0))
        now = int(self.env.now)
        begin = max(now, before)
        end = lanes[group] = begin + round(self.seconds(t) / TICK_S)
        return self.env.timeout(end - now, value=(begin, end))

    def links(self, step_s: float) -> tuple[LinkUse, ...]:
        """No links are looked at here."""
        del step_s
        return ()

    def span(self, event: simpy.Event) -> tuple[float, float]:
        """When a transfer began to move and ended, seconds."""
        begin, end = event.value  # type: ignore[misc]
        return float(begin * TICK_S), float(end * TICK_S)


class Shared:
    """Transfers as coflows that share the links of the real topology, bandwidth-fair per flow.

    The groups of a stage that make the same transfer are one coflow. Links that all coflows load alike are folded into
    one, unless links are slowed by name (`slow_links`: whole words of a link's name, factor on its bandwidth).
    """

    def __init__(self, env: simpy.Environment, setup: Setup, layout: Layout, slow_links: dict[str, float]) -> None:
        self.setup, self.layout = setup, layout
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
        if slow_links:
            self.kept = np.arange(topology.links)
        else:
            unit, bandwidth, self.kept = fold(unit, bandwidth)
        self._units = dict(zip(asked, unit, strict=True))
        self._ready: dict[tuple[Transfer, int, int], Coflow] = {}
        self.fluid = Fluid(bandwidth)
        self.process = FluidProcess(env, self.fluid)

    def _all(self) -> Iterator[tuple[int, int, Transfer]]:
        """Every transfer that can happen: (stage, group or -1 for all, transfer)."""
        for p, work in enumerate(self.setup.devices):
            own = [t for c in work.chunks for one in (c.forward, c.input, c.weight) for t in one.transfers]
            for g in range(self.setup.groups):
                yield from ((p, g, t) for t in own)
            group = -1 if self.setup.groups > 1 else 0
            yield from ((p, group, t) for t in (*work.reductions, *work.gathers))

    def _question(self, t: Transfer, stage: int, group: int) -> tuple[str, int, int, float, int, int]:
        return t.kind, t.size, t.stride, t.between, stage, group

    def _unit(self, kind: str, size: int, stride: int, between: float, stage: int, group: int) -> Coflow:
        """The coflow of one byte a rank, of the groups of a stage: all of them, or an expert group's own."""
        if size <= 1:
            return Coflow("nothing", kind, ())
        members = self.templates.members(size, stride)
        mine = [i for i, first in enumerate(members[:, 0].tolist()) if self.layout.stage_of(first) == stage]
        share = 1.0
        if group >= 0 and self.setup.groups > 1:
            if kind == "all_to_all" and len(mine) == self.setup.groups:
                mine = mine[group : group + 1]
            else:
                # Groups of the engine that are not this collective's groups each start an equal share of all of it.
                share = 1 / self.setup.groups
        transport = self.layout.transport if kind == "all_to_all" else "collective"
        unit = self.templates.shape(kind, size, stride, tuple(mine), transport, between)
        return unit if share == 1.0 else replace(unit, parts=_scaled(unit.parts, share))

    def transfer(self, t: Transfer, stage: int, group: int) -> simpy.Event:
        """Start it now; the event fires at its end."""
        key = (t, stage, group)
        coflow = self._ready.get(key)
        if coflow is None:
            unit, wait = self._units[self._question(t, stage, group)], 0.0
            parts: tuple[Part, ...] = ()
            if t.bytes > 0 and unit.parts:
                wait, factor = self.templates.start(t.kind, t.size, t.stride, t.between, t.bytes / t.calls)
                parts = _scaled(unit.parts, t.bytes * factor)
            coflow = self._ready[key] = replace(unit, name=t.name, parts=parts, latency_s=wait * t.calls)
        return self.process.transfer(coflow)

    def span(self, event: simpy.Event) -> tuple[float, float]:
        """When a transfer began to move and ended, seconds."""
        flight: Any = event.value
        return flight.started * TICK_S, flight.ended * TICK_S

    def links(self, step_s: float, most: int = 20) -> tuple[LinkUse, ...]:
        """The links that carried most for their bandwidth, one of each folded class."""
        carried = self.fluid.link_bytes()
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


def _scaled(parts: tuple[Part, ...], factor: float) -> tuple[Part, ...]:
    return tuple(replace(p, bytes=p.bytes * factor, largest_flow_bytes=p.largest_flow_bytes * factor) for p in parts)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where stages sit on a cluster, which library carries the all-to-alls, and the file of a fabric of one's own."""

    cluster: Cluster
    stages: int
    stage_stride: int
    transport: Literal["collective", "deepep", "hybridep"]
    graph: Path | None = None

    def stage_of(self, device: int) -> int:
        """Pipeline rank of a device."""
        return device // self.stage_stride % self.stages
