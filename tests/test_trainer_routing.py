"""Routers and their losses against other ways to say the same: by hand, in NumPy, by finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simulator.job.job import Capacity
from simulator.job.learning import RouterTraining
from simulator.job.model import Ffn, Hierarchy, Moe, Router
from simulator.job.rules import slots_per_expert
from trainer import routing
from trainer.gate import logits_of
from trainer.losses import Spans, finish, router_sums

DRAW = np.random.default_rng(0)


def moe(experts: int, top_k: int, hierarchy: Hierarchy | None = None, **router: Any) -> Moe:
    expert = Ffn(hidden=8, activation="relu")
    return Moe(experts=experts, top_k=top_k, expert=expert, router=Router(**router), hierarchy=hierarchy)


def losses(logits: Any, choices: routing.Choices, how: RouterTraining, **more: Any) -> dict[str, Any]:
    n = logits.shape[1]
    return finish(router_sums(logits, choices, how, Spans(n, n), **more), how)


# Capacity of the named code bases: tokens of a group N, experts E, choices k, capacity factor c -> slots.
SAME = {"factor": 1.0, "minimum": 1}
CODE_BASES: dict[str, tuple[Callable[[int, int, int, float], int], dict[str, Any], tuple[int, int]]] = {
    # name: (their formula, our setting, (least, most) of ours minus theirs)
    "mesh-tf": (lambda n, e, k, c: max(min(n, int(c * n / e)), 4), {"basis": "tokens", "minimum": 4}, (0, 0)),
    # Halves to even there, upwards here.
    "flaxformer": (
        lambda n, e, k, c: max(round(c * n / e), 4),
        {"basis": "tokens", "minimum": 4, "rounding": "round"},
        (0, 1),
    ),
    # Rounded up to multiples of four there.
    "lingvo": (lambda n, e, k, c: -(-(int(n * c / e) or 4) // 4) * 4, {"basis": "tokens"}, (-3, 0)),
    "v-moe": (lambda n, e, k, c: -(-math.ceil(k * n * c / e) // 4) * 4, {"basis": "assignments", "rounding": "ceil"},
              (-3, 0)),
    "axlearn": (lambda n, e, k, c: int(n * c / e), {"basis": "tokens"}, (0, 0)),
    # Ours takes no slot for a binary fraction: 1.1 x 250 is 275.00000000000006 there, and 276 slots.
    "megatron": (lambda n, e, k, c: math.ceil(k * n / e * c), {"basis": "assignments", "rounding": "ceil"}, (-1, 0)),
    "megablocks": (lambda n, e, k, c: int(c * k * n / e), {"basis": "assignments"}, (0, 0)),
    # A ceiling of its own before the factor.
    "maxtext": (lambda n, e, k, c: int(max(math.ceil(n * k / e) * c, c)), {"basis": "assignments"}, (-2, 0)),
    # k times the slots of one choice: rounded down k times, and N / E rounded up before.
    "tutel": (lambda n, e, k, c: k * int(c * math.ceil(n / e)), {"basis": "assignments"}, (-9, 4)),
    "fastmoe": (lambda n, e, k, c: math.ceil(c * n / e), {"basis": "tokens", "rounding": "ceil"}, (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE_BASES)
def test_capacity_of_the_named_code_bases(name: str) -> None:
    theirs, setting, departure = CODE_BASES[name]
    seen = set()
    for n, e, k, c in itertools.product((180, 256, 1000, 4096), (8, 60, 64), (1, 2, 6), (1.0, 1.1, 1.25, 2.0)):
        if theirs(n, e, k, c) <= n:
            capacity = Capacity(**{**SAME, **setting, "factor": c})
            seen.add(slots_per_expert(capacity, k, e, n) - theirs(n, e, k, c))
    assert (min(seen), max(seen)) == departure


def test_capacity_factor_means_two_things() -> None:
    # S 4096, E 64, k 2, factor 1.25: 80 slots in mesh-tf, 160 in Megatron.
    of = {b: slots_per_expert(Capacity(factor=1.25, basis=b), 2, 64, 4096) for b in ("tokens", "assignments")}  # type: ignore[arg-type]
    assert of == {"tokens": 80, "assignments": 160}
    assert slots_per_expert(Capacity(factor=1.25, eval_factor=2, basis="tokens"), 2, 64, 4096, evaluation=True) == 128


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_router_of_a_single_choice_learns(kind: Any) -> None:
    x = jnp.asarray(DRAW.normal(size=(1, 16, 8)), jnp.float32)
    one = moe(4, 1, kind=kind, renormalise=True)
    choose = routing.softmax_choices if kind == "softmax" else routing.sigmoid_choices

    def output(kernel: Any) -> Any:
        gate = choose(logits_of(x, kernel), one).gate_GNK
        assert gate.shape == (1, 16, 1)
        return gate.sum()

    assert float(jnp.abs(jax.grad(output)(jnp.asarray(DRAW.normal(size=(8, 4)), jnp.float32))).max()) > 0.1


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("counts", ["first", "all"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_balance_is_one_at_balance_and_the_number_of_experts_at_collapse(k: int, counts: Any, scope: Any) -> None:
    how = RouterTraining(balance_counts=counts, balance_scope=scope)
    e = 8
    turn = np.stack([np.roll(np.arange(e)[::-1] * 0.5, i) for i in range(e)])[None]
    even = jnp.asarray(np.tile(turn, (2, 3, 1)), jnp.float32)
    found = losses(even, routing.softmax_choices(even, moe(e, k)), how)["balance"]
    assert float(found) == pytest.approx(1, abs=1e-6)
    collapsed = jnp.zeros((2, 24, e)).at[..., 3].set(50.0)
    found = losses(collapsed, routing.softmax_choices(collapsed, moe(e, k)), how)["balance"]
    # Of all choices only one in k can fall on the one expert.
    assert float(found) == pytest.approx(e / (k if counts == "all" else 1), rel=1e-6)


def test_balance_is_of_groups_or_of_the_batch() -> None:
    # Two groups, each collapsed to an expert of its own: E in each of them, E / 2 over both.
    logits = jnp.zeros((2, 8, 4)).at[0, :, 0].set(50.0).at[1, :, 1].set(50.0)
    choices = routing.softmax_choices(logits, moe(4, 1))
    assert float(losses(logits, choices, RouterTraining())["balance"]) == pytest.approx(4)
    assert float(losses(logits, choices, RouterTraining(balance_scope="batch"))["balance"]) == pytest.approx(2)


def slope(f: Callable[[Any], Any], x: Any, at: tuple[int, ...], step: float = 1e-5) -> float:
    here = np.zeros(x.shape)
    here[at] = step
    return float((f(x + here) - f(x - here)) / (2 * step))


def test_gradients_of_z_loss_and_noisy_load_by_finite_differences() -> None:
    with jax.enable_x64(True):
        clean = jnp.asarray(DRAW.normal(size=(1, 6, 5)))
        width = jnp.asarray(DRAW.uniform(0.5, 1.5, size=(1, 6, 5)))
        noise = jnp.asarray(DRAW.normal(size=(1, 6, 5)))
        how, k = RouterTraining(), 2

        def z(x: Any) -> Any:
            return losses(x, routing.softmax_choices(x, moe(5, 2)), how)["z"]

        def load(x: Any, deviation: Any = width) -> Any:
            return (routing.noisy_choices(x, deviation, noise, k)[1].sum((0, 1)) ** 2).sum()

        for f, x in ((z, clean), (load, clean), (lambda w: load(clean, w), width)):
            exact, quick = jax.jit(jax.grad(f))(x), jax.jit(f)
            for at in [(0, 0, 0), (0, 3, 2), (0, 5, 4)]:
                assert float(exact[at]) == pytest.approx(slope(quick, x, at), rel=1e-6, abs=1e-9)
        assert float(z(clean)) == pytest.approx(float((np.log(np.exp(clean).sum(-1)) ** 2).mean()))


def shazeer(clean: Any, width: Any, noise: Any, k: int) -> tuple[Any, Any]:
    """Gates and probabilities of staying, token by token as the paper writes them (arXiv:1701.06538, eq. 3 to 9)."""
    gates, stay = np.zeros_like(clean), np.zeros_like(clean)
    for t, h in enumerate(clean + noise * width):
        top = sorted(range(len(h)), key=lambda i: -h[i])[:k]
        total = sum(math.exp(h[i]) for i in top)
        for i in range(len(h)):
            gates[t, i] = math.exp(h[i]) / total if i in top else 0
            kth_excluding = sorted((h[j] for j in range(len(h)) if j != i), reverse=True)[k - 1]
            stay[t, i] = 0.5 * (1 + math.erf((clean[t, i] - kth_excluding) / width[t, i] / math.sqrt(2)))
    return gates, stay


@pytest.mark.parametrize("k", [1, 2, 4])
def test_importance_and_load_as_the_paper_writes_them(k: int) -> None:
    clean, width, noise = (DRAW.normal(size=(12, 6)), DRAW.uniform(0.2, 1, (12, 6)), DRAW.normal(size=(12, 6)))
    gates, stay = shazeer(clean, width, noise, k)
    given = [jnp.asarray(x[None], jnp.float32) for x in (clean, width, noise)]
    choices, load = routing.noisy_choices(*given, k)
    np.testing.assert_allclose(choices.probabilities_GNE[0], gates, atol=1e-6)
    np.testing.assert_allclose(load[0], stay, atol=1e-6)
    found = losses(given[0], choices, RouterTraining(), load={"load_E": load.sum((0, 1))})
    for name, values in (("importance", gates.sum(0)), ("load", stay.sum(0))):
        assert float(found[name]) == pytest.approx((values.std() / values.mean()) ** 2, rel=1e-5)


def test_load_without_noise_counts_gates() -> None:
    clean = jnp.asarray(DRAW.normal(size=(1, 9, 5)), jnp.float32)
    _, load = routing.noisy_choices(clean, None, None, 2)
    assert float(load.sum()) == 18 and set(np.unique(load)) == {0, 1}


def test_hierarchy_gates_sum_to_one_and_load_is_that_of_the_paper() -> None:
    branches, per, tokens, k1, k2 = 3, 4, 20, 2, 2
    outer = [DRAW.normal(size=(tokens, branches)), DRAW.uniform(0.3, 1, (tokens, branches)),
             DRAW.normal(size=(tokens, branches))]  # fmt: skip
    inner = [DRAW.normal(size=(tokens, branches, per)), DRAW.uniform(0.3, 1, (tokens, branches, per)),
             DRAW.normal(size=(tokens, branches, per))]  # fmt: skip
    as_jax = [[jnp.asarray(x[None], jnp.float32) for x in level] for level in (outer, inner)]
    choices, sums = routing.hierarchical_choices(
        routing.noisy_choices(*as_jax[0], k1), routing.noisy_choices(*as_jax[1], k2)
    )
    gp, load_p = shazeer(*outer, k1)
    importance, load = np.zeros((branches, per)), np.zeros((branches, per))
    for i in range(branches):
        g, stay = shazeer(*(x[:, i] for x in inner), k2)
        importance[i] = (gp[:, i : i + 1] * g).sum(0)
        here = gp[:, i] > 0
        load[i] = load_p[:, i].sum() * stay[here].sum(0) / here.sum()
    np.testing.assert_allclose(choices.gate_GNK.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(choices.probabilities_GNE.sum((0, 1)), importance.ravel(), rtol=1e-5)
    logits = jnp.zeros((1, tokens, branches * per))
    found = losses(logits, choices, RouterTraining(), load=sums)
    assert float(found["load"]) == pytest.approx((load.std() / load.mean()) ** 2, rel=1e-4)
    assert float(found["importance"]) == pytest.approx((importance.std() / importance.mean()) ** 2, rel=1e-4)


def seats(expert: Any, capacity: int, order: Any, experts: int) -> Any:
    """Kept choices [N, K]: all first choices in order, then all second ones."""
    filled, kept = [0] * experts, np.zeros(np.shape(expert), bool)
    for k in range(kept.shape[1]):
        for n in order:
            e = expert[n][k]
            kept[n, k] = filled[e] < capacity
            filled[e] += kept[n, k]
    return kept


def choices_of(expert: Any, made: Any = None) -> routing.Choices:
    expert = jnp.asarray(expert)[None]
    made = jnp.ones(expert.shape, bool) if made is None else jnp.asarray(made)[None]
    return routing.Choices(expert, jnp.ones(expert.shape), made, jnp.zeros((*expert.shape[:2], 4)))


def test_first_choices_are_seated_before_second_ones() -> None:
    # Expert 0 is the second choice of token 0 and the first of tokens 1 and 2: with two slots, token 0 gets none.
    found = routing.assign_slots(choices_of([[1, 0], [0, 1], [0, 2]]), 3, 2)
    np.testing.assert_array_equal(found.place_GNK[0], [[2, 6], [0, 3], [1, 4]])
    np.testing.assert_array_equal(found.choice_GEC[0], [[2, 4], [0, 3], [5, 6]])
    # With priority the last token comes first within each choice.
    found = routing.assign_slots(choices_of([[1, 0], [0, 1], [0, 2]]), 3, 1, jnp.asarray([[0.1, 0.2, 0.9]]))
    np.testing.assert_array_equal(found.place_GNK[0], [[1, 3], [3, 3], [0, 2]])


@pytest.mark.parametrize("by_probability", [False, True])
def test_seats_are_those_of_a_loop(by_probability: bool) -> None:
    expert = np.stack([DRAW.permutation(6)[:3] for _ in range(40)])
    sure = DRAW.uniform(size=40)
    found = routing.assign_slots(choices_of(expert), 6, 13, jnp.asarray(sure[None]) if by_probability else None)
    order = np.argsort(-sure) if by_probability else range(40)
    np.testing.assert_array_equal(found.place_GNK[0] < 6 * 13, seats(expert, 13, order, 6))
    # The same seen from the slots: each taken slot names the choice that has it.
    flat, back = np.asarray(found.place_GNK[0]).ravel(), np.asarray(found.choice_GEC[0]).ravel()
    taken = back < 120
    np.testing.assert_array_equal(flat[back[taken]], np.flatnonzero(taken))
    assert taken.sum() == (flat < 78).sum() < 120


def test_more_slots_never_drop_more() -> None:
    expert = np.stack([DRAW.permutation(6)[:2] for _ in range(50)])
    kept = [int((routing.assign_slots(choices_of(expert), 6, c).place_GNK < 6 * c).sum()) for c in (1, 4, 9, 17, 29)]
    assert kept == sorted(kept) and kept[-1] == 100


def test_choices_that_are_not_made_take_no_slot() -> None:
    found = routing.assign_slots(choices_of([[0, 1], [1, 0]], [[True, False], [True, True]]), 2, 2)
    np.testing.assert_array_equal(found.place_GNK[0], [[0, 4], [2, 1]])


def test_a_second_choice_is_made_with_its_probability() -> None:
    # Gates 0.9 and 0.1 after renormalising, threshold 0.2: the second expert gets half of the tokens.
    n = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.72, 0.08, 0.2 / 3, 0.2 / 3, 0.2 / 3])), (1, n, 5))
    how = RouterTraining(second_choice="random", threshold=0.2)
    chance = jax.random.uniform(jax.random.key(0), (1, n, 2))
    choices = routing.softmax_choices(logits, moe(5, 2), how, chance)
    assert bool(choices.made_GNK[..., 0].all())
    assert float(choices.made_GNK[..., 1].mean()) == pytest.approx(0.5, abs=0.015)
    sure = routing.softmax_choices(logits, moe(5, 2), RouterTraining(second_choice="random", threshold=0.05), chance)
    assert bool(sure.made_GNK.all())


def test_the_group_limit_never_picks_a_masked_expert() -> None:
    limited = moe(16, 4, kind="sigmoid", bias=True, groups=4, top_groups=2, scale=2.5)
    logits = jnp.asarray(DRAW.normal(size=(2, 200, 16)), jnp.float32)
    # Biased scores are all below zero: a mask of zeros would be the best of them.
    choices = routing.sigmoid_choices(logits, limited, jnp.asarray(DRAW.uniform(-9, -2, 16), jnp.float32))
    expert = np.asarray(choices.expert_GNK).reshape(-1, 4)
    assert all(len(set(e // 4)) <= 2 and len(set(e)) == 4 for e in expert)
    np.testing.assert_allclose(choices.gate_GNK.sum(-1), 2.5, rtol=1e-6)
    # Gates are the scores without the bias.
    score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    picked = np.take_along_axis(score, np.asarray(choices.expert_GNK), -1)
    np.testing.assert_allclose(choices.gate_GNK, 2.5 * picked / picked.sum(-1, keepdims=True), rtol=1e-5)


def test_groups_are_chosen_by_their_two_best() -> None:
    limited = moe(6, 1, kind="sigmoid", groups=3, top_groups=1)
    scores = jnp.asarray([[[0.9, 0.0, 0.6, 0.5, 0.7, 0.1]]])
    assert np.isfinite(routing.limit_groups(scores, limited, 2)).tolist() == [
        [[False, False, True, True, False, False]]
    ]
    assert np.isfinite(routing.limit_groups(scores, limited, 1)).tolist() == [[[True, True] + [False] * 4]]


def test_the_balance_bias_moves_towards_the_idle_and_stays_centred() -> None:
    bias, counts = jnp.zeros((2, 4)), jnp.asarray([[10, 2, 4, 4], [5, 5, 5, 5]])
    moved = routing.updated_bias(bias, counts, 0.001)
    np.testing.assert_allclose(moved[0] * 1e3, [-1.5, 0.5, 0.5, 0.5], rtol=1e-5)
    np.testing.assert_array_equal(moved[1], 0)
    for _ in range(100):
        bias = routing.updated_bias(bias, jnp.asarray(DRAW.integers(0, 9, (2, 4))), 0.01)
    assert float(jnp.abs(bias.mean(-1)).max()) < 1e-7


def test_even_routing_is_even_per_rank() -> None:
    # Tokens dealt to experts in turn: every rank of any number of ranks gets the same, and nothing is dropped.
    n, e, k = 64, 16, 2
    logits = jnp.asarray([[np.roll(np.arange(e)[::-1], i * k) for i in range(n)]], jnp.float32)
    choices = routing.softmax_choices(logits, moe(e, k))
    found = routing.assign_slots(choices, e, n * k // e)
    assert bool((found.choice_GEC < n * k).all())
    for ranks in (2, 4, 8):
        per_rank = np.bincount(np.asarray(choices.expert_GNK).ravel() // (e // ranks), minlength=ranks)
        assert set(per_rank) == {n * k // ranks}


def test_experts_choose_their_surest_tokens() -> None:
    logits = DRAW.normal(size=(1, 12, 3))
    token, gate = routing.expert_choice(jnp.asarray(logits, jnp.float32), 4)
    p = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    for e in range(3):
        np.testing.assert_array_equal(token[0, e], np.argsort(-p[:, e])[:4])
        np.testing.assert_allclose(gate[0, e], np.sort(p[:, e])[::-1][:4], rtol=1e-5)


@pytest.mark.parametrize("k", [2, 12])
def test_the_largest_in_order_and_the_earlier_of_equals(k: int) -> None:
    x = jnp.asarray(DRAW.integers(0, 5, (3, 40, 16)), jnp.float32)
    np.testing.assert_array_equal(routing.largest(x, k), np.argsort(-np.asarray(x), axis=-1, stable=True)[..., :k])
