"""Uneven all-to-alls as sums over their members: what a unit of load of each puts on every link.

Everybody sends alike to every member, times that member's load, or gets it from there: bytes are linear in the loads.
So the bytes of each member's unit are routed once, and those of any loads are a product of matrices.

Legend: B patterns of loads, R members, U links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Part

Array = NDArray[np.float64]

# Multiplications of one product: OpenBLAS shares larger ones among threads, and those that wait for work burn a core.
ON_ONE_THREAD = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """The flows of one level: bytes and flows of each member's unit on `links` (U), and its largest flow."""

    level: str
    links: NDArray[np.int64]
    bytes_RU: Array
    flows_RU: Array
    largest_R: Array

    def parts(self, loads_BR: Array) -> list[Part]:
        """The part under each of several loads, all positive: they share the list of links."""
        flows, largest = self.flows_RU.sum(axis=0), (loads_BR * self.largest_R).max(axis=1).tolist()
        rows = max(1, ON_ONE_THREAD // self.bytes_RU.size)
        bytes_BU = np.concatenate([loads_BR[i : i + rows] @ self.bytes_RU for i in range(0, len(loads_BR), rows)])
        return [Part(self.level, self.links, b, flows, x) for b, x in zip(bytes_BU, largest, strict=True)]

    def part(self, loads_R: Array) -> Part | None:
        """The part under one load, over the links of those that have any; None where nothing is sent."""
        mine = loads_R > 0
        bytes_, flows = (loads_R[mine, None] * self.bytes_RU[mine]).sum(axis=0), self.flows_RU[mine].sum(axis=0)
        used = np.flatnonzero(bytes_)
        if not used.size:
            return None
        return Part(self.level, self.links[used], bytes_[used], flows[used], float((loads_R * self.largest_R).max()))
