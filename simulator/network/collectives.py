"""Time of one collective alone on the network: alpha-beta per link level, with the algorithm that fits the topology.

`bytes_` is nccl-tests' size S: all_reduce the buffer, all_gather the gathered output, reduce_scatter the full input,
all_to_all the full send buffer of a rank, permute what a rank sends. n is the group's size.

- Switched networks (NVSwitch, fat tree): rings fill all levels at once, so the time is the slowest level's. Every rank
  sends S(n-1)/n per pass within a domain; at a domain's border the same bytes leave over the network cards of the
  members in it. All-to-all sends S(m-1)/n inside a domain of m members and S(n-m)/n out of it.
- Torus: a ring collective uses every axis it spans, both ways round where the axis is a ring: bytes over the sum of the
  axes' bandwidths. All-to-all is bound by the bisection of its longest axis: S e/(8 w) on a ring of e, S e/(4 w) on a
  line (Dally & Towles 2004, chapter 3; GShard section 5 for the growth).
- All-reduce is a reduce-scatter and an all-gather, or one pass of S up and down where the switch adds (NVLS, SHARP).
"""

from __future__ import annotations

from dataclasses import dataclass

from hw_profiles.cluster import Cluster, Torus
from simulator.network.groups import TorusGroup, level_members, torus_group

PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


# NCCL takes the switch's reduction from 5 GPUs on H200 and 6 on B200 (its tuner; facts: topologies, 2); 6 for all.
NVLS_FROM = 6


@dataclass(frozen=True, slots=True)
class Rate:
    """A collective as a line: seconds = latency_s + bytes x seconds_per_byte; `level` names the slowest part."""

    latency_s: float
    seconds_per_byte: float
    level: str

    def seconds(self, bytes_: float) -> float:
        """Seconds for `bytes_`; nothing to send takes no time."""
        return self.latency_s + bytes_ * self.seconds_per_byte if bytes_ > 0 else 0.0


NOTHING = Rate(0.0, 0.0, "none")


class Network:
    """The collectives of one cluster; remembers the line of each kind and group, which bytes do not change."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._rates: dict[tuple[str, int, int, float], Rate] = {}

    def rate(self, kind: str, size: int, stride: int, between: float = 1.0) -> Rate:
        """The line of `kind` for a group of `size` members `stride` apart (see `collective_rate`)."""
        key = (kind, size, stride, between)
        found = self._rates.get(key)
        if found is None:
            found = self._rates[key] = collective_rate(self.cluster, kind, size, stride, between)
        return found


def collective_rate(cluster: Cluster, kind: str, size: int, stride: int, between: float = 1.0) -> Rate:
    """The line of `kind` for a group of `size` members `stride` apart, all groups of the axis running at once.

    `between` scales the bytes that leave the fastest domain (transports that send a token once per node).
    """
    if size <= 1:
        return NOTHING
    if cluster.torus is not None:
        return _torus(cluster, cluster.torus, kind, size, stride)
    return _switched(cluster, kind, size, stride, between)


def _switched(cluster: Cluster, kind: str, size: int, stride: int, between: float) -> Rate:
    members = level_members(cluster, size, stride)
    latency, best, inner = 0.0, (0.0, "none"), 1
    for i, (level, m) in enumerate(zip(cluster.levels, members, strict=True)):
        if m == inner and m != size:
            continue
        steps = m // inner
        if kind == "all_to_all":
            out = (m - inner) / size
            per_byte = out * (between if i else 1.0) / (level.bytes_per_s * level.all_to_all_efficiency)
            latency += level.latency_s
        elif kind == "permute":
            # Neighbours in a ring: within a domain of m members one hop in m crosses the border, and sets the pace.
            per_byte = 1 / (level.bytes_per_s * level.ring_efficiency) if m > inner else 0.0
            latency = max(latency, level.latency_s)
        elif kind == "all_reduce" and level.in_switch_efficiency and inner == 1 and m == size and m >= NVLS_FROM:
            per_byte = 1 / (level.bytes_per_s * level.in_switch_efficiency)
            latency += 2 * level.latency_s
        else:
            passes = PASSES[kind]
            per_byte = passes * (size - 1) / size / (level.bytes_per_s * level.ring_efficiency * inner)
            # Small all-reduces take a tree: twice the depth instead of twice the ring.
            tree = 2 * (steps - 1).bit_length()
            latency += level.latency_s * (min(passes * (steps - 1), tree) if kind == "all_reduce" else steps - 1)
        if per_byte > best[0]:
            best = (per_byte, level.name)
        inner = m
        if m == size:
            break
    return Rate(latency, *best)


def _torus(cluster: Cluster, torus: Torus, kind: str, size: int, stride: int) -> Rate:
    per_chip = cluster.chip.devices_per_chip
    group = torus_group(torus, per_chip, cluster.devices_per_slice, size, stride)
    inside = _inside_slice(torus, group, kind, size)
    if group.slices == 1:
        return inside
    return _with_slices(cluster, group, kind, size, inside)


def _inside_slice(torus: Torus, group: TorusGroup, kind: str, size: int) -> Rate:
    """Within a slice. Groups that interleave on a chip or an axis share its links."""
    if not group.extents:
        # Cores of one chip exchange through its memory; counted with the ops' own traffic.
        return NOTHING
    w, latency = torus.link_bytes_per_s, torus.latency_s
    share = group.sharing_chip
    if kind == "all_to_all":
        chip_bytes = group.on_chip * share
        worst = 0.0
        for e in group.extents:
            per_link = (
                e.members / 8
                if e.ring and e.members % 2 == 0
                else (e.members**2 - 1) / (8 * e.members)
                if e.ring
                else e.members / 4
            )
            if not e.ring and e.members % 2:
                per_link = (e.members**2 - 1) / (4 * e.members)
            worst = max(worst, per_link * e.interleaved)
        hops = sum(e.members // (4 if e.ring else 3) or 1 for e in group.extents)
        return Rate(latency + 1e-6 * hops, chip_bytes * worst / (w * torus.all_to_all_efficiency), "ICI")
    if kind == "permute":
        widest = max(e.interleaved for e in group.extents)
        return Rate(latency, share * widest / (w * torus.ring_efficiency), "ICI")
    bandwidth = sum(w * (2 if e.ring else 1) / e.interleaved for e in group.extents) / share
    chips = group.chips
    steps = sum((e.members - 1) / (2 if e.ring else 1) for e in group.extents)
    passes = PASSES[kind]
    return Rate(
        passes * latency * max(1.0, steps), passes * (chips - 1) / chips / (bandwidth * torus.ring_efficiency), "ICI"
    )


def _with_slices(cluster: Cluster, group: TorusGroup, kind: str, size: int, inside: Rate) -> Rate:
    """Over several slices: first within each, then each device's share across the data-centre network."""
    level = cluster.levels[-1]
    per_slice = size // group.slices
    between = group.slices
    if kind == "all_to_all":
        across = (size - per_slice) / size / (level.bytes_per_s * level.all_to_all_efficiency)
        part = inside.seconds_per_byte * per_slice / size
        return Rate(inside.latency_s + level.latency_s, max(across, part), level.name if across > part else "ICI")
    if kind == "permute":
        return Rate(level.latency_s, 1 / (level.bytes_per_s * level.ring_efficiency), level.name)
    across = PASSES[kind] * (between - 1) / between / per_slice / (level.bytes_per_s * level.ring_efficiency)
    latency = inside.latency_s + PASSES[kind] * (between - 1) * level.latency_s
    slower = level.name if across > inside.seconds_per_byte else "ICI"
    return Rate(latency, inside.seconds_per_byte + across, slower)
