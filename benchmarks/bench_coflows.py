"""How fast coflows are simulated, and how near they are to every flow by itself (tests/reference_flows.py).

Times are the best of five, templates built from the byte matrices included; memory is the peak that NumPy and Python
allocate in one more run, the matrices included. Usage: python benchmarks/bench_coflows.py
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from simulator.network.coflow import Coflow, Part
from simulator.network.fairness import fair_rates
from simulator.network.flight import ticks
from simulator.network.fluid import Fluid
from simulator.network.transfers import FluidProcess

Floats = NDArray[np.float64]
MIB = 2**20
PORT = 50e9
NVLINK = 450e9
NODE, LEAF = 8, 256


def zipf(n: int, exponent: float, seed: int) -> Floats:
    """Bytes (n, n) of a dispatch of 64 MiB an endpoint to destinations of unequal load; nobody sends to itself."""
    load = np.random.default_rng(seed).permutation(np.arange(1, n + 1.0) ** -exponent)
    pairs = np.tile(64 * MIB * load / load.sum(), (n, 1))
    np.fill_diagonal(pairs, 0)
    return pairs


def over_a_switch(pairs: Floats) -> tuple[Part, ...]:
    """One part: endpoint i sends on link i and receives on link n + i."""
    n = len(pairs)
    sends = pairs > 0
    bytes_ = np.concatenate([pairs.sum(1), pairs.sum(0)])
    flows = np.concatenate([sends.sum(1), sends.sum(0)]).astype(float)
    return (Part("switch", np.arange(2 * n), bytes_, flows, float(pairs.max())),)


def by_size(pairs: Floats) -> tuple[Part, ...]:
    """A part for flows of one size, give or take 5 %: what faces unlike congestion progresses apart."""
    n = len(pairs)
    with np.errstate(divide="ignore"):
        steps = np.log(pairs / pairs.max()) / np.log(1.1)
    rank = np.where(pairs > 0, -np.rint(steps), -1).astype(np.int64) + 1
    cells = int(rank.max()) + 1
    parts = []
    at = np.arange(n)
    sent = np.bincount((rank * n + at[:, None]).ravel(), pairs.ravel(), cells * n).reshape(cells, n)
    got = np.bincount((rank * n + at).ravel(), pairs.ravel(), cells * n).reshape(cells, n)
    bytes_ = np.hstack([sent, got])
    for k in np.flatnonzero(bytes_[1:].any(1)) + 1:
        used = np.flatnonzero(bytes_[k])
        largest = float(pairs.max()) * 1.1 ** (1.0 - k)
        parts.append(Part("switch", used, bytes_[k, used], bytes_[k, used] / largest, largest))
    return tuple(parts)


def tree_bandwidth(n: int, oversubscribed: float) -> Floats:
    """NVLink out and in, cards out and in, for each rank; a trunk up and a trunk down for each leaf."""
    trunks = np.full(2 * n // LEAF, LEAF * PORT / oversubscribed)
    return np.concatenate([np.full(2 * n, NVLINK), np.full(2 * n, PORT), trunks])


def within(pairs: Floats, group: int) -> Floats:
    """Bytes that each rank sends to its own group, then those it gets from it."""
    count = len(pairs) // group
    blocks = pairs.reshape(count, group, count, group)[np.arange(count), :, np.arange(count), :]
    return np.concatenate([blocks.sum(2).ravel(), blocks.sum(1).ravel()])


def over_the_tree(pairs: Floats) -> tuple[Part, ...]:
    """A part for each level: within nodes of 8, within leaves of 256, over the trunks."""
    n = len(pairs)
    biggest = float(pairs.max())
    node, leaf, all_ = within(pairs, NODE), within(pairs, LEAF), np.concatenate([pairs.sum(1), pairs.sum(0)])
    trunks = (all_ - leaf).reshape(-1, LEAF).sum(1)
    parts = []
    for level, first, bytes_ in (
        ("node", 0, node),
        ("leaf", 2 * n, leaf - node),
        ("spine", 2 * n, np.concatenate([all_ - leaf, trunks])),
    ):
        used = np.flatnonzero(bytes_ > 1e-6 * MIB)
        parts.append(Part(level, first + used, bytes_[used], bytes_[used] / biggest, biggest))
    return tuple(parts)


def ring_over_the_tree(n: int, bytes_: float) -> tuple[Part, ...]:
    """Every rank sends to the next."""
    rank = np.arange(n)
    to = (rank + 1) % n
    parts = []
    for level, lower, group in (("node", 1, NODE), ("leaf", NODE, LEAF), ("spine", LEAF, n)):
        here = rank[(rank // group == to // group) & (rank // lower != to // lower)]
        first = 0 if level == "node" else 2 * n
        links = np.concatenate([first + here, first + n + to[here]])
        if level == "spine":
            links = np.concatenate([links, 4 * n + here // LEAF, 4 * n + n // LEAF + to[here] // LEAF])
        parts.append(Part(level, links, np.full(links.size, bytes_), np.ones(links.size), bytes_))
    return tuple(parts)


def switch_case(n: int, split: Callable[[Floats], tuple[Part, ...]], pairs: list[Floats]) -> list[float]:
    """Seconds that each of the all-to-alls takes, all begun at once."""
    fluid = Fluid(np.full(2 * n, PORT))
    flights = [fluid.start(Coflow("dispatch", "all_to_all", split(p)), 0) for p in pairs]
    fluid.finish()
    return [flight.seconds for flight in flights]


def tree_case(n: int, dispatch: Floats) -> list[float]:
    """A skewed all-to-all, an even one 0.5 ms later and a ring 1 ms later, on a tree of 4:1."""
    fluid = Fluid(tree_bandwidth(n, 4.0))
    even = np.full((n, n), 16 * MIB / n)
    starts = ((over_the_tree(dispatch), 0.0), (over_the_tree(even), 5e-4), (ring_over_the_tree(n, 32 * MIB), 1e-3))
    flights = [fluid.start(Coflow("test", "test", parts), ticks(start_s)) for parts, start_s in starts]
    fluid.finish()
    return [flight.seconds for flight in flights]


def measured(make: Callable[[], Callable[[], list[float]]]) -> tuple[float, float, list[float]]:
    """Wall seconds without what `make` prepares, MiB with it, and the simulated seconds."""
    run = make()
    walls = []
    for _ in range(5):
        begin = time.perf_counter()
        result = run()
        walls.append(time.perf_counter() - begin)
    del run
    tracemalloc.start()
    make()()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(walls), peak / MIB, result


def speed() -> Table:
    """The table of wall times."""
    table = Table(title="Coflows over links of 50 GB/s, 64 MiB an endpoint, loads by Zipf's law with exponent 0.6")
    for name in ("what", "target", "wall", "peak memory", "simulated"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def row(what: str, target: str, make: Callable[[], Callable[[], list[float]]]) -> None:
        wall, peak, result = measured(make)
        seconds = ", ".join(f"{1e3 * s:.3f}" for s in result)
        table.add_row(what, target, f"{1e3 * wall:.2f} ms", f"{peak:.0f} MiB", f"{seconds} ms")

    def one(n: int, split: Callable[[Floats], tuple[Part, ...]], count: int) -> Callable[[], Callable[[], list[float]]]:
        def make() -> Callable[[], list[float]]:
            pairs = [zipf(n, 0.6, seed) * (1.0 if seed == 1 else 0.25) for seed in range(1, count + 1)]
            return lambda: switch_case(n, split, pairs)

        return make

    def tree() -> Callable[[], list[float]]:
        pairs = zipf(2048, 0.6, 1)
        return lambda: tree_case(2048, pairs)

    row("all-to-all, switch, 256 endpoints", "10 ms, 100 MB", one(256, over_a_switch, 1))
    row("all-to-all, switch, 1,024 endpoints", "20 ms, 100 MB", one(1024, over_a_switch, 1))
    row("two all-to-alls by flow size, switch, 256", "", one(256, by_size, 2))
    row("two all-to-alls by flow size, switch, 1,024", "", one(1024, by_size, 2))
    row("three staggered, by level, fat tree 4:1, 2,048", "200 ms", tree)
    return table


def overhead() -> Table:
    """What the engine pays for one transfer of a known template, SimPy included, and for a solve."""
    table = Table(title="One transfer, SimPy's part included (20,000 transfers)")
    for name in ("what", "target", "wall"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def transfers(processes: int, links: int, shared: bool) -> float:
        env = simpy.Environment()
        fluid = FluidProcess(env, Fluid(np.full(links * processes, PORT)))
        turns = 20_000 // processes

        def rank(k: int) -> Generator[simpy.Event, Any, None]:
            bytes_ = np.full(links, 1e6 + 1e3 * k)
            at = np.arange(links) + (0 if shared else k * links)
            template = Coflow("c", "test", (Part("x", at, bytes_, np.ones(links), 1e6 + 1e3 * k),), latency_s=1e-6)
            for _ in range(turns):
                yield fluid.transfer(template)

        for k in range(processes):
            env.process(rank(k))
        begin = time.perf_counter()
        env.run()
        return (time.perf_counter() - begin) / (turns * processes)

    for what, target, args in (
        ("1 rank, 16 links", "20 µs", (1, 16, False)),
        ("1 rank, 4,096 links", "20 µs", (1, 4096, False)),
        ("64 ranks apart, 16 links each", "20 µs", (64, 16, False)),
        ("4 ranks on the same 4,096 links", "", (4, 4096, True)),
    ):
        table.add_row(what, target, f"{1e6 * min(transfers(*args) for _ in range(3)):.1f} µs")
    parts = [p for seed in (1, 2, 3) for p in by_size(zipf(1024, 0.6, seed))]
    begin = time.perf_counter()
    fair_rates(parts, np.full(2048, PORT))
    table.add_row(f"a solve of {len(parts)} parts on 2,048 links", "", f"{1e3 * (time.perf_counter() - begin):.1f} ms")
    return table


def against_flows() -> tuple[Table, Table]:
    """At 64 endpoints beside every flow by itself: wall times as a ratio, and errors."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from reference_flows import Collective, by_coflows, even_scenarios, simulate, skewed_scenarios, switch, tree

    def given(
        split: Callable[[Floats], tuple[Part, ...]], pairs: list[Floats]
    ) -> Callable[[], Callable[[], list[float]]]:
        return lambda: lambda: switch_case(64, split, pairs)

    ratios = Table(title="64 endpoints on a switch, from the same matrices: wall time")
    for name in ("what", "coflows", "per flow", "ratio", "largest error"):
        ratios.add_column(name, justify="left" if name == "what" else "right")
    dispatch, small = zipf(64, 0.6, 1), zipf(64, 0.6, 2) / 4
    for what, split, pairs in (
        ("skewed all-to-all", over_a_switch, [dispatch]),
        ("two skewed all-to-alls, by flow size", by_size, [dispatch, small]),
        ("dispatch and its combine, by flow size", by_size, [dispatch, small.T]),
    ):
        fast, _, got = measured(given(split, pairs))
        begin = time.perf_counter()
        exact = np.array(simulate(switch(64), [Collective(what, [p]) for p in pairs]))
        slow = time.perf_counter() - begin
        error = np.abs(np.array(got) / exact - 1).max()
        ratios.add_row(what, f"{1e3 * fast:.2f} ms", f"{1e3 * slow:.0f} ms", f"x{slow / fast:.0f}", f"{error:.1%}")

    errors = Table(title="64 endpoints: largest error of an end, by how collectives are split into parts")
    for name in ("net", "what", "by level", "by flow size", "by destination", "as the engine cuts"):
        errors.add_column(name, justify="left" if name in ("net", "what") else "right")
    for net in (switch(64), tree(64, 16, 4)):
        for what, collectives in (even_scenarios(64) | skewed_scenarios(64)).items():
            exact = np.array(simulate(net, collectives))
            cells = []
            # A stage of a chain is one part, so that chains are split by level only.
            chained = any(len(c.stages) > 1 for c in collectives)
            for how in ("level", "size", "end", "cut"):
                if chained and how != "level":
                    cells.append("")
                    continue
                error = np.array(by_coflows(net, collectives, how)) / exact - 1
                cells.append(f"{error[np.abs(error).argmax()]:+.1%}")
            errors.add_row(net.name, what, *cells)
    return ratios, errors


def main() -> None:
    """Print the four tables."""
    console = Console(width=140)
    for table in (speed(), overhead(), *against_flows()):
        console.print(table)


if __name__ == "__main__":
    main()
