"""Who sends how much to whom in ring collectives: along the axes of a torus, and through nodes and their network cards.

Legend: G groups, k members of a group, c chips of a group, P bytes of all passes (one for all_gather and
reduce_scatter, two for all_reduce). In both networks the data is cut so that all links the group has are busy equally
long; by each of them it takes P (k-1)/k over their sum.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.network.joins import compact
from simulator.network.layouts import SwitchedLayout, TorusLayout
from simulator.network.loads_switched import Ports, empty_ports, flow_ports
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Flows = tuple[Index, Index, Array]


def index_ring(members: Index, bytes_: float) -> Flows:
    """Flows of one ring a group in the order of its members (G x k), half of the bytes each way round."""
    after = np.roll(members, -1, axis=1)
    source, target = np.concatenate((members, after), axis=None), np.concatenate((after, members), axis=None)
    return source, target, np.full(source.size, bytes_ / 2)


def tree_flows(members: Index, bytes_: float) -> Flows:
    """Flows of an all-reduce up and down one binary tree a group: every edge carries the whole buffer both ways."""
    child = np.arange(1, members.shape[1])
    a, b = members[:, child].ravel(), members[:, (child - 1) // 2].ravel()
    return np.concatenate((a, b)), np.concatenate((b, a)), np.full(2 * a.size, bytes_)


def joined(flows: list[Flows]) -> Flows:
    """Several lists of flows as one."""
    return tuple(np.concatenate([f[i] for f in flows]) for i in range(3))  # type: ignore[return-value]


def alike(layout: TorusLayout, members: Index) -> list[Index]:
    """The groups (G x k) in classes of equal shape: one is another, moved without passing an end of an axis."""
    chip = members // layout.devices_per_chip
    place = np.stack((chip // layout.slice_chips, *np.unravel_index(chip % layout.slice_chips, layout.dims)))
    shape = place - place[:, :, :1]
    if (shape == shape[:, :1]).all():
        return [members]
    _, number = np.unique(shape.transpose(1, 0, 2).reshape(len(members), -1), axis=0, return_inverse=True)
    return [members[number.ravel() == i] for i in range(int(number.max()) + 1)]


def chips_by_slice(layout: TorusLayout, members: Index) -> Index | None:
    """Chips of each group in each slice (G*slices x c), or None where groups lie on their chips or slices unevenly."""
    chip = members // layout.devices_per_chip
    new = np.diff(chip, axis=1, prepend=-1) != 0
    if (new != new[:1]).any():
        return None
    chip = chip[:, new[0]]
    slice_ = chip // layout.slice_chips
    starts = np.flatnonzero(np.diff(slice_[0], prepend=-1))
    sizes = np.diff(starts, append=chip.shape[1])
    if (slice_[:, :1] - slice_ != slice_[:1, :1] - slice_[:1]).any() or (sizes != sizes[0]).any():
        return None
    return chip.reshape(-1, int(sizes[0]))


def axis_rings(layout: TorusLayout, chips: Index, bytes_: float, gathers: bool) -> Flows | None:
    """Flows of bidirectional rings along every axis that the groups (G x c chips) span; None where they are no grid.

    A closed axis carries its part both ways round, an open one as a line: the k-th link from the start has k parts of
    an all-gather (`gathers`) upwards, and of a reduce-scatter downwards. Groups that interleave on an axis take their
    share of it.
    """
    coordinates = np.stack(np.unravel_index(chips % layout.slice_chips, layout.dims))
    relative = coordinates - coordinates[:, :, :1]
    if (relative != relative[:, :1]).any() or (relative < 0).any():
        return None
    values = [np.unique(axis) for axis in relative[:, 0]]
    counts = [v.size for v in values]
    steps = [int(v[1] - v[0]) if v.size > 1 else 1 for v in values]
    if np.prod(counts) != chips.shape[1] or any((np.diff(v) != s).any() for v, s in zip(values, steps, strict=True)):
        return None
    closed = [w and n == c * s for w, n, c, s in zip(layout.wrap, layout.dims, counts, steps, strict=True)]
    width = [(2 if ring else 1) / s if c > 1 else 0.0 for ring, s, c in zip(closed, steps, counts, strict=True)]
    devices = (chips * layout.devices_per_chip).reshape(-1, *counts)
    whole = bytes_ * (chips.shape[1] - 1) / chips.shape[1]
    flows: list[Flows] = []
    for axis, (count, ring) in enumerate(zip(counts, closed, strict=True)):
        if count == 1:
            continue
        share = whole * width[axis] / sum(width)
        line = np.moveaxis(devices, axis + 1, -1)
        after = np.roll(line, -1, axis=-1)
        if ring:
            amount = np.full(line.shape, share / 2)
            flows += [(line, after, amount), (after, line, amount)]
            continue
        along = np.arange(1, count) / (count - 1)
        up, down = (along, along[::-1]) if gathers else (along[::-1], along)
        ends = line[..., :-1], after[..., :-1]
        flows += [
            (*ends, np.broadcast_to(share * up, ends[0].shape)),
            (*ends[::-1], np.broadcast_to(share * down, ends[0].shape)),
        ]
    if not flows:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    source, target, amount = (np.concatenate([f[i].ravel() for f in flows]) for i in range(3))
    return source, target, amount


def has_open_axis(layout: TorusLayout, members: Index) -> bool:
    """Whether the first group (G x k) spans an axis that it does not close, so that its links differ in load."""
    chips = members[0] // layout.devices_per_chip
    coordinates = np.stack(np.unravel_index(chips % layout.slice_chips, layout.dims))
    for axis, n, wrap in zip(coordinates, layout.dims, layout.wrap, strict=True):
        values = np.unique(axis)
        if values.size > 2 and not (wrap and n == values.size * (values[1] - values[0])):
            return True
    return False


def node_rings(t: Topology, layout: SwitchedLayout, members: Index, bytes_: float) -> list[Ports]:
    """Ports of rings through the groups' nodes (members ascending, G x k); level by level.

    Inside a node every member passes all on. At its border the bytes are divided over as many rings as the node with
    the fewest members has: ring j leaves a node from member j and enters the next one at member j.
    """
    groups, size = members.shape
    amount = bytes_ * (size - 1) / size
    node = members // layout.domain
    new = np.diff(node, axis=1, prepend=-1) != 0
    ordinal = np.cumsum(new, axis=1) - 1
    nodes = ordinal[:, -1] + 1
    row = np.broadcast_to(np.arange(groups)[:, None], members.shape)
    column = np.broadcast_to(np.arange(size), members.shape)
    first = np.zeros((groups, int(nodes.max())), dtype=np.int64)
    first[row[new], ordinal[new]] = column[new]
    count = np.bincount((row * first.shape[1] + ordinal).ravel(), minlength=first.size).reshape(first.shape)
    found = []
    if (count > 1).any():
        found.append(_inside(t, layout, members, count[row, ordinal], (row * first.shape[1] + ordinal), amount))
    if nodes.max() > 1:
        rings = np.where(count > 0, count, size).min(axis=1)[:, None]
        place = column - first[row, ordinal]
        leaves = (place < rings) & (nodes > 1)[:, None]
        entry = first[row, (ordinal + 1) % nodes[:, None]] + place
        source, target = members[leaves], members[row[leaves], entry[leaves]]
        each = np.broadcast_to(amount / rings, members.shape)[leaves]
        found += flow_ports(layout, source, target, each, "direct")
    return found


def _inside(t: Topology, layout: SwitchedLayout, members: Index, mates: Index, key: Index, amount: float) -> Ports:
    """Ports of what passes on inside nodes: `mates` members of the group share the node, which is number `key`."""
    ports = empty_ports(layout, layout.up_name)
    ports.largest = amount
    busy = members[mates > 1]
    if layout.crossbar:
        for side in (ports.up_out, ports.up_in):
            side[0, busy], side[1, busy] = amount, 1.0
        return ports
    m = layout.domain
    rates = np.zeros((m, m))
    links = layout.mesh[0]
    rates[t.source[links] % m, t.target[links] % m] = t.bandwidth_bytes_per_s[links]
    shape = (layout.domains, links.size)
    load, flows = np.zeros(shape), np.zeros(shape)
    number, _ = compact(key[mates > 1])
    order = np.argsort(number, kind="stable")
    for mine in np.split(busy[order], np.flatnonzero(np.diff(number[order])) + 1):
        share = mesh_ring(rates.tobytes(), layout.mesh_share.tobytes(), m, tuple((mine % m).tolist()))
        load[mine[0] // m] += amount * share
        flows[mine[0] // m] += share > 0
        ports.largest = min(ports.largest, amount * float(share.max()))
    ports.mesh = [load, flows]
    return ports


@lru_cache(maxsize=256)
def mesh_ring(rates: bytes, routes: bytes, m: int, members: tuple[int, ...]) -> Array:
    """Share of a ring's bytes on each link of a domain of `m` whose pairs have links of `rates` (M x M).

    Where the members' own links join them, several rings together use these in proportion to their rates, as far as
    the member with the fewest allows; otherwise one ring in index order takes the `routes` between neighbours.
    """
    rate = np.frombuffer(rates).reshape(m, m)
    route = np.frombuffer(routes).reshape(m, m, -1)
    mine = np.array(members)
    joined = (rate[np.ix_(mine, mine)] > 0) | np.eye(mine.size, dtype=np.bool_)
    if np.linalg.matrix_power(joined.astype(np.float64), mine.size).all():
        inside = np.zeros((m, m), dtype=np.bool_)
        inside[np.ix_(mine, mine)] = True
        kept = np.where(inside, rate, 0.0)
        ends = np.nonzero(rate)
        share: Array = kept[ends] / kept.sum(axis=1)[mine].min()
        return share
    after = np.roll(mine, -1)
    out: Array = (route[mine, after].sum(axis=0) + route[after, mine].sum(axis=0)) / 2
    return out
