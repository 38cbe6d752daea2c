"""Loads on tori: dimension order, the shorter way round a closed axis, only equidistant pairs split in halves.

Legend: D devices, C chips of all slices, A axes, n chips along an axis, E products of the earlier axes, H of the later
ones, Z flows. While a message travels along axis a, it has its destination's earlier and its source's later
coordinates. So the traffic on the lines of axis a is a matrix (E x H lines, n x n), the pair matrix summed over the
source's earlier and the destination's later coordinates; a constant matrix turns it into loads. (W. Dally, B. Towles,
Principles and Practices of Interconnection Networks, 2004, chapter 8, for dimension order.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Part
from simulator.network.joins import compact, largest_product, make_part, pairs_within, sums
from simulator.network.layouts import TorusLayout
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Columns = Callable[[Index], tuple[Array, Array]]


@lru_cache(maxsize=256)
def routing(n: int, wrap: bool) -> Array:
    """Share of a pair's bytes on each link of a line ((n*n) x 2n): upwards from 0..n-1, then downwards from 0..n-1."""
    share_of = np.zeros((n, n, 2, n))
    closed = wrap and n > 2
    for a in range(n):
        for b in range(n):
            up = (b - a) % n if closed or b > a else 0
            down = (a - b) % n if closed or a > b else 0
            if closed and up != down:
                up, down = (up, 0) if up < down else (0, down)
            share = 0.5 if up and down else 1.0
            for k in range(up):
                share_of[a, b, 0, (a + k) % n] += share
            for k in range(down):
                share_of[a, b, 1, (a - k) % n] += share
    out: Array = share_of.reshape(n * n, 2 * n)
    out.flags.writeable = False
    return out


def _sizes(layout: TorusLayout, axis: int) -> tuple[int, int, int]:
    """E, n and H of an axis."""
    return prod(layout.dims[:axis]), layout.dims[axis], prod(layout.dims[axis + 1 :])


def _apply(layout: TorusLayout, lines: list[Array], links: int) -> Array:
    """Loads (L) from the line matrices of every axis (slices x E x H x n x n)."""
    out = np.zeros(links)
    for a, matrix in enumerate(lines):
        before, n, after = _sizes(layout, a)
        load = matrix.reshape(-1, n * n) @ routing(n, layout.wrap[a])
        by_chip = load.reshape(layout.slices, before, after, 2, n).transpose(3, 0, 1, 4, 2).reshape(2, -1)
        ids = layout.ici[a]
        out[ids[ids >= 0]] += by_chip[ids >= 0]
    return out


def of_flows(t: Topology, layout: TorusLayout, source: Index, target: Index, amount: Array) -> tuple[Part, ...]:
    """Parts of flows (Z) between devices."""
    per_chip, chips = layout.devices_per_chip, layout.slice_chips
    a, b = source // per_chip, target // per_chip
    same_slice = a // chips == b // chips
    on_chip = a == b
    on_ici = same_slice & ~on_chip

    def line_sums(weight: Array) -> list[Array]:
        s, d, w = a[on_ici], b[on_ici], weight[on_ici]
        out = []
        for axis in range(len(layout.dims)):
            before, n, after = _sizes(layout, axis)
            line = ((s // chips) * before + d % chips // (n * after)) * after + s % after
            key = (line * n + s // after % n) * n + d // after % n
            out.append(sums(key, w, layout.slices * chips * n))
        return out

    def ports(mask: NDArray[np.bool_], weight: Array) -> tuple[Array, Array]:
        return (
            sums(source[mask], weight[mask], t.devices),
            sums(target[mask], weight[mask], t.devices),
        )

    ones = np.ones(amount.size)
    found = []
    for name, mask in (("chip", on_chip), ("ICI", on_ici), ("DCN", ~same_slice)):
        if not mask.any():
            continue
        bytes_L, flows_L = (
            _apply(layout, line_sums(w), t.links) if name == "ICI" else np.zeros(t.links) for w in (amount, ones)
        )
        for dense, weight in ((bytes_L, amount), (flows_L, ones)):
            out, in_ = (layout.dcn_out, layout.dcn_in) if name == "DCN" else (layout.chip_out, layout.chip_in)
            if out.size:
                dense[out], dense[in_] = ports(mask, weight)
        found.append(make_part(name, bytes_L, flows_L, float(amount[mask].max())))
    return tuple(found)


def of_pairs(t: Topology, layout: TorusLayout, pairs: NDArray[np.floating]) -> tuple[Part, ...]:
    """Parts of a full matrix (D x D); works through it in slabs of the slowest axis, so it needs little beside it."""
    per_chip, chips, dims = layout.devices_per_chip, layout.slice_chips, layout.dims
    first, rest = dims[0], prod(dims[1:])
    lines = [[np.zeros((layout.slices, *_shape(layout, a))) for a in range(len(dims))] for _ in range(2)]
    ports = {name: np.zeros((2, 2, t.devices)) for name in ("chip", "ICI", "DCN")}
    largest = dict.fromkeys(ports, 0.0)
    for slab in range(layout.slices * first):
        here = slab * rest * per_chip
        block = pairs[here : here + rest * per_chip].astype(np.float64)
        rows = np.arange(block.shape[0])
        block[rows, here + rows] = 0.0
        begin = slab // first * chips * per_chip
        inside = block[:, begin : begin + chips * per_chip]
        if layout.slices > 1:
            away = block.copy()
            away[:, begin : begin + chips * per_chip] = 0.0
            _count_ports(ports["DCN"], largest, "DCN", away, here)
        if per_chip > 1:
            core = np.zeros_like(inside)
            own = (rows // per_chip * per_chip)[:, None] + np.arange(per_chip) + here - begin
            core[rows[:, None], own] = inside[rows[:, None], own]
            whole = np.zeros_like(block)
            whole[:, begin : begin + chips * per_chip] = core
            _count_ports(ports["chip"], largest, "chip", whole, here)
            inside -= core
            whole[:, begin : begin + chips * per_chip] = inside
            _count_ports(ports["ICI"], largest, "ICI", whole, here)
        else:
            largest["ICI"] = max(largest["ICI"], float(inside.max()))
        for values, sums_of in ((inside, lines[0]), ((inside > 0).astype(np.float64), lines[1])):
            by_chip = values.reshape(rest, per_chip, chips, per_chip).sum(axis=(1, 3)) if per_chip > 1 else values
            _reduce(layout, by_chip, slab // first, slab % first, sums_of)
    found = []
    for name, big in largest.items():
        if not big:
            continue
        dense = [_apply(layout, lines[i], t.links) if name == "ICI" else np.zeros(t.links) for i in range(2)]
        out, in_ = (layout.dcn_out, layout.dcn_in) if name == "DCN" else (layout.chip_out, layout.chip_in)
        if out.size:
            for i in range(2):
                dense[i][out], dense[i][in_] = ports[name][i]
        found.append(make_part(name, dense[0], dense[1], big))
    return tuple(found)


def _shape(layout: TorusLayout, axis: int) -> tuple[int, int, int, int]:
    before, n, after = _sizes(layout, axis)
    return before, after, n, n


def _count_ports(ports: Array, largest: dict[str, float], name: str, block: Array, first: int) -> None:
    """Add what the rows of `block` (devices from `first` on) send and what each column receives, bytes and flows."""
    largest[name] = max(largest[name], float(block.max()))
    for i, values in enumerate((block, block > 0)):
        ports[i, 0, first : first + block.shape[0]] += values.sum(axis=1)
        ports[i, 1] += values.sum(axis=0)


def _reduce(layout: TorusLayout, block: Array, slice_: int, place: int, lines: list[Array]) -> None:
    """Add the rows of one place on axis 0 (chips of the later axes x chips of the slice) to the line matrices."""
    dims = layout.dims
    rows, left = block.shape[0], block
    for a in range(len(dims) - 1, -1, -1):
        before, n, after = _sizes(layout, a)
        # `left` is already summed over the destination's axes after a.
        if a == 0:
            lines[0][slice_, 0, :, place, :] += left
            return
        sources = left.reshape(before // dims[0], n, after, before, n).sum(axis=0)
        lines[a][slice_] += sources.transpose(2, 1, 0, 3)
        # A product with ones is a sum at memory speed, whatever the length of the inner axis.
        left = (left.reshape(-1, n) @ np.ones(n)).reshape(rows, before)


def of_product(t: Topology, layout: TorusLayout, rows: Array, columns: Array, group: Index) -> tuple[Part, ...]:
    """Parts where i sends rows[i] * columns[j] to every other j of its group (D each); never forms pairs."""
    member = np.flatnonzero((group >= 0) & ((rows > 0) | (columns > 0)))
    per_chip, chips = layout.devices_per_chip, layout.slice_chips
    chip = member // per_chip
    r, c = rows[member], columns[member]
    everyone, _ = compact(group[member])
    here, _ = compact(everyone, chip // chips)
    on_chip, _ = compact(here, chip)
    found = []
    for name, outer, inner in (("chip", on_chip, member), ("ICI", here, chip), ("DCN", everyone, chip // chips)):
        largest = float(largest_product(r, c, outer, inner))
        if not largest:
            continue
        excluded, _ = compact(outer, inner)
        dense = []
        for x, y in ((r, c), (np.sign(r), np.sign(c))):
            out = np.zeros(t.links)
            if name == "ICI":
                out = _apply(layout, _product_lines(layout, chip, x, y, here), t.links)
            ends = (layout.dcn_out, layout.dcn_in) if name == "DCN" else (layout.chip_out, layout.chip_in)
            if ends[0].size:
                out[ends[0][member]] = x * (sums(outer, y)[outer] - sums(excluded, y)[excluded])
                out[ends[1][member]] = y * (sums(outer, x)[outer] - sums(excluded, x)[excluded])
            dense.append(out)
        # Differences of sums leave crumbs where nothing is sent.
        found.append(make_part(name, np.where(dense[1] > 1e-9, dense[0], 0.0), dense[1], largest))
    return tuple(found)


def _product_lines(layout: TorusLayout, chip: Index, rows: Array, columns: Array, key: Index) -> list[Array]:
    """Line matrices: sums of rows over the source's earlier, of columns over the destination's later coordinates."""
    chips, out = layout.slice_chips, []
    place, slice_ = chip % chips, chip // chips
    if not key.max():
        return _one_product(layout, int(slice_[0]), sums(place, rows, chips), sums(place, columns, chips))
    for a in range(len(layout.dims)):
        before, n, after = _sizes(layout, a)
        sent, source = _sums(key, place % (n * after), rows)
        got, target = _sums(key, place // after, columns)
        slice_of = np.zeros(int(key.max()) + 1, dtype=np.int64)
        slice_of[key] = slice_
        i, j = pairs_within(source[0], target[0])
        s, d = source[1][i], target[1][j]
        line = (slice_of[source[0][i]] * before + d // n) * after + s % after
        at = (line * n + s // after) * n + d % n
        out.append(sums(at, sent[i] * got[j], layout.slices * chips * n))
    return out


def _one_product(layout: TorusLayout, slice_: int, rows: Array, columns: Array) -> list[Array]:
    """The same for one group in one slice (rows and columns by chip): outer products, without a join."""
    out = []
    for a in range(len(layout.dims)):
        before, n, after = _sizes(layout, a)
        sent = rows.reshape(before, n, after).sum(axis=0)
        got = columns.reshape(before, n, after).sum(axis=2)
        lines = np.zeros((layout.slices, *_shape(layout, a)))
        lines[slice_] = sent.T[None, :, :, None] * got[:, None, None, :]
        out.append(lines)
    return out


def _sums(key: Index, place: Index, weight: Array) -> tuple[Array, tuple[Index, Index]]:
    """Sums of `weight` over equal (key, place), and their keys and places; nothing where the sum is 0."""
    span = int(place.max()) + 1
    joint, number = np.unique(key * span + place, return_inverse=True)
    total = sums(number, weight)
    joint, total = joint[total > 0], total[total > 0]
    return total, (joint // span, joint % span)
