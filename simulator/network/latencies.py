"""How a collective of a certain size starts, and by how much its library falls short of a level's usual rate.

A template has the geometry: who sends what over which link, over the level's efficiency. What is measured beyond that
(another protocol for small messages, the cost of a rank's own share) the closed form knows; here it becomes the latency
of a coflow and a factor on its bytes, so that a regular group alone takes what the closed form says.
"""

from __future__ import annotations

from dataclasses import replace

from hw_profiles.cluster import Cluster, Level
from simulator.network.collectives import PASSES, Rate, collective_rate
from simulator.network.groups import level_members, torus_group
from simulator.network.topology import Topology


class Starts:
    """Latencies and factors on one network, remembered by collective and group."""

    def __init__(self, cluster: Cluster, topology: Topology) -> None:
        self.cluster, self.topology = cluster, topology
        # Only what every level has: no fits of single collectives.
        levels = tuple(
            Level(
                name=x.name,
                devices=x.devices,
                bytes_per_s=x.bytes_per_s,
                latency_s=x.latency_s,
                ring_efficiency=x.ring_efficiency,
                all_to_all_efficiency=x.all_to_all_efficiency,
                in_switch_efficiency=x.in_switch_efficiency,
                oversubscription=x.oversubscription,
            )
            for x in cluster.levels
        )
        self._plain = replace(cluster, levels=levels)
        self._rates: dict[tuple[str, int, int, float], tuple[Rate, Rate]] = {}

    def of(
        self, kind: str, algorithm: str | None, size: int, stride: int, between: float, bytes_: float
    ) -> tuple[float, float]:
        """Latency (seconds) and factor on bytes of a message of `bytes_`; `algorithm` None is the closed form's own.

        On a network that a user has drawn a step takes the slowest link twice, up and down; where the cluster's own
        has one level, what was measured of its library there is added: it starts as slowly on any cables.
        """
        torus = self.cluster.torus
        if self.topology.layout is None:
            step = 2 * float(self.topology.latency_s.max(initial=0.0))
            drawn = step * (_steps(kind, algorithm, size) if kind in PASSES else 1.0)
            if torus is not None or len(self.cluster.levels) > 1 or not _measured(self.cluster.levels[0], kind):
                return drawn, 1.0
            latency_s, factor = self._beyond(kind, algorithm, size, stride, between, bytes_)
            return drawn + latency_s, factor
        if torus is not None:
            per_chip = self.cluster.chip.devices_per_chip
            group = torus_group(torus, per_chip, self.cluster.devices_per_slice, size, stride)
            if group.slices > self.cluster.slices:
                # The closed form has no place for a group that does not divide the slice: a ring by index, both ways.
                return torus.latency_s * (_steps(kind, "ring", size) / 2 if kind in PASSES else 1.0), 1.0
            if algorithm == "tree":
                return _steps(kind, algorithm, size) * torus.latency_s, 1.0
        elif kind == "all_reduce" and algorithm in ("ring", "tree"):
            inner, total = 1, 0.0
            for level, m in zip(self.cluster.levels, level_members(self.cluster, size, stride), strict=True):
                total += level.latency_s * _steps(kind, algorithm, m // inner)
                inner = m
            return total, 1.0
        return self._beyond(kind, algorithm, size, stride, between, bytes_)

    def _beyond(
        self, kind: str, algorithm: str | None, size: int, stride: int, between: float, bytes_: float
    ) -> tuple[float, float]:
        """Latency and factor by what was measured of the cluster's levels, beyond their latency and efficiency."""
        key = (kind, size, stride, between)
        if key not in self._rates:
            self._rates[key] = collective_rate(self.cluster, *key), collective_rate(self._plain, *key)
        full, plain = self._rates[key]
        if algorithm is not None or not plain.seconds_per_byte:
            return plain.latency_s, 1.0
        lines = ((full.latency_s, full.seconds_per_byte), *full.smaller)
        latency_s, per_byte = min(lines, key=lambda line: line[0] + bytes_ * line[1])
        return latency_s, per_byte / plain.seconds_per_byte


def _measured(level: Level, kind: str) -> bool:
    """Whether something is known of `kind` on `level` beyond its latency and efficiency."""
    own = {"all_to_all": level.all_to_all, "all_reduce": level.all_reduce}
    own |= {"all_gather": level.ring, "reduce_scatter": level.reduce_scatter or level.ring}
    return own.get(kind) is not None


def _steps(kind: str, algorithm: str | None, size: int) -> float:
    """Steps of a ring, or for an all-reduce those of a tree where they are fewer: small ones take it."""
    ring = PASSES[kind] * (size - 1)
    tree = 2 * (size - 1).bit_length()
    if algorithm == "tree":
        return tree
    return min(ring, tree) if kind == "all_reduce" else ring
