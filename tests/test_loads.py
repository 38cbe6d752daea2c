"""Loads on links against paths walked one pair at a time, by other code than the product's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.network.build_switched import switched_topology
from simulator.network.fabrics import Fabric
from simulator.network.layouts import SwitchedLayout, TorusLayout
from simulator.network.loads import Loads, Rail, flow_loads, pair_loads, rank_one_loads
from simulator.network.topology import Topology, topology_of

Path = list[tuple[int, int]]
RAILS: tuple[Rail, ...] = ("direct", "pxn", "forward")


def torus(dims: tuple[int, ...], wrap: tuple[bool, ...], slices: int = 1, cores: int = 1) -> Topology:
    """Any torus, with the links of v5p, or of v3 where a chip is two devices."""
    spec = {"chip": "tpu-v5p" if cores == 1 else "tpu-v3", "slice": "4x4x4" if cores == 1 else "4x4", "slices": slices}
    base = resolve_cluster(spec)
    assert base.torus is not None
    devices = int(np.prod(dims)) * slices * cores
    name = f"{dims} {wrap} {slices} {cores}"
    return topology_of(
        replace(base, name=name, devices=devices, torus=replace(base.torus, dims=dims, wrap=wrap), slices=slices)
    )


def torus_paths(t: Topology, source: int, target: int) -> Iterator[tuple[float, Path]]:
    """All paths of a pair with their share of it: dimension order, both ways round where these are equally long."""
    layout = t.layout
    assert isinstance(layout, TorusLayout)
    per_chip, chips = layout.devices_per_chip, layout.slice_chips
    a, b = source // per_chip, target // per_chip
    first = 0 if per_chip == 1 else t.devices
    hub = t.nodes - 1
    if a // chips != b // chips:
        yield 1.0, [(source, hub), (hub, target)]
        return
    ways: list[tuple[float, Path, list[int]]] = [(1.0, [], list(layout.coordinates(a)))]
    base = first + a // chips * chips
    for axis, goal in enumerate(layout.coordinates(b)):
        longer = []
        n, closed = layout.dims[axis], layout.wrap[axis] and layout.dims[axis] > 2
        for share, path, at in ways:
            distance = goal - at[axis]
            turns = [x for x in (distance, distance - n, distance + n) if closed or x == distance]
            shortest = min(map(abs, turns))
            best = [x for x in turns if abs(x) == shortest]
            for steps in best:
                here, way = list(at), list(path)
                for _ in range(abs(steps)):
                    before = int(np.ravel_multi_index(here, layout.dims))
                    here[axis] = (here[axis] + (1 if steps > 0 else -1)) % n
                    way.append((base + before, base + int(np.ravel_multi_index(here, layout.dims))))
                longer.append((share / len(best), way, here))
        ways = longer
    for share, path, _ in ways:
        yield share, [(source, first + a), *path, (first + b, target)] if per_chip > 1 else path


def tree_paths(t: Topology, rail: Rail, source: int, target: int) -> Iterator[tuple[float, Path]]:
    """All paths of a pair over NVSwitch, leaves, spines and cores, with their share of it."""
    layout = t.layout
    assert isinstance(layout, SwitchedLayout) and layout.crossbar
    n, m = t.devices, layout.domain
    switches = layout.domains if m > 1 else 0

    def up(a: int, b: int) -> Path:
        return [(a, n + a // m), (n + a // m, b)] if a != b else []

    if source // m == target // m:
        yield 1.0, up(source, target)
        return
    out, last, r = source, target, layout.rails
    if rail == "pxn":
        out = source // r * r + target % r
    elif rail == "forward":
        last = target // r * r + source % r
    before, after = up(source, out), up(last, target)
    leaf = [n + switches + int(layout.leaf[x]) for x in (out, last)]
    if leaf[0] == leaf[1]:
        yield 1.0, [*before, (out, leaf[0]), (leaf[0], last), *after]
        return
    leaves, spines = layout.pod.size, layout.leaf_up.shape[1]
    pods = [int(layout.pod[layout.leaf[x]]) for x in (out, last)]
    first_spine = n + switches + leaves
    for s in range(spines):
        spine = [first_spine + p * spines + s for p in pods]
        middle: list[Path] = [[]]
        if pods[0] != pods[1]:
            cores = layout.core_up.shape[2]
            first_core = first_spine + (int(layout.pod.max()) + 1) * spines + s * cores
            middle = [[(spine[0], first_core + c), (first_core + c, spine[1])] for c in range(cores)]
        for hops in middle:
            path = [*before, (out, leaf[0]), (leaf[0], spine[0]), *hops, (spine[1], leaf[1]), (leaf[1], last), *after]
            yield 1.0 / spines / len(middle), path


def enumerated(t: Topology, pairs: np.ndarray, paths: object) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Bytes on every link by highest level crossed, and the largest flow of each, path by path."""
    link = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(t.source, t.target, strict=True))}
    out: dict[str, np.ndarray] = {}
    largest: dict[str, float] = {}
    for a, b in np.argwhere(pairs):
        for share, path in paths(t, int(a), int(b)):  # type: ignore[operator]
            ids = [link[hop] for hop in path]
            level = t.level_names[max(t.level[i] for i in ids)]
            load = out.setdefault(level, np.zeros(t.links))
            for i in ids:
                load[i] += share * pairs[a, b]
            largest[level] = max(largest.get(level, 0.0), float(pairs[a, b]))
    return out, largest


def assert_same(t: Topology, loads: Loads, truth: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    by_level, largest = truth
    assert [p.level for p in loads.parts] == [name for name in t.level_names if name in by_level]
    for p in loads.parts:
        dense = np.zeros(t.links)
        dense[p.links] = p.bytes
        np.testing.assert_allclose(dense, by_level[p.level], rtol=1e-9, atol=1e-12)
        assert p.bytes.min() > 0 and p.flows.min() > 0
        assert p.largest_flow_bytes == pytest.approx(largest[p.level])


def random_pairs(n: int, seed: int, share: float = 0.7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = rng.random((n, n)) * (rng.random((n, n)) < share)
    np.fill_diagonal(out, 0.0)
    return out


SHAPES = [
    ((4, 4), (True, True), 1, 1),
    ((3, 5), (True, False), 1, 1),
    ((6, 2), (True, False), 1, 1),
    ((5, 4), (False, False), 1, 2),
    ((3, 4, 2), (True, True, False), 1, 1),
    ((2, 3, 5), (False, True, True), 1, 1),
    ((4, 1, 3), (True, False, False), 1, 1),
    ((2, 3), (False, True), 2, 2),
    ((3, 2, 2), (True, False, False), 3, 1),
    ((7,), (True,), 1, 1),
]


@pytest.mark.parametrize(("dims", "wrap", "slices", "cores"), SHAPES)
def test_torus_against_walked_paths(dims: tuple[int, ...], wrap: tuple[bool, ...], slices: int, cores: int) -> None:
    t = torus(dims, wrap, slices, cores)
    pairs = random_pairs(t.devices, 1)
    truth = enumerated(t, pairs, torus_paths)
    assert_same(t, pair_loads(t, pairs), truth)
    a, b = np.nonzero(pairs)
    assert_same(t, flow_loads(t, a, b, pairs[a, b]), truth)


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=3), st.integers(0, 9))
def test_any_torus_and_product_within_groups(axes: list[tuple[int, bool]], seed: int) -> None:
    t = torus(tuple(n for n, _ in axes), tuple(w for _, w in axes), 1 + seed % 2, 1 + seed // 2 % 2)
    assert_product_within_groups(t, seed, "direct")


def assert_product_within_groups(t: Topology, seed: int, rail: Rail) -> None:
    """rows x columns in random groups is the matrix of these bytes."""
    rng = np.random.default_rng(seed)
    n = t.devices
    rows, columns = rng.random(n) * (rng.random(n) < 0.8), rng.random(n) * (rng.random(n) < 0.8)
    group = rng.integers(-1, 3, n)
    pairs = np.where((group[:, None] == group) & (group >= 0)[:, None], np.outer(rows, columns), 0.0)
    np.fill_diagonal(pairs, 0.0)
    whole, product = pair_loads(t, pairs, rail), rank_one_loads(t, rows, columns, group, rail)
    assert [p.level for p in whole.parts] == [p.level for p in product.parts]
    for a, b in zip(whole.parts, product.parts, strict=True):
        np.testing.assert_array_equal(a.links, b.links)
        np.testing.assert_allclose(a.bytes, b.bytes, rtol=1e-9)
        np.testing.assert_allclose(a.flows, b.flows, rtol=1e-9)
        assert b.largest_flow_bytes >= a.largest_flow_bytes * (1 - 1e-12)
        if rail != "direct" or a.level not in ("spine", "core"):
            assert b.largest_flow_bytes == pytest.approx(a.largest_flow_bytes)


def fat_tree(nodes: int, per_node: int, fabric: Fabric, thin: float = 1.0) -> Topology:
    spec = {"chip": "h100-sxm", "nodes": nodes, "chips_per_node": per_node, "oversubscription": thin}
    return switched_topology(resolve_cluster(spec), fabric)


# Small switches, so that a few nodes need two and three tiers.
TREES = [
    (2, 4, Fabric(8, 8, 64, 1, "test")),
    (6, 4, Fabric(2, 2, 64, 4, "test")),
    (8, 2, Fabric(2, 2, 4, 2, "test")),
    (7, 4, Fabric(2, 2, 8, 2, "test")),
    (9, 1, Fabric(2, 2, 4, 2, "test")),
]


@pytest.mark.parametrize("rail", RAILS)
@pytest.mark.parametrize(("nodes", "per_node", "fabric"), TREES)
def test_fat_tree_against_all_its_paths(nodes: int, per_node: int, fabric: Fabric, rail: Rail) -> None:
    t = fat_tree(nodes, per_node, fabric)
    pairs = random_pairs(t.devices, 2)
    truth = enumerated(t, pairs, lambda t, a, b: tree_paths(t, rail, a, b))
    assert_same(t, pair_loads(t, pairs, rail), truth)
    for seed in range(3):
        assert_product_within_groups(t, seed, rail)


@pytest.mark.parametrize("spec", ["mi300x-64", "v100-64", "gb200-256", "shazeer-k40-32", "cpu-8"])
@pytest.mark.parametrize("rail", RAILS)
def test_products_on_other_domains(spec: str, rail: Rail) -> None:
    assert_product_within_groups(topology_of(resolve_cluster(spec)), 5, rail)


def hop_by_hop(t: Topology, pairs: np.ndarray) -> np.ndarray:
    """Equal next-hop split by recursion over networkx's shortest path lengths."""
    graph = nx.DiGraph(list(zip(t.source.tolist(), t.target.tolist(), strict=True)))
    link = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(t.source, t.target, strict=True))}
    out = np.zeros(t.links)
    for b in range(t.devices):
        away = dict(nx.single_source_shortest_path_length(graph.reverse(copy=False), b))
        waiting = dict(enumerate(pairs[:, b]))
        for node in sorted(away, key=lambda x: -away[x]):
            amount = waiting.get(node, 0.0)
            if node == b or not amount:
                continue
            hops = [x for x in graph.successors(node) if away.get(x) == away[node] - 1]
            for x in hops:
                out[link[node, x]] += amount / len(hops)
                waiting[x] = waiting.get(x, 0.0) + amount / len(hops)
    return out


def general(t: Topology) -> Topology:
    """The same network without what makes loads fast."""
    return replace(t, layout=None, names=tuple(str(i) for i in range(t.nodes)))


@pytest.mark.parametrize("shape", [((3, 4), (True, False)), ((3, 3, 2), (True, True, False))])
def test_general_graph_against_networkx(shape: tuple[tuple[int, ...], tuple[bool, ...]]) -> None:
    for t in (general(torus(*shape)), general(fat_tree(4, 2, TREES[2][2])), general(topology_of(v100()))):
        pairs = random_pairs(t.devices, 3)
        np.testing.assert_allclose(pair_loads(t, pairs).bytes, hop_by_hop(t, pairs), rtol=1e-9, atol=1e-12)
        a, b = np.nonzero(pairs)
        np.testing.assert_allclose(flow_loads(t, a, b, pairs[a, b]).bytes, hop_by_hop(t, pairs), atol=1e-12)
        assert_product_within_groups(t, 4, "direct")


def v100() -> Cluster:
    return resolve_cluster({"chip": "v100", "nodes": 1})


def test_general_graph_is_the_fat_tree_where_paths_are_the_same() -> None:
    """One device a node: no NVLink to go round by, so shortest paths are those of the tree; levels too."""
    t = fat_tree(9, 1, TREES[4][2])
    assert len(t.level_names) == 3
    pairs = random_pairs(9, 6)
    for fast, slow in zip(pair_loads(t, pairs).parts, pair_loads(general(t), pairs).parts, strict=True):
        assert (fast.level, fast.largest_flow_bytes) == (slow.level, slow.largest_flow_bytes)
        np.testing.assert_array_equal(fast.links, slow.links)
        np.testing.assert_allclose(fast.bytes, slow.bytes)
        np.testing.assert_allclose(fast.flows, slow.flows)


def test_all_to_all_on_a_closed_square_is_the_bisection() -> None:
    """Fixed bytes B a device on a wrapped n x n torus: n B / (8 w), on every link."""
    for spec, n in (("v6e-256", 16), ("tpu-v3-2048", 32)):
        t = topology_of(resolve_cluster(spec))
        sent = 1e9
        rows = np.full(t.devices, sent / t.devices)
        loads = rank_one_loads(t, rows, np.ones(t.devices))
        ici = t.level == t.level_names.index("ICI")
        busy = loads.bytes[ici]
        per_chip = t.devices // n**2
        np.testing.assert_allclose(busy, n * sent * per_chip / 8, rtol=1e-12)
        # Bytes over largest flow is the number of flows: what fairness weighs them by.
        np.testing.assert_allclose(busy, loads.flows[ici] * loads.largest_flow_bytes["ICI"])


def test_bytes_are_kept() -> None:
    """What enters a network leaves it: at every node that is no end of a flow, in and out are equal."""
    for t in (torus((3, 4), (True, False), 2, 2), fat_tree(7, 4, TREES[3][2])):
        pairs = random_pairs(t.devices, 8)
        loads = pair_loads(t, pairs).bytes
        balance = np.bincount(t.source, loads, minlength=t.nodes) - np.bincount(t.target, loads, minlength=t.nodes)
        expected = np.zeros(t.nodes)
        expected[: t.devices] = pairs.sum(axis=1) - pairs.sum(axis=0)
        np.testing.assert_allclose(balance, expected, atol=1e-9)


def test_questions_that_have_no_answer() -> None:
    t = torus((3, 4), (True, False))
    with pytest.raises(QuestionError, match=r"source = 12: .* devices 0 to 11"):
        flow_loads(t, np.array([12]), np.array([0]), 1.0)
    with pytest.raises(QuestionError, match=r"bytes = -1\.0"):
        flow_loads(t, np.array([1]), np.array([0]), -1.0)
    with pytest.raises(QuestionError, match="bytes = nan"):
        pair_loads(t, np.full((12, 12), np.nan))
    with pytest.raises(QuestionError, match=r"shape \(3, 3\)"):
        pair_loads(t, np.zeros((3, 3)))
    with pytest.raises(QuestionError, match="columns: shape"):
        rank_one_loads(t, np.ones(12), np.ones(3))
    assert pair_loads(t, np.eye(12)).parts == ()
