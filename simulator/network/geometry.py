"""Links in regions that no coflow joins: what is elsewhere need not be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Coflow

Index = NDArray[np.int64]


class Geometry:
    """The links (L) of each region, and the place of each link in its own; one region for all where none are given."""

    def __init__(self, bandwidth: NDArray[np.float64], region_L: Index | None = None) -> None:
        region = np.zeros(bandwidth.size, dtype=np.int64) if region_L is None else region_L
        order = np.argsort(region, kind="stable")
        bounds = np.searchsorted(region[order], np.arange(int(region.max(initial=0)) + 2))
        self.region_L = region
        self.links: list[Index] = [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        self.bandwidth = [bandwidth[links] for links in self.links]
        self.place_L = np.empty(bandwidth.size, dtype=np.int64)
        # Lists of links that were met, by identity; each keeps its own list, so that no other gets its identity.
        self.lists: dict[int, tuple[Index, Index, NDArray[np.float64], int, int]] = {}
        self.place_L[order] = np.arange(bandwidth.size) - bounds[region[order]]


def joined_links(coflows: Sequence[Coflow], links: int) -> Index:
    """The region of each link (L): links are in one where a coflow is on both, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    used = [np.concatenate([p.links for p in c.parts]) for c in coflows if c.parts]
    ends = [(np.full(x.size - 1, x[0]), x[1:]) for x in used if x.size > 1]
    if not ends:
        return np.arange(links)
    a, b = (np.concatenate(side) for side in zip(*ends, strict=True))
    region: Index = connected_components(coo_array((np.ones(a.size, dtype=np.int8), (a, b)), (links, links)), False)[1]
    return region.astype(np.int64)
