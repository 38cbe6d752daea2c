"""Plans in columns against the scalar forecast of each, and the walk and the launch bound against plain versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip, resolve_cluster
from hw_profiles.schema import Sharing
from simulator.analysis.launches import _enumerated, turns_of
from simulator.numbers import maximum
from simulator.planner.array_form import ArrayForm, evaluate
from simulator.planner.table import row
from simulator.workload.orders import ORDERS
from simulator.workload.schedules import StageTimes, pipeline_time
from tests.planner_draws import JOBS, draw_table, load, scalar_answers

PLANS = 320


def _assert_equal(name: str, table: dict[str, Any], cluster: Cluster | None = None) -> int:
    """How many plans of `table` keep the rules; all answers are those of the scalar forecast."""
    job, own = load(name)
    cluster = cluster or own
    found = evaluate(job, cluster, table)
    valid = 0
    for i in range(len(table["plan.tensor"])):
        one = scalar_answers(job, cluster, table, i)
        assert bool(found["ok"][i]) == isinstance(one, dict), (one, row(table, i))
        if isinstance(one, dict):
            valid += 1
            for what, number in one.items():
                if math.isnan(number):
                    assert math.isnan(found[what][i])
                else:
                    assert found[what][i] == pytest.approx(number, rel=1e-9), (what, row(table, i))
        else:
            assert math.isnan(found["step_time_s"][i])
    return valid


@pytest.mark.parametrize("name", JOBS)
def test_columns_equal_the_scalar_forecast(name: str) -> None:
    job, cluster = load(name)
    # Over the ten jobs well above a thousand plans keep the rules.
    assert _assert_equal(name, draw_table(job, cluster.devices, PLANS, np.random.default_rng(1))) > PLANS / 8


def test_columns_of_devices_that_share_cores() -> None:
    """How long a call lasts and what others compute in it goes by its group, another one in every plan."""
    eight = Sharing(devices=8, compute=4, memory=4, start=40, wire=3, waits={"all_to_all": 1.5}, filled=0.8)
    cluster = resolve_cluster("cpu-8", chip=load_chip("cpu-host").model_copy(update={"sharing": (eight,)}))
    table = draw_table(load("own-cpu")[0], 8, PLANS, np.random.default_rng(2))
    assert _assert_equal("own-cpu", table, cluster) > PLANS / 8


@settings(deadline=None, max_examples=12)
@given(name=st.sampled_from(sorted(JOBS)), seed=st.integers(0, 2**32 - 1))
def test_columns_equal_the_scalar_forecast_whatever_is_drawn(name: str, seed: int) -> None:
    job, cluster = load(name)
    _assert_equal(name, draw_table(job, cluster.devices, 12, np.random.default_rng(seed)))


def test_a_full_grid_equals_its_rows_one_by_one() -> None:
    job, cluster = load("gpt3")
    axes = {
        "plan.tensor": [2, 8], "plan.pipeline": [1, 4], "plan.microbatch_sequences": [1, 2], "plan.shard": [0, 1, 2, 3],
        "training.remat": [0, 2], "software.overlap.gradients": [0, 1], "software.overlap.parameters": [0, 1],
    }  # fmt: skip
    grid = np.meshgrid(*axes.values(), indexing="ij")
    table = {name: g.reshape(-1) for name, g in zip(axes, grid, strict=True)}
    whole = evaluate(job, cluster, table)
    form = ArrayForm(job, cluster)
    for i in range(0, len(table["plan.tensor"]), 7):
        one = evaluate(job, cluster, {name: c[i : i + 1] for name, c in table.items()}, form)
        assert whole["step_time_s"][i] == pytest.approx(one["step_time_s"][0], rel=1e-12)
        assert whole["memory_peak_bytes"][i] == pytest.approx(one["memory_peak_bytes"][0], rel=1e-12)


def test_a_column_that_no_plan_has_is_refused() -> None:
    job, cluster = load("gpt3")
    with pytest.raises(QuestionError, match=r"'plan.tensr': no field of a plan; did you mean 'plan.tensor'\?"):
        evaluate(job, cluster, {"plan.tensr": np.array([1])})


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_walk_of_columns_is_the_walk_of_each_plan(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(["1f1b", "interleaved", "zb-h1", "dualpipe", "gpipe"]))
    stages = data.draw(st.sampled_from([2, 4, 6]))
    virtual = data.draw(st.integers(1, 3)) if schedule == "interleaved" else 1
    microbatches = stages * data.draw(st.integers(2 if schedule == "dualpipe" else 1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    columns = [rng.uniform(0.5, 1.5, (3, 5)) for _ in range(stages * virtual)]
    hop = rng.uniform(0, 0.2, 5)
    many = pipeline_time(schedule, [StageTimes(*c) for c in columns], microbatches, virtual, hop)
    for i in range(5):
        times = [StageTimes(*c[:, i].tolist()) for c in columns]
        assert many[i] == pytest.approx(pipeline_time(schedule, times, microbatches, virtual, float(hop[i])), rel=1e-12)


def test_columns_that_walk_differently_are_refused() -> None:
    times = [StageTimes(np.ones(2), np.ones(2), np.ones(2))] * 2
    with pytest.raises(ValueError, match="walk 1 to 4 microbatches"):
        pipeline_time("1f1b", times, np.array([1, 8]), 1, 0.0)


@pytest.mark.parametrize("schedule", sorted(ORDERS))
@pytest.mark.parametrize("rounds", [1, 3, 5, 6, 9, 12, 13])
def test_long_orders_are_read_off_short_ones(schedule: str, rounds: int) -> None:
    stages, virtual = 4, 3 if schedule == "interleaved" else 1
    microbatches = stages * (rounds + 1)
    for p in range(stages):
        turns, whole = turns_of(schedule, p, stages, microbatches, virtual)
        exact, total = _enumerated(schedule, p, stages, microbatches, virtual)
        assert whole == pytest.approx(total)
        places = {(t.own, t.forward, tuple(round(x, 6) for x in t.before)) for t in turns}
        assert places == {(t.own, t.forward, tuple(round(x, 6) for x in t.before)) for t in exact}


def test_only_the_ends_of_a_run_of_equal_steps_can_be_where_the_longest_path_turns() -> None:
    rng = np.random.default_rng(3)
    for schedule in sorted(ORDERS):
        copies = 2 if schedule == "dualpipe" else 1
        turns, _ = _enumerated(schedule, 1, 4, 12, 1)
        done, every = (0.0,) * 3 * copies, []
        parts = {"F": (0,), "B": (1, 2), "I": (1,), "W": (2,)}
        for action in ORDERS[schedule](1, 4, 12, 1):
            own = [0.0] * (3 * copies)
            for a in (action,) if action.pair is None else (action, action.pair):
                for i in parts[a.kind]:
                    own[3 * (a.chunk if copies == 2 else 0) + i] += 1
            every.append((tuple(own), done))
            done = tuple(x + y for x, y in zip(done, own, strict=True))
        assert len(turns) < len(every)
        for _ in range(20):
            slope = rng.normal(size=3 * copies)
            for kind in {own for own, _ in every}:
                most = -math.inf
                for own, before in every:
                    most = maximum(most, float(np.dot(slope, before))) if own == kind else most
                assert max(float(np.dot(slope, t.before)) for t in turns if t.own == kind) == pytest.approx(most)
