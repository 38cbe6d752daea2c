"""A collective in flight: bytes on every link it uses, progressing at one common rate.

The design and its reasons are in docs/architecture.md: flows of one level finish together, so one number (the fraction
done) describes them all, and a collective among a thousand ranks costs as much to simulate as one among four.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The flows of a coflow whose highest link is of one level (NVLink, leaf, spine, ...); they progress together.

    `links` are indices into the topology's link arrays; `bytes` cross each of them over the part's whole life; and
    `flows` is how many flows do: a link is shared in proportion to the flows on it. `largest_flow_bytes` belongs to the
    flow that finishes last when all flows have equal bandwidth: it sets the part's pace.
    """

    level: str
    links: NDArray[np.int64]
    bytes: NDArray[np.float64]
    flows: NDArray[np.float64]
    largest_flow_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class Coflow:
    """One collective (or all groups of an axis doing the same one at the same time).

    Its parts run side by side and it is done when the last is, or one after the other when `chained` (two-level
    all-to-all). `phases` says how many parts each of several phases has that follow each other (there and back), the
    parts of one side by side. `latency_s` passes before the first byte moves. Identity, not content, tells coflows
    apart: templates are shared, and rates are cached by the set of active templates.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    latency_s: float = 0.0
    chained: bool = False
    members: int = 0
    meta: dict[str, float] = field(default_factory=dict)
    phases: tuple[int, ...] = ()

    def phase_sizes(self) -> tuple[int, ...]:
        """How many parts each phase has."""
        return self.phases or ((1,) * len(self.parts) if self.chained else (len(self.parts),))
