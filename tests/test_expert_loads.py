"""Loads on expert ranks: draws against tokens drawn singly, expectations against draws, what the engine asks, drops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from load_questions import loads_of, question
from simulator.engine.loads import draw_loads, dropped_fraction, expected_drops, moe_layers
from simulator.engine.placement import place_contiguous, split_matrix
from simulator.job.model import Ffn, Moe
from simulator.workload.routing import (
    Slots,
    busiest_over_mean,
    chosen_shares,
    dirichlet_busiest,
    dropped_by_chance,
    zipf_busiest,
)

Array = NDArray[np.float64]


def moe(experts: int, top_k: int) -> Moe:
    return Moe(experts=experts, top_k=top_k, expert=Ffn(hidden=8, activation="relu"))


# Draws against brute force


def by_token(rng: np.random.Generator, shares: Array, tokens: int, draws: int) -> Array:
    """Counts of experts, [draws, E]: every token takes a systematic sample in random order, which has these shares."""
    counts = np.zeros((draws, len(shares)))
    for d in range(draws):
        order = np.argsort(rng.random((tokens, len(shares))), axis=1)
        ends = np.cumsum(shares[order], axis=1) + rng.random((tokens, 1))
        starts = ends - shares[order]
        hit = np.floor(ends - 1e-12) > np.floor(starts - 1e-12)
        np.add.at(counts[d], order[hit], 1)
    return counts


@pytest.mark.parametrize("tokens", [12, 48, 512])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.2])
@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(16, 1, 8), (16, 4, 4), (8, 2, 8)])
def test_draws_agree_with_tokens_that_choose_one_by_one(
    tokens: int, exponent: float, experts: int, top_k: int, ranks: int
) -> None:
    rng = np.random.default_rng(3)
    shares = chosen_shares(rng.permutation(np.arange(1.0, experts + 1) ** -exponent), top_k)
    split = split_matrix(place_contiguous(experts, ranks), experts)
    exact = by_token(rng, shares, tokens, 1500 if tokens < 500 else 400) @ split.T
    drawn = draw_loads(rng, tokens, top_k, shares, split, (4000,))
    assert drawn.sum(axis=-1) == pytest.approx(tokens * top_k)
    assert drawn.mean(axis=0) == pytest.approx(tokens * split @ shares, rel=0.03, abs=0.02 * tokens)
    assert float(drawn.max(axis=-1).mean()) == pytest.approx(float(exact.max(axis=-1).mean()), rel=0.02)
    assert float(drawn.std(axis=0).mean()) == pytest.approx(float(exact.std(axis=0).mean()), rel=0.1)


def test_variance_by_chance_is_the_formula() -> None:
    """k s (1 - s)(E - k)/(E - 1) a token, on both sides of the change from multinomial to normal."""
    for tokens in (40, 4000):
        shares = chosen_shares(np.ones(32), 8)
        split = split_matrix(place_contiguous(32, 16), 32)
        drawn = draw_loads(np.random.default_rng(0), tokens, 8, shares, split, (20_000,))
        assert drawn.var(axis=0).mean() == pytest.approx(tokens * 8 / 16 * 15 / 16 * 24 / 31, rel=0.02)


def test_copies_share_the_fate_of_their_expert() -> None:
    """Two copies of one expert, alone on two ranks, always get the same."""
    split = split_matrix([[0], [0], [1, 2]], 3)
    assert split.tolist() == [[0.5, 0, 0], [0.5, 0, 0], [0, 1, 1]]
    for tokens in (12, 4000):
        drawn = draw_loads(np.random.default_rng(1), tokens, 1, np.array([0.5, 0.3, 0.2]), split, (2000,))
        assert drawn[:, 0] == pytest.approx(drawn[:, 1], abs=0.01)
        assert drawn[:, 2].var() == pytest.approx(tokens / 4, rel=0.1)
        assert drawn.sum(axis=-1) == pytest.approx(tokens)


@given(
    exponent=st.floats(0, 20),
    tokens=st.integers(1, 5000),
    sizes=st.sampled_from([(1, 4, 1), (2, 4, 1), (4, 4, 4), (8, 8, 3), (4, 32, 31), (16, 64, 8)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_nothing_is_lost_and_no_expert_gets_a_token_twice(
    exponent: float, tokens: int, sizes: tuple[int, int, int], seed: int
) -> None:
    ranks, experts, top_k = sizes
    rng = np.random.default_rng(seed)
    shares = chosen_shares(rng.permutation(np.arange(1.0, experts + 1) ** -exponent), top_k)
    assert shares.sum() == pytest.approx(top_k) and shares.max() <= 1 and shares.min() >= 0
    drawn = draw_loads(rng, tokens, top_k, shares, split_matrix(place_contiguous(experts, ranks), experts), (3, 5))
    assert drawn.sum(axis=-1) == pytest.approx(tokens * top_k)
    assert drawn.min() >= 0 and drawn.max() <= tokens * min(top_k, experts // ranks) * (1 + 1e-12)


# The closed form's expectations

PLACEMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"placement": "dealt"},
    {"placement": "balanced"},
    {"placement": "balanced", "replicas": 1},
)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: "-".join(str(x) for x in p.values()) or "contiguous")
@pytest.mark.parametrize("exponent", [0.2, 0.6, 1.1])
def test_zipf_expectation_is_the_mean_of_the_draws(exponent: float, placement: dict[str, Any]) -> None:
    routing = {"model": "zipf", "exponent": exponent} | placement
    loads = loads_of(routing)
    sampled = np.mean([loads.resample(s).busiest_overall() for s in range(30 if not placement else 2)])
    expected = zipf_busiest(moe(64, 4), 16, exponent, 16 * 1024, **placement)
    assert expected == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: "-".join(str(x) for x in p.values()) or "contiguous")
@pytest.mark.parametrize("concentration", [0.3, 2.0, 50.0])
def test_dirichlet_expectation_is_the_mean_of_the_draws(concentration: float, placement: dict[str, Any]) -> None:
    routing = {"model": "dirichlet", "concentration": concentration} | placement
    loads = loads_of(routing)
    sampled = np.mean([loads.resample(s).busiest_overall() for s in range(40 if not placement else 12)])
    expected = dirichlet_busiest(moe(64, 4), 16, concentration, 16 * 1024, **placement)
    assert expected == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("length", [256, 4096])
def test_chance_expectation_is_the_mean_of_the_draws(length: int) -> None:
    sampled = loads_of({"model": "chance"}, length=length).busiest_overall()
    assert float(busiest_over_mean(16 * length, moe(64, 4), 16)) == pytest.approx(sampled, rel=0.01)


def test_expectations_at_the_ends() -> None:
    assert zipf_busiest(moe(64, 4), 1, 1.0) == dirichlet_busiest(moe(64, 4), 1, 0.1, 100.0) == 1.0
    # One expert takes every token, and so do the other choices' favourites: nobody exceeds E / k.
    assert zipf_busiest(moe(64, 4), 64, 20.0) == pytest.approx(16)
    assert dirichlet_busiest(moe(64, 4), 16, 1e-6) <= 16
    assert dirichlet_busiest(moe(64, 4), 16, 1e9) == pytest.approx(1, abs=1e-3)
    assert zipf_busiest(moe(64, 4), 16, 0.6, placement="dealt") <= zipf_busiest(moe(64, 4), 16, 0.6)


# What the engine asks


def test_excess_is_the_mean_over_the_layers_of_a_stage() -> None:
    loads = loads_of({"model": "zipf", "exponent": 0.5}, layers=4, mtp=1)
    assert [x.stage for x in loads.plan.layers] == [0, 0, 1, 1, 1]
    assert [x.number for x in loads.plan.layers] == [0, 1, 2, 3, 4]
    mean = 16 * 1024 * 4 / 16
    for stage, layers in ((0, (0, 1)), (1, (2, 3, 4))):
        by_hand = np.mean([loads.rank_loads(i, 5, 1).max() / mean - 1 for i in layers])
        assert loads.excess(1, stage, 5) == pytest.approx(by_hand)
    most = max(float(loads.rank_loads(i, m, g).max()) for i in range(5) for m in range(8) for g in range(2))
    assert loads.max_tokens_on_a_rank() == pytest.approx(most)


def test_layers_follow_the_model_and_the_chunks() -> None:
    job, degrees, _ = question(
        {"model": "chance"}, layers=8, moe={"every": 2, "offset": 1},
        plan={"schedule": "interleaved", "virtual_stages": 2},
    )  # fmt: skip
    assert [(x.number, x.stage) for x in moe_layers(job, degrees)] == [(1, 0), (3, 1), (5, 2), (7, 3)]
    assert {x.tokens for x in moe_layers(job, degrees)} == {16 * 1024}


@pytest.mark.parametrize("routing", [{"model": "even"}, {"model": "zipf", "exponent": 1.0}])
def test_no_excess_where_every_rank_does_the_same(routing: dict[str, Any]) -> None:
    padded = {"factor": 1.25, "basis": "assignments"} if routing["model"] == "zipf" else "dropless"
    loads = loads_of(routing, capacity=padded, layers=4)
    assert {loads.excess(g, s, m) for g in range(2) for s in range(2) for m in range(8)} == {0.0}
    chosen = loads_of({"model": "chance"}, moe={"router": {"kind": "expert_choice"}}, layers=4)
    assert chosen.excess(0, 0, 0) == pytest.approx(0) and chosen.busiest_overall() == pytest.approx(1)
    alone = loads_of(routing, layers=4, plan={"expert": 1})
    assert alone.excess(0, 0, 0) == 0 and alone.busiest_overall() == 1


def test_equal_seeds_give_equal_steps() -> None:
    routing = {"model": "dirichlet", "concentration": 1.0}
    one, two = loads_of(routing, layers=4), loads_of(routing, layers=4)
    assert one.excess(0, 1, 3) == two.excess(0, 1, 3)
    assert (one.rank_loads(2, 1, 1) == two.resample(0).rank_loads(2, 1, 1)).all()
    assert one.excess(0, 1, 3) != one.resample(1).excess(0, 1, 3)


# Drops


def test_drops_are_those_of_each_expert() -> None:
    slots = Slots(100, 12, 0.0)
    loads = np.array([40.0, 10.0, 10.0, 30.0, 10.0])
    by_hand = sum(x * dropped_by_chance(x, 12, 100) for x in loads) / 100
    assert dropped_fraction(loads, slots) == pytest.approx(by_hand, rel=1e-9)
    assert dropped_fraction(loads, Slots(100, 100, 0.0)) == 0
    assert dropped_fraction(np.array([100.0]), slots) == pytest.approx(0.88)


def test_a_skewed_router_drops_more_and_more_capacity_drops_less() -> None:
    job, degrees, _ = question({"model": "even"}, capacity={"factor": 0.25, "basis": "assignments"}, layers=4)
    assert expected_drops(job, degrees) == pytest.approx(0.75)
    dropped = []
    for routing in (
        {"model": "even"},
        {"model": "chance"},
        {"model": "zipf", "exponent": 0.4},
        {"model": "zipf", "exponent": 1.0},
    ):
        job, degrees, _ = question(routing, capacity={"factor": 1.25, "basis": "assignments"}, layers=4)
        dropped.append(expected_drops(job, degrees))
    assert dropped == sorted(dropped) and dropped[0] == 0
    assert dropped[1] == pytest.approx(dropped_by_chance(64, 80, 1024))
    job, degrees, _ = question(
        {"model": "zipf", "exponent": 1.0}, capacity={"factor": 2, "basis": "assignments"}, layers=4
    )
    assert expected_drops(job, degrees) < dropped[-1]


def test_the_more_concentrated_a_router_the_more_it_drops() -> None:
    """Slots for half of the choices: an even router drops half; one of four experts only, all but 2 of 64."""
    dropped = []
    for concentration in (1e6, 5.0, 0.5, 0.05):
        routing = {"model": "dirichlet", "concentration": concentration}
        job, degrees, _ = question(routing, capacity={"factor": 2, "basis": "tokens"}, layers=4)
        dropped.append(expected_drops(job, degrees))
    assert dropped == sorted(set(dropped)) and dropped[-1] < 1 - 2 / 64
    assert dropped[0] == pytest.approx(0.5, abs=1e-4)
