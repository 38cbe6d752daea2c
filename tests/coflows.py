"""Small coflows for tests."""

from __future__ import annotations

import numpy as np

from simulator.network.coflow import Coflow, Part
from simulator.network.fluid import Fluid

GB = 1e9


def part(loads: dict[int, float], largest: float | None = None, level: str = "x") -> Part:
    """A part with bytes per link; its largest flow, if not given, is all there is on the busiest link."""
    bytes_ = np.array(list(loads.values()), dtype=float)
    largest = max(loads.values(), default=0.0) if largest is None else largest
    return Part(level, np.array(list(loads), dtype=np.int64), bytes_, bytes_ / (largest or 1.0), largest)


def coflow(name: str, *parts: Part, latency_s: float = 0.0, chained: bool = False) -> Coflow:
    return Coflow(name, "test", parts, latency_s, chained)


def story(fluid: Fluid, *starts: tuple[Coflow, int]) -> list[tuple[str, int | None]]:
    """Everything that ends, in order: name and tick."""
    for one, tick in starts:
        fluid.start(one, tick)
    return [(flight.coflow.name, flight.ended) for flight in fluid.finish()]


def random_case(seed: int) -> tuple[np.ndarray, list[tuple[Coflow, int]]]:
    rng = np.random.default_rng(seed)
    links = 6
    templates = [
        part({int(k): float(rng.uniform(1e6, 1e8)) for k in rng.permutation(links)[: rng.integers(1, 4)]})
        for _ in range(5)
    ]
    starts = []
    for k in range(int(rng.integers(2, 12))):
        parts = [templates[i] for i in rng.integers(0, 5, int(rng.integers(1, 3)))]
        one = coflow(str(k), *parts, latency_s=float(rng.choice([0.0, 2e-6])), chained=bool(rng.integers(2)))
        starts.append((one, int(rng.integers(0, 4)) * 1_000_000))
    return rng.uniform(GB, 50 * GB, links), starts
