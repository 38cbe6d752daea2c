"""One step is the same on 1, 2, 4 and 8 devices, however the plan splits it; plans that cannot be are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.job.load import load_job
from simulator.job.rules import resolve
from trainer.mesh import make_axes
from trainer.refuse import check_runnable
from trainer_jobs import CASES, DECODER, LSTM, merged, plan
from trainer_runs import make_trainer

SUITE = {name: "mesh-decoder" if name == "decoder" else "mesh-others" for name in CASES}
PLANS = [(case, variant) for case, (_, variants) in CASES.items() for variant in variants]


@pytest.fixture(scope="session")
def found(trainer_suite: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    return lambda case: trainer_suite(SUITE[case])[case]


@pytest.mark.parametrize(("case", "variant"), PLANS, ids=[f"{c}: {v}" for c, v in PLANS])
def test_a_plan_does_not_change_the_step(case: str, variant: str, found: Callable[[str], dict[str, Any]]) -> None:
    seen = found(case)["variants"][variant]
    assert "error" not in seen, seen["error"]
    # float32 sums in another order; relative to the largest value of each array.
    assert max(seen["gradients"].values()) < 1e-5, sorted(seen["gradients"].items(), key=lambda x: -x[1])[:5]
    assert max(seen["metrics"].values()) < 1e-5, sorted(seen["metrics"].items(), key=lambda x: -x[1])[:5]
    # Which token went where is the same one by one, noise and seats included.
    counts = {k: v for k, v in seen["metrics"].items() if k.endswith(("wanted_E", "kept_E"))}
    assert counts and not any(counts.values())


@pytest.mark.parametrize("case", CASES)
def test_the_cases_try_what_they_should(case: str, found: Callable[[str], dict[str, Any]]) -> None:
    seen = found(case)
    # Every parameter learns, the router too; experts overflow, but where they choose themselves or nothing is dropped.
    assert [k for k in seen["still"] if not k.endswith("balance_bias")] == []
    assert np.isfinite(seen["loss"])
    assert (seen["dropped"] > 0.1 * seen["wanted"]) is (case not in ("expert choice", "dropless", "forced"))


def test_a_step_is_the_same_on_eight_devices(trainer_suite: Callable[[str], dict[str, Any]]) -> None:
    for name, seen in trainer_suite("steps").items():
        assert seen["norm"] < 1e-5, name
        # Parameters after two steps, relative to how far the steps moved them.
        assert max(seen["moved"].values()) < 1e-3, (name, sorted(seen["moved"].items(), key=lambda x: -x[1])[:5])
        assert seen["evaluation"] < 1e-5, name


def axes_of(**fields: Any) -> Any:
    devices = fields.pop("devices")
    job = load_job(merged(DECODER, plan(devices, **fields)))
    return make_axes(job, resolve(job, resolve_cluster(job.cluster)))


def test_degrees_are_tuples_of_mesh_axes() -> None:
    axes = axes_of(devices=8, tensor=4, expert=4, expert_tensor=2, shard="parameters")
    assert axes.size(axes.tensor) == 4 and axes.size(axes.data) == 2
    assert axes.size(axes.expert) == 4 and axes.size(axes.expert_tensor) == 2
    # Experts lie over two tensor ranks and two data ranks: no copies, and nothing to shard.
    assert set(axes.expert) & set(axes.tensor) and set(axes.expert) & set(axes.data)
    assert axes.copies == () and axes.expert_shard == () and axes.size(axes.shard) == 2
    axes = axes_of(devices=8, expert=2, shard="parameters", shard_degree=4)
    assert (axes.size(axes.shard), axes.size(axes.expert_shard), axes.size(axes.copies)) == (4, 2, 4)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (plan(8, expert=2, expert_tensor=2), "ranks that hold the same tokens"),
        (plan(8, tensor=2, expert=8, shard="optimizer", shard_degree=4) | {"batch": {"sequences": 12}}, None),
        (merged(plan(4, tensor=2, expert_tensor=2), {"model": {"decoder": {"moe": {"expert": {"depth": 2}}}}}),
         "2 hidden layers"),
        (merged(plan(6, tensor=2, expert=3), {"batch": {"sequences": 6}, "model": {"decoder": {"moe": {"experts": 9}}}}
                ), "does not divide"),
    ],
)  # fmt: skip
def test_plans_that_fit_no_mesh_are_refused_by_name(change: dict[str, Any], rule: str | None) -> None:
    job = load_job(merged(DECODER, change))
    degrees = resolve(job, resolve_cluster(job.cluster))
    if rule is None:
        assert make_axes(job, degrees).names
        return
    with pytest.raises(QuestionError, match=rule):
        make_axes(job, degrees)


def runnable(*changes: dict[str, Any]) -> None:
    job: dict[str, Any] = DECODER
    for change in changes:
        job = merged(job, change)
    loaded = load_job(job)
    check_runnable(loaded, resolve(loaded, resolve_cluster(loaded.cluster)), "cpu")


BY_SEQUENCE = {"training": {"learning": {"router": {"balance_scope": "sequence"}}}}
THREE = {"batch": {"sequences": 3, "length": 32}}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        # Two sequences of 32 tokens on four ranks: half of one each.
        (plan(4, tensor=4, microbatch_sequences=2), None),
        (plan(4, tensor=4, expert_tensor=2, sequence_parallel=True, microbatch_sequences=1), None),
        # Three on two ranks: one and a half each.
        (merged(plan(2, tensor=2), THREE), "balance_scope = sequence: .* equal pieces of one; it has 48 tokens"),
    ],
)
def test_losses_over_sequences_need_equal_pieces_of_them(change: dict[str, Any], rule: str | None) -> None:
    dropless = {"training": {"capacity": "dropless"}}
    if rule is None:
        runnable(change, BY_SEQUENCE)
        return
    with pytest.raises(QuestionError, match=rule):
        runnable(change, BY_SEQUENCE)
    # Where nothing is dropped there are no groups, and sequences stand for them.
    with pytest.raises(QuestionError, match=r"capacity = dropless: .* equal pieces; it has 48 tokens"):
        runnable(change, dropless)
    runnable(change)


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(QuestionError, match="needs 2 devices; there are 1"):
        make_trainer(merged(DECODER, plan(2)))


def test_initial_values_are_truncated_normal_by_fan_in() -> None:
    trainer = make_trainer(merged(DECODER, {"training": {"learning": {"init_scale": 0.1}}}))
    params = trainer.init().params
    layer = params["decoder"]["segments"][0][0]
    for name, fan_in in (("up", 32), ("down", 32)):
        w = np.asarray(layer["moe"]["experts"][name])
        deviation = (0.1 / fan_in) ** 0.5
        assert w.std() == pytest.approx(deviation, rel=0.02)
        # Cut at two standard deviations of the normal before the cut.
        assert np.abs(w).max() <= 2 * deviation / 0.8796 + 1e-6
    assert np.asarray(layer["moe"]["router"]["kernel"]).std() == pytest.approx(0.02, rel=0.1)
    assert len({float(w.ravel()[0]) for w in map(np.asarray, jax.tree.leaves(layer)) if w.std() > 0}) == 8
    lstm = make_trainer(LSTM).init().params["decoder"]["segments"][0][0]["moe"]["router"]
    assert not np.asarray(lstm["kernel"]).any() and not np.asarray(lstm["noise"]).any()
