"""Parts of collectives on one network: who sends what, routed, and divided by what collectives reach of the rate.

Legend: D devices, G groups, k members of a group. Exchanges between cores of a chip are left out: they count with the
ops' own memory traffic.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.network.coflow import Part
from simulator.network.collectives import PASSES
from simulator.network.joins import make_part
from simulator.network.layouts import SwitchedLayout, TorusLayout
from simulator.network.loads import Loads, Rail, added, flow_loads, rank_one_loads
from simulator.network.loads_switched import Ports, flow_ports, product_ports
from simulator.network.responses import Response
from simulator.network.ring_patterns import (
    Flows,
    alike,
    axis_rings,
    chips_by_slice,
    has_open_axis,
    index_ring,
    joined,
    node_rings,
)
from simulator.network.sublayouts import Near, near
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]


# Surroundings of groups that are remembered.
KEPT = 1024
# Numbers of one response, beyond which routing what is asked for costs less; and of all that are remembered (130 MB).
MOST_IN_RESPONSE, KEPT_IN_RESPONSES = 1 << 17, 1 << 23

# Groups that lie in one domain add in its switch, those across a border form rings.
IN_SWITCH_WHERE_POSSIBLE = "in-switch where possible"


class PartMaker:
    """Turns traffic of groups into parts; `rail` is how a plain all-to-all changes rails in a fat tree."""

    def __init__(self, cluster: Cluster, topology: Topology) -> None:
        self.cluster, self.topology = cluster, topology
        # NCCL forwards over NVLink to the rail of the destination (PXN); elsewhere cards send to cards directly.
        self.rail: Rail = "pxn" if cluster.chip.scale_up.kind == "nvswitch" else "direct"
        self._near: OrderedDict[bytes, Near | None] = OrderedDict()
        self._responses: dict[tuple[object, ...], list[Response]] = {}
        self._kept = 0

    def efficiency(self, level: str, kind: str) -> float:
        """The share of a level's rate that collectives of `kind` reach."""
        c = self.cluster
        of = next((x for x in c.levels if x.name == level), c.levels[-1] if c.levels else None)
        if c.torus is not None and (of is None or level in ("chip", "ICI")):
            return c.torus.all_to_all_efficiency if kind == "all_to_all" else c.torus.ring_efficiency
        assert of is not None
        return of.all_to_all_efficiency if kind == "all_to_all" else of.ring_efficiency

    def _finished(self, parts: tuple[Part, ...], kind: str) -> tuple[Part, ...]:
        """Bytes over efficiency, and without the links between the cores of a chip."""
        names, out = self.topology.level_names, []
        for p in parts:
            kept = np.ones(p.links.size, dtype=np.bool_)
            if "chip" in names:
                kept = self.topology.level[p.links] != names.index("chip")
            if kept.any():
                e = self.efficiency(p.level, kind)
                bytes_ = p.bytes[kept] / self._reached(p.links[kept], p.level, e)
                out.append(Part(p.level, p.links[kept], bytes_, p.flows[kept], p.largest_flow_bytes / e))
        return tuple(out)

    def _reached(self, links: Index, level: str, at_devices: float) -> Array | float:
        """The share of their rates that links reach, `at_devices` where they end at one.

        On a drawn network links between switches reach what a ring does: an all-to-all falls short where a card meets
        several partners at once, while a trunk carries the flows of many cards, which keep it busy (docs/netlab.md).
        """
        if self.topology.layout is not None:
            return at_devices
        ends = np.minimum(self.topology.source[links], self.topology.target[links])
        return np.where(ends < self.topology.devices, at_devices, max(at_devices, self.efficiency(level, "ring")))

    def product(self, members: Index, rows: Array, columns: Array, transport: str, between: float) -> tuple[Part, ...]:
        """All-to-alls in groups (G x k) where i sends rows[i] * columns[j] bytes to j (D each)."""
        layout, devices = self.topology.layout, self.cluster.devices
        place = self.around(layout, members) if isinstance(layout, SwitchedLayout) else None
        if place is not None:
            layout, devices = place.layout, place.devices.size
            rows, columns, members = rows[place.devices], columns[place.devices], place.own(members)
        group = np.full(devices, -1)
        group[members] = np.arange(len(members))[:, None]
        if not isinstance(layout, SwitchedLayout):
            return self._finished(rank_one_loads(self.topology, rows, columns, group).parts, "all_to_all")
        ports = product_ports(layout, rows, columns, group, self._rail(transport))
        return self._of_ports(layout, ports, "all_to_all", transport, between, members, place)

    def responses(
        self, members: Index, others: NDArray[np.bool_], to_experts: bool, transport: str, between: float
    ) -> list[Response] | None:
        """What a unit of load of each member (of G x k) exchanges with `others` (k), 1/k of it with each.

        None where that is more to work out and keep than it saves: large groups, and networks without domains.
        """
        layout = self.topology.layout
        if not isinstance(layout, SwitchedLayout):
            return None
        place = self.around(layout, members)
        links = self.topology.links if place is None else place.links
        size = members.shape[1]
        if size * links > MOST_IN_RESPONSE:
            return None
        if place is not None:
            layout, members = place.layout, place.own(members)
        # Groups that lie alike in networks that are alike share theirs.
        network = () if place is None else place.shape
        key = (network, members.tobytes(), size, others.tobytes(), to_experts, transport, between)
        found = self._responses.get(key)
        if found is None:
            found = self._respond(layout, links, members, others, to_experts, transport, between)
            more = sum(r.bytes_RU.size for r in found)
            if self._kept + more > KEPT_IN_RESPONSES:
                self._responses.clear()
                self._kept = 0
            self._kept += more
            self._responses[key] = found
        return found if place is None else [replace(r, links=place.link_ids[r.links]) for r in found]

    def _respond(
        self,
        layout: SwitchedLayout,
        links: int,
        members: Index,
        others: NDArray[np.bool_],
        to_experts: bool,
        transport: str,
        between: float,
    ) -> list[Response]:
        size = members.shape[1]
        group = np.full(layout.devices, -1)
        group[members] = np.arange(len(members))[:, None]
        plain, unit = np.zeros(layout.devices), np.zeros((size, layout.devices))
        plain[members] = others / size
        unit[np.arange(size)[:, None], members.T] = 1.0
        rows, columns = (plain, unit) if to_experts else (unit, plain)
        ports = product_ports(layout, rows, columns, group, self._rail(transport))
        out = []
        for p, scales in self._scales(layout, ports, "all_to_all", transport, between, members):
            bytes_RL, flows_RL, scale = p.dense(links, layout, *scales)
            used = np.flatnonzero(bytes_RL.any(axis=0))
            out.append(Response(p.level, used, bytes_RL[:, used], flows_RL[:, used], scale * np.asarray(p.largest)))
        return out

    def _rail(self, transport: str) -> Rail:
        return self.rail if transport == "collective" else "forward"

    def on_one_switch(self, members: Index) -> bool:
        """Whether every group (G x k) is on a switch of its own, where devices share no link with each other."""
        layout = self.topology.layout
        if not isinstance(layout, SwitchedLayout) or not layout.crossbar:
            return False
        domains = members // layout.domain
        return bool((domains == domains[:, :1]).all())

    def around(self, layout: SwitchedLayout, members: Index) -> Near | None:
        """The network around groups; the last ones asked for are remembered."""
        key = members.tobytes()
        if key not in self._near:
            self._near[key] = near(layout, members)
            if len(self._near) > KEPT:
                self._near.popitem(last=False)
        self._near.move_to_end(key)
        return self._near[key]

    def flows(
        self,
        flows: Flows,
        kind: str,
        transport: str = "collective",
        between: float = 1.0,
        members: Index | None = None,
    ) -> tuple[Part, ...]:
        """Flows, with the efficiency of `kind`; `members` (G x k) where a transport merges flows to a node."""
        layout = self.topology.layout
        source, target, amount = flows
        if not isinstance(layout, SwitchedLayout):
            return self._finished(flow_loads(self.topology, source, target, amount).parts, kind)
        sends = (source != target) & (amount > 0)
        ports = flow_ports(layout, source[sends], target[sends], amount[sends], self._rail(transport))
        return self._of_ports(layout, ports, kind, transport, between, members)

    def _of_ports(
        self,
        layout: SwitchedLayout,
        ports: list[Ports],
        kind: str,
        transport: str = "collective",
        between: float = 1.0,
        members: Index | None = None,
        place: Near | None = None,
    ) -> tuple[Part, ...]:
        links = self.topology.links if place is None else place.links
        scaled = self._scales(layout, ports, kind, transport, between, members)
        out = [p.part(links, layout, *scales) for p, scales in scaled]
        if place is not None:
            out = [replace(p, links=place.link_ids[p.links]) for p in out]
        return tuple(out)

    def _scales(
        self,
        layout: SwitchedLayout,
        ports: list[Ports],
        kind: str,
        transport: str,
        between: float,
        members: Index | None,
    ) -> list[tuple[Ports, tuple[float, float, float]]]:
        """Ports of each level, with the factors on bytes inside a domain and on cards, and how many flows are one."""
        inside = 1 / self.efficiency(layout.up_name, kind)
        out = []
        for p in ports:
            if p.level == layout.up_name:
                out.append((p, (inside, 1.0, 1.0)))
                continue
            across = between / self.efficiency(layout.out_name, kind)
            if not across:
                continue
            if transport == "collective" or members is None:
                out.append((p, (across, across, 1.0)))
                continue
            # One flow to a node, instead of one to each member there.
            mates = members.shape[1] / np.unique(members[0] // layout.domain).size
            out.append((p, (inside, across, mates)))
        return out

    def two_levels(self, members: Index, between: float) -> tuple[Part, ...]:
        """First within the fast domain, to the member in the place of the destination; then between equal places."""
        layout = self.topology.layout
        if isinstance(layout, SwitchedLayout):
            domain = layout.domain
        elif isinstance(layout, TorusLayout) and layout.slices > 1:
            domain = layout.devices // layout.slices
        else:
            raise QuestionError(f"algorithm = 'hierarchical': {self.topology.name} has one level of network")
        size = members.shape[1]
        node = members // domain
        places = int((node[0] == node[0, 0]).sum())
        if size % places or (node.reshape(len(members), -1, places) != node[:, ::places, None]).any():
            raise QuestionError(f"algorithm = 'hierarchical': groups of {size} lie unevenly in domains of {domain}")
        grid = members.reshape(len(members), size // places, places)
        if places == 1 or places == size:
            row = np.zeros(self.cluster.devices)
            row[members] = 1.0 / size
            return self.product(members, row, np.sign(row), "collective", between)
        phases = self._pairwise(grid, 2, 1.0 / places, 1.0), self._pairwise(grid, 1, places / size, between)
        return tuple(p for phase in phases for p in self._together(phase))

    def _pairwise(self, grid: Index, axis: int, bytes_: float, between: float) -> tuple[Part, ...]:
        """Everybody sends `bytes_` to everybody else along one axis of the grid."""
        line = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        rows = np.zeros(self.cluster.devices)
        rows[line] = bytes_
        return self.product(line, rows, np.sign(rows), "collective", between)

    def rings(self, kind: str, algorithm: str, members: Index) -> tuple[tuple[Part, ...], bool]:
        """Ring or in-switch collective of every group (G x k), and whether its parts follow each other."""
        layout, passes, size = self.topology.layout, PASSES[kind], members.shape[1]
        if isinstance(layout, SwitchedLayout):
            if algorithm == "in-switch":
                return self._in_switch(layout, members), False
            if algorithm == IN_SWITCH_WHERE_POSSIBLE:
                inside = members[:, 0] // layout.domain == members[:, -1] // layout.domain
                added_up = self._in_switch(layout, members[inside]) if inside.any() else ()
                across = self.rings(kind, "ring", members[~inside])[0] if not inside.all() else ()
                return added(self.topology, [Loads(self.topology.links, p) for p in (added_up, across)]).parts, False
            place = self.around(layout, members) if layout.crossbar else None
            if place is not None:
                layout, members = place.layout, place.own(members)
            ports = node_rings(self.topology, layout, members, passes)
            return self._of_ports(layout, ports, kind, place=place), False
        if algorithm == "in-switch":
            raise QuestionError(f"algorithm = 'in-switch': {self.topology.name} has no switch that adds")
        if not isinstance(layout, TorusLayout) or layout.twisted:
            source, target, amount = index_ring(members, passes * (size - 1) / size)
            if self.cluster.chip.kind == "cpu":
                # gloo goes round one way only, which shows on cables that carry as much the other way.
                ahead = np.roll(members, -1, axis=1)
                source, target = members.ravel(), ahead.ravel()
                amount = np.full(members.size, passes * (size - 1) / size)
            return self.flows((source, target, amount), kind), False
        return self._torus_rings(layout, kind, members)

    def _torus_rings(self, layout: TorusLayout, kind: str, members: Index) -> tuple[tuple[Part, ...], bool]:
        """Along the axes in every slice, then between slices; groups that are no grid form one ring by index."""
        passes, classes = PASSES[kind], alike(layout, members)
        # On an open axis the two halves of an all-reduce load the links differently, one after the other.
        halves = 2 if kind == "all_reduce" and any(has_open_axis(layout, c) for c in classes) else 1
        phases: list[list[Flows]] = [[] for _ in range(halves + 1)]
        for same in classes:
            chips = chips_by_slice(layout, same)
            for half in range(halves):
                gathers = kind == "all_gather" or half == 1
                flows = axis_rings(layout, chips, passes / halves, gathers) if chips is not None else None
                if flows is None:
                    ring = same if chips is None else chips * layout.devices_per_chip
                    flows = index_ring(ring, passes / halves * (ring.shape[1] - 1) / ring.shape[1])
                phases[half].append(flows)
            slices = np.unique(same[0] // (layout.devices // layout.slices)).size
            if slices > 1 and chips is not None:
                grid = same.reshape(len(same), slices, -1)
                amount = np.full(grid.size, passes * (slices - 1) / slices / grid.shape[2])
                phases[-1].append((grid.ravel(), np.roll(grid, -1, axis=1).ravel(), amount))
        found = [parts for phase in phases if phase and (parts := self.flows(joined(phase), kind))]
        if len(found) == 1:
            return found[0], False
        return tuple(p for phase in found for p in self._together(phase)), len(found) > 1

    def _together(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """One part of all: what is chained is a phase, whose levels run side by side."""
        sums = Loads(self.topology.links, parts)
        name = max((p.level for p in parts), key=self.topology.level_names.index, default="")
        largest = max((p.largest_flow_bytes for p in parts), default=0.0)
        return (make_part(name, sums.bytes, sums.flows, largest),) if largest else ()

    def _in_switch(self, layout: SwitchedLayout, members: Index) -> tuple[Part, ...]:
        """Every member sends its buffer to the switch once, and gets the sum once."""
        share = self.cluster.levels[0].in_switch_efficiency
        nodes = members // layout.domain
        if not share or not layout.up_out.size or (nodes != nodes[:, :1]).any():
            raise QuestionError(f"algorithm = 'in-switch': groups of {members.shape[1]} have no switch that adds")
        links = np.sort(np.concatenate((layout.up_out[members.ravel()], layout.up_in[members.ravel()])))
        return (Part(layout.up_name, links, np.full(links.size, 1 / share), np.ones(links.size), 1 / share),)
