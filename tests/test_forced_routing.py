"""Forced routing: exact counts on every expert, spread evenly over sequences, and the same loads in the forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.engine.loads import ExpertLoads, expert_loads
from simulator.job.job import Routing
from simulator.job.load import load_job
from simulator.job.popularity import chosen_shares, forced_counts, whole_counts
from simulator.job.rules import resolve, rows_per_block
from trainer.forced import Forced, spread
from trainer.setting import TOKENS, Noise
from trainer_jobs import DROPLESS, LSTM, ST_MOE, SWITCH, merged, plan
from trainer_runs import make_batch, make_trainer, start

ZIPF: dict[str, Any] = {"training": {"routing": {"model": "zipf", "exponent": 1.0, "forced": True}}}
REPLAY: dict[str, Any] = {"training": {"routing": {"model": "replay", "file": "counts.csv", "forced": True}}}
# Assignments of a step of two layers, 8 sequences of 32 tokens, two choices each.
COUNTS = ((101, 3, 77, 60, 120, 0, 50, 101), (64, 64, 64, 64, 64, 64, 64, 64))


def write_counts(folder: Path, counts: Any = COUNTS) -> None:
    rows = [f"7,{layer},{e},{n}" for layer, own in enumerate(counts) for e, n in enumerate(own)]
    (folder / "counts.csv").write_text("\n".join(["step,layer,expert,tokens", *rows]) + "\n")


def test_largest_remainders_by_hand() -> None:
    # 3.5, 2.1 and 1.4: one token is left, for the largest remainder.
    assert whole_counts(np.array([0.5, 0.3, 0.2]), 7, 1).tolist() == [4, 2, 1]
    # 2.5 each, of two: equal remainders go to the earlier.
    assert whole_counts(np.array([0.5, 0.5, 0.5, 0.5]), 5, 2).tolist() == [3, 3, 2, 2]
    # Nobody chooses an expert twice.
    assert whole_counts(np.array([1.0, 0.5, 0.5]), 3, 2).tolist() == [3, 2, 1]


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40), st.integers(1, 5), st.integers(1, 10_000))
def test_whole_counts_are_within_one_of_the_shares(popularity: list[float], k: int, tokens: int) -> None:
    k = min(k, len(popularity))
    shares = chosen_shares(np.array(popularity), k)
    counts = whole_counts(shares, tokens, k)
    assert counts.sum() == tokens * k and counts.min() >= 0 and counts.max() <= tokens
    assert np.abs(counts - tokens * shares).max() < 1 + 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 50), st.integers(1, 4), st.integers(0, 2**31), st.floats(0.01, 100))
def test_every_count_is_met_by_different_experts_of_each_token(
    sequences: int, length: int, k: int, seed: int, concentration: float
) -> None:
    job = load_job(merged(DROPLESS, {"batch": {"sequences": sequences, "length": length}}))
    popularity = np.random.default_rng(seed).standard_gamma(concentration, 6) + 1e-12
    counts = whole_counts(chosen_shares(popularity, k), sequences * length, k)
    forced = Forced.of(job, {1: counts})
    tokens = TOKENS * np.arange(sequences)[:, None] + np.arange(length)
    chosen = np.asarray(forced.experts(Noise(None, None, 1), tokens, length, k))
    assert np.array_equal(np.bincount(chosen.reshape(-1), minlength=6), counts)
    assert all(len(set(row)) == k for row in chosen.reshape(-1, k).tolist())
    # Of each sequence every expert gets its share, rounded up or down.
    each = np.stack([np.bincount(row.reshape(-1), minlength=6) for row in chosen])
    assert np.abs(each - counts / sequences).max() < 1


def test_a_part_of_a_sequence_sees_all_experts() -> None:
    job = load_job(merged(DROPLESS, {"batch": {"sequences": 4, "length": 256}}))
    forced = Forced.of(job, {0: np.full(8, 128)})
    tokens = TOKENS * np.arange(4)[:, None] + np.arange(256)
    chosen = np.asarray(forced.experts(Noise(None, None, 0), tokens, 256, 1))
    quarter = np.bincount(chosen[:, :64].reshape(-1), minlength=8)
    assert np.abs(quarter - 32).max() <= 8
    assert all(np.gcd(spread(n), n) == 1 for n in range(1, 300))


def loads_of(change: dict[str, Any], folder: Path | None = None, seed: int = 0) -> tuple[Any, ExpertLoads]:
    job = load_job(merged(merged(DROPLESS, change), {"software": {"stack": "moecast"}}))
    degrees = resolve(job, resolve_cluster(job.cluster))
    return job, expert_loads(job, degrees, 1, seed, folder=folder)


def test_trainer_and_engine_have_the_recorded_counts_to_the_last_token(tmp_path: Path) -> None:
    write_counts(tmp_path)
    job, loads = loads_of(merged(REPLAY, plan(4, expert=4)), tmp_path)
    assert {k: v.tolist() for k, v in forced_counts(job, tmp_path).items()} == dict(enumerate(map(list, COUNTS)))
    for layer, own in enumerate(COUNTS):
        assert loads.rank_loads(layer, 0, 0) == pytest.approx(np.reshape(own, (4, 2)).sum(1), abs=1e-6)
    # 64 rows an expert on average: blocks of 64. The busiest rank has 120 and 0 rows, or 60 + 77: two blocks or three.
    assert rows_per_block(64) == 64 and loads.block_rows(0)[0, 0].tolist() == [192, 192, 128, 192]
    assert loads.block_rows(1)[0, 0].tolist() == [128] * 4
    assert loads.excess(0, 0, 0) == pytest.approx((192 / 128 - 1) / 2)


@pytest.mark.parametrize("change", [merged(ZIPF, plan(n, expert=n, microbatch_sequences=1)) for n in (2, 4)])
def test_forced_loads_are_those_of_the_runs_own_seed(change: dict[str, Any]) -> None:
    job, loads = loads_of(change, seed=3)
    again = loads_of(change, seed=4)[1].resample(9)
    counts = forced_counts(job, Path())
    for layer in range(len(loads.plan.layers)):
        assert np.array_equal(loads.shares(layer), again.shares(layer))
        assert counts[layer] == pytest.approx(8 * 32 * loads.shares(layer), abs=1)
    other = merged(change, {"training": {"learning": {"seed": 2}}})
    assert not np.array_equal(loads_of(other)[1].shares(0), loads.shares(0))


def test_a_step_routes_as_it_is_told(tmp_path: Path) -> None:
    """On one device here; on others the counts are the same one by one (test_trainer_mesh.py, case forced)."""
    mapping = merged(DROPLESS, ZIPF)
    expected = forced_counts(load_job(mapping), tmp_path)
    assert max(c.max() / c.mean() for c in expected.values()) > 2
    trainer = make_trainer(mapping)
    run, params, batch = jax.jit(trainer.gradients), start(trainer), make_batch(trainer)
    for step in (0, 3):
        _, metrics = run(params, batch, jnp.int32(step))
        wanted = np.asarray(metrics["experts"]["decoder"][0]["wanted_E"]).reshape(2, 8)
        assert wanted.tolist() == [expected[0].tolist(), expected[1].tolist()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_more_skew_never_means_fewer_blocks_on_the_hot_rank(data: st.DataObject) -> None:
    """Tokens that move from the other ranks to the hot one never shorten its work."""
    hot = data.draw(st.lists(st.integers(0, 256), min_size=2, max_size=2))
    moved = [data.draw(st.integers(n, 256)) for n in hot]
    base = loads_of(merged(ZIPF, plan(4, expert=4)))[1].plan

    def rows(first: list[int]) -> float:
        rest = 512 - sum(first)
        counts = np.array([*first, *np.full(6, rest // 6)], float)
        counts[2:] += np.arange(6) < rest % 6
        recorded = Routing(model="replay", file="counts.csv", forced=True)
        loads = ExpertLoads(replace(base, routing=recorded, recorded=(counts, counts)), 0)
        return float(loads.block_rows(0)[0, 0, 0])

    assert rows(moved) >= rows(hot)


@pytest.mark.parametrize(
    ("base", "change", "rule"),
    [
        (DROPLESS, {"training": {"routing": {"forced": True}}}, "forced = true: goes with model even, zipf"),
        (LSTM, ZIPF, "routing.forced = true: .* kind softmax and sigmoid, not noisy_top_k"),
        (ST_MOE, ZIPF, "second_choice = random: "),
        (SWITCH, merged(ZIPF, {"batch": {"sequences": 1, "length": {"encoder": 2 * TOKENS, "decoder": 8}}}),
         "batch.length = 32768: .* at most 16384 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_forced_is_refused_by_name(base: Any, change: Any, rule: str) -> None:
    with pytest.raises(QuestionError, match=rule):
        make_trainer(merged(base, change))


def test_a_bad_table_is_named_by_file_and_rule(tmp_path: Path) -> None:
    write_counts(tmp_path, ((600, *COUNTS[0][1:]), COUNTS[1]))
    with pytest.raises(QuestionError, match=r"counts.csv.*step 7, layer 0 has 1,011 tokens x k; the job sends 512"):
        forced_counts(load_job(merged(DROPLESS, REPLAY)), tmp_path)
