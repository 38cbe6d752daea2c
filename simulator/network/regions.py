"""Who is in flight in a region of links: parts with their rates, and coflows that meet nobody."""

from __future__ import annotations

from simulator.network.fairness import Template
from simulator.network.flight import Flight


class Running:
    """A part in flight: `left` is the fraction not yet moved at its component's `since`."""

    __slots__ = ("flight", "left", "part", "template")

    def __init__(self, template: Template, flight: Flight, part: int) -> None:
        self.template = template
        self.flight = flight
        self.part = part
        self.left = 1.0


class Component:
    """Parts that contend, with the rates (fractions/s) they keep until one of them ends or another comes."""

    __slots__ = ("bound_by", "due", "ends", "mask", "rates", "region", "running", "since")

    running: list[Running]
    rates: list[float]
    bound_by: list[int]
    region: int
    mask: int
    since: int
    ends: list[int]
    due: int


class Alone:
    """A coflow that meets nobody from its first byte to its last: when its parts end, in ticks after that first byte.

    `region` and `mask` are where all its parts are, of all phases.
    """

    __slots__ = ("ends", "last", "mask", "region")

    def __init__(self, region: int, mask: int, ends: list[int], last: int) -> None:
        self.region, self.mask, self.ends, self.last = region, mask, ends, last


class Region:
    """What is in flight in one region; `others` and `alone` are all flights from start to end, with their links."""

    __slots__ = ("alone", "components", "mask", "others")

    def __init__(self) -> None:
        self.components: dict[Component, None] = {}
        self.mask = 0
        self.others: dict[Flight, int] = {}
        self.alone: dict[Flight, Alone] = {}
