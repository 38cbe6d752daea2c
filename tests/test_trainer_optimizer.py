"""Schedules by hand, Adafactor against loops and optax, clipping, and what stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simulator.job.learning import Learning, LearningRate
from trainer.optimizer import adafactor_parts, frozen_parts, per_matrix, schedule_of
from trainer.parameters import Parameter
from trainer.step import State
from trainer_jobs import LATENT, merged
from trainer_runs import make_batch, make_trainer, named, start

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"schedule": "constant"}, {0: 0.2, 4: 1.0, 5: 1.0, 999: 1.0}),
        # Peak sqrt(warmup / n) from step n = warmup on: T5's 1 / sqrt(max(n, warmup)), scaled to the peak.
        ({"schedule": "rsqrt"}, {0: 0.2, 2: 0.6, 4: 1.0, 5: 1.0, 20: 0.5, 500: 0.1}),
        # Half way down between 1 and 0.1, then the end, and no further.
        ({"schedule": "cosine", "decay_steps": 25}, {4: 1.0, 5: 1.0, 15: 0.55, 25: 0.1, 400: 0.1}),
        ({"schedule": "rsqrt", "warmup_steps": 1}, {0: 1.0, 1: 1.0, 4: 0.5}),
    ],
)
def test_schedules_by_hand(fields: dict[str, Any], points: dict[int, float]) -> None:
    rate = schedule_of(LearningRate(**{"peak": 1.0, "warmup_steps": 5, **fields}))
    for step, value in points.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(value, rel=1e-6), step


def updates_of(method: Any, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    state = method.init(params)
    update = jax.jit(method.update)
    for g in gradients:
        out, state = update(g, state, params)
    return out, state


# More experts than hidden units: optax by itself would factor over experts.
STACK = Parameter((2, 300, 130, 140), ("layers", "experts", "hidden", "expert_ffn"), "fan_in", expert=True)


def test_adafactor_treats_each_expert_alone() -> None:
    least = {"least": 4}
    small = Parameter((2, 9, 5, 6), STACK.axes, "fan_in", expert=True)
    w = jnp.asarray(DRAW.normal(size=small.shape), jnp.float32)
    gradients = [jnp.asarray(DRAW.normal(size=small.shape), jnp.float32) for _ in range(3)]
    stacked = per_matrix(lambda: adafactor_parts(Learning(), **least), {"w": small})
    found, _ = updates_of(stacked, {"w": w}, [{"w": g} for g in gradients])
    for i in range(2):
        for e in range(9):
            alone, _ = updates_of(adafactor_parts(Learning(), **least), w[i, e], [g[i, e] for g in gradients])
            np.testing.assert_allclose(found["w"][i, e], alone, rtol=1e-5, atol=1e-7)
    # optax on the whole stack is something else: it averages over experts.
    mixed, _ = updates_of(adafactor_parts(Learning(), **least), w, gradients)
    assert float(jnp.abs(mixed - found["w"]).max()) > 0.01


def test_adafactor_by_its_formulas() -> None:
    w, g = DRAW.normal(size=(6, 8)), DRAW.normal(size=(2, 6, 8))
    found, _ = updates_of(adafactor_parts(Learning(), least=4), jnp.asarray(w, jnp.float32),
                          [jnp.asarray(x, jnp.float32) for x in g])  # fmt: skip
    rows, columns = np.zeros(6), np.zeros(8)
    for t, x in enumerate(g, 1):
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (x**2 + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (x**2 + 1e-30).mean(0)
    u = g[-1] / np.sqrt(np.outer(rows, columns) / rows.mean())
    u /= max(1, np.sqrt((u**2).mean()))
    np.testing.assert_allclose(found, u * max(1e-3, np.sqrt((w**2).mean())), rtol=1e-5)


def test_moments_are_never_factored_across_a_stack() -> None:
    shapes = jax.eval_shape(
        per_matrix(lambda: adafactor_parts(Learning()), {"w": STACK}).init,
        {"w": jax.ShapeDtypeStruct(STACK.shape, jnp.float32)},
    )
    large = {x.shape for x in jax.tree.leaves(shapes) if x.size > 600}
    assert large == {(2, 300, 130), (2, 300, 140)}
    alone = jax.eval_shape(adafactor_parts(Learning()).init, jax.ShapeDtypeStruct(STACK.shape, jnp.float32))
    assert (2, 130, 140) in {x.shape for x in jax.tree.leaves(alone)}


def test_clipping_counts_every_expert_once(trainer_suite: Callable[[str], dict[str, Any]]) -> None:
    for name, seen in trainer_suite("steps").items():
        # By hand from the gradients of one device; on one device and on eight the step finds the same.
        assert seen["gradient_norm"] == pytest.approx([seen["norm_by_hand"]] * 2, rel=1e-5), name
        # The norm is far above the limit, so a shard counted twice would show in every parameter.
        assert seen["norm_by_hand"] > 10 * seen["clip"]


SMALL = merged(
    LATENT,
    {
        "batch": {"sequences": 2},
        "training": {"optimizer": "adamw", "learning": {"weight_decay": 0.1, "learning_rate": {"warmup_steps": 1}}},
    },
)


def moved(job: dict[str, Any]) -> dict[str, bool]:
    """Which parameters a step moves."""
    trainer = make_trainer(job)
    params = start(trainer)
    before = jax.device_get(params)
    state, _ = trainer.step(State(jnp.int32(0), params, trainer.optimizer.init(params)), make_batch(trainer))
    pairs = zip(named(before), named(state.params), strict=True)
    return {name: bool((a != np.asarray(b)).any()) for (name, a), (_, b) in pairs}


def frozen(*names: str) -> dict[str, Any]:
    return merged(SMALL, {"training": {"learning": {"start": {"checkpoint": "runs/first", "freeze": list(names)}}}})


def test_a_step_moves_everything_and_frozen_parts_stay() -> None:
    everything = moved(SMALL)
    assert all(everything.values())
    sparse = {k for k in everything if "/experts/" in k or "/router/" in k}
    found = moved(frozen("others"))
    assert {k for k, v in found.items() if v} == sparse
    # The balance bias of a frozen router is frozen, though no optimiser moves it.
    found = moved(frozen("experts"))
    assert {k for k, v in found.items() if not v} == sparse and any("balance_bias" in k for k in sparse)


def test_named_parts_are_frozen() -> None:
    trainer = make_trainer(frozen("embedding", "attention"))
    still = dict(named(frozen_parts(trainer.job, trainer.abstract)))
    for name, stays in still.items():
        assert stays is ("embedding" in name or "/attention/" in name or "balance_bias" in name), name


def test_the_optimiser_leaves_balance_biases_to_the_router() -> None:
    trainer = make_trainer(merged(SMALL, {"training": {"learning": {"router": {"bias_update": 0.01}}}}))
    params = start(trainer)
    before = np.asarray(params["decoder"]["segments"][1][0]["moe"]["router"]["balance_bias"])
    state, metrics = trainer.step(State(jnp.int32(0), params, trainer.optimizer.init(params)), make_batch(trainer))
    after = np.asarray(state.params["decoder"]["segments"][1][0]["moe"]["router"]["balance_bias"])
    counts = np.asarray(metrics["experts"]["decoder"][0]["wanted_E"])
    expected = before + 0.01 * np.sign(counts.mean(-1, keepdims=True) - counts)
    np.testing.assert_allclose(after, expected - expected.mean(-1, keepdims=True), atol=1e-6)


def test_weight_decay_is_for_matrices() -> None:
    trainer = make_trainer(SMALL)
    params = start(trainer)
    nothing = jax.tree.map(jnp.zeros_like, params)
    method = trainer.optimizer
    updates = jax.jit(lambda g, p: method.update(g, method.init(p), p)[0])(nothing, params)
    for name, u in named(updates):
        assert bool(np.any(u)) is not (name.endswith(("scale", "bias"))), name
    assert isinstance(trainer.optimizer, optax.GradientTransformation)
