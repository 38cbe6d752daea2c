"""Laws of slots, drops and the busiest rank, for every router and capacity."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_draws import Data, answer
from simulator.job.job import Capacity
from simulator.job.model import Ffn, Moe
from simulator.workload.routing import capacity_slots, dirichlet_busiest, expected_maximum, zipf_busiest


@pytest.mark.parametrize(
    "routing",
    [
        {"model": "even"},
        {"model": "chance"},
        {"model": "zipf", "exponent": 1},
        {"model": "dirichlet", "concentration": 1},
    ],
    ids=lambda routing: routing["model"],
)
def test_what_has_no_slot_is_dropped_however_even_the_router(routing: Data) -> None:
    """Slots for half of the tokens, two experts a token: three of four assignments find none."""
    got = answer({
        "model": "mixtral-8x7b", "cluster": "h100-64", "batch": {"sequences": 64, "length": 4096},
        "training": {"capacity": {"factor": 0.5, "basis": "tokens", "group_tokens": 4096}, "routing": routing},
    })  # fmt: skip
    assert got.routing.dropped_token_fraction >= 0.75 * (1 - 1e-12)


def moe_of(experts: int, top_k: int) -> Moe:
    return Moe(experts=experts, top_k=top_k, expert=Ffn(hidden=1, activation="relu"))


@given(
    st.integers(1, 64), st.integers(1, 8), st.integers(1, 4096), st.floats(0.01, 8), st.floats(1, 4),
    st.sampled_from(["floor", "ceil", "round"]), st.sampled_from(["tokens", "assignments"]),
)  # fmt: skip
def test_slots_grow_with_the_factor_and_drops_shrink(
    experts: int, top_k: int, group: int, factor: float, times: float, rounding: str, basis: str
) -> None:
    moe = moe_of(experts, min(top_k, experts))
    less, more = (
        capacity_slots(Capacity.model_validate({"factor": f, "basis": basis, "rounding": rounding}), moe, group)
        for f in (factor, factor * times)
    )
    assert 1 <= less.per_expert <= more.per_expert <= group
    assert 0 <= more.dropped_fraction <= less.dropped_fraction <= 1
    kept = 1 - less.dropped_fraction
    assert kept * group * moe.top_k <= less.per_expert * experts * (1 + 1e-9)


@settings(max_examples=20)
@given(st.integers(0, 7), st.integers(0, 3), st.floats(0.01, 3), st.floats(0.01, 20))
def test_fewer_and_larger_ranks_are_never_less_even(
    log_experts: int, log_k: int, exponent: float, spread: float
) -> None:
    """A rank's load is the sum over its experts, so it cannot matter how they stand within it."""
    experts = 2**log_experts
    moe = moe_of(experts, min(2**log_k, experts))
    ranks = [2**i for i in range(log_experts + 1)]
    for busiest in (
        [zipf_busiest(moe, r, exponent) for r in ranks],
        [dirichlet_busiest(moe, r, spread) for r in ranks],
    ):
        assert busiest[0] == 1 and busiest == sorted(busiest) and busiest[-1] <= experts / moe.top_k
    weights = sorted(((i + 1) ** -exponent for i in range(experts)), reverse=True)
    assert zipf_busiest(moe, experts, exponent) == pytest.approx(
        min(weights[0] / sum(weights) * experts, experts / moe.top_k)
    )
    assert expected_maximum(1) == 0
