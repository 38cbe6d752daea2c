"""Where a group of devices sits on the cluster: how many members share a node, or which torus axes it spans.

A group has `size` members, `stride` apart in device index; all groups of the same axis run at once, which is why a link
is shared wherever their members interleave.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from hw_profiles.cluster import Cluster, Torus


@dataclass(frozen=True, slots=True)
class Extent:
    """Part of one torus axis that a group spans: members along it, groups interleaved on its links, ring or line."""

    members: int
    interleaved: int
    ring: bool


@dataclass(frozen=True, slots=True)
class TorusGroup:
    """A group on a torus: members on one chip, groups that share each chip, extents per axis, slices spanned."""

    on_chip: int
    sharing_chip: int
    extents: tuple[Extent, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips of the group within one slice."""
        out = 1
        for e in self.extents:
            out *= e.members
        return out


def members_per_domain(size: int, stride: int, domain: int) -> int:
    """Members of a group that share a domain of `domain` consecutive devices; at least one.

    With a stride that does not divide the domain the count varies between domains; the smallest is returned, since the
    slowest domain sets the time.
    """
    return max(1, min(size, domain // stride))


@lru_cache(maxsize=4096)
def torus_group(torus: Torus, devices_per_chip: int, devices_per_slice: int, size: int, stride: int) -> TorusGroup:
    """The place of a group on a torus, devices numbered along the last axis first, cores of a chip innermost."""
    on_chip = max(1, min(size, devices_per_chip // stride)) if stride < devices_per_chip else 1
    left = size // on_chip
    step = max(1, stride * on_chip // devices_per_chip) if stride * on_chip >= devices_per_chip else 1
    extents = []
    for length, wrap in zip(reversed(torus.dims), reversed(torus.wrap), strict=True):
        if left == 1:
            break
        if step >= length:
            step = max(1, step // length)
            continue
        room = length // step
        take = left if left <= room else gcd(left, room)
        if take > 1:
            extents.append(Extent(take, step, wrap and take * step == length))
        left //= take
        step = 1
    return TorusGroup(on_chip, devices_per_chip // on_chip, tuple(extents), left)


def level_members(cluster: Cluster, size: int, stride: int) -> tuple[int, ...]:
    """Members of the group within one domain of each switched level, fastest level first; the last is `size`."""
    out, last = [], 1
    for level in cluster.levels:
        last = max(last, members_per_domain(size, stride, level.devices))
        out.append(last)
    if out:
        out[-1] = size
    return tuple(out)
