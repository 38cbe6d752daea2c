"""Bytes and flows on every link, from who sends how much to whom.

Legend: D devices, L links, Z flows (pairs that send), G groups. Three ways to say what is sent: a list of flows, a full
matrix of pairs, or a product (bytes of a source times share of a destination) within groups, which costs no pairs.
The result is split by the highest level that a flow crosses: NVLink, leaf, spine, core; ICI, DCN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.network import loads_switched, loads_torus
from simulator.network.coflow import Part
from simulator.network.joins import make_part, sums
from simulator.network.layouts import SwitchedLayout, TorusLayout
from simulator.network.next_hops import spread
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# How traffic between different rails of a fat tree goes: through the spines; over NVLink first, to the device of the
# own host on the destination's rail (NCCL's PXN); or over the own rail first, and NVLink in the destination's host
# (DeepEP).
Rail = Literal["direct", "pxn", "forward"]
ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Loads:
    """What crosses each link of a topology, by the highest level that the flows cross."""

    links: int
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> Array:
        """Bytes on each link (L), all parts together."""
        return self._sum("bytes")

    @property
    def flows(self) -> Array:
        """Flows on each link (L); a flow that is split over paths counts in fractions."""
        return self._sum("flows")

    @property
    def largest_flow_bytes(self) -> dict[str, float]:
        """Bytes of the largest flow of each level."""
        return {part.level: part.largest_flow_bytes for part in self.parts}

    def _sum(self, what: str) -> Array:
        out = np.zeros(self.links)
        for part in self.parts:
            out[part.links] += getattr(part, what)
        return out


def flow_loads(t: Topology, source: Index, target: Index, bytes_: Array | float, rail: Rail = "direct") -> Loads:
    """Loads of flows: `bytes_` (Z) from device `source` (Z) to device `target` (Z); to itself a device sends nothing.

    Raises QuestionError for devices that are not there, and for bytes that are negative or not finite.
    """
    source, target = np.broadcast_arrays(np.asarray(source, dtype=np.int64), np.asarray(target, dtype=np.int64))
    amount = np.array(np.broadcast_to(np.asarray(bytes_, dtype=np.float64), source.shape))
    for name, ends in (("source", source), ("target", target)):
        wrong = (ends < 0) | (ends >= t.devices)
        if wrong.any():
            raise QuestionError(f"{name} = {ends[wrong][0]}: {t.name} has devices 0 to {t.devices - 1}")
    _check_bytes(amount)
    sends = (amount > 0) & (source != target)
    source, target, amount = source[sends], target[sends], amount[sends]
    if isinstance(t.layout, SwitchedLayout):
        return Loads(t.links, loads_switched.of_flows(t, t.layout, source, target, amount, rail))
    if isinstance(t.layout, TorusLayout) and not t.layout.twisted:
        return Loads(t.links, loads_torus.of_flows(t, t.layout, source, target, amount))

    def columns(batch: Index) -> tuple[Array, Array]:
        place = np.full(t.devices, -1)
        place[batch] = np.arange(batch.size)
        mine = place[target] >= 0
        at = source[mine] * batch.size + place[target[mine]]
        shape, size = (t.devices, batch.size), t.devices * batch.size
        return sums(at, amount[mine], size).reshape(shape), sums(at, np.ones(at.size), size).reshape(shape)

    return _generic(t, np.unique(target), columns)


def pair_loads(t: Topology, pairs: NDArray[np.floating], rail: Rail = "direct") -> Loads:
    """Loads of a full matrix of bytes (D x D, row sends to column); single precision halves its memory.

    Raises QuestionError for a matrix of another shape, and for bytes that are negative or not finite.
    """
    if pairs.shape != (t.devices, t.devices):
        raise QuestionError(f"pairs: shape {pairs.shape}: {t.name} has {t.devices} devices, each a row and a column")
    for start in range(0, t.devices, ROWS):
        _check_bytes(pairs[start : start + ROWS])
    if isinstance(t.layout, TorusLayout) and not t.layout.twisted:
        return Loads(t.links, loads_torus.of_pairs(t, t.layout, pairs))
    if t.layout is None or isinstance(t.layout, TorusLayout):

        def columns(batch: Index) -> tuple[Array, Array]:
            block = pairs[:, batch].astype(np.float64)
            block[batch, np.arange(batch.size)] = 0.0
            return block, (block > 0).astype(np.float64)

        return _generic(t, np.arange(t.devices), columns)
    blocks = []
    for start in range(0, t.devices, ROWS):
        source, target = np.nonzero(pairs[start : start + ROWS])
        amount = pairs[start : start + ROWS][source, target].astype(np.float64)
        blocks.append(flow_loads(t, source + start, target, amount, rail))
    return added(t, blocks)


def rank_one_loads(
    t: Topology, rows: Array, columns: Array, group: Index | None = None, rail: Rail = "direct"
) -> Loads:
    """Loads where device i sends rows[i] * columns[j] bytes to every other device j of its group (D each).

    `group` is -1 for a device that takes no part; without it all devices are one group. On a torus and on a crossbar
    with a fat tree this costs no pairs. `largest_flow_bytes` is exact, but for routing "direct" in a fat tree, where it
    is an upper bound from the spines up. Raises QuestionError as `flow_loads` does.
    """
    rows, columns = np.asarray(rows, dtype=np.float64), np.asarray(columns, dtype=np.float64)
    group = np.zeros(t.devices, dtype=np.int64) if group is None else group
    for name, values in (("rows", rows), ("columns", columns), ("group", group)):
        if values.shape != (t.devices,):
            raise QuestionError(f"{name}: shape {values.shape}: one number for each of {t.devices} devices is needed")
    _check_bytes(rows)
    _check_bytes(columns)
    if isinstance(t.layout, SwitchedLayout):
        return Loads(t.links, loads_switched.of_product(t, t.layout, rows, columns, group, rail))
    if isinstance(t.layout, TorusLayout) and not t.layout.twisted:
        return Loads(t.links, loads_torus.of_product(t, t.layout, rows, columns, group))

    def block(batch: Index) -> tuple[Array, Array]:
        same = (group[:, None] == group[batch]) & (group >= 0)[:, None]
        out = np.where(same, rows[:, None] * columns[batch], 0.0)
        out[batch, np.arange(batch.size)] = 0.0
        return out, (out > 0).astype(np.float64)

    return _generic(t, np.flatnonzero(group >= 0), block)


def added(t: Topology, many: list[Loads]) -> Loads:
    """The sum of several loads, level by level."""
    parts = []
    for name in t.level_names:
        mine = [p for loads in many for p in loads.parts if p.level == name]
        if mine:
            whole = Loads(t.links, tuple(mine))
            parts.append(make_part(name, whole.bytes, whole.flows, max(p.largest_flow_bytes for p in mine)))
    return Loads(t.links, tuple(parts))


def _generic(t: Topology, destinations: Index, columns: loads_torus.Columns) -> Loads:
    found = spread(t.source, t.target, t.level, t.nodes, destinations, columns)
    parts = [
        make_part(t.level_names[v], b, f, float(big)) for v, (b, f, big) in enumerate(zip(*found, strict=True)) if big
    ]
    return Loads(t.links, tuple(parts))


def _check_bytes(amount: NDArray[np.floating]) -> None:
    if amount.size and not (amount.min() >= 0 and amount.max() < np.inf):
        wrong = ~np.isfinite(amount) | (amount < 0)
        raise QuestionError(f"bytes = {amount[wrong][0]}: must be finite and not negative")
