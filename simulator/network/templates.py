"""Collectives as coflows: bytes on every link, of one group or of all groups of a mesh axis at once.

Legend: D devices, G groups, k members of a group. `bytes_` is nccl-tests' size S, as in `collectives`. The efficiencies
of rings, all-to-alls and in-switch sums are applied as in the closed form, but to the bytes: a level that reaches 80 %
of its rate is given 1/0.8 of the bytes, so that capacities stay those of the links and efficiencies of collectives that
share a link do not mix. Exchanges between cores of a chip are left out: they count with the ops' own memory traffic.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.network.coflow import Coflow, Part
from simulator.network.collectives import NVLS_FROM, PASSES
from simulator.network.latencies import Starts
from simulator.network.ring_patterns import tree_flows
from simulator.network.splits import quarters, size_class
from simulator.network.template_parts import IN_SWITCH_WHERE_POSSIBLE, PartMaker
from simulator.network.topology import Topology, topology_of

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Transport = Literal["collective", "deepep", "hybridep"]

KINDS = (*PASSES, "all_to_all", "permute")
ALGORITHMS = {
    "all_reduce": ("ring", "tree", "in-switch"),
    "all_gather": ("ring",),
    "reduce_scatter": ("ring",),
    "all_to_all": ("direct", "hierarchical"),
    "permute": ("direct",),
}
KEPT = 4096


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a template is of; `bytes_` apart, which only scales it."""

    kind: str
    size: int
    stride: int
    algorithm: str
    groups: tuple[int, ...]
    transport: str
    between: float


class Templates:
    """The coflows of one cluster; the same question gets the same object, so that rates can be remembered by it."""

    def __init__(self, cluster: Cluster, topology: Topology | None = None) -> None:
        self.cluster = cluster
        self.topology = topology or topology_of(cluster)
        self._unit: dict[_Ask, Coflow] = {}
        self._scaled: OrderedDict[tuple[_Ask, float], Coflow] = OrderedDict()
        if self.topology.devices != cluster.devices:
            raise QuestionError(
                f"{self.topology.name}: {self.topology.devices} devices; {cluster.name} has {cluster.devices}"
            )
        self._make = PartMaker(cluster, self.topology)
        self._starts = Starts(cluster, self.topology)

    def members(self, size: int, stride: int) -> Index:
        """Devices of all groups of an axis (G x k): `size` members `stride` apart, groups in order of first member."""
        devices = self.cluster.devices
        if size < 1 or stride < 1 or size * stride > devices:
            raise QuestionError(f"group of {size} members {stride} apart: {self.cluster.name} has {devices} devices")
        outer = np.arange(devices // (size * stride)) * (size * stride)
        first = (outer[:, None] + np.arange(stride)).ravel()
        return first[:, None] + np.arange(size) * stride

    def collective(
        self,
        kind: str,
        size: int,
        stride: int,
        bytes_: float,
        algorithm: str | None = None,
        groups: Literal["all"] | int | tuple[int, ...] = "all",
        transport: Transport = "collective",
        between: float = 1.0,
    ) -> Coflow:
        """The coflow of `kind` in groups of `size` members `stride` apart, all groups at once or some of them.

        `algorithm`: ring, tree or in-switch for all_reduce; direct or hierarchical (two levels, one after the other)
        for all_to_all; None takes what the closed form does. `between` scales the bytes of an all_to_all that leave the
        fastest domain; under deepep and hybridep they arrive once a node, and are forwarded in full over NVLink there
        at the same time. Raises QuestionError for what does not exist.
        """
        if kind not in KINDS:
            raise QuestionError(f"kind = {kind!r:.40}: must be one of {', '.join(KINDS)}")
        if algorithm is not None and algorithm not in ALGORITHMS[kind]:
            raise QuestionError(f"algorithm = {algorithm!r:.40}: {kind} has {', '.join(ALGORITHMS[kind])}")
        chosen = algorithm or self._algorithm(kind, size, stride)
        chosen_groups = () if groups == "all" else (groups,) if isinstance(groups, int) else tuple(groups)
        if any(g < 0 for g in chosen_groups):
            raise QuestionError(f"groups = {groups}: must be 'all' or numbers of groups, from 0")
        for name, value in (("bytes", bytes_), ("between", between)):
            if not 0 <= value < np.inf:
                raise QuestionError(f"{name} = {value:g}: must be finite and not negative")
        ask = _Ask(kind, size, stride, chosen, chosen_groups, transport, between)
        found = self._scaled.get((ask, bytes_))
        if found is None:
            found = self._scaled[ask, bytes_] = self._of_size(ask, bytes_)
            if len(self._scaled) > KEPT:
                self._scaled.popitem(last=False)
        return found

    def shape(
        self,
        kind: str,
        size: int,
        stride: int,
        groups: tuple[int, ...],
        transport: Transport = "collective",
        between: float = 1.0,
    ) -> Coflow:
        """The coflow of one byte a rank of these groups, without latency: scale it by bytes and `start`'s factor."""
        ask = _Ask(kind, size, stride, self._algorithm(kind, size, stride), groups, transport, between)
        unit = self._unit.get(ask)
        if unit is None:
            unit = self._unit[ask] = self._build(ask)
        return unit

    def uneven(
        self,
        size: int,
        stride: int,
        groups: tuple[int, ...],
        loads: Array,
        to_experts: bool,
        transport: Transport = "collective",
        between: float = 1.0,
        fine: bool = False,
    ) -> tuple[Part, ...]:
        """Parts of an all-to-all of one byte a rank in these groups when member j has `loads[j]` times the mean load.

        To the experts every member sends alike and j receives its load, on the way back j sends it. `fine` cuts it as
        `splits` says, for contention; else one part for each level.
        """
        members = self.members(size, stride)[list(groups)]
        cuts: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = [(loads > 0, np.ones(size, dtype=np.bool_))]
        if fine:
            classes = np.full(size, 1)
            classes[loads > 0] = size_class(loads[loads > 0])
            places = quarters(size, self._make.on_one_switch(members))
            mine = [classes == c for c in np.unique(classes[loads > 0])]
            cuts = [(a, places == q) for a in mine for q in np.unique(places)]
        out: list[Part] = []
        for skewed, others in cuts:
            responses = self._make.responses(members, others, to_experts, transport, between)
            if responses is not None:
                out += [p for r in responses if (p := r.part(loads * skewed)) is not None]
                continue
            busy, plain = self._spread(members, loads * skewed, "loads"), self._spread(members, others / size, "shares")
            ends = (plain, busy) if to_experts else (busy, plain)
            out += self._make.product(members, *ends, transport, between)
        return tuple(out)

    def uneven_several(
        self,
        size: int,
        stride: int,
        groups: tuple[int, ...],
        loads_BR: Array,
        to_experts: bool,
        transport: Transport = "collective",
        between: float = 1.0,
    ) -> list[tuple[Part, ...]]:
        """`uneven`, not fine, for several loads at once: each of the same network around the same groups."""
        members, everybody = self.members(size, stride)[list(groups)], np.ones(size, dtype=np.bool_)
        responses = self._make.responses(members, everybody, to_experts, transport, between)
        if responses is None or not (loads_BR > 0).all():
            # Who gets nothing has no flows.
            return [self.uneven(size, stride, groups, x, to_experts, transport, between) for x in loads_BR]
        return list(zip(*(r.parts(loads_BR) for r in responses), strict=True)) or [() for _ in loads_BR]

    def start(self, kind: str, size: int, stride: int, between: float, bytes_: float) -> tuple[float, float]:
        """Latency (s) of one call with `bytes_`, and the factor on its bytes that the library's protocol costs."""
        return self._starts.of(kind, None, size, stride, between, bytes_)

    def all_to_all_matrix(
        self,
        members: Index,
        traffic: Array | tuple[Array, Array],
        transport: Transport = "collective",
        between: float = 1.0,
    ) -> Coflow:
        """An uneven all-to-all among `members` (k, or G x k): bytes of each pair, or bytes of rows times column shares.

        `traffic` is (k x k) or (G x k x k), or two vectors of (k) or (G x k): i sends rows[i] * columns[j] to j. Every
        call makes a new coflow. Raises QuestionError for shapes that do not fit, and for a member twice.
        """
        groups = np.atleast_2d(np.asarray(members, dtype=np.int64))
        count, size = groups.shape
        if groups.size and (groups.min() < 0 or groups.max() >= self.cluster.devices):
            raise QuestionError(f"members: {self.cluster.name} has devices 0 to {self.cluster.devices - 1}")
        if np.unique(groups).size != groups.size:
            raise QuestionError("members: a device is in it twice")
        if isinstance(traffic, tuple):
            rows, columns = (
                self._spread(groups, v, what) for v, what in zip(traffic, ("rows", "columns"), strict=True)
            )
            parts = self._make.product(groups, rows, columns, transport, between)
            sent = float((rows[groups].sum(axis=1) * columns[groups].sum(axis=1)).sum())
        else:
            try:
                pairs = np.broadcast_to(np.asarray(traffic, dtype=np.float64), (count, size, size))
            except ValueError:
                raise QuestionError(
                    f"pair bytes: shape {np.shape(traffic)}: {count} x {size} x {size} needed"
                ) from None
            g, i, j = np.nonzero(pairs)
            flows = groups[g, i], groups[g, j], pairs[g, i, j]
            parts = self._make.flows(flows, "all_to_all", transport, between, groups)
            sent = float(pairs.sum())
        if not parts:
            return Coflow("uneven all_to_all", "all_to_all", (), members=size)
        # What its library does depends on the size that the mean member sends.
        stride = max(1, int(groups[0, 1] - groups[0, 0]))
        wait, factor = self._starts.of("all_to_all", None, size, stride, between, sent / groups.size)
        return Coflow("uneven all_to_all", "all_to_all", _scaled(parts, factor), wait, members=size)

    def send(self, source: Index, target: Index, bytes_: Array | float, name: str = "send") -> Coflow:
        """Flows from devices to devices, such as the activations between two pipeline stages; one step of latency."""
        ends = np.broadcast_arrays(np.asarray(source), np.asarray(target), np.asarray(bytes_, dtype=np.float64))
        flows = tuple(np.ravel(e) for e in ends)
        parts = self._make.flows((flows[0], flows[1], flows[2]), "permute")
        distance = max(1, int(np.abs(flows[0] - flows[1]).max(initial=0)))
        wait, factor = self._starts.of("permute", None, 2, distance, 1.0, float(flows[2].max(initial=0.0)))
        return Coflow(name, "permute", _scaled(parts, factor), wait if parts else 0.0, members=flows[0].size)

    def _spread(self, groups: Index, values: Array, what: str) -> Array:
        out = np.zeros(self.cluster.devices)
        try:
            out[groups] = np.broadcast_to(np.asarray(values, dtype=np.float64), groups.shape)
        except ValueError:
            raise QuestionError(f"{what}: shape {np.shape(values)}: one for each of {groups.shape}") from None
        return out

    def _algorithm(self, kind: str, size: int, stride: int) -> str:
        if kind == "all_reduce" and self.cluster.torus is None and size >= NVLS_FROM:
            first = self.cluster.levels[0]
            if first.in_switch_efficiency and size * stride <= first.devices:
                return IN_SWITCH_WHERE_POSSIBLE
        return ALGORITHMS[kind][0]

    def _of_size(self, ask: _Ask, bytes_: float) -> Coflow:
        unit = self._unit.get(ask)
        if unit is None:
            unit = self._unit[ask] = self._build(ask)
        if not bytes_ or not unit.parts:
            return replace(unit, parts=())
        own = ask.algorithm == self._algorithm(ask.kind, ask.size, ask.stride)
        algorithm = None if own else ask.algorithm
        wait, factor = self._starts.of(ask.kind, algorithm, ask.size, ask.stride, ask.between, bytes_)
        meta = {**unit.meta, "bytes": bytes_}
        return replace(unit, parts=_scaled(unit.parts, bytes_ * factor), latency_s=wait, meta=meta)

    def _build(self, ask: _Ask) -> Coflow:
        """The template for one byte, without latency."""
        members = self.members(ask.size, ask.stride)
        if ask.groups:
            if max(ask.groups) >= len(members):
                raise QuestionError(f"groups = {max(ask.groups)}: the axis has groups 0 to {len(members) - 1}")
            members = members[list(ask.groups)]
        name = f"{ask.kind} of {ask.size}, {ask.stride} apart"
        if ask.size == 1:
            return Coflow(name, ask.kind, (), members=1)
        chained = False
        if ask.kind == "all_to_all" and ask.algorithm == "direct":
            rows = np.zeros(self.cluster.devices)
            rows[members] = 1.0 / ask.size
            parts = self._make.product(members, rows, np.sign(rows), ask.transport, ask.between)
        elif ask.kind == "all_to_all":
            parts, chained = self._make.two_levels(members, ask.between), True
        elif ask.kind == "permute":
            flows = members.ravel(), np.roll(members, -1, axis=1).ravel(), np.ones(members.size)
            parts = self._make.flows(flows, "permute")
        elif ask.algorithm == "tree":
            parts = self._make.flows(tree_flows(members, 1.0), ask.kind)
        else:
            parts, chained = self._make.rings(ask.kind, ask.algorithm, members)
        meta = {"groups": float(len(members))}
        return Coflow(name, ask.kind, parts, chained=chained, members=ask.size, meta=meta)


def _scaled(parts: tuple[Part, ...], factor: float) -> tuple[Part, ...]:
    return tuple(replace(p, bytes=p.bytes * factor, largest_flow_bytes=p.largest_flow_bytes * factor) for p in parts)


def solo_seconds(coflow: Coflow, topology: Topology) -> float:
    """Time of a coflow alone on its network, seconds: latency, and its busiest link; the sum over parts if chained.

    Parts that run side by side share links (a network card serves flows to its leaf and beyond): their bytes add up.
    """
    return solo_seconds_over(coflow, topology.bandwidth_bytes_per_s)


def solo_seconds_over(coflow: Coflow, bandwidth: Array) -> float:
    """The same over links of `bandwidth` (L; bytes/s)."""
    seconds, first = coflow.latency_s, 0
    for size in coflow.phase_sizes():
        together = np.zeros(bandwidth.size)
        for p in coflow.parts[first : first + size]:
            together[p.links] += p.bytes
        seconds += float((together / bandwidth).max(initial=0.0))
        first += size
    return seconds
