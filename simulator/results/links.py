"""How much a link carried."""

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
