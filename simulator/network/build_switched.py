"""The graph of GPU nodes and racks (and of a CPU host): a fast domain each, joined by a rail-optimised fat tree."""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster, Level
from simulator.network.fabrics import Fabric, fabric_of
from simulator.network.layouts import NO_LINKS, SwitchedLayout
from simulator.network.next_hops import shares
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]

SWITCH_NAMES = {"nvswitch": "NVSwitch", "pcie": "host bridge", "host_memory": "host memory"}

UP_NAMES = ("NVLink", "xGMI", "PCIe", "host memory")

# NVLinks between the V100s of a DGX-1V, as `nvidia-smi topo -m` prints them (general knowledge; facts: topologies, 2,
# has only the six links a GPU).
CUBE_MESH = (
    (0, 1, 1, 2, 2, 0, 0, 0),
    (1, 0, 2, 1, 0, 2, 0, 0),
    (1, 2, 0, 2, 0, 0, 1, 0),
    (2, 1, 2, 0, 0, 0, 0, 1),
    (2, 0, 0, 0, 0, 1, 1, 2),
    (0, 2, 0, 0, 1, 0, 2, 1),
    (0, 0, 1, 0, 1, 2, 0, 2),
    (0, 0, 0, 1, 2, 1, 2, 0),
)


class _Links:
    """Links as they are added; `add` returns their indices."""

    def __init__(self) -> None:
        self.columns: list[tuple[Index, Index, Array, Array, Index]] = []
        self.count = 0

    def add(self, source: Index, target: Index, rate: Array | float, latency_s: float, level: int) -> Index:
        source, target = np.broadcast_arrays(source, target)
        shape, n = source.shape, source.size
        rates = np.broadcast_to(np.asarray(rate, dtype=np.float64), shape).ravel()
        self.columns.append((source.ravel(), target.ravel(), rates, np.full(n, latency_s), np.full(n, level)))
        self.count += n
        return np.arange(self.count - n, self.count).reshape(shape)

    def arrays(self) -> tuple[Index, Index, Array, Array, Index]:
        source, target, rate, latency, level = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        return source.astype(np.int64), target.astype(np.int64), rate, latency, level.astype(np.int64)


def switched_topology(cluster: Cluster, fabric: Fabric | None = None) -> Topology:
    """Domains of `cluster` with links of the levels NVLink (xGMI, PCIe, ...), leaf, spine and core.

    The network card of a device has the rate of the data sheet; oversubscription thins the links above the leaves.
    A path up and down has the latency of one step. `fabric` replaces the family's own counts.
    """
    devices = cluster.devices
    up, out = switched_levels(cluster)
    domain = up.devices if up else 1
    domains = devices // domain
    names = [*([up.name] if up else [])]
    kinds: list[tuple[str, int]] = [("device", devices)]
    links = _Links()
    up_out = up_in = mesh = NO_LINKS
    share = np.empty((0, 0))
    kind = cluster.chip.scale_up.kind
    if up is not None and kind in SWITCH_NAMES:
        switch = devices + np.arange(devices) // domain
        up_out = links.add(np.arange(devices), switch, up.bytes_per_s, up.latency_s / 2, 0)
        up_in = links.add(switch, np.arange(devices), up.bytes_per_s, up.latency_s / 2, 0)
        kinds.append((SWITCH_NAMES[kind], domains))
    elif up is not None:
        counts = np.array(CUBE_MESH if kind == "cube_mesh" else np.ones((8, 8)) - np.eye(8), dtype=np.float64)
        if kind == "full_mesh" and domain != 8:
            counts = np.ones((domain, domain)) - np.eye(domain)
        a, b = np.nonzero(counts[:domain, :domain])
        base = (np.arange(domains) * domain)[:, None]
        rates = counts[a, b] * up.bytes_per_s / cluster.chip.scale_up.links_per_chip
        mesh = links.add(base + a, base + b, np.broadcast_to(rates, (domains, a.size)), up.latency_s, 0)
        # In a full mesh every pair has its link; in a cube mesh some go by way of another device.
        whole = a.size == domain * (domain - 1)
        share = np.eye(domain * domain)[:, a * domain + b] if whole else shares(a, b, domain)
    tree = _Tree(cluster, out, domain, fabric or fabric_of(cluster.chip.name)) if out is not None else None
    if tree is not None:
        tree.build(links, kinds, names)
    source, target, rate, latency, level = links.arrays()
    return Topology(
        name=cluster.name,
        devices=devices,
        kinds=tuple(kinds),
        source=source,
        target=target,
        bandwidth_bytes_per_s=rate,
        latency_s=latency,
        level=level,
        level_names=tuple(names),
        layout=SwitchedLayout(
            domain=domain,
            domains=domains,
            up_name=up.name if up else "",
            out_name=out.name if out else "",
            unit_name=_unit_name(cluster, domain),
            rails=tree.rails if tree else 1,
            up_out=up_out,
            up_in=up_in,
            mesh=mesh,
            mesh_share=share,
            **(tree.links if tree else _NO_TREE),
        ),
        note=f"Fat tree: {tree.fabric.source}" if tree else "",
    )


def switched_levels(cluster: Cluster) -> tuple[Level | None, Level | None]:
    """The level inside a domain and the one between domains; None for one that the cluster does not have."""
    first, last = cluster.levels[0], cluster.levels[-1]
    up = first if first.name in UP_NAMES else None
    return up, (last if last is not up else None)


def _unit_name(cluster: Cluster, domain: int) -> str:
    """What a domain is called in the names of its links."""
    if cluster.chip.kind == "cpu":
        return "host"
    return "rack" if domain > cluster.chip.chips_per_host * cluster.chip.devices_per_chip else "node"


_NO_TREE = dict.fromkeys(("nic_out", "nic_in", "leaf", "pod", "leaf_up", "leaf_down", "core_up", "core_down"), NO_LINKS)


class _Tree:
    """Leaves, spines and cores over the network cards of all devices."""

    def __init__(self, cluster: Cluster, level: Level, domain: int, fabric: Fabric) -> None:
        chip = cluster.chip
        assert chip.scale_out is not None
        self.fabric, self.level, self.devices = fabric, level, cluster.devices
        self.nic = chip.scale_out.nic_gb_per_s.value * 1e9 / chip.devices_per_chip
        self.thin = level.oversubscription
        # A CPU host has one card for all its devices.
        self.rails = 1 if chip.kind == "cpu" else gcd(domain, chip.chips_per_host * chip.devices_per_chip)
        device = np.arange(self.devices)
        unit = device // (domain * fabric.unit_domains)
        self.leaf = unit * self.rails + device % self.rails
        units = int(unit[-1]) + 1
        three = self.devices > fabric.two_tier_cards
        self.pod = np.arange(units * self.rails) // (self.rails * fabric.pod_units if three else units * self.rails)
        self.leaves, self.pods = self.pod.size, int(self.pod[-1]) + 1
        pod_cards = min(self.devices, domain * fabric.unit_domains * fabric.pod_units)
        self.spines = fabric.spines(self.devices, pod_cards) if self.leaves > 1 else 0
        self.cores = fabric.cores_per_spine(self.devices, self.spines) if self.pods > 1 else 0
        self.links: dict[str, Index] = dict(_NO_TREE)

    def build(self, links: _Links, kinds: list[tuple[str, int]], names: list[str]) -> None:
        """Add nodes and links; the cards below a leaf, over the oversubscription, are what leads up from it."""
        device, leaf = np.arange(self.devices), np.arange(self.leaves)
        first = sum(count for _, count in kinds)
        level, half = len(names), self.level.latency_s / 2
        kinds.append(("leaf", self.leaves))
        names.append("leaf")
        out = self.links
        out["leaf"], out["pod"] = self.leaf, self.pod
        out["nic_out"] = links.add(device, first + self.leaf, self.nic, half, level)
        out["nic_in"] = links.add(first + self.leaf, device, self.nic, half, level)
        if not self.spines:
            return
        up = np.bincount(self.leaf, minlength=self.leaves) * self.nic / self.thin
        spine = first + self.leaves + self.pod[:, None] * self.spines + np.arange(self.spines)
        kinds.append(("spine", self.pods * self.spines))
        names.append("spine")
        rate = np.broadcast_to((up / self.spines)[:, None], spine.shape)
        out["leaf_up"] = links.add((first + leaf)[:, None], spine, rate, 0.0, level + 1)
        out["leaf_down"] = links.add(spine, (first + leaf)[:, None], rate, 0.0, level + 1)
        if not self.cores:
            return
        spine_node = first + self.leaves + np.arange(self.pods * self.spines).reshape(self.pods, self.spines, 1)
        core = spine_node[-1, -1, 0] + 1 + np.arange(self.spines * self.cores).reshape(1, self.spines, self.cores)
        kinds.append(("core", self.spines * self.cores))
        names.append("core")
        above = np.bincount(self.pod, up) / (self.spines * self.cores)
        rate = np.broadcast_to(above[:, None, None], (self.pods, self.spines, self.cores))
        out["core_up"] = links.add(spine_node, core, rate, 0.0, level + 2)
        out["core_down"] = links.add(core, spine_node, rate, 0.0, level + 2)
