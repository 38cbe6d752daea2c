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

from dataclasses import dataclass, replace

from hw_profiles.cluster import Cluster, Level, Torus
from simulator.network.groups import Extent, TorusGroup, level_members, torus_group
from simulator.network.oversubscription import thinning
from simulator.numbers import Number, minimum, where

PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


# NCCL takes the switch's reduction from 5 GPUs on H200 and 6 on B200 (its tuner; facts: topologies, 2); 6 for all.
NVLS_FROM = 6
# A chip of a torus passes a message on in about so many seconds (jax-ml.github.io/scaling-book, its pages on TPUs).
HOP_S = 1e-6


@dataclass(frozen=True, slots=True)
class Rate:
    """A collective as a line for large messages: latency_s + bytes x seconds_per_byte; `level` names the slowest part.

    Smaller messages may take another protocol of the library: `smaller` holds lines (latency, seconds per byte), and a
    message takes the fastest, so that time is concave in bytes and the line is never too low.
    """

    latency_s: Number
    seconds_per_byte: Number
    level: str
    smaller: tuple[tuple[Number, Number], ...] = ()

    def seconds(self, bytes_: Number) -> Number:
        """Seconds for `bytes_`, a number or an array; nothing to send takes no time."""
        out = self.latency_s + bytes_ * self.seconds_per_byte
        for latency_s, per_byte in self.smaller:
            out = minimum(out, latency_s + bytes_ * per_byte)
        return where(bytes_ > 0, out, 0.0)


NOTHING = Rate(0.0, 0.0, "none")


class Network:
    """The collectives of one cluster; remembers the line of each kind and group, which bytes do not change."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._rates: dict[tuple[str, int, int, float], Rate] = {}

    def rate(self, kind: str, size: Number, stride: Number, between: Number = 1.0) -> Rate:
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


def merged_starts(cluster: Cluster, arrays: Number) -> Number:
    """Starts that an all-reduce merged of `arrays` arrays counts, where a library goes through them one by one."""
    fit = cluster.levels[-1].all_reduce if cluster.levels else None
    return 1 + (arrays - 1) * (1.0 if fit is None else fit.array)


def transport_rate(cluster: Cluster, name: str, part: str, size: int, sms: float | None = None) -> Rate | None:
    """The line of DeepEP or HybridEP for `size` neighbours of one domain; None where the profile does not know it.

    `part` is dispatch or combine. Bytes are the tokens' copies, one for each rank that holds an expert of the token,
    its own rank included: all pass through the `sms` (default: the library's own), those of others through the port.
    """
    known = {str(key): fit for key, fit in cluster.chip.scale_up.transports.items()}.get(name)
    if known is None or cluster.torus is not None or size > cluster.levels[0].devices:
        return None
    if size <= 1:
        return NOTHING
    level = cluster.levels[0]
    per_sm = known.dispatch_sm_gb_per_s if part == "dispatch" else known.combine_sm_gb_per_s
    by_cores = 1 / (per_sm.value * 1e9 * (known.sms.value if sms is None else sms))
    by_port = (size - 1) / size / (level.bytes_per_s * known.efficiency.value)
    return Rate(known.start_us.value * 1e-6, max(by_cores, by_port), level.name)


def _switched(cluster: Cluster, kind: str, size: int, stride: int, between: float) -> Rate:
    members = level_members(cluster, size, stride)
    latency, best, inner = 0.0, (0.0, "none"), 1
    lines: list[tuple[float, float]] = []
    for i, (level, m) in enumerate(zip(cluster.levels, members, strict=True)):
        if m == inner and m != size:
            continue
        if kind == "permute":
            # Neighbours in a ring: within a domain of m members one hop in m crosses the border, and sets the pace.
            per_byte = 1 / (level.bytes_per_s * level.ring_efficiency) if m > inner else 0.0
            lines = [(level.latency_s - latency, per_byte)] if level.latency_s > latency else [(0.0, per_byte)]
        elif kind == "all_to_all":
            # A transport that sends a token once to a node hands its copies on inside: the fast links carry them all.
            base = m if between < 1 and m < size else size
            lines = _exchange(level, size, (m - inner) / base * (between if i else 1.0), alone=m == size and inner == 1)
        else:
            lines = _ring(level, kind, size, inner, m)
        if i or len(cluster.levels) == 1:
            thin = thinning(cluster, level, kind, size, stride, inner)
            lines = [(start, per_byte * thin) for start, per_byte in lines]
        if lines[-1][1] > best[0]:
            best = (lines[-1][1], level.name)
        if m == size:
            break
        # Bytes go on over the slower level meanwhile: what starts a small message is all that is seen of this one.
        latency += lines[0][0]
        inner = m
    smaller = tuple((latency + start, max(per_byte, best[0])) for start, per_byte in lines[:-1])
    return Rate(latency + lines[-1][0], *best, smaller)


def _exchange(level: Level, size: int, out: float, alone: bool) -> list[tuple[float, float]]:
    """Lines of an all-to-all that sends the share `out` of its bytes over `level`."""
    rate = level.bytes_per_s * level.all_to_all_efficiency
    fit = level.all_to_all
    if fit is None:
        return [(level.latency_s, out / rate)]
    work = out * fit.passes + (fit.own / size if alone else 0.0)
    return [(start + step * (size - 1), work / (rate * share)) for start, step, share in fit.lines]


def _ring(level: Level, kind: str, size: int, inner: int, m: int) -> list[tuple[float, float]]:
    """Lines of a collective that goes round a ring through all members of `level`; where the switch adds, not round."""
    steps, alone = m // inner, inner == 1 and m == size
    if kind == "all_reduce" and level.in_switch_efficiency and alone and m >= NVLS_FROM:
        rate = level.bytes_per_s * level.in_switch_efficiency
        if level.in_switch is None:
            return [(2 * level.latency_s, 1 / rate)]
        return [(start + step * (size - 1), 1 / (rate * share)) for start, step, share in level.in_switch.lines]
    passes = PASSES[kind]
    rate = level.bytes_per_s * level.ring_efficiency * inner
    wire = passes * (size - 1) / size
    # Small all-reduces take a tree: twice the depth instead of twice the ring. Inside a domain it is a chain up to 8.
    tree = 2 * (steps - 1).bit_length()
    fit = {"all_reduce": level.all_reduce, "reduce_scatter": level.reduce_scatter or level.ring}.get(kind, level.ring)
    if fit is None:
        hops = min(passes * (steps - 1), tree) if kind == "all_reduce" else steps - 1
        return [(level.latency_s * hops, wire / rate)]
    if inner == 1:
        hops = min(steps - 1, tree + 1) if kind == "all_reduce" else steps - 1
    else:
        hops = min(passes * (steps - 1), tree) if kind == "all_reduce" else steps - 1
    work = wire * fit.passes + (fit.own / size if alone else 0.0)
    return [(start + step * hops, work / (rate * share)) for start, step, share in fit.lines]


def _torus(cluster: Cluster, torus: Torus, kind: str, size: int, stride: int) -> Rate:
    per_chip = cluster.chip.devices_per_chip
    group = torus_group(torus, per_chip, cluster.devices_per_slice, size, stride)
    if group.slices > 1 and cluster.slices == 1:
        # A group that no box of whole axes holds: its last members are taken as a line of their own, the slowest shape.
        group = replace(group, extents=(*group.extents, Extent(group.slices, 1, False)), slices=1)
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
        return Rate(latency + HOP_S * hops, chip_bytes * worst / (w * torus.all_to_all_efficiency), "ICI")
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
