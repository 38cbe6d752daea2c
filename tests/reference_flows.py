"""Every flow by itself: exact max-min rates over small networks, to check coflows against; and the same as coflows.

`simulate` shares no code with the product. A flow has one rate; where its route splits, each link carries the weight
that routing gives it. Rates are max-min fair (progressive filling, the lowest share each round) and constant between
two events: a collective that starts, or flows that finish.

Legend: F flows, L links, N endpoints, U uses (one per flow and link on its route).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Coflow, Part
from simulator.network.flight import TICK_S, ticks
from simulator.network.fluid import Fluid
from simulator.network.splits import quarters, size_class

MIB = 2**20
Route = list[tuple[int, float]]


@dataclass
class Net:
    """Links with bytes/s, routes as (link, weight), and the level of a pair: the highest link it crosses.

    On `one_switch` endpoints share no link with each other.
    """

    name: str
    endpoints: int
    bandwidth: NDArray[np.float64]
    route: Callable[[int, int], Route]
    level: Callable[[int, int], str]
    one_switch: bool = False


def switch(n: int, bytes_per_s: float = 50e9) -> Net:
    """One switch: endpoint i sends on link i and receives on link n + i."""
    ports = np.full(2 * n, bytes_per_s)
    return Net(f"switch {n}", n, ports, lambda s, d: [(s, 1.0), (n + d, 1.0)], lambda s, d: "switch", one_switch=True)


def tree(n: int, leaf: int, oversubscribed: float, bytes_per_s: float = 50e9) -> Net:
    """Leaves of `leaf` endpoints, each with a trunk up and one down of leaf x bytes_per_s / oversubscribed."""
    leaves = n // leaf
    trunk = np.full(2 * leaves, leaf * bytes_per_s / oversubscribed)

    def route(s: int, d: int) -> Route:
        ports = [(s, 1.0), (n + d, 1.0)]
        if s // leaf == d // leaf:
            return ports
        return [*ports, (2 * n + s // leaf, 1.0), (2 * n + leaves + d // leaf, 1.0)]

    return Net(
        f"tree {n}/{leaf}, {oversubscribed:g}:1",
        n,
        np.concatenate([np.full(2 * n, bytes_per_s), trunk]),
        route,
        lambda s, d: "leaf" if s // leaf == d // leaf else "spine",
    )


def torus(rows: int, columns: int, bytes_per_s: float = 50e9) -> Net:
    """Wrapped both ways; rows first, the shorter way round, pairs at equal distance in halves."""
    n = rows * columns

    def link(node: int, axis: int, step: int) -> int:
        return node * 4 + axis * 2 + (step < 0)

    def along(node: int, axis: int, target: int) -> tuple[int, Route]:
        length, stride = (rows, columns) if axis == 0 else (columns, 1)
        at = node // stride % length
        base = node - at * stride
        ahead = (target - at) % length
        ways = [(1, 1.0)] if 2 * ahead < length else [(-1, 1.0)] if 2 * ahead > length else [(1, 0.5), (-1, 0.5)]
        route = []
        for step, weight in ways:
            for hop in range(ahead if step > 0 else length - ahead):
                route.append((link(base + (at + step * hop) % length * stride, axis, step), weight))
        return base + target * stride, route if ahead else []

    def route(s: int, d: int) -> Route:
        turn, first = along(s, 0, d // columns)
        return first + along(turn, 1, d % columns)[1]

    return Net(f"torus {rows}x{columns}", n, np.full(4 * n, bytes_per_s), route, lambda s, d: "torus")


def all_to_all(n: int, bytes_per_endpoint: float, members: Iterable[int] | None = None) -> NDArray[np.float64]:
    """Pair bytes (N, N) of an even all-to-all; what an endpoint keeps is not sent."""
    group = list(range(n) if members is None else members)
    pairs = np.zeros((n, n))
    pairs[np.ix_(group, group)] = bytes_per_endpoint / len(group)
    np.fill_diagonal(pairs, 0)
    return pairs


def skewed(n: int, bytes_per_endpoint: float, exponent: float, seed: int) -> NDArray[np.float64]:
    """Pair bytes (N, N) of a dispatch whose destinations' loads follow Zipf's law, hottest anywhere."""
    load = np.random.default_rng(seed).permutation(np.arange(1, n + 1.0) ** -exponent)
    pairs = np.tile(bytes_per_endpoint * load / load.sum(), (n, 1))
    np.fill_diagonal(pairs, 0)
    return pairs


def chance(n: int, tokens: int, exponent: float, seed: int) -> NDArray[np.float64]:
    """Pair bytes (N, N) of `tokens` of 14 KiB an endpoint, each drawn to a destination: no two pairs are alike."""
    rng = np.random.default_rng(seed)
    load = rng.permutation(np.arange(1, n + 1.0) ** -exponent)
    pairs = np.asarray(14336.0 * rng.multinomial(tokens, load / load.sum(), size=n), np.float64)
    np.fill_diagonal(pairs, 0)
    return pairs


def ring(n: int, bytes_per_endpoint: float, members: Iterable[int] | None = None) -> NDArray[np.float64]:
    """Pair bytes (N, N) of a ring: everyone sends all its bytes to the next."""
    group = list(range(n) if members is None else members)
    pairs = np.zeros((n, n))
    pairs[group, group[1:] + group[:1]] = bytes_per_endpoint
    return pairs


@dataclass
class Collective:
    """Stages of pair bytes (N, N), in turn, from `start_s` on; `fine` is the end that sets a flow's size."""

    name: str
    stages: list[NDArray[np.float64]]
    start_s: float = 0.0
    fine: str = "level"


def to_coflow(net: Net, collective: Collective, split: str = "level") -> Coflow:
    """The collective as the product sees it: a part for each stage and level.

    `split` goes further: "cut" is the product's cut for contention, by classes of size and quarters of the end that
    does not set it; "end" is by destination or source, whichever sets the size; "size" by classes of size alone. A
    stage of a chain must be one part, as the record has it: of one level.
    """
    parts = []
    for pairs in collective.stages:
        groups: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
        ends = np.argwhere(pairs > 0)
        sizes = size_class(pairs[pairs > 0]).tolist()
        quarter = quarters(net.endpoints, net.one_switch).tolist()
        for (s, d), size in zip(ends.tolist(), sizes, strict=True):
            mine, other = (s, d) if collective.fine == "source" else (d, s)
            keys = {"level": (0, 0), "end": (mine, 0), "size": (size, 0), "cut": (size, quarter[other])}
            groups.setdefault((net.level(s, d), *keys[split]), []).append((s, d))
        assert len(collective.stages) == 1 or len(groups) == 1, "a stage of a chain is one part"
        parts += [_part(net, level, pairs, members) for (level, *_), members in sorted(groups.items())]
    return Coflow(collective.name, "test", tuple(parts), chained=len(collective.stages) > 1)


def _part(net: Net, level: str, pairs: NDArray[np.float64], members: list[tuple[int, int]]) -> Part:
    uses = [(link, weight, pairs[s, d]) for s, d in members for link, weight in net.route(s, d)]
    link = np.array([u[0] for u in uses])
    weight = np.array([u[1] for u in uses])
    size = np.array([u[2] for u in uses])
    links, where = np.unique(link, return_inverse=True)
    return Part(
        level,
        links,
        np.bincount(where, weight * size).astype(np.float64),
        np.bincount(where, weight).astype(np.float64),
        max(float(pairs[s, d]) for s, d in members),
    )


def max_min(
    flow_U: NDArray[np.int64],
    link_U: NDArray[np.int64],
    weight_U: NDArray[np.float64],
    room: NDArray[np.float64],
    n: int,
) -> NDArray[np.float64]:
    """Rates (n; bytes/s) of flows, each using links with a weight, over links with `room` (L; bytes/s)."""
    rate = np.zeros(n)
    room = room.copy()
    while flow_U.size:
        crossing = np.bincount(link_U, weight_U, minlength=room.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(crossing > 0, room / crossing, np.inf)
        lowest = share.min()
        saturated = share <= lowest * (1 + 1e-10)
        stuck = np.zeros(n, dtype=bool)
        stuck[flow_U[saturated[link_U]]] = True
        rate[stuck] = lowest
        gone = stuck[flow_U]
        room -= lowest * np.bincount(link_U[gone], weight_U[gone], minlength=room.size)
        room = np.maximum(room, 0.0)
        flow_U, link_U, weight_U = flow_U[~gone], link_U[~gone], weight_U[~gone]
    return rate


def simulate(net: Net, collectives: list[Collective]) -> list[float]:
    """When each collective's last flow finishes, in seconds from 0."""
    routes: dict[tuple[int, int], Route] = {}
    owner: list[tuple[int, int]] = []
    left: list[float] = []
    uses: list[tuple[int, int, float]] = []
    for c, collective in enumerate(collectives):
        for number, pairs in enumerate(collective.stages):
            for s, d in np.argwhere(pairs > 0).tolist():
                route = routes.setdefault((s, d), net.route(s, d))
                uses += [(len(owner), link, weight) for link, weight in route]
                owner.append((c, number))
                left.append(pairs[s, d])
    flow_U = np.array([u[0] for u in uses])
    link_U = np.array([u[1] for u in uses])
    weight_U = np.array([u[2] for u in uses])
    left_F = np.array(left)
    size_F = left_F.copy()
    job_F, stage_F = np.array(owner).T
    begin = [collective.start_s for collective in collectives]
    stage = [0] * len(collectives)
    done = [-1.0] * len(collectives)
    now = 0.0
    while min(done) < 0:
        started = np.array([b <= now for b in begin])
        active = started[job_F] & (stage_F == np.array(stage)[job_F]) & (left_F > 0)
        kept = active[flow_U]
        rate = max_min(flow_U[kept], link_U[kept], weight_U[kept], net.bandwidth, left_F.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            until = np.where(active, left_F / rate, np.inf)
        step = min(until.min(), *(b - now for b in begin if b > now), np.inf)
        left_F = np.where(active, left_F - rate * step, left_F)
        left_F[active & (left_F <= 1e-9 * size_F)] = 0.0
        # A start that is due is met exactly, not by a sum.
        now = min([b for b in begin if now < b <= now + step * (1 + 1e-12)], default=now + step)
        for c in range(len(collectives)):
            while done[c] < 0 and begin[c] <= now and not left_F[(job_F == c) & (stage_F == stage[c])].any():
                stage[c] += 1
                if stage[c] == len(collectives[c].stages):
                    done[c] = now
    return done


def by_coflows(net: Net, collectives: list[Collective], split: str) -> list[float]:
    """The same, in seconds, by the product."""
    fluid = Fluid(net.bandwidth)
    flights = [fluid.start(to_coflow(net, c, split), ticks(c.start_s)) for c in collectives]
    fluid.finish()
    return [flight.ended * TICK_S for flight in flights if flight.ended is not None]


def dispatch(n: int, mib: float, exponent: float, seed: int, start_s: float = 0.0) -> Collective:
    """A skewed all-to-all to where the experts are."""
    return Collective("dispatch", [skewed(n, mib * MIB, exponent, seed)], start_s, "destination")


def combine(n: int, mib: float, exponent: float, seed: int, start_s: float = 0.0) -> Collective:
    """The way back."""
    return Collective("combine", [skewed(n, mib * MIB, exponent, seed).T], start_s, "source")


def even_scenarios(n: int) -> dict[str, list[Collective]]:
    """Collectives whose flows are of one size."""

    def a2a(mib: float, start_s: float = 0.0, members: Iterable[int] | None = None) -> Collective:
        return Collective("all-to-all", [all_to_all(n, mib * MIB, members)], start_s)

    neighbours = sum(all_to_all(n, 64 * MIB, range(first, first + 8)) for first in range(0, n, 8))
    stride = max(8, n // 4)
    strided = sum(ring(n, 64 * MIB, range(first, n, stride)) for first in range(stride))
    assert isinstance(neighbours, np.ndarray) and isinstance(strided, np.ndarray)
    return {
        "all-to-all alone": [a2a(64)],
        "two all-to-alls, 64 and 8 MiB": [a2a(64), a2a(8)],
        "all-to-all and ring": [a2a(64), Collective("ring", [ring(n, 64 * MIB)])],
        "all-to-all and small ring": [a2a(64), Collective("ring", [ring(n, 4 * MIB)])],
        "groups of 8, rings across, staggered": [
            Collective("all-to-alls", [neighbours]),
            Collective("rings", [strided], 2e-4),
        ],
        "three staggered": [a2a(64), a2a(64, 3e-4), Collective("ring", [ring(n, 32 * MIB)], 5e-4)],
        "interleaved groups": [a2a(64, 0, range(0, n, 2)), a2a(64, 0, range(0, n, 4)), a2a(64, 0, range(n // 2))],
        "chain beside an all-to-all": [Collective("chain", [neighbours, strided]), a2a(32, 1e-4)],
    }


def skewed_scenarios(n: int) -> dict[str, list[Collective]]:
    """Collectives of which one at least has hot destinations or sources (Zipf's law, exponent in the name)."""
    out: dict[str, list[Collective]] = {}
    for z in (0.3, 0.6, 1.0):
        out |= {
            f"Zipf {z} alone": [dispatch(n, 64, z, 1)],
            f"Zipf {z}, two, 64 and 16 MiB": [dispatch(n, 64, z, 1), dispatch(n, 16, z, 2)],
            f"Zipf {z}, dispatch and combine": [dispatch(n, 64, z, 1), combine(n, 64, z, 1, 1e-4)],
            f"Zipf {z} and ring": [dispatch(n, 64, z, 1), Collective("ring", [ring(n, 64 * MIB)], 0.0, "source")],
            f"Zipf {z} and even, later": [
                dispatch(n, 64, z, 1),
                Collective("all-to-all", [all_to_all(n, 64 * MIB)], 4e-4),
            ],
        }
    return out


def unrelated_scenarios(n: int) -> dict[str, list[Collective]]:
    """A dispatch beside the combine of other experts: a hot destination has a source that is busy elsewhere."""
    return {
        "Zipf 0.6, 64 MiB, other combine 16": [dispatch(n, 64, 0.6, 1), combine(n, 16, 0.6, 2)],
        "Zipf 1.0, 64 MiB, other combine 64": [dispatch(n, 64, 1.0, 1), combine(n, 64, 1.0, 2)],
    }


def chance_scenarios(n: int) -> dict[str, list[Collective]]:
    """Tokens drawn at random, with and without skew, 64 for an average pair."""
    out: dict[str, list[Collective]] = {}
    for z in (0.0, 0.6):
        first = Collective("dispatch", [chance(n, 64 * n, z, 1)], 0.0, "destination")
        out |= {
            f"chance, Zipf {z}, alone": [first],
            f"chance, Zipf {z}, two": [
                first,
                Collective("dispatch", [chance(n, 32 * n, z, 2)], 1e-5, "destination"),
            ],
            f"chance, Zipf {z}, dispatch and combine": [
                first,
                Collective("combine", [chance(n, 64 * n, z, 2).T], 1e-5, "source"),
            ],
        }
    return out
