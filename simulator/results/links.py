"""How much links carried, and where they are on a drawing of the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkUse:
    """One directed link: bytes it carried in the step, and the share of the step that these take at its full rate."""

    name: str
    level: str
    bytes: float
    bytes_per_s: float
    utilisation: float


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """A device, chip or switch on the drawing."""

    name: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class DrawnLink:
    """Both directions between two neighbours as one line through the points (x, y); the busier direction counts."""

    name: str
    level: str
    utilisation: float
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """The network, or the part of it round its busiest link; `note` says which."""

    nodes: tuple[DrawnNode, ...]
    links: tuple[DrawnLink, ...]
    note: str
