"""How long link loads take on a full 3D torus of 9,216 chips, and how they agree with enumeration on small ones.

Also GShard's growth of the all-to-all from 16 to 2,048 TPU v3 cores beside ours, closed and open axes. The peak is what
Python allocated during the call, the matrix itself not counted. Usage: python benchmarks/bench_link_loads.py
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hw_profiles.cluster import Cluster
from hw_profiles.loader import load_chip, resolve_cluster
from simulator.network.loads import Loads, pair_loads, rank_one_loads
from simulator.network.templates import Templates, solo_seconds
from simulator.network.topology import Topology, topology_of

SHAPE = (16, 24, 24)
RUNS = 3
# arXiv:2006.16668 section 5: all-to-all grows 9 times from 16 to 2,048 partitions, bytes a device fixed.
GSHARD = 9.0


def torus(dims: tuple[int, ...], wrap: tuple[bool, ...], chip: str = "tpu-v5p") -> Cluster:
    """A torus of any shape, with the links of `chip`."""
    base = resolve_cluster({"chip": chip, "slice": "4x4x4" if len(dims) == 3 else "4x4"})
    assert base.torus is not None
    chips = int(np.prod(dims))
    devices = chips * load_chip(chip).devices_per_chip
    name = f"{chip} {'x'.join(map(str, dims))} {''.join('TF'[not w] for w in wrap)}"
    return replace(base, name=name, devices=devices, chips=chips, torus=replace(base.torus, dims=dims, wrap=wrap))


def measured(call: Callable[[], Loads]) -> tuple[float, float]:
    """Best seconds of some runs, and the peak megabytes of one."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return min(times), peak


def one_by_one(topology: Topology, dims: tuple[int, ...], wrap: tuple[bool, ...], pairs: np.ndarray) -> np.ndarray:
    """Loads of a full matrix by walking every pair's path, link by link; knows nothing of the fast way."""
    ends = zip(topology.source.tolist(), topology.target.tolist(), strict=True)
    link = {pair: i for i, pair in enumerate(ends)}
    out = np.zeros(topology.links)
    for a, b in np.argwhere(pairs):
        here, goal = list(np.unravel_index(a, dims)), np.unravel_index(b, dims)
        for axis, (n, closed) in enumerate(zip(dims, wrap, strict=True)):
            up = int(goal[axis] - here[axis])
            ways = [up] if not closed or n < 3 else [x for x in (up % n, up % n - n) if 2 * abs(x) <= n]
            for way in ways:
                at = list(here)
                for _ in range(abs(way)):
                    before = int(np.ravel_multi_index(at, dims))
                    at[axis] = (at[axis] + (1 if way > 0 else -1)) % n
                    out[link[before, int(np.ravel_multi_index(at, dims))]] += pairs[a, b] / len(ways)
            here[axis] = goal[axis]
    return out


def growth(wrap_small: bool, wrap_large: bool) -> float:
    """All-to-all of 2,048 cores over that of 16, bytes a core fixed, on v3 tori that are closed or open."""
    seconds = []
    for dims, wrap in (((2, 4), wrap_small), ((32, 32), wrap_large)):
        cluster = torus(dims, (wrap, wrap), "tpu-v3")
        templates = Templates(cluster)
        flight = templates.collective("all_to_all", cluster.devices, 1, 1e9)
        seconds.append(solo_seconds(flight, templates.topology) - flight.latency_s)
    return seconds[1] / seconds[0]


def main() -> None:
    """Print the tables."""
    big = topology_of(torus(SHAPE, (True,) * 3))
    n = big.devices
    rng = np.random.default_rng(0)
    rows, columns = rng.random(n), rng.zipf(2.0, n).astype(np.float64)
    pairs = rng.random((n, n), dtype=np.float32)
    print(f"{big.name}: {n} devices, {big.links} links")
    print(f"{'':34} {'seconds':>8} {'target':>8} {'peak, MB':>9}")
    for name, target, call in (
        ("tokens x load (rank one)", 0.05, lambda: rank_one_loads(big, rows, columns)),
        (f"pair matrix ({pairs.nbytes / 1e6:.0f} MB)", 1.5, lambda: pair_loads(big, pairs)),
    ):
        seconds, peak = measured(call)
        print(f"{name:34} {seconds:8.3f} {target:8.3f} {peak:9.1f}")
    print()
    print("largest difference of a link's load from enumeration, relative to the busiest link")
    for dims, wrap in (((4, 4, 4), (True,) * 3), ((3, 5, 4), (True, False, True)), ((6, 5), (False, True))):
        small = topology_of(torus(dims, wrap, "tpu-v5p" if len(dims) == 3 else "tpu-v5e"))
        r, c = rng.random(small.devices), rng.random(small.devices)
        matrix = np.outer(r, c)
        np.fill_diagonal(matrix, 0.0)
        truth = one_by_one(small, dims, wrap, matrix)
        for name, loads in (("rank one", rank_one_loads(small, r, c)), ("matrix", pair_loads(small, matrix))):
            print(f"{small.name:34} {name:9} {np.abs(loads.bytes - truth).max() / truth.max():.1e}")
    print()
    print(f"all-to-all, 16 to 2,048 TPU v3 cores, bytes a core fixed: GShard measured x{GSHARD:g}")
    for name, small_closed, large_closed in (
        ("2x4 open, 32x32 closed (our reading of a v3 pod)", False, True),
        ("both closed on axes of more than two", True, True),
        ("both open", False, False),
    ):
        print(f"  {name:50} x{growth(small_closed, large_closed):.1f}")


if __name__ == "__main__":
    main()
