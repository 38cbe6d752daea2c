"""Collectives as coflows: beside the closed form, beside bounds, and one group beside all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.network.coflow import Coflow
from simulator.network.collectives import PASSES, collective_rate
from simulator.network.fluid import Fluid
from simulator.network.folding import fold
from simulator.network.layouts import SwitchedLayout
from simulator.network.templates import KINDS, Templates, solo_seconds
from simulator.network.topology import topology_of

TWO_SLICES = "2 slices of v5p 4x4x4"
SPECS: dict[str, Any] = {
    "tpu-v3-32": "tpu-v3-32",
    "tpu-v3-2048": "tpu-v3-2048",
    "v5p 4x4x4": {"chip": "tpu-v5p", "slice": "4x4x4"},
    "v5p 4x4x8": {"chip": "tpu-v5p", "slice": "4x4x8"},
    "v5e 4x8": {"chip": "tpu-v5e", "slice": "4x8"},
    "v6e 16x16": {"chip": "tpu-v6e", "slice": "16x16"},
    "7x 4x4x4": {"chip": "tpu7x", "slice": "4x4x4"},
    TWO_SLICES: {"chip": "tpu-v5p", "slice": "4x4x4", "slices": 2},
    "h100-64": "h100-64",
    "h800-2048": "h800-2048",
    "selene-1120": "selene-1120",
    "gb200-256": "gb200-256",
    "mi300x-64": "mi300x-64",
    "shazeer-k40-32": "shazeer-k40-32",
    "cpu-8": "cpu-8",
}


@cache
def templates(name: str) -> Templates:
    return Templates(resolve_cluster(SPECS[name]))


def regular_groups(cluster: Cluster) -> list[tuple[int, int]]:
    sizes = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    return [(k, s) for k in sizes for s in (1, 2, 4, 8, 16, 64, 256) if cluster.devices % (k * s) == 0]


def halfway_round(t: Templates, size: int, stride: int) -> bool:
    """Whether groups send to the opposite side of a closed axis: the closed form knows one way round only."""
    torus = t.cluster.torus
    if torus is None:
        return False
    reach, rest = [], stride / t.cluster.chip.devices_per_chip
    for n, wrap in zip(reversed(torus.dims), reversed(torus.wrap), strict=True):
        reach.append(wrap and n > 2 and rest == n / 2)
        rest /= n
    return any(reach)


def one_link_a_pair(t: Templates, kind: str, size: int, stride: int) -> bool:
    """Whether a group has two to seven of the eight devices of an xGMI node, so not all seven links of a device."""
    inside = min(size, 8 // stride)
    return t.cluster.chip.scale_up.kind == "full_mesh" and (1 < inside < 8 or (kind == "permute" and inside > 1))


@pytest.mark.parametrize("name", SPECS)
def test_alone_a_template_takes_what_the_closed_form_says(name: str) -> None:
    t = templates(name)
    for kind in KINDS:
        for size, stride in regular_groups(t.cluster):
            for sent in (1.0, 1e6, 1e9):
                coflow = t.collective(kind, size, stride, sent)
                ours = solo_seconds(coflow, t.topology)
                theirs = collective_rate(t.cluster, kind, size, stride).seconds(sent)
                where = f"{kind} of {sent:g} bytes, {size} members {stride} apart"
                if kind == "permute" and halfway_round(t, size, stride):
                    assert theirs / 2 <= ours <= theirs * (1 + 1e-9), where
                elif one_link_a_pair(t, kind, size, stride):
                    # The closed form gives a pair all seven links: it is up to seven times too fast.
                    assert theirs * (1 - 1e-9) <= ours <= 7.001 * theirs, where
                else:
                    assert ours == pytest.approx(theirs, rel=1e-9), where


@pytest.mark.parametrize("name", [n for n in SPECS if n != "tpu-v3-2048"])
def test_in_flight_alone_and_folded_it_takes_that_long(name: str) -> None:
    """The rate solver agrees, over all links and over one link of every class."""
    t = templates(name)
    for kind in KINDS:
        for size, stride in ((4, 1), (8, 4), (16, 2), (t.cluster.devices, 1)):
            if t.cluster.devices % (size * stride):
                continue
            coflow = t.collective(kind, size, stride, 1e8)
            expected = solo_seconds(coflow, t.topology)
            folded, bandwidth, kept, class_of = fold([coflow], t.topology.bandwidth_bytes_per_s)
            assert len(kept) <= 40 and class_of.max() == len(kept) - 1
            for one, rates in ((coflow, t.topology.bandwidth_bytes_per_s), (folded[0], bandwidth)):
                fluid = Fluid(rates)
                flight = fluid.start(one, 0)
                fluid.finish()
                assert flight.seconds == pytest.approx(expected, rel=1e-6, abs=1e-8), (kind, size, stride)


def vectors(t: Templates, coflow: Coflow) -> np.ndarray:
    """Bytes and flows on every link, by level: (levels x 2 x links)."""
    out = np.zeros((len(t.topology.level_names), 2, t.topology.links))
    for p in coflow.parts:
        level = t.topology.level_names.index(p.level)
        out[level, 0, p.links] += p.bytes
        out[level, 1, p.links] += p.flows
    return out


@pytest.mark.parametrize("name", ["v5p 4x4x8", "7x 4x4x4", TWO_SLICES, "h100-64", "gb200-256", "mi300x-64", "v5e 4x8"])
def test_all_groups_are_the_sum_of_each(name: str) -> None:
    t = templates(name)
    for kind in KINDS:
        for size, stride in ((4, 1), (4, 4), (8, 2), (3, 2), (12, 1), (5, 1)):
            if size * stride > t.cluster.devices:
                continue
            count = len(t.members(size, stride))
            whole = t.collective(kind, size, stride, 1e6)
            each = [vectors(t, t.collective(kind, size, stride, 1e6, groups=g)) for g in range(count)]
            # A phase of a chain is one part, under the highest level of all its groups.
            axes = (0, 1) if whole.chained else (0,)
            ours, single = (np.sum(x, axis=axes) for x in ([vectors(t, whole)], each))
            np.testing.assert_allclose(ours, single, rtol=1e-9, err_msg=f"{kind} {size} {stride}")


@given(
    st.sampled_from(["v5p 4x4x8", "7x 4x4x4", "v5e 4x8", "h100-64", "gb200-256", "mi300x-64", TWO_SLICES]),
    st.sampled_from(KINDS),
    st.integers(2, 24),
    st.integers(1, 12),
    st.data(),
)
def test_no_algorithm_beats_ports_or_bisection(
    name: str, kind: str, size: int, stride: int, data: st.DataObject
) -> None:
    """What must leave a device, and what must cross any cut of the devices, takes its time on the links there."""
    t = templates(name)
    topology = t.topology
    if size * stride > t.cluster.devices:
        return
    algorithms = {"all_reduce": (None, "ring", "tree"), "all_to_all": (None, "hierarchical")}.get(kind, (None,))
    chosen = data.draw(st.sampled_from(algorithms))
    members = t.members(size, stride)
    try:
        coflow = t.collective(kind, size, stride, 1.0, algorithm=chosen)
    except QuestionError:
        assert chosen == "hierarchical"
        return
    seconds = solo_seconds(coflow, topology) - coflow.latency_s
    # A random half of the devices, with the switches wherever they help most (a minimum cut). Cores of a chip go
    # together, for what they exchange is not counted.
    per_chip = t.cluster.chip.devices_per_chip
    side = np.repeat(
        np.array(
            data.draw(
                st.lists(st.booleans(), min_size=t.cluster.devices // per_chip, max_size=t.cluster.devices // per_chip)
            )
        ),
        per_chip,
    )
    if side.all() or not side.any():
        side[:per_chip] = not side[0]
    inside = side[members].sum(axis=1)
    crossing = {
        "all_to_all": inside * (size - inside) / size,
        "permute": (side[members] & ~side[np.roll(members, -1, axis=1)]).sum(axis=1),
    }.get(kind)
    if crossing is None:
        # Someone outside needs what only those inside have, at least their parts of it (the sum may be added inside).
        divided = (inside > 0) & (inside < size)
        share = {"all_gather": inside / size, "reduce_scatter": (size - inside) / size, "all_reduce": 1.0}[kind]
        crossing = divided * share
    assert seconds >= crossing.sum() / minimum_cut(t, side) * (1 - 1e-9)


def minimum_cut(t: Templates, side: np.ndarray) -> float:
    """Bytes/s out of the devices of one side, switches placed so as to make it least."""
    graph = nx.DiGraph()
    topology = t.topology
    ends = zip(topology.source.tolist(), topology.target.tolist(), topology.bandwidth_bytes_per_s, strict=True)
    for source, target, rate in ends:
        a, b = (("in" if side[x] else "out") if x < topology.devices else x for x in (source, target))
        if a != b:
            old = graph.get_edge_data(a, b, {"capacity": 0.0})["capacity"]
            graph.add_edge(a, b, capacity=old + rate)
    return float(nx.minimum_cut_value(graph, "in", "out"))


def test_uneven_all_to_all_makes_a_hot_link() -> None:
    """A matrix of equal bytes is the even template; a hot expert's device receives what it must."""
    for name in ("h800-2048", "v5p 4x4x8", "mi300x-64", TWO_SLICES):
        t = templates(name)
        members = t.members(16, 2)
        even = vectors(t, t.collective("all_to_all", 16, 2, 1e6))
        flat = np.full((16, 16), 1e6 / 16)
        for traffic in (flat, np.broadcast_to(flat, (len(members), 16, 16)), (np.full(16, 1e6 / 16), np.ones(16))):
            np.testing.assert_allclose(vectors(t, t.all_to_all_matrix(members, traffic)), even, rtol=1e-9)
        load = np.ones(16)
        load[3] = 9.0
        rows = np.random.default_rng(0).random(16)
        matrix = t.all_to_all_matrix(members, np.outer(rows, load))
        product = t.all_to_all_matrix(members, (rows, load))
        np.testing.assert_allclose(vectors(t, matrix), vectors(t, product), rtol=1e-9)
    port = topology_of(resolve_cluster("h100-64"))
    t = templates("h100-64")
    coflow = t.all_to_all_matrix(np.arange(0, 64, 8), (np.ones(8), load[:8]))
    hot = {port.link_name(int(i)): b for p in coflow.parts for i, b in zip(p.links, p.bytes, strict=True)}
    out = t.cluster.levels[-1]
    assert hot["InfiniBand in gpu 0 of node 3"] == pytest.approx(7 * 9 / out.all_to_all_efficiency)


def test_transports_of_deepep() -> None:
    """A token crosses to a node once and is forwarded there in full: fewer bytes on cards, more on NVLink."""
    t = templates("h800-2048")
    inside, out = t.cluster.levels
    sent, share = 64e6, 0.4
    plain = t.collective("all_to_all", 64, 1, sent)
    once = t.collective("all_to_all", 64, 1, sent, transport="deepep", between=share)
    layout = t.topology.layout
    assert isinstance(layout, SwitchedLayout)
    loads = [vectors(t, c)[:, 0].sum(axis=0) for c in (plain, once)]
    across = 56 / 64 * sent
    np.testing.assert_allclose(loads[0][layout.nic_out], across / out.all_to_all_efficiency)
    np.testing.assert_allclose(loads[1][layout.nic_out], share * across / out.all_to_all_efficiency)
    forwarded = (7 / 64 + 56 / 64 * 7 / 8) * sent
    np.testing.assert_allclose(loads[1][layout.up_in], forwarded / inside.all_to_all_efficiency)
    np.testing.assert_allclose(loads[1][layout.up_out], forwarded / inside.all_to_all_efficiency)
    # One flow a destination node, eight times the bytes.
    leaf = next(p for p in once.parts if p.level == "leaf")
    assert leaf.largest_flow_bytes == pytest.approx(8 * share * sent / 64 / out.all_to_all_efficiency)


def test_hierarchical_is_a_chain_of_two_levels() -> None:
    t = templates("h100-64")
    inside, out = t.cluster.levels
    coflow = t.collective("all_to_all", 64, 1, 1e9, algorithm="hierarchical")
    first = 7 / 8 * 1e9 / (inside.bytes_per_s * inside.all_to_all_efficiency)
    second = 7 / 8 * 1e9 / (out.bytes_per_s * out.all_to_all_efficiency)
    assert coflow.chained and solo_seconds(coflow, t.topology) == pytest.approx(first + second + coflow.latency_s)
    with pytest.raises(QuestionError, match="one level of network"):
        templates("v5p 4x4x4").collective("all_to_all", 64, 1, 1e9, algorithm="hierarchical")


def test_thin_spines_slow_down_only_what_crosses_them() -> None:
    """Same-rail traffic of one unit stays below the spines: a quarter of the bandwidth above is no loss to it."""
    for kind, size, stride in (("all_to_all", 8, 8), ("all_reduce", 64, 1), ("all_to_all", 64, 1)):
        times = []
        for thin in (1, 4):
            t = Templates(resolve_cluster({"chip": "h100-sxm", "nodes": 64, "oversubscription": thin}))
            times.append(solo_seconds(t.collective(kind, size, stride, 1e9), t.topology))
            beyond = solo_seconds(t.collective("all_to_all", 512, 1, 1e9), t.topology)
        assert times[0] == pytest.approx(times[1])
    assert beyond > 1.5 * times[1]


def test_the_same_question_has_the_same_object() -> None:
    t = templates("h100-64")
    assert t.collective("all_gather", 8, 8, 1e6) is t.collective("all_gather", 8, 8, 1e6)
    assert t.collective("all_gather", 8, 8, 0.0).parts == ()
    assert t.collective("all_gather", 1, 1, 5.0).parts == ()
    assert t.members(4, 2).tolist()[:3] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14]]


def test_sending_to_the_next_stage() -> None:
    t = templates("h100-64")
    out = t.cluster.levels[-1]
    coflow = t.send(np.arange(32), np.arange(32) + 32, 1e8)
    expected = out.latency_s + 1e8 / (out.bytes_per_s * out.ring_efficiency)
    assert solo_seconds(coflow, t.topology) == pytest.approx(expected)


def test_questions_that_have_no_answer() -> None:
    t = templates("h100-64")
    for call, message in (
        (lambda: t.collective("all_two_all", 8, 1, 1.0), "kind = 'all_two_all'"),
        (lambda: t.collective("all_reduce", 8, 1, 1.0, algorithm="star"), "algorithm = 'star': all_reduce has ring"),
        (lambda: t.collective("all_reduce", 8, 8, 1.0, algorithm="in-switch"), "no switch that adds"),
        (lambda: t.collective("all_reduce", 65, 1, 1.0), "65 members 1 apart"),
        (lambda: t.collective("all_reduce", 8, 1, 1.0, groups=8), "groups 0 to 7"),
        (lambda: t.collective("all_reduce", 8, 1, -1.0), "bytes = -1"),
        (lambda: t.all_to_all_matrix(np.array([0, 0]), np.ones((2, 2))), "twice"),
        (lambda: t.all_to_all_matrix(np.array([0, 99]), np.ones((2, 2))), "devices 0 to 63"),
        (lambda: t.all_to_all_matrix(np.array([0, 1]), np.ones((3, 3))), "2 x 2 needed"),
        (lambda: t.all_to_all_matrix(np.array([0, 1]), (np.ones(3), np.ones(2))), "rows: shape"),
        (lambda: Templates(t.cluster, templates("cpu-8").topology), "8 devices; h100-64 has 64"),
    ):
        with pytest.raises(QuestionError, match=message):
            call()


def test_a_fabric_that_a_user_drew() -> None:
    """Without a layout every collective runs over shortest paths; an even all-to-all equals the fast one's loads."""
    t = templates("v5p 4x4x4")
    names = tuple(str(i) for i in range(64))
    drawn = Templates(t.cluster, replace(t.topology, layout=None, names=names))
    for kind in KINDS:
        coflow = drawn.collective(kind, 64, 1, 1e8)
        assert coflow.latency_s > 0
        assert solo_seconds(coflow, drawn.topology) >= solo_seconds(t.collective(kind, 64, 1, 1e8), t.topology) * 0.5
    assert PASSES["all_reduce"] == 2.0
