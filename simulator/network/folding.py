"""Fewer links to solve for: links that all coflows load alike are one link.

In a regular job nearly all links are copies: every card carries the same bytes of the same collectives. Of equal
constraints one is enough, so the fold is exact for the coflows it was made of (and for those only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Coflow, Part

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# Sums of the same bytes in another order differ in the last digits.
DIGITS = 10


def fold(coflows: Sequence[Coflow], bandwidth: Array) -> tuple[list[Coflow], Array, Index, Index]:
    """The same coflows over one link of every class of equal links; legend: L links, K classes.

    Returns the coflows, the bandwidths (K; bytes/s), the link that stands for each class (K) and the class of each link
    (L; -1 where nobody uses it). Two links are equal
    where they have the same bandwidth, and every part of every coflow the same bytes on both. Links that nobody uses
    are dropped. The results are new objects: fold once, and use them instead of the originals.
    """
    parts = [p for coflow in coflows for p in coflow.parts]
    links = bandwidth.size
    used = np.zeros(links, dtype=np.bool_)
    # Number the classes so far; every part splits them by its bytes.
    _, number = np.unique(bandwidth, return_inverse=True)
    number = number.astype(np.int64)
    for p in (p for p in parts if p.bytes.any()):
        load = np.zeros(links)
        load[p.links] = np.round(p.bytes / p.bytes.max(), DIGITS)
        used[p.links] = True
        _, mine = np.unique(load, return_inverse=True)
        _, number = np.unique(number * (int(mine.max()) + 1) + mine, return_inverse=True)
        number = number.astype(np.int64)
    kept_of = np.full(int(number.max(initial=-1)) + 1, -1, dtype=np.int64)
    # The first link of a class stands for it.
    at = np.flatnonzero(used)[::-1]
    kept_of[number[at]] = at
    kept = np.sort(kept_of[kept_of >= 0])
    place = np.full(links, -1, dtype=np.int64)
    place[kept] = np.arange(kept.size)
    folded = []
    for coflow in coflows:
        folded.append(replace(coflow, parts=tuple(onto(p, place) for p in coflow.parts)))
    return folded, bandwidth[kept], kept, np.where(used, place[kept_of[number]], -1)


def onto(part: Part, place: Index) -> Part:
    """`part` over the kept links alone; `place` (L) is the number of each link among them, -1 where it is not."""
    stays = place[part.links] >= 0
    return replace(part, links=place[part.links][stays], bytes=part.bytes[stays], flows=part.flows[stays])
