"""Coflows in time: by hand, by laws, and what is not solved anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coflows import GB, coflow, part, random_case, story
from hw_profiles.errors import QuestionError
from reference_flows import switch
from simulator.network import known as known_module
from simulator.network.flight import TICKS_PER_S, ticks
from simulator.network.fluid import Fluid


def test_two_coflows_and_a_neighbour() -> None:
    """10 GB and 30 GB share a link of 10 GB/s: 5 each for 2 s, then 20 GB alone; another link's transfer is apart."""
    fluid = Fluid(np.array([10.0, 10.0]) * GB)
    small, large, apart = (
        coflow(n, part({i: b * GB})) for n, i, b in (("small", 0, 10), ("large", 0, 30), ("apart", 1, 25))
    )
    assert story(fluid, (large, 0), (small, 0), (apart, 0)) == [
        ("small", 2 * TICKS_PER_S),
        ("apart", 5 * TICKS_PER_S // 2),
        ("large", 4 * TICKS_PER_S),
    ]
    assert fluid.solves == 1
    assert fluid.link_bytes().tolist() == pytest.approx([40 * GB, 25 * GB])


def test_latency_passes_before_the_first_byte() -> None:
    fluid = Fluid(np.array([GB]))
    late, early = coflow("late", part({0: 1e9}), latency_s=0.5), coflow("early", part({0: 1e9}))
    # Alone for 0.5 s, then half the link: early has 0.5 s of work left, takes 1 s; late has then half left.
    assert story(fluid, (late, 0), (early, 0)) == [("early", 1_500_000_000), ("late", 2_000_000_000)]
    assert story(Fluid(np.array([GB])), (coflow("barrier", latency_s=1e-6), 5)) == [("barrier", 1005)]


def test_chained_parts_follow_each_other_and_others_run_side_by_side() -> None:
    parts = part({0: 1e9}), part({}), part({1: 2e9})
    fluid = Fluid(np.array([GB, GB]))
    chain = fluid.start(coflow("chain", *parts, latency_s=1e-3, chained=True), 0)
    beside = fluid.start(coflow("beside", part({1: 1e9})), 0)
    fluid.finish()
    assert chain.part_ended == [1_001_000_000, 1_001_000_000, 3_001_000_000]
    assert beside.ended == 1_000_000_000
    assert story(Fluid(np.array([GB, GB])), (coflow("together", *parts), 0)) == [("together", 2_000_000_000)]


def test_who_ends_in_one_tick_comes_in_order_of_starts() -> None:
    """0.3 s, thrice 0.1 s and 0.1 + 0.2 s end together: ticks know no rounding of sums."""
    fluid = Fluid(np.full(3, GB))
    a, b = coflow("a", part({0: 3e8})), coflow("b", part({1: 1e8}), part({1: 2e8}), chained=True)
    c = coflow("c", *(part({2: 1e8}) for _ in range(3)), chained=True)
    assert story(fluid, (c, 0), (a, 0), (b, 0)) == [(name, 300_000_000) for name in "cab"]


def test_next_completion_and_advance() -> None:
    fluid = Fluid(np.array([GB]))
    first, second = (
        fluid.start(coflow(name, part({0: 1e9})), tick) for name, tick in (("first", 0), ("second", 10**9 // 2))
    )
    assert fluid.advance(10**9) == []
    assert fluid.link_bytes() == pytest.approx([1e9])
    assert fluid.next_completion() == (1_500_000_000, [first])
    assert fluid.next_completion() == (2_000_000_000, [second])
    assert fluid.next_completion() is None and fluid.next_event() is None
    assert first.seconds == 1.5
    with pytest.raises(QuestionError, match="tick 5: it is tick 2000000000 already"):
        fluid.start(first.coflow, 5)
    with pytest.raises(QuestionError, match="latency_s = -1"):
        fluid.start(coflow("odd", latency_s=-1), fluid.now)


def test_who_is_blocked_by_whom() -> None:
    fluid = Fluid(np.array([GB, 2 * GB]))
    a, b = (fluid.start(coflow(name, part({0: 1e9, 1: 1e9}, level="leaf")), 0) for name in "ab")
    free = fluid.start(coflow("free", part({1: 1e6})), 0)
    fluid.advance(0)
    assert [(r.flight, r.level, r.speed, r.link, r.others) for r in fluid.blocked()] == [
        (a, "leaf", 0.5, 0, (b,)),
        (b, "leaf", 0.5, 0, (a,)),
        (free, "x", 0.5, 1, (a, b)),
    ]
    fluid.finish()
    assert fluid.blocked() == []


def test_ticks_round_up_but_for_rounding() -> None:
    assert [ticks(s) for s in (0.0, 1e-9, 1.1e-9, 0.1 + 0.2, 1e-18)] == [0, 1, 2, 300_000_000, 0]


@given(st.integers(0, 10_000))
def test_remembered_rates_are_the_solved_ones(seed: int) -> None:
    bandwidth, starts = random_case(seed)
    assert story(Fluid(bandwidth), *starts) == story(Fluid(bandwidth, remember=False), *starts)


@given(st.integers(0, 10_000))
def test_bytes_on_links_are_the_bytes_of_the_coflows(seed: int) -> None:
    bandwidth, starts = random_case(seed)
    fluid, sent = Fluid(bandwidth), np.zeros(bandwidth.size)
    for one, tick in starts:
        fluid.start(one, tick)
        for p in one.parts:
            sent[p.links] += p.bytes
    before, seen = 0, np.zeros(bandwidth.size)
    while (tick := fluid.next_event()) is not None:
        fluid.advance(tick)
        moved = fluid.link_bytes() - seen
        # A tick of slack: a part is done in the tick within which its last byte arrives.
        assert (moved >= -1e-3).all() and (moved <= bandwidth * (tick - before + 1) / TICKS_PER_S).all()
        before, seen = tick, seen + moved
    assert seen == pytest.approx(sent, rel=1e-12)


@given(st.integers(0, 10_000))
def test_twice_the_bandwidth_takes_half_the_time(seed: int) -> None:
    bandwidth, starts = random_case(seed)
    at_once = [(coflow(c.name, *c.parts, chained=c.chained), 0) for c, _ in starts]
    once, twice = dict(story(Fluid(bandwidth), *at_once)), dict(story(Fluid(bandwidth * 2), *at_once))
    # Every change of rates rounds to a tick.
    assert all(abs(once[name] - 2 * twice[name]) <= 6 * len(starts) for name in once)


@given(st.integers(0, 10_000))
def test_order_of_starts_in_one_tick_changes_no_end(seed: int) -> None:
    bandwidth, starts = random_case(seed)
    shuffled = [starts[i] for i in np.random.default_rng(seed + 1).permutation(len(starts))]
    assert dict(story(Fluid(bandwidth), *starts)) == dict(story(Fluid(bandwidth), *shuffled))


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 10**6)), min_size=1, max_size=8), st.integers(1, 64))
def test_one_more_over_the_same_links_speeds_nobody_up(others: list[tuple[int, int]], mib: int) -> None:
    net = switch(4)
    starts = [(coflow(str(k), part(dict.fromkeys(range(8), m * 2.0**20))), tick) for k, (m, tick) in enumerate(others)]
    before = dict(story(Fluid(net.bandwidth), *starts))
    after = dict(story(Fluid(net.bandwidth), *starts, (coflow("new", part(dict.fromkeys(range(8), mib * 2.0**20))), 0)))
    assert all(after[name] >= tick for name, tick in before.items())


def test_one_more_may_speed_up_whom_it_frees() -> None:
    """Max-min fairness does that: `new` slows b down on link 1, and a gets more of link 0 (per flow as well)."""
    bandwidth = np.array([4.0, 2.0]) * GB
    a, b, new = coflow("a", part({0: 3e9})), coflow("b", part({0: 9e9, 1: 9e9})), coflow("new", part({1: 9e9}))
    assert dict(story(Fluid(bandwidth), (a, 0), (b, 0)))["a"] == 1_500_000_000
    assert dict(story(Fluid(bandwidth), (a, 0), (b, 0), (new, 0)))["a"] == 1_000_000_000


def test_neighbours_that_share_no_link_never_solve() -> None:
    fluid = Fluid(np.full(64, GB))
    starts = [(coflow(str(k), part({k: 1e6 * (k + 1)})), 1000 * k) for k in range(64)]
    ends = story(fluid, *starts)
    assert fluid.solves == 0
    assert ends == [(str(k), 1000 * k + 1_000_000 * (k + 1)) for k in range(64)]


def test_the_same_company_is_solved_once() -> None:
    fluid = Fluid(np.array([GB]))
    a, b = coflow("a", part({0: 1e6})), coflow("b", part({0: 2e6}))
    for k in range(50):
        fluid.start(a, k * 10**7)
        fluid.start(b, k * 10**7)
    fluid.finish()
    assert fluid.solves == 1


def test_forgotten_templates_keep_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_module, "KEPT_USES", 3)
    fluid, sent = Fluid(np.full(4, GB)), np.zeros(4)
    for k in range(40):
        loads = {k % 4: 1e6, (k + 1) % 4: 3e6}
        fluid.start(coflow(str(k), part(loads), part({k % 3: 1e5}), chained=bool(k % 2)), k * 1_500_000)
        fluid.advance(k * 1_500_000)
        for link, load in [*loads.items(), (k % 3, 1e5)]:
            sent[link] += load
    fluid.finish()
    assert fluid.link_bytes() == pytest.approx(sent)
    assert len(fluid._known.templates) < 20
