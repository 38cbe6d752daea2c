"""How many nodes share a leaf and when a third tier of switches is needed, by family of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Fabric:
    """Counts of a rail-optimised fat tree: card r of all `unit_domains` nodes (or racks) of a unit is on one leaf.

    A leaf switch has `ports` cards below and as many ports above; two tiers serve up to `two_tier_cards` cards, beyond
    which pods of `pod_units` units are joined by cores. `source` says where the counts are from.
    """

    unit_domains: int
    ports: int
    two_tier_cards: int
    pod_units: int
    source: str

    def spines(self, cards: int, pod_cards: int) -> int:
        """Spines of one pod: half as many as leaves in two tiers, as many in three."""
        if cards <= self.two_tier_cards:
            return ceil(cards / (2 * self.ports))
        return ceil(pod_cards / self.ports)

    def cores_per_spine(self, cards: int, spines: int) -> int:
        """Cores of a spine's plane: half as many cores as leaves in all."""
        return 0 if cards <= self.two_tier_cards else ceil(cards / (2 * self.ports) / spines)


# Switches of 64 ports of 400 Gbit/s: the counts of DGX H100 and B200 SuperPODs up to 2,048 nodes come out of these.
_DEFAULT = Fabric(32, 32, 2048, 4, "NVIDIA DGX H100 and B200 SuperPOD reference architectures; pods of 4 units assumed")
_BY_PREFIX = {
    "a100": Fabric(20, 20, 800, 2, "NVIDIA DGX A100 SuperPOD RA-09950: units of 20 nodes, switches of 40 ports"),
    # Two planes of 400 Gbit/s a card, drawn as one: 64 nodes share a (double) leaf.
    "b300": Fabric(64, 64, 4096, 8, "NVIDIA DGX B300 SuperPOD: units of 64 nodes, two tiers up to 512 nodes"),
    "gb200": Fabric(8, 32, 2048, 4, "NVIDIA GB200 SuperPOD: units of 8 racks; tiers assumed as for H100"),
    "gb300": Fabric(8, 32, 2048, 4, "NVIDIA GB200 SuperPOD: units of 8 racks; tiers assumed as for H100"),
}


def fabric_of(chip: str) -> Fabric:
    """The fat tree that nodes of `chip` come with; others than NVIDIA's are assumed to follow the H100's."""
    return next((f for prefix, f in _BY_PREFIX.items() if chip.startswith(prefix)), _DEFAULT)
