"""The part of a switched network around some devices, numbered anew: loads cost what the group is, not the cluster.

Domains keep their devices, units of leaves their rails, and everything its order, so that the same arithmetic over the
small arrays gives the same numbers, to the last bit, as over the whole network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.network.layouts import SwitchedLayout

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """A small layout, its `devices` and `links` as numbered in the whole network (ascending).

    Of one network, those of equal `shape` differ in these numbers alone.
    """

    layout: SwitchedLayout
    devices: Index
    link_ids: Index
    shape: tuple[tuple[str, tuple[int, ...], bytes], ...]

    @property
    def links(self) -> int:
        """Links near these devices."""
        return self.link_ids.size

    def own(self, members: Index) -> Index:
        """Devices of the whole network as numbered here."""
        found: Index = np.searchsorted(self.devices, members)
        return found


def near(layout: SwitchedLayout, members: Index) -> Near | None:
    """The network around `members`; None where it is the whole one, or too irregular to be cut out."""
    m, rails = layout.domain, layout.rails
    domains = np.unique(members.ravel() // m)
    if domains.size == layout.domains or m % rails or layout.pod.size % rails:
        return None
    devices = (domains[:, None] * m + np.arange(m)).ravel()
    changes: dict[str, Index] = {}
    for name in ("up_out", "up_in", "nic_out", "nic_in"):
        links = getattr(layout, name)
        changes[name] = links[devices] if links.size else links
    if layout.mesh.size:
        changes["mesh"] = layout.mesh[domains]
    if layout.leaf.size:
        units = np.unique(layout.leaf[devices] // rails)
        leaves = (units[:, None] * rails + np.arange(rails)).ravel()
        pods = np.unique(layout.pod[leaves])
        changes["leaf"] = np.searchsorted(leaves, layout.leaf[devices])
        changes["pod"] = np.searchsorted(pods, layout.pod[leaves])
        for name, places in (("leaf_up", leaves), ("leaf_down", leaves), ("core_up", pods), ("core_down", pods)):
            links = getattr(layout, name)
            changes[name] = links[places] if links.size else links
    # `leaf` and `pod` are places, the others links.
    named = [name for name in changes if name not in ("leaf", "pod")]
    link_ids = np.sort(np.concatenate([changes[name].ravel() for name in named]))
    if link_ids.size and link_ids[0] < 0:
        return None
    for name in named:
        changes[name] = np.searchsorted(link_ids, changes[name])
    small = replace(layout, domains=int(domains.size), **changes)  # type: ignore[arg-type]
    shape = tuple((name, places.shape, places.tobytes()) for name, places in changes.items())
    return Near(small, devices, link_ids, shape)
