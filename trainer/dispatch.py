"""Dispatch and combine: moving tokens to their experts and back, in several ways behind one interface.

    buffer_EGCD = way.dispatch(x_GND, assignment)      # this device's tokens, for all experts
    gate_EGC = gates(gate_GNK, assignment)             # the gate of each slot travels with its token
    rows_eRD, gate_eR = send(...)                      # all-to-all: all tokens, for this device's experts
    ...experts, which multiply by the gate before their last product...
    y_GND = way.combine(returned_EGCD, assignment)     # the sum of a token's rows

All ways give the same values and gradients (tests/test_trainer_dispatch.py). `loop` is the oracle: every expert sees
every token, nothing is moved.

The gate is applied at the expert, before its last product, where Megatron-Core applies it too: the sum at home then
needs no result of the experts for its gradient, so that none is kept, and a fully rematerialised layer sends its tokens
three times, not four.

Letters: G groups of this device, N tokens of a group, E experts, e experts of this device, K choices, C slots, D
hidden, R rows an expert of this device gets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.routing import Assignment

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=())
def move_rows(x_ID: Array, forward_O: Array, backward_IJ: Array) -> Array:
    """y_OD = x[forward], zero where forward is I; each row of x goes to at most J places, listed in `backward_IJ`.

    Knowing the way back, the gradient is a gather too, where JAX's own would scatter and add (O marks "nowhere").
    """
    return _gather(x_ID, forward_O)


def _gather(x_ID: Array, index: Array) -> Array:
    found = jnp.take(x_ID, jnp.minimum(index, x_ID.shape[0] - 1), axis=0, mode="clip")
    return jnp.where((index < x_ID.shape[0])[..., None], found, 0)


def _move_forward(x: Array, forward: Array, backward: Array) -> tuple[Array, Array]:
    return _gather(x, forward), backward


def _move_backward(backward: Array, dy_OD: Array) -> tuple[Array, None, None]:
    return _gather(dy_OD, backward).sum(-2), None, None


move_rows.defvjp(_move_forward, _move_backward)


def slots_dispatch(x_GND: Array, assignment: Assignment) -> Array:
    """buffer_EGCD by gathering each slot's token; empty slots are zero."""
    groups, d = x_GND.shape[0], x_GND.shape[-1]
    experts, capacity = assignment.choice_GEC.shape[1:]
    k = assignment.place_GNK.shape[-1]

    def one(x: Array, choice_EC: Array, place_NK: Array) -> Array:
        return move_rows(x, choice_EC.reshape(-1) // k, place_NK)

    rows = jax.vmap(one)(x_GND, assignment.choice_GEC, assignment.place_GNK)
    return rows.reshape(groups, experts, capacity, d).swapaxes(0, 1)


def gates(gate_GNK: Array, assignment: Assignment) -> Array:
    """gate_EGC, the gate of the choice in each slot; empty slots have 0."""

    def one(gate_NK: Array, choice_EC: Array, place_NK: Array) -> Array:
        rows = move_rows(gate_NK.reshape(-1, 1), choice_EC.reshape(-1), place_NK.reshape(-1, 1))
        return rows.reshape(choice_EC.shape)

    return jax.vmap(one)(gate_GNK, assignment.choice_GEC, assignment.place_GNK).swapaxes(0, 1)


def slots_combine(buffer_EGCD: Array, assignment: Assignment) -> Array:
    """y_GND, the sum of each token's rows; dropped choices add nothing."""
    experts, groups, capacity, d = buffer_EGCD.shape

    def one(rows_RD: Array, place_NK: Array, choice_EC: Array) -> Array:
        found = move_rows(rows_RD, place_NK.reshape(-1), choice_EC.reshape(-1, 1))
        return found.reshape(*place_NK.shape, d).sum(1)

    flat = buffer_EGCD.swapaxes(0, 1).reshape(groups, experts * capacity, d)
    return jax.vmap(one)(flat, assignment.place_GNK, assignment.choice_GEC)


def mask_of(assignment: Assignment, dtype: Any) -> Array:
    """mask_GNEC, 1 where token n has slot c of expert e."""
    groups, tokens, _ = assignment.place_GNK.shape
    experts, capacity = assignment.choice_GEC.shape[1:]
    hot = jax.nn.one_hot(assignment.place_GNK, experts * capacity, dtype=dtype).sum(2)
    return hot.reshape(groups, tokens, experts, capacity)


def one_hot_dispatch(x_GND: Array, assignment: Assignment) -> Array:
    """buffer_EGCD by a product with a mask (GShard, arXiv:2006.16668, algorithm 1): 2 N E C D FLOPs a group."""
    return jnp.einsum("gnec,gnd->egcd", mask_of(assignment, x_GND.dtype), x_GND)


def one_hot_combine(buffer_EGCD: Array, assignment: Assignment) -> Array:
    """y_GND by a product with the mask: 2 N E C D FLOPs a group."""
    return jnp.einsum("gnec,egcd->gnd", mask_of(assignment, buffer_EGCD.dtype), buffer_EGCD)


WAYS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "slots": (slots_dispatch, slots_combine),
    "one_hot": (one_hot_dispatch, one_hot_combine),
}


def chosen_dispatch(x_GND: Array, token_GEC: Array) -> Array:
    """buffer_EGCD when experts choose their tokens."""
    return jnp.take_along_axis(x_GND[:, None], token_GEC[..., None], axis=2).swapaxes(0, 1)


def chosen_combine(buffer_EGCD: Array, token_GEC: Array, tokens: int) -> Array:
    """y_GND when experts chose: a token adds up whatever experts took it, which may be none."""
    groups = token_GEC.shape[0]
    rows = buffer_EGCD.swapaxes(0, 1).reshape(groups, -1, buffer_EGCD.shape[-1])
    return jax.vmap(lambda r, t: jax.ops.segment_sum(r, t, num_segments=tokens))(rows, token_GEC.reshape(groups, -1))


def send(buffer_EGCD: Array, axes: tuple[str, ...], ranks: int) -> Array:
    """rows_eRD: the all-to-all over the expert ranks, R = ranks x G x C; without ranks only a change of shape."""
    experts, groups, capacity, d = buffer_EGCD.shape
    if ranks == 1:
        return buffer_EGCD.reshape(experts, groups * capacity, d)
    parts = buffer_EGCD.reshape(ranks, experts // ranks, groups * capacity, d)
    got = lax.all_to_all(parts, axes, split_axis=0, concat_axis=0)
    return got.swapaxes(0, 1).reshape(experts // ranks, ranks * groups * capacity, d)


def send_back(rows_eRD: Array, axes: tuple[str, ...], ranks: int, groups: int) -> Array:
    """buffer_EGCD: the way back."""
    here, rows, d = rows_eRD.shape
    if ranks == 1:
        return rows_eRD.reshape(here, groups, -1, d)
    parts = rows_eRD.reshape(here, ranks, rows // ranks, d).swapaxes(0, 1)
    got = lax.all_to_all(parts, axes, split_axis=0, concat_axis=0)
    return got.reshape(ranks * here, groups, -1, d)


def loop(
    x_GND: Array, gate_GNK: Array, expert_GNK: Array, assignment: Assignment, expert: Callable[[int, Array], Array]
) -> Array:
    """y_GND with a loop over experts, each of which sees every token: the oracle that the others are held against."""
    experts, capacity = assignment.choice_GEC.shape[1:]
    kept = assignment.place_GNK < experts * capacity
    out = jnp.zeros_like(x_GND)
    for e in range(experts):
        weight = jnp.where(kept & (expert_GNK == e), gate_GNK, 0).sum(-1)
        out = out + weight[..., None].astype(x_GND.dtype) * expert(e, x_GND)
    return out
