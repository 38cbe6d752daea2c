"""Rates of parts that share links: by hand, against rates of single flows, and max-min fairness itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coflows import GB, coflow, part
from hw_profiles.errors import QuestionError
from reference_flows import max_min
from simulator.network.coflow import Part
from simulator.network.fairness import Template, alike, fair_rates, pair_rates, solve
from simulator.network.fluid import Fluid
from simulator.network.geometry import Geometry


def test_alone_the_busiest_link_sets_the_rate() -> None:
    bandwidth = np.array([10.0, 5.0, 1.0])
    assert fair_rates([part({0: 10, 1: 20})], bandwidth).tolist() == [0.25]


def test_a_link_is_shared_by_flows_not_by_coflows() -> None:
    """Three flows of 4 bytes and one of 8 on a link of 4 bytes/s: one byte/s each."""
    rates = fair_rates([part({0: 12}, 4), part({0: 8}, 8)], np.array([4.0]))
    assert rates == pytest.approx([1 / 4, 1 / 8])


def test_what_one_part_cannot_use_another_gets() -> None:
    """Link 1 holds part b to 1 byte/s; part a takes the other 9 of link 0."""
    a, b, elsewhere = part({0: 9}), part({0: 1, 1: 1}), part({2: 7})
    rates = fair_rates([a, b, elsewhere], np.array([10.0, 1.0, 7.0]))
    assert rates == pytest.approx([1.0, 1.0, 1.0])


def test_a_part_that_sends_nothing_is_never_waited_for() -> None:
    assert fair_rates([part({}), part({0: 0.0}), part({0: 1})], np.array([1.0])).tolist() == [np.inf, np.inf, 1.0]
    assert fair_rates([], np.array([1.0])).size == 0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (part({0: 1, 2: 3}), "link 2 has bandwidth 0, and 3 bytes cross it"),
        (part({5: 1}), "link 5: the topology has links 0 to 2"),
        (part({-1: 1}), "link -1"),
        (part({0: -1}, 1), "-1.0 bytes on link 0"),
        (part({1: float("nan")}, 1), "nan bytes on link 1"),
        (part({0: 1}, 0), "largest_flow_bytes = 0"),
        (Part("x", np.array([1, 1]), np.ones(2), np.ones(2), 1.0), "link 1 is listed twice"),
        (Part("x", np.array([1]), np.ones(2), np.ones(2), 1.0), "one number for each link"),
    ],
)
def test_a_part_that_cannot_be_is_named(bad: Part, says: str) -> None:
    bandwidth = np.array([1.0, 1.0, 0.0])
    with pytest.raises(QuestionError, match=says):
        fair_rates([bad], bandwidth)
    with pytest.raises(QuestionError, match=f"dispatch: part 'x': .*{says}"):
        Fluid(bandwidth).start(coflow("dispatch", part({0: 1}), bad), 0)


@st.composite
def part_sets(draw: st.DrawFn) -> tuple[list[Part], np.ndarray]:
    links = draw(st.integers(1, 8))
    size = st.floats(0.01, 100.0)
    bandwidth = np.array(draw(st.lists(size, min_size=links, max_size=links)))
    parts = []
    for _ in range(draw(st.integers(1, 7))):
        loads = draw(st.dictionaries(st.integers(0, links - 1), size, min_size=1))
        parts.append(part(loads, draw(size)))
    return parts, bandwidth


@given(part_sets())
def test_no_link_overflows_and_every_part_has_its_bottleneck(case: tuple[list[Part], np.ndarray]) -> None:
    """Max-min: a part runs as if alone, or crosses a full link on which nobody has more bandwidth per flow."""
    parts, bandwidth = case
    rates = fair_rates(parts, bandwidth)
    load = np.zeros(bandwidth.size)
    for p, rate in zip(parts, rates, strict=True):
        load[p.links] += rate * p.bytes
    assert (load <= bandwidth * (1 + 1e-9)).all()
    levels = [rate * p.largest_flow_bytes for p, rate in zip(parts, rates, strict=True)]
    for p, rate, level in zip(parts, rates, levels, strict=True):
        full = {link for link in p.links.tolist() if load[link] >= bandwidth[link] * (1 - 1e-9)}
        highest = {link: max(v for q, v in zip(parts, levels, strict=True) if link in q.links) for link in full}
        alone = 1 / (p.bytes / bandwidth[p.links]).max()
        assert rate == pytest.approx(alone) or any(level >= v * (1 - 1e-9) for v in highest.values())


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_parts_of_one_flow_get_the_rates_of_the_reference(flows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bandwidth = rng.uniform(1, 10, 6)
    routes = [rng.permutation(6)[: rng.integers(1, 5)] for _ in range(flows)]
    size = rng.uniform(1, 100, flows)
    parts = [part(dict.fromkeys(route.tolist(), b)) for route, b in zip(routes, size, strict=True)]
    flow_U = np.repeat(np.arange(flows), [len(route) for route in routes])
    link_U = np.concatenate(routes)
    exact = max_min(flow_U, link_U, np.ones(link_U.size), bandwidth, flows)
    assert fair_rates(parts, bandwidth) * size == pytest.approx(exact, rel=1e-9)


@given(part_sets())
def test_order_of_parts_does_not_matter(case: tuple[list[Part], np.ndarray]) -> None:
    parts, bandwidth = case
    order = np.random.default_rng(len(parts)).permutation(len(parts))
    assert fair_rates([parts[i] for i in order], bandwidth) == pytest.approx(fair_rates(parts, bandwidth)[order])


@pytest.mark.parametrize("seed", range(40))
def test_pairs_at_once_are_each_solved_by_itself(seed: int) -> None:
    """Eight loads of two lists of links that overlap, some with ties: rates and the links that bind."""
    rng = np.random.default_rng(seed)
    bandwidth = rng.choice([1.0, 2.0, 3.0], 9) * GB
    lists = [rng.permutation(9)[: rng.integers(2, 8)] for _ in range(2)]
    lists[1] = np.union1d(lists[1], lists[0][:1])
    geometry = Geometry(bandwidth)
    columns = [
        [
            Part("x", links, rng.integers(1, 4, links.size) * 1e8, np.ones(links.size), 1e8 * x)
            for x in rng.integers(1, 4, 8)
        ]
        for links in lists
    ]
    pairs = [alike(column, bandwidth, geometry) for column in columns]
    assert pairs[0] is not None and pairs[1] is not None
    found = pair_rates(pairs[0], pairs[1])
    for i, two in enumerate(zip(*columns, strict=True)):
        rates, _ = solve([Template(p, bandwidth) for p in two], bandwidth)
        np.testing.assert_allclose([found[0][i], found[1][i]], rates, rtol=1e-12)
        # Of links that are full at once either may be named: what is named is full, and the part sends over it.
        for part_, link in zip(two, (found[2][i], found[3][i]), strict=True):
            used = sum(r * p.bytes[p.links == link].sum() for p, r in zip(two, rates, strict=True))
            assert link in part_.links and used == pytest.approx(bandwidth[link])
