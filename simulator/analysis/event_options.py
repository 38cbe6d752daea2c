"""Choices of a run by events."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EventOptions:
    """Choices of a run by events.

    `seed` of the routing draws; `fold` lets one group stand for all equal ones; `stragglers` multiplies the compute of
    single devices (device index: factor), `slow_links` the bandwidth of links by name; `samples` is the number of draws
    behind the percentiles; without `contention` every collective runs at its solo rate.
    `load_vectors` is how many vectors of loads stand for the microbatches of a stage and group in their all-to-alls;
    None for one of its own for every microbatch. `graph` is a file with the fabric (GraphML or JSON) in place of the
    cluster's own network.
    """

    seed: int = 0
    fold: bool = True
    stragglers: dict[int, float] = field(default_factory=dict)
    slow_links: dict[str, float] = field(default_factory=dict)
    samples: int = 100
    contention: bool = True
    graph: Path | None = None
    load_vectors: int | None = 4
