"""How the devices of a benchmark lie: on how many hosts, and over which network a group of them speaks."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from hw_profiles.cluster import Level
from hw_profiles.cluster_spec import plain_spec
from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from trainer.others import Others

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Hosts:
    """`devices` on `machines`, and on `nodes` as collectives see them; the switched levels of such a cluster.

    On CPUs each process is a node: collectives between processes go over TCP, wherever these are. `wires` says what a
    row of a collective has to know of that, and is empty where there is nothing.
    """

    devices: int
    machines: int
    nodes: int
    levels: tuple[Level, ...]
    processes: int = 1
    wires: str = ""

    @property
    def local(self) -> int:
        """Devices of a node."""
        return self.devices // self.nodes

    def note(self, kind: str) -> str:
        """What a row of this kind says of the processes."""
        several = f"{self.processes} processes" if self.processes > 1 else ""
        return f"{several}: {self.wires}" if kind == "collective" and self.wires else several

    def level(self, size: int, stride: int) -> str:
        """The name of the network that a group of `size`, `stride` apart, needs; empty on a torus."""
        return next((level.name for level in self.levels if size * stride <= level.devices), "")


def hosts_of(others: Others, chip: Chip, devices: int) -> Hosts:
    """Where the devices of all processes lie; QuestionError where machines have unequal numbers of them."""
    machine = BOOT.read_text(encoding="ascii").strip() if BOOT.is_file() else platform.node()
    found = others.share("on which machine each process is", machine)
    machines = len(set(found))
    counts = sorted(found.count(m) for m in set(found))
    if counts[0] != counts[-1]:
        raise QuestionError(
            f"--processes {others.count}: from {counts[0]} to {counts[-1]} of them on a machine; each needs as many"
        )
    nodes = others.count if chip.kind == "cpu" else machines
    levels = () if chip.kind == "tpu" else resolve_cluster(plain_spec(chip, devices, nodes)).levels
    wires = ""
    if chip.kind == "cpu" and others.count > 1:
        # Seen with jaxlib 0.10: a group within one process takes as long as one across processes.
        wires = "gloo over TCP, within a process too"
        if nodes > machines:
            wires += f"; {machines} machine{'s' if machines > 1 else ''}, whose loopback joins its processes"
    return Hosts(devices, machines, nodes, levels, others.count, wires)
