"""A cluster as the simulator sees it: one kind of chip, and the networks that join its devices.

Everything is SI here. Devices are JAX devices. A device's position is its index; neighbours in index are neighbours in
the fastest network (the cores of a chip, then the chips of a node or the last torus axis).
"""

from __future__ import annotations

from dataclasses import dataclass

from hw_profiles.schema import Chip


@dataclass(frozen=True, slots=True)
class Protocols:
    """How a library runs one collective: (start, step) in seconds and share of the rate per protocol; own share's cost.

    The last protocol is that of large messages. `passes` are the bytes it sends over those of the algorithm assumed,
    `array` the start of a further array of a merged call over the first's.
    """

    lines: tuple[tuple[float, float, float], ...]
    own: float
    passes: float = 1.0
    array: float = 1.0


@dataclass(frozen=True, slots=True)
class Level:
    """One tier of a switched network: within groups of `devices` consecutive devices, each sends at `bytes_per_s`.

    `latency_s` is one step of a collective algorithm over this level as the framework sees it. Efficiencies are the
    achieved fraction of `bytes_per_s`; `in_switch_efficiency` is 0 where the switch does not add. Between domains
    `bytes_per_s` is the card's, and `oversubscription` is the rate of the cards below a leaf over what leads up from
    it. `ring` (all-gather, and reduce-scatter without an entry of its own), `reduce_scatter`, `all_reduce`,
    `in_switch`, `all_to_all` hold what was measured beyond latency and efficiency.
    """

    name: str
    devices: int
    bytes_per_s: float
    latency_s: float
    ring_efficiency: float
    all_to_all_efficiency: float
    in_switch_efficiency: float = 0.0
    oversubscription: float = 1.0
    ring: Protocols | None = None
    reduce_scatter: Protocols | None = None
    all_reduce: Protocols | None = None
    in_switch: Protocols | None = None
    all_to_all: Protocols | None = None


@dataclass(frozen=True, slots=True)
class Torus:
    """The inter-chip torus of one TPU slice: chips per axis (slowest first), wrap per axis, one link and direction."""

    dims: tuple[int, ...]
    wrap: tuple[bool, ...]
    link_bytes_per_s: float
    latency_s: float
    ring_efficiency: float
    all_to_all_efficiency: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Chips and networks of a whole job.

    `levels` are the switched tiers, fastest first, the last spanning all devices; for TPUs the torus comes first and
    `levels` holds only the data-centre network between slices (if there are several).
    """

    name: str
    description: str
    chip: Chip
    devices: int
    chips: int
    torus: Torus | None
    slices: int
    levels: tuple[Level, ...]

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one TPU slice (all devices, where there is no torus)."""
        return self.devices // self.slices
