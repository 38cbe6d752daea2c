"""Choices of a run by events."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EventOptions:
    """Choices of a run by events.

    `seed` of the routing draws; `fold` lets one group stand for all equal ones; `stragglers` multiplies the compute of
    single devices (device index: factor), `slow_links` the bandwidth of links by name; `samples` is the number of draws
    behind the percentiles; without `contention` every collective runs at its solo rate.
    """

    seed: int = 0
    fold: bool = True
    stragglers: dict[int, float] = field(default_factory=dict)
    slow_links: dict[str, float] = field(default_factory=dict)
    samples: int = 200
    contention: bool = True
