"""The network of a cluster as a directed graph: devices, switches, links with bandwidth, latency and level.

Legend of arrays: L links, N nodes (the devices first, in the order of JAX), Z pairs of devices. Everything is flat
NumPy; networkx is imported only when a graph is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.network.layouts import Layout, TorusLayout

if TYPE_CHECKING:
    import networkx

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """A network: link `i` leads from node `source[i]` to `target[i]`; nodes 0 to `devices - 1` are the JAX devices.

    `kinds` names the nodes by runs: (("device", 8), ("leaf", 2)); `names` overrides it node by node (files).
    `bandwidth_bytes_per_s` and `latency_s` are per link and direction; the latencies along a path sum to one step of a
    collective, except on the ICI, whose links have the latency of a hop. `level[i]` indexes `level_names`, lowest
    first: a flow belongs to the highest level that it crosses. `layout` holds what fast loads need, where the network
    is regular. `note` says what is assumed. Raises QuestionError, naming link or nodes, for a bandwidth that is not
    positive and finite, and where one device cannot reach another.
    """

    name: str
    devices: int
    kinds: tuple[tuple[str, int], ...]
    source: Index
    target: Index
    bandwidth_bytes_per_s: Array
    latency_s: Array
    level: Index
    level_names: tuple[str, ...]
    layout: Layout | None = None
    names: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def links(self) -> int:
        """How many directed links there are."""
        return len(self.source)

    @property
    def nodes(self) -> int:
        """How many nodes there are, devices and switches."""
        return len(self.names) or sum(count for _, count in self.kinds)

    def node_name(self, node: int) -> str:
        """`device 5`, `leaf 2`, or the coordinates of a chip: `(3,1,0)`."""
        if self.names:
            return self.names[node]
        if isinstance(self.layout, TorusLayout):
            chip = self.layout.chip_of_node(node)
            if chip >= 0:
                return self.layout.chip_name(chip)
        rest = node
        for kind, count in self.kinds:
            if rest < count:
                return f"{kind} {rest}" if count > 1 or kind == "device" else kind
            rest -= count
        raise IndexError(f"node {node}: there are {self.nodes}")

    def link_name(self, link: int) -> str:
        """What a person calls it: `ICI x+ (3,1,0)->(0,1,0)`, `NVLink out gpu 5 of node 3`, `leaf 2 -> spine 5`."""
        named = self.layout.link_name(int(self.source[link]), int(self.target[link])) if self.layout else ""
        if named:
            return named
        ends = f"{self.node_name(int(self.source[link]))} -> {self.node_name(int(self.target[link]))}"
        return ends if self.layout else f"{self.level_names[self.level[link]]}: {ends}"

    def graph(self) -> networkx.DiGraph:
        """The same as a networkx graph, with the attributes that `topology_from_file` reads."""
        import networkx

        out: Any = networkx.DiGraph(name=self.name)
        for node in range(self.nodes):
            extra = {"device": node} if node < self.devices else {}
            out.add_node(self.node_name(node) if node >= self.devices else f"device {node}", **extra)
        labels = list(out)
        for i in range(self.links):
            out.add_edge(
                labels[self.source[i]],
                labels[self.target[i]],
                bandwidth_gb_per_s=float(self.bandwidth_bytes_per_s[i]) / 1e9,
                latency_us=float(self.latency_s[i]) * 1e6,
                level=self.level_names[self.level[i]],
                label=self.link_name(i),
            )
        return out


def topology_of(cluster: Cluster, twisted: bool = False) -> Topology:
    """The network that `cluster` has, remembered per cluster.

    `twisted` joins the short axes of an A x A x 2A or A x 2A x 2A torus with a shift; the shift is not verified against
    any text of the maker. Raises QuestionError for a shape that cannot be twisted.
    """
    return _built(cluster.torus, cluster.levels, cluster.chip.name, cluster.devices, _Key(cluster), twisted)


class _Key:
    """Carries a cluster through a cache that compares only what the network depends on."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        chip = cluster.chip
        nic = chip.scale_out.nic_gb_per_s.value if chip.scale_out else 0.0
        counts = (chip.devices_per_chip, chip.chips_per_host, chip.scale_up.links_per_chip, cluster.slices)
        self.what = (cluster.name, chip.kind, chip.scale_up.kind, chip.device_memory_bytes_per_s, nic, counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.what == other.what

    def __hash__(self) -> int:
        return hash(self.what)


@lru_cache(maxsize=32)
def _built(torus: object, levels: object, chip: str, devices: int, key: _Key, twisted: bool) -> Topology:
    from simulator.network.build_switched import switched_topology
    from simulator.network.build_torus import torus_topology

    cluster = key.cluster
    if cluster.torus is not None:
        return torus_topology(cluster, twisted)
    if twisted:
        raise QuestionError(f"twisted = true: {cluster.name} has no torus")
    return switched_topology(cluster)


def _check(t: Topology) -> None:
    """QuestionError for a link that cannot carry anything, or for devices that cannot talk."""
    for what, values, positive in (("bandwidth", t.bandwidth_bytes_per_s, True), ("latency", t.latency_s, False)):
        wrong = ~np.isfinite(values) | (values < 0) | (positive & (values == 0))
        if wrong.any():
            i = int(np.argmax(wrong))
            rule = "greater than 0" if positive else "0 or more"
            raise QuestionError(f"{t.name}: {what} of {t.link_name(i)} = {values[i]:g}: must be finite and {rule}")
    if t.devices < 1:
        raise QuestionError(f"{t.name}: no devices")
    # Everybody reaches device 0, and it everybody: then every pair is joined.
    for start, end, words in ((t.source, t.target, (0, 1)), (t.target, t.source, (1, 0))):
        reached = reachable(start, end, t.nodes)
        lost = np.flatnonzero(~reached[: t.devices])
        if lost.size:
            pair = (t.node_name(0), t.node_name(int(lost[0])))
            more = f" (and {lost.size - 1} more devices)" if lost.size > 1 else ""
            raise QuestionError(f"{t.name}: no path from {pair[words[0]]} to {pair[words[1]]}{more}")


def reachable(start: Index, end: Index, nodes: int) -> NDArray[np.bool_]:
    """Which nodes (N) node 0 reaches over links from `start` to `end` (L)."""
    seen = np.zeros(nodes, dtype=np.bool_)
    seen[0] = True
    count = 1
    while True:
        seen[end[seen[start]]] = True
        now = int(np.count_nonzero(seen))
        if now == count:
            return seen
        count = now
