"""Uneven all-to-alls as coflows: out to the experts and back, each way with the bytes of its loads.

Letters: B patterns of loads, U links that a part uses. Patterns of one family are made into coflows together, since
what they share (network, groups, links) is most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.load_patterns import LoadPattern
from simulator.engine.work import Transfer
from simulator.network.coflow import Coflow, Part
from simulator.network.fluid import Fluid

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# Parts of one byte a rank under several loads: (transfer, stage, group, loads, to the experts, fine).
MakeParts = Callable[[Transfer, int, int, list[Array], bool, bool], list[tuple[Part, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One part under several loads, which use the same links: bytes (B x U), and the largest flow of each (B)."""

    level: str
    links: Index
    bytes_BU: Array
    flows: Array
    largest_B: Array

    def parts(self, factor: float) -> list[Part]:
        largest = (self.largest_B * factor).tolist()
        rows = zip(self.bytes_BU * factor, largest, strict=True)
        return [Part(self.level, self.links, bytes_, self.flows, x) for bytes_, x in rows]


class Uneven:
    """Makes the coflows of uneven all-to-alls, over folded links where `place` (the place of each) is given."""

    def __init__(self, fluid: Fluid, make_parts: MakeParts, place: Index | None) -> None:
        self._fluid, self._make_parts, self._place = fluid, make_parts, place
        self._made: dict[tuple[Transfer, int, int, LoadPattern, bool], Coflow] = {}
        self._blocks: dict[tuple[object, ...], list[_Block] | None] = {}
        # By the identity of lists of links, which are kept with what is known of them, so that none gets it again.
        self._folded: dict[int, tuple[Index, NDArray[np.bool_], Index]] = {}
        self._joined: dict[tuple[int, ...], tuple[list[Index], list[Index], Array]] = {}

    def coflow(
        self, t: Transfer, stage: int, group: int, pattern: LoadPattern, fine: bool, even: Coflow, factor: float
    ) -> Coflow:
        """The coflow of `t` with the loads of `pattern`; `even` is the same with even loads.

        `factor` is what the library's protocol costs in bytes; `fine` cuts it for contention (`network/splits.py`).
        """
        found = self._made.get((t, stage, group, pattern, fine))
        if found is None:
            family = [pattern] if fine or pattern not in pattern.family else pattern.family
            made = self._make(t, stage, group, family, fine, even, factor)
            if made is None:
                # Not all loads use the same links: each by itself.
                made = [c for one in family for c in self._make(t, stage, group, [one], fine, even, factor) or ()]
            for one, coflow in zip(family, made, strict=True):
                self._made[t, stage, group, one, fine] = coflow
            if not fine:
                self._fluid.prepare(made)
            found = self._made[t, stage, group, pattern, fine]
        return found

    def _make(
        self, t: Transfer, stage: int, group: int, patterns: list[LoadPattern], fine: bool, even: Coflow, factor: float
    ) -> list[Coflow] | None:
        """Coflows of several patterns, None where their links differ; `uneven` is what even loads would not take."""
        alone = self._seconds([_block([p]) for p in even.parts])
        total_B: Array = np.full(len(patterns), even.latency_s)
        sizes, parts = [], []
        for to_experts, bytes_ in ((True, t.out_bytes), (False, t.bytes - t.out_bytes)):
            if bytes_ <= 0:
                continue
            blocks = self._shapes(t, stage, group, patterns, to_experts, fine)
            if blocks is None:
                return None
            total_B = total_B + self._seconds(blocks) * (bytes_ * factor)
            sizes.append(len(blocks))
            parts += [block.parts(bytes_ * factor) for block in blocks]
        share_B = np.maximum(0.0, 1 - (even.latency_s + alone[0]) / total_B).tolist()
        return [
            Coflow(
                even.name,
                even.kind,
                tuple(column[i] for column in parts),
                even.latency_s,
                even.chained,
                even.members,
                even.meta | {"uneven": share},
                tuple(sizes),
            )
            for i, share in enumerate(share_B)
        ]

    def _shapes(
        self, t: Transfer, stage: int, group: int, patterns: list[LoadPattern], to_experts: bool, fine: bool
    ) -> list[_Block] | None:
        """Blocks of one byte a rank, over the folded links; all-to-alls that differ in bytes alone share them."""
        kind = (t.size, t.stride, t.between, stage, group, to_experts, fine)
        key = (*kind, len(patterns), patterns[0])
        if key not in self._blocks:
            several = self._make_parts(t, stage, group, [p.ranks_R for p in patterns], to_experts, fine)
            if all(_over_the_same_links(parts, several[0]) for parts in several):
                self._blocks[key] = [self._fold(_block(column)) for column in zip(*several, strict=True)]
            else:
                self._blocks[key] = None
                for one, parts in zip(patterns, several, strict=True):
                    self._blocks[*kind, 1, one] = [self._fold(_block([p])) for p in parts]
        return self._blocks[key]

    def _fold(self, block: _Block) -> _Block:
        if self._place is None:
            return block
        found = self._folded.get(id(block.links))
        if found is None:
            there = self._place[block.links]
            found = self._folded[id(block.links)] = block.links, there >= 0, there[there >= 0]
        _, stays, links = found
        return _Block(block.level, links, block.bytes_BU[:, stays], block.flows[stays], block.largest_B)

    def _seconds(self, blocks: list[_Block]) -> Array:
        """Seconds (B) that the busiest link takes for parts side by side; 0 without any."""
        if not blocks:
            return np.zeros(1)
        key = tuple(id(b.links) for b in blocks)
        found = self._joined.get(key)
        if found is None:
            lists = [b.links for b in blocks]
            used, place = np.unique(np.concatenate(lists), return_inverse=True)
            ends = np.cumsum([0, *(x.size for x in lists)])
            places = [place[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
            found = self._joined[key] = lists, places, self._fluid.bandwidth[used]
        _, places, bandwidth = found
        together = np.zeros((len(blocks[0].bytes_BU), bandwidth.size))
        for block, place in zip(blocks, places, strict=True):
            # A part has each link once.
            together[:, place] += block.bytes_BU
        busiest: Array = (together / bandwidth).max(axis=1, initial=0.0)
        return busiest


def _over_the_same_links(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Whether parts are of the same levels, and have the very same lists of links."""
    pairs = zip(parts, others, strict=False)
    return len(parts) == len(others) and all(a.links is b.links and a.level == b.level for a, b in pairs)


def _block(column: Sequence[Part]) -> _Block:
    first = column[0]
    bytes_BU, largest = np.array([p.bytes for p in column]), np.array([p.largest_flow_bytes for p in column])
    return _Block(first.level, first.links, bytes_BU, first.flows, largest)
