"""Loads on expert ranks against tokens drawn singly; placements by hand; recorded counts and what is wrong there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.engine.loads import ExpertLoads, draw_loads, dropped_fraction, expected_drops, expert_loads, moe_layers
from simulator.engine.placement import balance, place_contiguous, place_dealt, rank_loads, read_placement, split_matrix
from simulator.job.load import load_job
from simulator.job.model import Ffn, Moe
from simulator.job.recorded import read_counts
from simulator.job.rules import Degrees, resolve
from simulator.workload.routing import (
    Slots,
    busiest_over_mean,
    chosen_shares,
    dirichlet_busiest,
    dropped_by_chance,
    zipf_busiest,
)

Array = NDArray[np.float64]


def loads_of(routing: dict[str, Any], *, seed: int = 0, groups: int = 2, **changes: Any) -> ExpertLoads:
    """32 layers of 64 experts, 4 a token, on 16 ranks; 2 stages, 8 microbatches of 1,024 tokens a rank."""
    job, degrees, folder = question(routing, **changes)
    return expert_loads(job, degrees, groups, seed, folder=folder)


def question(routing: dict[str, Any], **changes: Any) -> tuple[Any, Degrees, Path]:
    layers, mtp = changes.pop("layers", 32), changes.pop("mtp", 0)
    experts, top_k = changes.pop("experts", 64), changes.pop("top_k", 4)
    folder = changes.pop("folder", Path())
    capacity = changes.pop("capacity", "dropless")
    stack = {
        "layers": layers,
        "attention": {"heads": 4, "head_dim": 16},
        "ffn": {"hidden": 64, "activation": "swiglu"},
        "moe": {"experts": experts, "top_k": top_k, "expert": {"hidden": 32, "activation": "swiglu"}}
        | changes.pop("moe", {}),
    }
    plan = {"pipeline": 2, "expert": 16, "microbatch_sequences": 1} | changes.pop("plan", {})
    job = load_job(
        {
            "model": {"hidden": 64, "vocab": 128, "mtp_layers": mtp, "decoder": stack},
            "cluster": {"chip": "h100-sxm", "nodes": 8},
            "plan": plan,
            "batch": {"sequences": 256, "length": changes.pop("length", 1024)},
            "training": {"routing": routing, "capacity": capacity},
        }
    )
    assert not changes
    return job, resolve(job, resolve_cluster(job.cluster)), folder


def moe(experts: int, top_k: int) -> Moe:
    return Moe(experts=experts, top_k=top_k, expert=Ffn(hidden=8, activation="relu"))


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


# Draws against brute force -------------------------------------------------------------------------------------------


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


# The closed form's expectations -------------------------------------------------------------------------------------

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


# What the engine asks ------------------------------------------------------------------------------------------------


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


# Placement ----------------------------------------------------------------------------------------------------------


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


# Recorded counts ----------------------------------------------------------------------------------------------------

GOOD = "step,layer,expert,tokens\n" + "".join(
    f"{s},{i},{e},{10 * e + s}\n" for s in (5, 6) for i in (1, 3) for e in range(4)
)


def counts_of(folder: Path, text: str | bytes, name: str = "t.csv") -> Array:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_counts(name, folder, [1, 3], 4, [100, 100])


def test_recorded_steps_are_averaged(tmp_path: Path) -> None:
    assert counts_of(tmp_path, GOOD).tolist() == [[5.5, 15.5, 25.5, 35.5]] * 2
    head, *rows = GOOD.splitlines()
    assert counts_of(tmp_path, "\n".join([head, *reversed(rows)])).tolist() == [[5.5, 15.5, 25.5, 35.5]] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("step,layer,expert,tokens\n", "has no rows"),
        ("step,layer,expert\n1,1,1\n", "has no column tokens"),
        ("step,layer,expert,token\n1,1,1,1\n", "unknown column 'token'; did you mean 'tokens'?"),
        ("step,layer,expert,tokens,tokens\n1,1,1,1,1\n", "unknown column"),
        (GOOD.replace("5,1,2,25", "5,1,2,nan"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,inf"), "line 4: tokens = inf: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,-1"), "line 4: tokens = -1: must not be negative"),
        (GOOD.replace("5,1,2,25", "5,1,2,many"), "line 4: tokens = 'many': must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,25,7"), "not a CSV table"),
        (GOOD.replace("5,1,2,25", '5,1,2,"25'), "not a CSV table"),
        (GOOD.replace("5,1,2,25", "5,1,2,1e300"), "line 4: tokens = 1e+300: is too large"),
        (GOOD.replace("5,1,2,25", "5,1,2," + "9" * 30), "line 4: tokens = 1e+30: is too large"),
        (GOOD.replace("5,1,2,25", "5,1,1.5,25"), "line 4: expert = 1.5: must be a whole number"),
        (GOOD.replace("5,1,2,25", "5,1,9,25"), "line 4: expert = 9: the model's experts are 0 to 3"),
        (GOOD.replace("5,1,2,25", "5,2,2,25"), "line 4: layer = 2: the model's layers with experts are 1, 3"),
        (GOOD.replace("5,1,2,25", "5,-1,2,25"), "line 4: layer = -1: the model's layers"),
        (GOOD.replace("5,1,2,25\n", ""), "step 5, layer 1, expert 2 is missing"),
        (GOOD.replace("6,3,3,36\n", ""), "step 6, layer 3, expert 3 is missing"),
        (GOOD.replace("5,1,2,25", "5,1,1,25"), "step 5, layer 1, expert 1 appears twice"),
        (GOOD.replace("5,1,2,25", "5,1,2,99"), "step 5, layer 1 has 154 tokens x k; the job sends 100"),
        ("step,layer,expert,tokens\n" + "".join(f"0,{i},{e},0\n" for i in (1, 3) for e in range(4)), "has no tokens"),
        (GOOD.replace("5,1,2,25\n", "\n5,1,2,25\n"), "line 4: step = nan: must be a finite number"),
        (b"\x00\x01\x02" * 50, "not a text file (NUL byte)"),
        (b"step,layer,expert,tokens\n\xff\xfe,1,1,1\n", "not a text file (UTF-8)"),
        ("\x1b[2J" * 5 + "\n1\n", "unknown column"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(QuestionError) as refused:
        counts_of(tmp_path, text)
    said = str(refused.value)
    assert says in said and said.startswith("training.routing.file = 't.csv'")
    assert said.isprintable() and len(said) < 300


def test_files_that_are_no_table_of_the_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "job"
    inner.mkdir()
    (tmp_path / "t.csv").write_text(GOOD)
    (inner / "link.csv").symlink_to(tmp_path / "t.csv")
    (inner / "t.txt").write_text(GOOD)
    (inner / "t.parquet").write_text(GOOD)
    (inner / "long.csv").write_text(GOOD)
    monkeypatch.setattr("simulator.job.recorded.MAX_BYTES", 50)
    for name, says in {
        "../t.csv": "must lie in the job's folder", "link.csv": "must lie in the job's folder",
        str(tmp_path / "t.csv"): "must lie in the job's folder", "a\0b.csv": "not a path", "x" * 5000: "name too long",
        "none.csv": "no such file", ".": "not a file", "long.csv": "bytes; at most 50 are read",
    }.items():  # fmt: skip
        with pytest.raises(QuestionError) as refused:
            read_counts(name, inner, [1, 3], 4, [100, 100])
        assert says in str(refused.value) and str(refused.value).isprintable()
    monkeypatch.undo()
    for name, says in {"t.txt": "must end in .csv or .parquet", "t.parquet": "arquet"}.items():
        with pytest.raises(QuestionError, match=says):
            read_counts(name, inner, [1, 3], 4, [100, 100])


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    expected = counts_of(tmp_path, GOOD)
    table = pd.read_csv(tmp_path / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    assert (read_counts("t.parquet", tmp_path, [1, 3], 4, [100, 100]) == expected).all()
    table.assign(tokens=-table.tokens - 1.5).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(QuestionError, match=r"row 0: tokens = -6\.5: must not be negative"):
        read_counts("t.parquet", tmp_path, [1, 3], 4, [100, 100])


def test_replayed_loads_are_the_recorded_ones(tmp_path: Path) -> None:
    """Without noise each microbatch has its part of the recorded counts; contiguous is by the experts' own index."""
    counts = np.arange(64.0) + 1
    sent = 256 * 1024 * 4
    rows = [f"0,{i},{e},{counts[e] / counts.sum() * sent}" for i in range(2) for e in range(64)]
    (tmp_path / "t.csv").write_text("\n".join(["step,layer,expert,tokens", *rows]))
    job, degrees, _ = question({"model": "replay", "file": "t.csv"}, layers=2)
    still = expert_loads(job, degrees, 2, 0, folder=tmp_path, noise=False)
    by_rank = counts.reshape(16, 4).sum(axis=1) / counts.sum()
    assert still.rank_loads(1, 3, 1) == pytest.approx(by_rank * 16 * 1024 * 4)
    assert still.excess(0, 0, 0) == pytest.approx(by_rank.max() * 16 - 1)
    noisy = expert_loads(job, degrees, 2, 0, folder=tmp_path)
    assert noisy.busiest_overall() == pytest.approx(still.busiest_overall(), rel=0.01)


# Drops --------------------------------------------------------------------------------------------------------------


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
    job, degrees, _ = question(
        {"model": "dirichlet", "concentration": 0.5}, capacity={"factor": 2, "basis": "tokens"}, layers=4
    )
    assert 0.05 < expected_drops(job, degrees) < 1
