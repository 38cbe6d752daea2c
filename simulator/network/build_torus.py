"""The graph of TPU slices: a 2D or 3D torus each, cores on their chips, and the data-centre network between slices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster, Torus
from hw_profiles.errors import QuestionError
from simulator.network.layouts import NO_LINKS, TorusLayout
from simulator.network.topology import Topology

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# Wire and router of one hop (jax-ml/scaling-book: about 1 us). What a collective step costs as the framework sees it is
# the torus's `latency_s`, and enters with the collective, not with the link.
HOP_LATENCY_S = 1e-6
UNVERIFIED = (
    "Twisted torus: the shift of the closing links (half the long axis) is that of k x k x 2k twisted tori in general; "
    "not verified against the maker's documentation."
)


def torus_topology(cluster: Cluster, twisted: bool = False) -> Topology:
    """All slices of `cluster`, with links of the levels chip (where a chip is several devices), ICI and DCN.

    The rules of edges: i to i + 1 along each axis, and the ends of a closed axis of more than two chips. A core reaches
    its chip's links through its share of the chip's memory bandwidth. Raises QuestionError for a shape that cannot be
    twisted.
    """
    torus = cluster.torus
    assert torus is not None
    shift = _shift(torus, cluster.name) if twisted else (0,) * len(torus.dims)
    per_chip, devices = cluster.chip.devices_per_chip, cluster.devices
    chips = cluster.slices * int(np.prod(torus.dims))
    first = 0 if per_chip == 1 else devices
    ends, ici = _ici(torus, cluster.slices, shift)
    sources, targets = [ends[0] + first], [ends[1] + first]
    bandwidth, latency = [np.full(ends.shape[1], torus.link_bytes_per_s)], [np.full(ends.shape[1], HOP_LATENCY_S)]
    level_names = [*(["chip"] if per_chip > 1 else []), "ICI", *(["DCN"] if cluster.slices > 1 else [])]
    levels = [np.full(ends.shape[1], level_names.index("ICI"))]
    kinds: list[tuple[str, int]] = [("device", devices)]
    chip_out = chip_in = dcn_out = dcn_in = NO_LINKS
    everyone = np.arange(devices)

    def join(hub: Index, rate: float, level: str, seconds: float) -> tuple[Index, Index]:
        start = sum(len(s) for s in sources)
        sources.extend((everyone, hub))
        targets.extend((hub, everyone))
        bandwidth.append(np.full(2 * devices, rate))
        latency.append(np.full(2 * devices, seconds))
        levels.append(np.full(2 * devices, level_names.index(level)))
        return start + everyone, start + devices + everyone

    if per_chip > 1:
        kinds.append(("chip", chips))
        chip_out, chip_in = join(first + everyone // per_chip, cluster.chip.device_memory_bytes_per_s, "chip", 0.0)
    if cluster.slices > 1:
        out = cluster.levels[-1]
        kinds.append(("DCN", 1))
        hub = np.full(devices, first + chips if per_chip > 1 else devices)
        dcn_out, dcn_in = join(hub, out.bytes_per_s, "DCN", out.latency_s / 2)
    return Topology(
        name=cluster.name,
        devices=devices,
        kinds=tuple(kinds),
        source=np.concatenate(sources),
        target=np.concatenate(targets),
        bandwidth_bytes_per_s=np.concatenate(bandwidth),
        latency_s=np.concatenate(latency),
        level=np.concatenate(levels),
        level_names=tuple(level_names),
        layout=TorusLayout(
            torus.dims, torus.wrap, per_chip, cluster.slices, ici, chip_out, chip_in, dcn_out, dcn_in, twisted
        ),
        note=UNVERIFIED if twisted else "",
    )


def _ici(torus: Torus, slices: int, shift: tuple[int, ...]) -> tuple[Index, Index]:
    """Ends of all links between chips (2 x L), and their index by (axis, direction, chip)."""
    dims, axes = torus.dims, len(torus.dims)
    here = np.indices(dims).reshape(axes, -1)
    chips = here.shape[1]
    ici = np.full((axes, 2, slices, chips), -1, dtype=np.int64)
    ends: list[Index] = []
    count = 0
    for a, (n, wrap) in enumerate(zip(dims, torus.wrap, strict=True)):
        for direction, step in enumerate((1, -1)):
            there = here.copy()
            there[a] += step
            outside = (there[a] < 0) | (there[a] >= n)
            if shift[a]:
                for b, length in enumerate(dims):
                    if shift[b] == 0:
                        there[b, outside] = (there[b, outside] + step * shift[a]) % length
            exists = ~outside | (wrap and n > 2)
            from_chip = np.flatnonzero(exists)
            to_chip = np.ravel_multi_index(tuple(there[:, exists]), dims, mode="wrap")
            for s in range(slices):
                ici[a, direction, s, from_chip] = count + np.arange(from_chip.size)
                count += from_chip.size
                ends.append(np.stack((from_chip, to_chip)) + s * chips)
    joined = np.concatenate(ends, axis=1) if ends else np.empty((2, 0), dtype=np.int64)
    return joined.astype(np.int64), ici.reshape(axes, 2, slices * chips)


def _shift(torus: Torus, name: str) -> tuple[int, ...]:
    """By how much the closing links of each axis move along the long axes; QuestionError for other shapes."""
    short, long = min(torus.dims), max(torus.dims)
    shape = "x".join(map(str, torus.dims))
    if len(torus.dims) != 3 or long != 2 * short or set(torus.dims) != {short, long} or not all(torus.wrap):
        raise QuestionError(
            f"twisted = true: {name} is {shape}; only closed A x A x 2A and A x 2A x 2A tori can be twisted"
        )
    return tuple(short if n == short else 0 for n in torus.dims)
