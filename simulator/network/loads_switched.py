"""Loads on domains (nodes, racks) and the fat tree between them: ports, and equal-cost spreading above the leaves.

Legend: D devices, Z flows, M devices of a domain, H hosts that hold members of a group, R rails. What a device sends
and receives at each level is all that links need: spines share what leaves a leaf evenly, cores what leaves a pod. For
products (bytes of a source times share of a destination) these are sums over node, rail, leaf and pod; no pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Part
from simulator.network.joins import compact, largest_product, make_part, pairs_within, sums
from simulator.network.layouts import SwitchedLayout
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]

TIERS = ("leaf", "spine", "core")


@dataclass(slots=True)
class Ports:
    """What flows of one level put on the ports of devices (D each) and between pairs (domains x links of one).

    `up` are ports inside the domain (NVLink), `nic` the network cards; first row bytes, second row flows. Several
    patterns of loads among the same devices are a further axis in the middle (B), and `largest` has one for each.
    """

    level: str
    up_out: Array
    up_in: Array
    nic_out: Array
    nic_in: Array
    mesh: list[Array] = field(default_factory=list)
    largest: float | Array = 0.0

    def part(
        self,
        links: int,
        layout: SwitchedLayout,
        up_scale: float = 1.0,
        nic_scale: float = 1.0,
        merged: float = 1.0,
    ) -> Part:
        """The part with bytes of ports inside the domain and of network cards scaled; `merged` flows are one there."""
        bytes_, flows, scale = self.dense(links, layout, up_scale, nic_scale, merged)
        return make_part(self.level, bytes_, flows, float(scale * self.largest))

    def dense(
        self, links: int, layout: SwitchedLayout, up_scale: float, nic_scale: float, merged: float
    ) -> tuple[Array, Array, float]:
        """Bytes and flows on every link, and the factor on the largest flow."""
        dense = []
        for i in range(2):
            up, nic = (up_scale, nic_scale) if i == 0 else (1.0, 1 / merged)
            out = np.zeros((*self.up_out.shape[1:-1], links))
            if layout.up_out.size:
                out[..., layout.up_out], out[..., layout.up_in] = up * self.up_out[i], up * self.up_in[i]
            if self.mesh:
                out[..., layout.mesh] = up * self.mesh[i]
            if layout.nic_out.size:
                out[..., layout.nic_out], out[..., layout.nic_in] = nic * self.nic_out[i], nic * self.nic_in[i]
            if self.level in ("spine", "core"):
                _above(layout, self.level, nic * self.nic_out[i], out, layout.leaf_up, layout.core_up)
                _above(layout, self.level, nic * self.nic_in[i], out, layout.leaf_down, layout.core_down)
            dense.append(out)
        # Differences of sums leave crumbs where nothing is sent.
        scale = up_scale if self.level == layout.up_name else nic_scale * merged
        return np.where(dense[1] > 1e-9, dense[0], 0.0), dense[1], scale


def _above(layout: SwitchedLayout, level: str, ports: Array, out: Array, leaf_links: Index, core_links: Index) -> None:
    """Spread what the cards of each leaf send (or get) over its spines, and of each pod over its cores."""
    by_leaf = sums(layout.leaf, ports, layout.pod.size)
    out[..., leaf_links] = (by_leaf / leaf_links.shape[1])[..., None]
    if level == "core":
        pods, spines, cores = core_links.shape
        out[..., core_links] = (sums(layout.pod, by_leaf, pods) / (spines * cores))[..., None, None]


def empty_ports(layout: SwitchedLayout, level: str, several: tuple[int, ...] = ()) -> Ports:
    """Ports that nothing crosses; `several` patterns at once."""
    shape = (2, *several, layout.devices)
    return Ports(level, np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape))


def of_flows(
    t: Topology, layout: SwitchedLayout, source: Index, target: Index, amount: Array, rail: str
) -> tuple[Part, ...]:
    """Parts of flows (Z) between different devices."""
    return tuple(p.part(t.links, layout) for p in flow_ports(layout, source, target, amount, rail))


def flow_ports(layout: SwitchedLayout, source: Index, target: Index, amount: Array, rail: str) -> list[Ports]:
    """Ports of flows (Z), level by level."""
    m, rails, n = layout.domain, layout.rails, layout.devices
    inside = source // m == target // m
    # Links between pairs have no port to forward through: what changes the rail there goes through the spines.
    rail = rail if layout.up_out.size else "direct"
    if rail == "pxn":
        first, last = source // rails * rails + target % rails, target
    elif rail == "forward":
        first, last = source, target // rails * rails + source % rails
    else:
        first, last = source, target
    tier = np.zeros(source.size, dtype=np.int64)
    if layout.leaf.size:
        leaf_a, leaf_b = layout.leaf[first], layout.leaf[last]
        tier += leaf_a != leaf_b
        tier += layout.pod[leaf_a] != layout.pod[leaf_b]
    found = []
    for level, mask in ((layout.up_name, inside), *((name, ~inside & (tier == i)) for i, name in enumerate(TIERS))):
        if not mask.any():
            continue
        ports = empty_ports(layout, level)
        ports.largest = float(amount[mask].max())
        s, d, a, b = source[mask], target[mask], first[mask], last[mask]
        for i, weight in enumerate((amount[mask], np.ones(int(mask.sum())))):
            if level == layout.up_name and not layout.crossbar:
                pair = (s // m * m + s % m) * m + d % m
                matrix = sums(pair, weight, n * m).reshape(-1, m * m)
                ports.mesh.append(matrix @ layout.mesh_share)
            elif level == layout.up_name:
                ports.up_out[i], ports.up_in[i] = _ends(s, d, weight, n)
            else:
                ports.nic_out[i], ports.nic_in[i] = _ends(a, b, weight, n)
                for x, y in ((s, a), (b, d)):
                    moves = x != y
                    out, in_ = _ends(x[moves], y[moves], weight[moves], n)
                    ports.up_out[i] += out
                    ports.up_in[i] += in_
        found.append(ports)
    return found


def _ends(source: Index, target: Index, weight: Array, n: int) -> tuple[Array, Array]:
    return sums(source, weight, n), sums(target, weight, n)


def of_product(
    t: Topology, layout: SwitchedLayout, rows: Array, columns: Array, group: Index, rail: str
) -> tuple[Part, ...]:
    """Parts where i sends rows[i] * columns[j] to every other j of its group (D each)."""
    return tuple(p.part(t.links, layout) for p in product_ports(layout, rows, columns, group, rail))


def product_ports(layout: SwitchedLayout, rows: Array, columns: Array, group: Index, rail: str) -> list[Ports]:
    """Ports where i sends rows[i] * columns[j] to every other j of its group (D each), level by level.

    Rows and columns may be several (B x D), for as many patterns of loads at once.
    """
    busy = (rows > 0) | (columns > 0)
    member = np.flatnonzero((group >= 0) & busy.reshape(-1, busy.shape[-1]).any(axis=0))
    if not member.size:
        return []
    r, c = np.broadcast_arrays(rows[..., member], columns[..., member])
    everyone, _ = compact(group[member])
    node, _ = compact(everyone, member // layout.domain)
    found = []
    inner = _inside(layout, member, r, c, node)
    if np.any(inner.largest):
        found.append(inner)
    if layout.leaf.size:
        rail = rail if layout.up_out.size else "direct"
        if rail == "direct":
            found += _direct(layout, member, r, c, everyone, node)
        elif rail == "pxn":
            found += _rails(layout, member, r, c, everyone, node)
        else:
            # Forwarding at the destination is forwarding at the source, with all traffic reversed.
            for p in _rails(layout, member, c, r, everyone, node):
                p.up_out, p.up_in, p.nic_out, p.nic_in = p.up_in, p.up_out, p.nic_in, p.nic_out
                found.append(p)
    return found


def _inside(layout: SwitchedLayout, member: Index, r: Array, c: Array, node: Index) -> Ports:
    """Traffic within domains."""
    ports = empty_ports(layout, layout.up_name, r.shape[:-1])
    ports.largest = largest_product(r, c, node, member)
    if not np.any(ports.largest):
        return ports
    m = layout.domain
    weights = ((r, c), (np.sign(r), np.sign(c)))
    if layout.crossbar:
        for i, (x, y) in enumerate(weights):
            ports.up_out[i][..., member] = x * (sums(node, y)[..., node] - y)
            ports.up_in[i][..., member] = y * (sums(node, x)[..., node] - x)
        return ports
    a, b = pairs_within(node, node)
    pair = member[a] * m + member[b] % m
    for x, y in weights:
        matrix = sums(pair, x[..., a] * y[..., b], layout.devices * m).reshape(*x.shape[:-1], -1, m * m)
        ports.mesh.append(matrix @ layout.mesh_share)
    return ports


def _direct(layout: SwitchedLayout, member: Index, r: Array, c: Array, everyone: Index, node: Index) -> list[Ports]:
    """Traffic between domains, each flow from card to card."""
    leaf = layout.leaf[member]
    on_leaf, _ = compact(everyone, leaf)
    in_pod, _ = compact(everyone, layout.pod[leaf])
    beside, _ = compact(node, leaf)
    ports = [empty_ports(layout, level, r.shape[:-1]) for level in TIERS]
    for i, (x, y) in enumerate(((r, c), (np.sign(r), np.sign(c)))):
        for mine, other, side in ((x, y, "nic_out"), (y, x, "nic_in")):
            near, own, pod, whole, mates = (sums(k, other)[..., k] for k in (on_leaf, node, in_pod, everyone, beside))
            for p, reach in zip(ports, (near - mates, pod - own - (near - mates), whole - pod), strict=True):
                getattr(p, side)[i][..., member] = mine * reach
    ports[0].largest = largest_product(r, c, on_leaf, node)
    ports[1].largest = largest_product(r, c, in_pod, on_leaf)
    ports[2].largest = largest_product(r, c, everyone, in_pod)
    return _cleaned(ports)


def _rails(layout: SwitchedLayout, member: Index, r: Array, c: Array, everyone: Index, node: Index) -> list[Ports]:
    """Traffic between domains, over NVLink to the own host's device on the destination's rail, then along that rail."""
    n, rails, lead = layout.devices, layout.rails, r.shape[:-1]
    rail, host = member % rails, member // rails
    leaf = layout.leaf[member]
    unit, units = compact(everyone, leaf // rails)
    pod, pods = compact(everyone, layout.pod[leaf])
    nodes, groups = int(node.max()) + 1, int(everyone.max()) + 1
    at_host, hosts = compact(node, host)
    # One member stands for its host: node, unit, pod and group of it.
    of_host = np.zeros(hosts, dtype=np.int64)
    of_host[at_host] = np.arange(member.size)
    proxy = (host[of_host] * rails)[:, None] + np.arange(rails)
    ports = [empty_ports(layout, level, r.shape[:-1]) for level in TIERS]
    for i, (x, y) in enumerate(((r, c), (np.sign(r), np.sign(c)))):
        wanted = [
            sums(key * rails + rail, y, count * rails).reshape(*lead, count, rails)[..., key[of_host], :]
            for key, count in ((node, nodes), (unit, units), (pod, pods), (everyone, groups))
        ]
        offered = [sums(key, x)[..., key] for key in (node, unit, pod, everyone)]
        from_host = sums(at_host, x)
        own_rail = sums(at_host * rails + rail, x, hosts * rails).reshape(*lead, hosts, rails)
        for tier, p in enumerate(ports):
            # Bytes per unit of weight that host H wants to send along rail R: shape H x R.
            reach = wanted[tier + 1] - wanted[tier]
            p.nic_out[i] = sums(proxy.ravel(), (from_host[..., None] * reach).reshape(*lead, -1), n)
            p.nic_in[i][..., member] = y * (offered[tier + 1] - offered[tier])
            hop = (from_host[..., None] - own_rail) * reach
            p.up_in[i] = sums(proxy.ravel(), hop.reshape(*lead, -1), n)
            p.up_out[i][..., member] = x * (reach.sum(axis=-1)[..., at_host] - reach[..., at_host, rail])
    for tier, (outer, inner) in enumerate(((unit, node), (pod, unit), (everyone, pod))):
        ports[tier].largest = largest_product(r, c, outer, inner)
    return _cleaned(ports)


def _cleaned(ports: list[Ports]) -> list[Ports]:
    """Without levels that nothing crosses, and without the crumbs that differences of sums leave."""
    kept = []
    for p in ports:
        if np.any(p.largest):
            for values in (p.up_out, p.up_in, p.nic_out, p.nic_in):
                np.multiply(values, values[1] >= 1e-9, out=values)
            if p.nic_out[0].any():
                kept.append(p)
    return kept
