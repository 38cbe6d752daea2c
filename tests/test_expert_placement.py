"""Experts on ranks: by hand, by laws of balancing, from a file, and what is wrong in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from load_questions import loads_of
from simulator.engine.placement import balance, place_contiguous, place_dealt, rank_loads, read_placement


def test_placements_by_hand() -> None:
    loads = [6.0, 1.0, 5.0, 2.0, 4.0, 3.0]
    assert place_contiguous(6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert place_dealt(loads, 3) == [[0, 5], [2, 3], [4, 1]]
    assert rank_loads(loads, place_dealt(loads, 3)).tolist() == [9, 7, 5]
    assert rank_loads(loads, balance(loads, 3, 2)).tolist() == [7, 7, 7]
    # Two extra slots: the hottest expert (8) is cut in halves, and then the next (2).
    cut = balance([8.0, 1.0, 1.0, 2.0], 2, 3)
    assert cut == [[0, 1, 3], [0, 2, 3]] and rank_loads([8.0, 1.0, 1.0, 2.0], cut).tolist() == [6, 6]


@given(
    seed=st.integers(0, 10_000),
    sizes=st.sampled_from([(8, 32), (8, 64), (16, 64)]),
    replicas=st.integers(0, 3),
    steepest=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=60)
def test_balanced_is_whole_never_worse_than_contiguous_and_near_the_bound(
    seed: int, sizes: tuple[int, int], replicas: int, steepest: float
) -> None:
    ranks, experts = sizes
    rng = np.random.default_rng(seed)
    loads = rng.permutation(np.arange(1.0, experts + 1) ** -rng.uniform(0, steepest))
    slots = experts // ranks + replicas
    placement = balance(loads, ranks, slots)
    assert {e for own in placement for e in own} == set(range(experts))
    assert all(len(set(own)) == len(own) <= slots for own in placement)
    assert rank_loads(loads, placement).sum() == pytest.approx(loads.sum())
    peak = rank_loads(loads, placement).max()
    assert peak <= rank_loads(loads, place_contiguous(experts, ranks)).max() * (1 + 1e-9)
    fewer = balance(loads, ranks, experts // ranks)
    assert peak <= rank_loads(loads, fewer).max() * 1.01
    if steepest > 1:
        return
    copies = np.bincount([e for own in placement for e in own], minlength=experts)
    # With equal slots the hottest expert has company: the coldest ones at least.
    company = np.sort(loads)[: slots - 1].sum() if not replicas else 0.0
    assert peak <= 1.05 * max(loads.sum() / ranks, (loads / copies).max() + company)


@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), st.integers(3, 6))
def test_any_loads_can_be_balanced(loads: list[float], slots: int) -> None:
    placement = balance(loads, 2, slots)
    assert {e for own in placement for e in own} == set(range(6))
    assert rank_loads(loads, placement).max() <= rank_loads(loads, place_contiguous(6, 2)).max() * (1 + 1e-9)


def test_replication_helps_where_one_expert_is_hot() -> None:
    routing = {"model": "zipf", "exponent": 0.8, "placement": "balanced"}
    busiest = [loads_of(routing | {"replicas": n}, layers=4).busiest_overall() for n in (0, 1, 2)]
    assert busiest[0] > 2 and busiest[1] < 1.1 and busiest[2] < 1.1


def test_experts_permuted_within_a_rank_change_nothing(tmp_path: Path) -> None:
    plain = [list(range(4 * r, 4 * r + 4)) for r in range(16)]
    (tmp_path / "a.json").write_text(json.dumps(plain))
    (tmp_path / "b.yaml").write_text(json.dumps([[own[::-1] for own in plain]] * 4))
    one, two, three = (
        loads_of({"model": "zipf", "exponent": 1.0} | file, layers=4, folder=tmp_path)
        for file in ({}, {"placement_file": "a.json"}, {"placement_file": "b.yaml"})
    )
    for loads in (two, three):
        assert loads.rank_loads(3, 1, 0) == pytest.approx(one.rank_loads(3, 1, 0))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "placement_file = 'p.json': not JSON"),
        ("[]", "must be a list of lists: the experts of each rank"),
        ("3", "must be a list of lists"),
        ("[[0, 1], [2]]", "expert 3 is on no rank"),
        ("[[0, 1, 2, 3]]", "1 ranks; plan.expert is 2"),
        ("[[0, 1], [2, 4]]", "rank 1: 4 is no expert; they are 0 to 3"),
        ("[[0, 1], [2, true]]", "rank 1: True is no expert"),
        ("[[0, 1, 1], [2, 3]]", "rank 0: has an expert twice"),
        ("[[0, 1, 2, 3], []]", "must be a list of lists"),
        ("[[[0, 1], [2, 3]], [[0, 1], [2, 3]]]", "places 2 layers; the model has 3 with experts"),
        ("[[[0, 1], [2, 3]], 1, [[0, 1], [2, 3]]]", "must be a list of lists"),
        ("[[[0, 1], [2, 3]], [[0, 1]], [[0, 1], [2, 3]]]", "layer 1: 1 ranks"),
        ("[[[0, 1], 2], [[0, 1], [2, 3]], [[0, 1], [2, 3]]]", "layer 0, rank 1: must be a list of experts"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_placement_files_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(QuestionError) as refused:
        read_placement("p.json", tmp_path, 3, 4, 2)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("routing", "says"),
    [
        ({"replicas": 1}, "replicas = 1: goes with placement balanced, not contiguous"),
        ({"placement": "dealt", "placement_file": "a"}, "placement = dealt: placement_file already places the experts"),
        ({"placement": "balanced", "replicas": -1}, "must be at least 0"),
        ({"placement": "balanced", "replicas": 61}, "would hold more than the 64 there are"),
        ({"placement_file": "../p.json"}, "must lie in the job's folder"),
        ({"placement_file": "none.json"}, "no such file"),
        ({"model": "replay", "file": "../t.csv"}, "must lie in the job's folder"),
    ],
)
def test_bad_routing_is_refused_in_one_line(tmp_path: Path, routing: dict[str, Any], says: str) -> None:
    with pytest.raises(QuestionError, match=r"training\.routing") as refused:
        loads_of(routing, folder=tmp_path)
    assert says in str(refused.value) and "\n" not in str(refused.value)
