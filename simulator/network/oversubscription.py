"""Oversubscription: what is above the leaves is thinner than the cards below them, and slows what crosses it.

One definition for both views of the network. Cards have the rate of the data sheet; the links that lead up from a leaf
have together the rate of the cards below it over the factor. So a collective whose traffic stays below the leaves of
its unit loses nothing. Events share those links; the closed form takes the slower of cards and uplinks here.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from hw_profiles.cluster import Cluster, Level
from simulator.network.fabrics import fabric_of


def thinning(cluster: Cluster, level: Level, kind: str, size: int, stride: int, inner: int) -> float:
    """By how much the links above the leaves lengthen a collective's bytes between domains; 1 where the cards do.

    A group has `size` members `stride` apart, `inner` of them in a domain (node, rack); all groups of the axis run at
    once, and the busiest unit counts. All-to-all: what goes to other units crosses the uplinks; where nothing forwards
    along rails (no switch inside a node), also what goes to other rails. A ring leaves a unit once for all its members
    there, as it leaves a domain once for all its members there.
    """
    if level.oversubscription == 1 or size <= inner:
        return 1.0
    domain = cluster.levels[0].devices if len(cluster.levels) > 1 else 1
    unit = domain * fabric_of(cluster.chip.name).unit_domains
    forwards = cluster.chip.scale_up.kind == "nvswitch" or inner == 1
    # A ring stays on its rail; only direct exchanges change rails in the tree.
    rails = 1 if forwards or kind != "all_to_all" else domain
    worst = 0.0
    for place, counts in _members(cluster.devices, unit, rails, size, stride).items():
        first = place // rails * unit
        cards = (min(unit, cluster.devices - first)) / rails
        if kind == "all_to_all":
            # Of one buffer a member: what leaves the leaves over what the cards carry.
            near = 0 if forwards else inner - 1
            leaving = sum(groups * c * (size - c - near) for c, groups in counts.items())
            worst = max(worst, leaving / cards / (size - inner))
        elif kind == "permute" and not forwards:
            worst = 1.0
        else:
            crossing = sum(groups for c, groups in counts.items() if c < size)
            worst = max(worst, inner * crossing / cards)
    return max(1.0, level.oversubscription * worst)


@lru_cache(maxsize=256)
def _members(devices: int, unit: int, rails: int, size: int, stride: int) -> dict[int, Counter[int]]:
    """For each unit (and rail in it): how many groups have how many members there."""
    found: dict[int, Counter[int]] = {}
    for outer in range(0, devices - size * stride + 1, size * stride):
        for first in range(outer, outer + stride):
            own: dict[int, int] = {}
            for d in range(first, first + size * stride, stride):
                place = d // unit * rails + d % rails
                own[place] = own.get(place, 0) + 1
            for place, count in own.items():
                found.setdefault(place, Counter())[count] += 1
    return found
