"""How parts of coflows that are in flight at once share the links: max-min fair in bandwidth per flow.

Legend: C parts, L links, U uses (one per part and link it sends over). A part's flows all progress at one fraction per
second; its pace is the bandwidth of its largest flow, `level`. All parts rise together in `level` until a link is full,
which freezes the parts that use it (progressive filling: Bertsekas & Gallager, Data Networks, 2nd ed., section 6.5.2;
here with parts instead of flows, and with weights, the bytes of a part on a link over those of its largest flow).

A part's weight on a link is its bytes there over its largest flow, not its count of flows: of flows of unequal size the
small ones leave early, and bytes over the largest is what they occupy on average while the part lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.network.coflow import Part
from simulator.network.geometry import Geometry

Array = NDArray[np.float64]
Index = NDArray[np.int64]
# A list of links, the places in its region, bandwidths, the places as bits, and the region.
Listed = tuple[Index, Index, Array, int, int]

# Shares closer than this are one share: sums of the same bytes in another order.
TIE = 1e-12


class Template:
    """A part made ready for solving: the links it really uses, their set as bits, and its rate alone.

    `mask` has bit l set for the link in place l of its region (`places`, of `links`): whether two parts of a region
    share a link is one AND of two integers. `done` counts finished flights, so that bytes per link need no array
    addition per flight.
    """

    __slots__ = ("bytes", "done", "links", "mask", "part", "places", "region", "serial", "solo", "tightest")

    def __init__(
        self, part: Part, bandwidth: NDArray[np.float64], serial: int = 0, geometry: Geometry | None = None
    ) -> None:
        """Check `part` against `bandwidth` (L; bytes/s).

        Raises QuestionError for a link that is out of range, twice in the list or without bandwidth, for bytes that are
        negative or not finite, and for a largest flow of no bytes in a part that sends some.
        """
        self.part = part
        self.serial = serial
        self.done = 0
        links, loads = np.asarray(part.links), np.asarray(part.bytes, dtype=np.float64)
        where = f"part {part.level!r}"
        if links.shape != loads.shape or links.ndim != 1:
            raise QuestionError(f"{where}: {links.shape} links for {loads.shape} bytes: one number for each link")
        if not loads.size or not loads.any():
            self.links = self.places = np.empty(0, dtype=np.int64)
            self.bytes, self.region = np.empty(0), 0
            self.mask, self.solo, self.tightest = 0, inf, -1
            return
        if not (loads.min() >= 0 and loads.max() < inf):
            worst = int(np.argmin((loads >= 0) & (loads < inf)))
            raise QuestionError(f"{where}: {loads[worst]} bytes on link {links[worst]}: finite, not negative")
        if not 0 < part.largest_flow_bytes < inf:
            raise QuestionError(
                f"{where}: largest_flow_bytes = {part.largest_flow_bytes}: positive, for bytes are sent"
            )
        if loads.min() == 0:
            links, loads = links[loads > 0], loads[loads > 0]
        known = None if geometry is None else geometry.lists.get(id(links))
        if known is None:
            known = _listed(links, loads, bandwidth, geometry, where)
            if geometry is not None:
                geometry.lists[id(links)] = known
        self.links, self.bytes = links, loads
        _, self.places, capacity, self.mask, self.region = known
        seconds = loads / capacity
        at = int(seconds.argmax())
        # Alone: the busiest link is never idle until the end.
        self.solo, self.tightest = 1.0 / float(seconds[at]), int(links[at])


@dataclass(frozen=True, slots=True)
class Alike:
    """Parts (B) over one list of links (U), checked and timed at once: rates alone, and the place of the busiest."""

    parts: list[Part]
    listed: Listed
    bytes_BU: Array
    pace_B: Array
    solo_B: Array
    tightest_B: Index

    def templates(self, serials: Iterator[int]) -> list[Template]:
        """What `Template` makes of each."""
        links, places, _, mask, region = self.listed
        out = []
        at = zip(self.parts, self.solo_B.tolist(), links[self.tightest_B].tolist(), strict=True)
        for part, solo, tightest in at:
            t = Template.__new__(Template)
            t.part, t.serial, t.done, t.solo, t.tightest = part, next(serials), 0, solo, tightest
            t.links, t.bytes, t.places, t.mask, t.region = links, part.bytes, places, mask, region
            out.append(t)
        return out


def alike(parts: list[Part], bandwidth: Array, geometry: Geometry) -> Alike | None:
    """These parts, whose `links` are one object; None where one is refused, or does not send over all of its links."""
    links = parts[0].links
    if not links.size or any(p.bytes.shape != links.shape for p in parts):
        return None
    bytes_BU, pace_B = np.array([p.bytes for p in parts]), np.array([p.largest_flow_bytes for p in parts])
    if not (bytes_BU.min() > 0 and bytes_BU.max() < inf and pace_B.min() > 0 and pace_B.max() < inf):
        return None
    listed = geometry.lists.get(id(links))
    if listed is None:
        try:
            listed = geometry.lists[id(links)] = _listed(links, bytes_BU[0], bandwidth, geometry, "")
        except QuestionError:
            return None
    seconds_BU = bytes_BU / listed[2]
    tightest_B = seconds_BU.argmax(axis=1)
    return Alike(parts, listed, bytes_BU, pace_B, 1.0 / seconds_BU[np.arange(len(parts)), tightest_B], tightest_B)


def pair_rates(a: Alike, b: Alike) -> tuple[Array, Array, Index, Index]:
    """Rates (B each) of pairs of parts, each pair alone in the network, and the link that holds each back.

    What `solve` says of two parts: both rise until one is as fast as alone, or a link that both use is full; who is
    left then takes what remains.
    """
    _, at_a, at_b = np.intersect1d(a.listed[1], b.listed[1], return_indices=True)
    capacity, rows = a.listed[2][at_a], np.arange(len(a.parts))
    bytes_a, bytes_b = a.bytes_BU[:, at_a], b.bytes_BU[:, at_b]
    share = capacity / (bytes_a / a.pace_B[:, None] + bytes_b / b.pace_B[:, None])
    full = share.argmin(axis=1)
    level = share[rows, full]
    free = [x.solo_B * x.pace_B <= level * (1.0 + TIE) for x in (a, b)]
    rates, bound_by = [], []
    for x, y, own, other, mine, theirs, at in (
        (a, b, bytes_a, bytes_b, *free, at_a),
        (b, a, bytes_b, bytes_a, *reversed(free), at_b),
    ):
        room = np.maximum(capacity - y.solo_B[:, None] * other, 0.0) / own
        last = room.argmin(axis=1)
        left = np.maximum(room[rows, last], level / x.pace_B)
        held = np.where(theirs, left, level / x.pace_B)
        alone = mine | (held >= x.solo_B * (1.0 - TIE))
        rates.append(np.where(alone, x.solo_B, held))
        links = x.listed[0]
        bound_by.append(np.where(alone, links[x.tightest_B], links[at[np.where(theirs, last, full)]]))
    return rates[0], rates[1], bound_by[0], bound_by[1]


def _listed(links: Index, loads: Array, bandwidth: Array, geometry: Geometry | None, where: str) -> Listed:
    """A list of links, checked."""
    if links.min() < 0 or links.max() >= len(bandwidth):
        wrong = int(links.min()) if links.min() < 0 else int(links.max())
        raise QuestionError(f"{where}: link {wrong}: the topology has links 0 to {len(bandwidth) - 1}")
    capacity = bandwidth[links]
    if capacity.min() <= 0:
        worst = int(np.argmin(capacity))
        raise QuestionError(
            f"{where}: link {links[worst]} has bandwidth {capacity[worst]:g}, and {loads[worst]:g} bytes cross it"
        )
    region, places, size = 0, links, len(bandwidth)
    if geometry is not None:
        region = int(geometry.region_L[links[0]])
        places, size = geometry.place_L[links], len(geometry.links[region])
        if (geometry.region_L[links] != region).any():
            raise ValueError(f"{where}: in several regions")
    used = np.zeros(size, dtype=np.bool_)
    used[places] = True
    if int(np.count_nonzero(used)) != links.size:
        twice = int(np.argmax(np.bincount(links)))
        raise QuestionError(f"{where}: link {twice} is listed twice: sum its bytes")
    mask = int.from_bytes(np.packbits(used, bitorder="little").tobytes(), "little")
    return links, places, capacity, mask, region


def fair_rates(parts: Sequence[Part], bandwidth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fractions per second (C) of `parts` that are in flight together over `bandwidth` (L; bytes/s).

    A part alone gets 1 / max(bytes / bandwidth); one that sends nothing gets infinity. Raises QuestionError as
    `Template` does.
    """
    return solve([Template(part, bandwidth) for part in parts], bandwidth)[0]


def solve(
    templates: Sequence[Template],
    bandwidth: NDArray[np.float64],
    links: NDArray[np.int64] | None = None,
    problems: Sequence[int] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Fractions per second (C), and the link (C) that holds each part back, -1 for a part that sends nothing.

    `bandwidth` and `links`, their numbers in the whole network, are those of the region that all parts are in.
    `problems` (C, ascending) solves several at once, each with the whole of the links to itself.

    Only links that the solo rates would overfill can bind, since no part ever runs faster than alone: all others are
    left out, and without any the solo rates are the answer.
    """
    rates = np.array([t.solo for t in templates], dtype=np.float64)
    bound_by = np.array([t.tightest for t in templates], dtype=np.int64)
    sending = [c for c, t in enumerate(templates) if t.links.size]
    if len(sending) < 2:
        return rates, bound_by
    link_U = np.concatenate([templates[c].places for c in sending])
    load_U = np.concatenate([templates[c].bytes for c in sending])
    part_U = np.repeat(np.array(sending), [templates[c].links.size for c in sending])
    if problems is not None:
        # Links that nobody uses would be there once for each problem.
        apart_U = np.repeat(np.array([problems[c] for c in sending]), [templates[c].places.size for c in sending])
        link_U += apart_U * len(bandwidth)
        met = np.zeros((problems[-1] + 1) * len(bandwidth), dtype=np.bool_)
        met[link_U] = True
        used = np.flatnonzero(met)
        link_U = (np.cumsum(met) - 1)[link_U]
        place = used % len(bandwidth)
        bandwidth, links = bandwidth[place], place if links is None else links[place]
    wanted_L = np.bincount(link_U, load_U * rates[part_U], minlength=len(bandwidth))
    overfull_L = wanted_L > bandwidth * (1.0 + TIE)
    if not overfull_L.any():
        return rates, bound_by
    kept_U = overfull_L[link_U]
    full = np.flatnonzero(overfull_L)
    compact_L = np.cumsum(overfull_L) - 1
    link_U, load_U, part_U = compact_L[link_U[kept_U]], load_U[kept_U], part_U[kept_U]
    start = _starts(part_U)
    contested = part_U[start]
    pace = np.array([templates[c].part.largest_flow_bytes for c in contested])
    ordinal_U = np.repeat(np.arange(contested.size), np.diff(start, append=part_U.size))
    level, bottleneck = _fill(link_U, load_U / pace[ordinal_U], ordinal_U, bandwidth[full], rates[contested] * pace)
    rates[contested] = level / pace
    bound = bottleneck >= 0
    tight = full[bottleneck[bound]]
    bound_by[contested[bound]] = tight if links is None else links[tight]
    return rates, bound_by


def _starts(part_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each part's uses begin."""
    return np.concatenate(([0], np.flatnonzero(part_U[1:] != part_U[:-1]) + 1))


def _fill(
    link_U: NDArray[np.int64],
    weight_U: NDArray[np.float64],
    part_U: NDArray[np.int64],
    room_L: NDArray[np.float64],
    cap_C: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Levels (C; bytes/s of the largest flow) and the link (C) that set each, -1 where it was the part's own cap.

    Uses are ordered by part. Instead of one link a round, every round freezes all links whose share is the lowest that
    any of their parts sees, wherever they are: the order among links that share no part does not matter. 512 parts of a
    random all-to-all among 256 endpoints took 7 rounds for 235 distinct levels.
    """
    parts, links = cap_C.size, room_L.size
    level_C = np.zeros(parts)
    bottleneck_C = np.full(parts, -1, dtype=np.int64)
    share_L = np.zeros(links)
    lowest_L = np.empty(links)
    room_L = room_L.copy()
    while link_U.size:
        weight_L = np.bincount(link_U, weight_U, minlength=links)
        busy_L = weight_L > 0
        # A share never falls when parts freeze below it; the maximum keeps rounding from saying so.
        share_L = np.maximum(share_L, np.divide(room_L, weight_L, out=np.full(links, inf), where=busy_L))
        starts = _starts(part_U)
        uses = np.diff(starts, append=part_U.size)
        active = part_U[starts]
        seen_U = share_L[link_U]
        offered = np.minimum.reduceat(seen_U, starts)
        reach = np.minimum(offered, cap_C[active])
        reach_U = np.repeat(reach, uses)
        lowest_L.fill(inf)
        np.minimum.at(lowest_L, link_U, reach_U)
        settled_L = lowest_L >= share_L * (1.0 - TIE)
        at_link = np.logical_or.reduceat(settled_L[link_U] & (seen_U <= reach_U * (1.0 + TIE)), starts)
        frozen = at_link | (cap_C[active] <= offered * (1.0 + TIE))
        level_C[active[frozen]] = reach[frozen]
        frozen_U = np.repeat(frozen, uses)
        tight_U = frozen_U & (seen_U <= reach_U * (1.0 + TIE))
        bottleneck_C[part_U[tight_U]] = link_U[tight_U]
        room_L -= np.bincount(link_U[frozen_U], (weight_U * reach_U)[frozen_U], minlength=links)
        kept_U = ~frozen_U
        link_U, weight_U, part_U = link_U[kept_U], weight_U[kept_U], part_U[kept_U]
    return level_C, bottleneck_C
