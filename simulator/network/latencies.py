"""Seconds that pass in a collective before bytes matter: steps of its algorithm times the latency of each level."""

from __future__ import annotations

from hw_profiles.cluster import Cluster
from simulator.network.collectives import PASSES, collective_rate
from simulator.network.groups import level_members
from simulator.network.topology import Topology


def latency_s(
    cluster: Cluster, topology: Topology, kind: str, algorithm: str, size: int, stride: int, between: float
) -> float:
    """Latency of a collective, seconds; that of the closed form, where it has the same algorithm.

    On a network that a user has drawn a step takes the slowest link twice, up and down.
    """
    if topology.layout is None:
        step = 2 * float(topology.latency_s.max())
        steps = 1.0 if kind in ("all_to_all", "permute") else _steps(kind, algorithm, size)
        return steps * step
    if kind == "all_reduce" and algorithm in ("ring", "tree"):
        if cluster.torus is None:
            members = level_members(cluster, size, stride)
            inner, total = 1, 0.0
            for level, m in zip(cluster.levels, members, strict=True):
                total += level.latency_s * _steps(kind, algorithm, m // inner)
                inner = m
            return total
        if algorithm == "tree":
            return _steps(kind, algorithm, size) * cluster.torus.latency_s
    return collective_rate(cluster, kind, size, stride, between).latency_s


def _steps(kind: str, algorithm: str, size: int) -> float:
    """Steps of a ring, or for an all-reduce those of a tree where they are fewer: small ones take it."""
    ring = PASSES[kind] * (size - 1)
    tree = 2 * (size - 1).bit_length()
    if algorithm == "tree":
        return tree
    return min(ring, tree) if kind == "all_reduce" else ring
