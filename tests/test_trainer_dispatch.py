"""Ways to bring tokens to experts: the same values, gradients and drops; and what compiled steps send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import dispatch, routing
from trainer.moe import moe_layer
from trainer.parameters import initial_values
from trainer.setting import Noise
from trainer_jobs import DECODER, merged
from trainer_runs import make_trainer

G, N, D, F, E, K = 2, 24, 8, 12, 6, 2
DRAW = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return jnp.asarray(DRAW.normal(size=shape), jnp.float32)


X, KERNEL, UP, DOWN, OUT = normal(G, N, D), normal(D, E), normal(E, D, F), normal(E, F, D), normal(G, N, D)


def mixture(way: str, capacity: int) -> Callable[..., Any]:
    """The layer from tokens to tokens, with the router's seats, by one of the ways."""

    def layer(x: Any, kernel: Any, up: Any, down: Any) -> Any:
        logits = jnp.einsum("gnd,de->gne", x, kernel)
        top = routing.largest(logits, K)
        gate = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), top, axis=-1)
        choices = routing.Choices(top, gate, jnp.ones(top.shape, bool), logits)
        seats = routing.assign_slots(choices, E, capacity)
        if way == "loop":
            return dispatch.loop(x, gate, top, seats, lambda e, t: jax.nn.relu(t @ up[e]) @ down[e])
        send, collect = dispatch.WAYS[way]
        rows = dispatch.send(send(x, seats), (), 1)
        gate_eR = dispatch.send(dispatch.gates(gate, seats)[..., None], (), 1)
        hidden = jax.nn.relu(jnp.einsum("erd,edf->erf", rows, up)) * gate_eR
        rows = jnp.einsum("erf,efd->erd", hidden, down)
        return collect(dispatch.send_back(rows, (), 1, G), seats)

    return layer


@pytest.mark.parametrize("capacity", [2, 5, N * K])
@pytest.mark.parametrize("way", ["slots", "one_hot"])
def test_all_ways_are_the_loop_over_experts_in_values_and_gradients(way: str, capacity: int) -> None:
    def both(of: str) -> Any:
        f = mixture(of, capacity)
        return jax.jit(jax.value_and_grad(lambda *a: ((y := f(*a)) * OUT).sum() + (y**2).sum(), (0, 1, 2, 3)))(
            X, KERNEL, UP, DOWN
        )

    (value, gradients), (expected, oracle) = both(way), both("loop")
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for found, wanted in zip(gradients, oracle, strict=True):
        assert float(jnp.abs(wanted).max()) > 0.1
        # float32 sums in another order.
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_tokens_without_a_seat_come_back_as_zero() -> None:
    y = jax.jit(mixture("slots", 1))(X, KERNEL, UP, DOWN)
    expected = jax.jit(mixture("loop", 1))(X, KERNEL, UP, DOWN)
    empty = np.asarray((expected == 0).all(-1))
    assert 0 < empty.sum() < empty.size
    np.testing.assert_array_equal(np.asarray((y == 0).all(-1)), empty)


def test_move_rows_has_the_gradient_that_jax_finds_itself() -> None:
    # Row i goes to the places in backward[i]; place o has row forward[o]; 5 rows, 8 places, some empty.
    backward = np.array([[0, 3], [1, 8], [7, 2], [8, 8], [5, 8]])
    forward = np.full(8, 5)
    for row, places in enumerate(backward):
        forward[places[places < 8]] = row
    x, out = normal(5, 3), normal(8, 3)
    found = jax.grad(lambda v: (dispatch.move_rows(v, jnp.asarray(forward), jnp.asarray(backward)) * out).sum())(x)

    def plain(v: Any) -> Any:
        return jnp.where(forward[:, None] < 5, v[np.minimum(forward, 4)], 0)

    np.testing.assert_array_equal(dispatch.move_rows(x, jnp.asarray(forward), jnp.asarray(backward)), plain(x))
    np.testing.assert_allclose(found, jax.grad(lambda v: (plain(v) * out).sum())(x), rtol=1e-6)


def test_experts_that_choose_add_up_where_they_meet() -> None:
    token = jnp.asarray([[[0, 1], [1, 2]]])
    gate = jnp.asarray([[[0.5, 0.25], [0.125, 1.0]]])
    x = jnp.arange(8.0).reshape(1, 4, 2)
    rows = dispatch.chosen_dispatch(x, token) * gate.swapaxes(0, 1)[..., None]
    y = dispatch.chosen_combine(rows, token, 4)
    np.testing.assert_allclose(y[0], np.asarray(x[0]) * [[0.5], [0.375], [1.0], [0.0]])


LAYER = {"batch": {"sequences": 4}, "model": {"decoder": {"layers": 1, "moe": {"expert": {"bias": True}}}}}


def run_layer(change: dict[str, Any], layout: str | None = None) -> Any:
    """(output, gradients of the layer's weights and input) of one MoE layer on one device, with noise."""
    trainer = make_trainer(merged(merged(DECODER, LAYER), change))
    (layer,) = trainer.job.model.decoder_layers
    spec = trainer.abstract["decoder"]["segments"][0][0]["moe"]
    params = jax.jit(lambda: jax.tree.map(lambda w: w[0] + 0.1, initial_values(spec, 0, jnp.float32)))()
    x = normal(4, 32, 32) if "x" not in _KEPT else _KEPT["x"]
    _KEPT["x"] = x
    s = trainer.setting()
    s = replace(s, degrees=replace(s.degrees, layout=layout or s.degrees.layout))

    def f(p: Any, v: Any) -> Any:
        noise = Noise(jax.random.key(1), jnp.arange(4 * 32).reshape(4, 32))
        y, sums, seen = moe_layer(s, layer.moe, v, p, noise)
        return (jnp.sin(3 * y)).sum() + sums["balance"] + sums["z"], (y, seen["kept_E"])

    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x)


_KEPT: dict[str, Any] = {}
DROPLESS = {"training": {"capacity": "dropless"}}
AMPLE = {"training": {"capacity": {"factor": 8.0, "basis": "tokens", "group_tokens": 32}}}


@pytest.mark.parametrize("layout", ["ragged", "blocks"])
def test_dropless_experts_are_slots_that_never_fill(layout: str) -> None:
    (_, (y, kept)), found = run_layer(DROPLESS, layout)
    (_, (expected, seated)), wanted = run_layer(AMPLE)
    np.testing.assert_array_equal(kept, seated)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), err_msg=str(path))
        assert float(jnp.abs(b).max()) > 0


@pytest.mark.parametrize(("change", "layout"), [(AMPLE, "slots"), (DROPLESS, "ragged"), (DROPLESS, "blocks")])
def test_expert_dropout_keeps_the_mean_and_is_inside_of_experts(change: dict[str, Any], layout: str) -> None:
    still = run_layer(change, layout)[0][1][0]
    rate = {"training": {"learning": {"expert_dropout": 0.5}}}
    (_, (y, _)), gradients = run_layer(merged(change, rate), layout)
    assert float(jnp.abs(y - still).max()) > 0.1
    # Biases after the hidden layer are not dropped, and no output is zeroed as a whole.
    assert not bool((y - _KEPT["x"] == 0).any())
    again = run_layer(merged(change, rate), layout)[0][1][0]
    np.testing.assert_array_equal(y, again)
    assert float(jnp.abs(gradients[0]["experts"]["up"]).max()) > 0


@pytest.fixture(scope="session")
def programs(trainer_suite: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return trainer_suite("programs")


def test_routers_compute_in_float32_and_the_all_to_all_carries_bfloat16(programs: dict[str, Any]) -> None:
    found = programs["jaxpr"]
    # Forward, and both products of the backward pass; the kernel is [32, 8].
    assert found["router"] and {tuple(x) for x in found["router"]} == {("float32", "float32", "float32")}
    assert len(found["router"]) >= 3
    # Rows there and back, and gates there, forward and backward.
    assert found["all_to_all"] == ["bfloat16"] * 6
    assert found["experts"] and {tuple(x)[:2] for x in found["experts"]} == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("remat", ["none", "full", "dispatch"])
def test_an_moe_layer_has_two_all_to_alls_forward_and_two_backward(programs: dict[str, Any], remat: str) -> None:
    found = programs["audit"][remat]
    slots = found["E"] * found["G"] * found["C"] * found["width"]
    # Made again, only the way there is travelled again: no gradient needs what came back, as gates are applied before.
    again = {"full": {"recompute": 1}}.get(remat, {})
    for size, travels in ((slots * found["D"], {"forward": 2, "backward": 2}), (slots, {"forward": 1, "backward": 1})):
        calls = dict.fromkeys(travels | again, 0)
        for phase, sent, count in found["sent"]:
            calls[phase] += count * (sent == size)
        assert calls == {phase: n * found["layers"] for phase, n in (travels | again).items()}
    assert {sent for _, sent, _ in found["sent"]} == {slots * found["D"], slots}


@pytest.mark.parametrize("remat", ["selective", "full", "save", "recompute"])
def test_remat_changes_the_work_and_not_the_step(programs: dict[str, Any], remat: str) -> None:
    found = programs["remat"]
    assert found[remat]["difference"] < 1e-5
    assert found[remat]["loss"] == pytest.approx(found["none"]["loss"], rel=1e-6)
    extra = found[remat]["flops"] - found["none"]["flops"]
    assert extra == found[remat]["expected"] > 0


def test_fsdp_gathers_again_what_it_does_not_keep(programs: dict[str, Any]) -> None:
    found = programs["fsdp"]
    assert found["gathers"]["recompute"] == found["gathers"]["forward"] - found["outside"]
    # The default reduces in the compute format, and the job's word is obeyed.
    assert (found["reduced"], found["reduced_fp32"]) == (["bf16"], ["f32"])
