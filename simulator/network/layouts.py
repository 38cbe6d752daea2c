"""Where the links of a regular network are in the topology's arrays: the arithmetic that fast loads and names need.

Legend: A axes, C chips of all slices (row-major, last axis first to move), D devices, V domains (nodes or racks) of M
devices, F leaves, P pods of S spines, K cores a spine. An index of -1 is a link that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

AXES = "xyzuvw"
NO_LINKS: Index = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class TorusLayout:
    """Links of one or several tori; node numbers are devices, then chips (where a chip is several devices), then DCN.

    `ici[a, 0, c]` leaves chip c upwards along axis a, `ici[a, 1, c]` downwards. `chip_out`, `chip_in` (D) join cores to
    their chip, `dcn_out`, `dcn_in` (D) devices to the data-centre network; empty where there are none.
    """

    dims: tuple[int, ...]
    wrap: tuple[bool, ...]
    devices_per_chip: int
    slices: int
    ici: Index
    chip_out: Index
    chip_in: Index
    dcn_out: Index
    dcn_in: Index
    twisted: bool = False

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return prod(self.dims)

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return self.slice_chips * self.slices * self.devices_per_chip

    def chip_of_node(self, node: int) -> int:
        """The chip that a node stands for, or -1."""
        chip = node if self.devices_per_chip == 1 else node - self.devices
        return chip if 0 <= chip < self.slice_chips * self.slices else -1

    def coordinates(self, chip: int) -> tuple[int, ...]:
        """Place of a chip in its slice, slowest axis first."""
        return tuple(int(i) for i in np.unravel_index(chip % self.slice_chips, self.dims))

    def chip_name(self, chip: int) -> str:
        """`(3,1,0)`, or `slice 1 (3,1,0)` where there are several."""
        place = f"({','.join(map(str, self.coordinates(chip)))})"
        return f"slice {chip // self.slice_chips} {place}" if self.slices > 1 else place

    def link_name(self, source: int, target: int) -> str:
        """`ICI x+ (3,1,0)->(0,1,0)`, `DCN out device 5`, `core 5 -> chip (1,2)`."""
        a, b = self.chip_of_node(source), self.chip_of_node(target)
        if a >= 0 and b >= 0:
            here, there = self.coordinates(a), self.coordinates(b)
            # A twisted link moves along several axes: it belongs to the one whose end it joins.
            axis = next(i for i, (x, y) in enumerate(zip(here, there, strict=True)) if x != y)
            up = there[axis] - here[axis] == 1 or (here[axis] == self.dims[axis] - 1 and there[axis] == 0 != here[axis])
            if self.dims[axis] == 2:
                up = here[axis] == 0
            name = f"ICI {AXES[axis]}{'+' if up else '-'} {self.chip_name(a)}->"
            return name + f"({','.join(map(str, there))})"
        if a >= 0 and target < self.devices:
            return f"chip {self.chip_name(a)} -> core {target}"
        if b >= 0 and source < self.devices:
            return f"core {source} -> chip {self.chip_name(b)}"
        return f"DCN out device {source}" if source < self.devices else f"DCN in device {target}"


@dataclass(frozen=True, slots=True, eq=False)
class SwitchedLayout:
    """Links of domains of consecutive devices and the rail-optimised fat tree that joins them.

    Inside a domain either a crossbar, `up_out` and `up_in` (D), or links between pairs: `mesh` (V x links of one
    domain), over which `mesh_share` (M*M x links) spreads the traffic of each pair. `nic_out`, `nic_in` (D) join a
    device to leaf `leaf` (D); `leaf_up`, `leaf_down` (F x S) a leaf to the spines of its pod `pod` (F); `core_up`,
    `core_down` (P x S x K) a spine to the cores of its plane. `rails` devices in a row have cards on different leaves;
    card r of every node of a unit is on the same one.
    """

    domain: int
    domains: int
    up_name: str
    out_name: str
    unit_name: str
    rails: int
    up_out: Index
    up_in: Index
    mesh: Index
    mesh_share: Array
    nic_out: Index
    nic_in: Index
    leaf: Index
    pod: Index
    leaf_up: Index
    leaf_down: Index
    core_up: Index
    core_down: Index

    @property
    def devices(self) -> int:
        """Devices of all domains."""
        return self.domain * self.domains

    @property
    def crossbar(self) -> bool:
        """Whether a domain is a switch that every device has one port to (or a single device)."""
        return not self.mesh.size

    def link_name(self, source: int, target: int) -> str:
        """`NVLink out gpu 5 of node 3`, `xGMI gpu 0 -> gpu 5 of node 3`, `InfiniBand in gpu 5 of node 3`."""
        n = self.devices
        switches = self.domains if self.crossbar and self.domain > 1 else 0
        if source >= n and target >= n:
            return ""
        device, other, way = (source, target, "out") if source < n else (target, source, "in")
        unit = f"{self.unit_name} {device // self.domain}"
        if other < n:
            return f"{self.up_name} gpu {device % self.domain} -> gpu {other % self.domain} of {unit}"
        place = f"gpu {device % self.domain} of {unit}" if self.unit_name != "host" else f"device {device}"
        return f"{self.up_name if other < n + switches else self.out_name} {way} {place}"


Layout = TorusLayout | SwitchedLayout
