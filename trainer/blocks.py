"""Dropless experts where there is no ragged all-to-all: a padded exchange, and products over the rows that came.

XLA:CPU has no ragged all-to-all and computes a ragged product once for every expert. Here rows travel in buffers that
hold the worst case, all choices that one rank can make of another, by the same all-to-all as capacity slots; on arrival
they are sorted by expert, and the experts work through them in blocks, in a loop that ends with the last row. So bytes
are those of the worst case, but compute is that of the tokens a rank got, rounded up to whole blocks: a hot rank takes
longer, as on an accelerator. No collective is in the loop, so that each device may go round as often as it must.

Letters: G groups (one, of all tokens), N tokens of this device, K choices, P expert ranks, C rows that one rank may
send another, R = P C rows that may arrive, e experts of this device, B rows of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from simulator.job.rules import rows_per_block
from trainer import dispatch
from trainer.hlo_walk import BY_TOKENS
from trainer.layers import network
from trainer.routing import assign_slots, sort_pairs
from trainer.setting import Noise, Setting, axes_of, expert_dropout, varying, zeros_like

if TYPE_CHECKING:
    from simulator.job.model import Moe
    from trainer.routing import Choices

Array = jax.Array
Tree = Any
# One block through one expert: (weights, rows [B, D], gates [B], token and choice [B, 2], noise's key) -> [B, D].
Network = Callable[[Tree, Array, Array, Any, Any], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Order:
    """Rows as they arrived, by expert: `row_Q` numbers them in order (R where there is none), B more than R of them;
    expert e has `size_e` of them from `start_e` on, and row r lies at `place_R` of the order.
    """

    row_Q: Array
    start_e: Array
    size_e: Array
    place_R: Array


def order_by_expert(owner_R: Array, experts: int, block: int) -> Order:
    """The order of rows that belong to the experts `owner_R`, `experts` where a row is empty."""
    rows = owner_R.shape[0]
    number = varying(jnp.arange(rows, dtype=jnp.int32), tuple(axes_of(owner_R)))
    _, row_R = sort_pairs(owner_R, number, experts + 1, rows)
    _, place_R = sort_pairs(row_R, number, rows, rows)
    size_e = (owner_R[:, None] == jnp.arange(experts)).sum(0).astype(jnp.int32)
    # A block that reaches beyond the rows reads nothing there.
    none = varying(jnp.full((block,), rows, jnp.int32), tuple(axes_of(owner_R)))
    row_Q = jnp.concatenate([row_R, none])
    found = Order(row_Q, jnp.cumsum(size_e, dtype=jnp.int32) - size_e, size_e, place_R)
    return jax.tree.map(lambda x: checkpoint_name(x, "router"), found)


def _take(x: Array, index_B: Array) -> Array:
    return jnp.take(x, index_B, axis=0, mode="fill", fill_value=0)


def _loop(
    order: Order, block: int, weights: Tree, shared: Tree, first: Callable[[Tree], Tree],
    work: Callable[[Tree, Tree, Tree, Array, Array], tuple[Tree, Tree]],
) -> tuple[Tree, Tree]:  # fmt: skip
    """`work` on every block that holds rows, expert by expert: the state that all share, and each expert's own [e].

    `work` gets both states, the expert's weights, the block's rows [B], and its first place in the order; `first` makes
    an expert's own state of its weights.
    """

    def expert(shared: Tree, now: Tree) -> tuple[Tree, Tree]:
        w, start, size = now
        count = (size + block - 1) // block

        def step(state: Tree) -> Tree:
            number, shared, own = state
            at = start + number * block
            index_B = lax.dynamic_slice_in_dim(order.row_Q, at, block)
            # Beyond the expert's last row the order goes on with the next one's.
            index_B = jnp.where(jnp.arange(block) < size - number * block, index_B, order.place_R.shape[0])
            return number + 1, *work(shared, own, w, index_B, at)

        zero = varying(jnp.zeros((), count.dtype), tuple(axes_of(count)))
        with jax.named_scope(BY_TOKENS):
            _, shared, own = lax.while_loop(lambda state: state[0] < count, step, (zero, shared, first(w)))
        return shared, own

    out: tuple[Tree, Tree] = lax.scan(expert, shared, (weights, order.start_e, order.size_e))
    return out


def _zeros(block: int, like: Array) -> Array:
    """Zeros for what is made of the rows of `like`, in order, with room for a last block that reaches beyond them."""
    return varying(jnp.zeros((like.shape[0] + block, *like.shape[1:]), like.dtype), tuple(axes_of(like)))


def _put(out: Array, made: Array, at: Array) -> Array:
    """`out` with a block written at place `at`: what reaches beyond an expert's rows is written over by the next."""
    return lax.dynamic_update_slice_in_dim(out, made.astype(out.dtype), at, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def by_blocks(
    one: Network, block: int, scope: str, weights: Tree, rows_RD: Array, gate_R: Array, number_R2: Any, key: Any,
    order: Order,
) -> Array:  # fmt: skip
    """y_RD, each row through its expert's network `one`; empty rows are zero. Floats differ along the same mesh axes.

    The backward pass is such a loop too, and makes the hidden layer of a block again: nothing as wide as an expert is
    kept, which would have to be kept for the worst case. `scope` is what each block does beside its products: fetching
    rows, and adding its part to the weights' gradients.
    """

    @jax.named_scope(scope)
    def work(out: Array, own: Tree, w: Tree, index_B: Array, at: Array) -> tuple[Array, Tree]:
        numbers = None if number_R2 is None else _take(number_R2, index_B)
        return _put(out, one(w, _take(rows_RD, index_B), _take(gate_R, index_B), numbers, key), at), own

    out, _ = _loop(order, block, weights, _zeros(block, rows_RD), lambda w: (), work)
    return jnp.take(out, order.place_R, axis=0)


def _forward(one: Network, block: int, scope: str, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return by_blocks(one, block, scope, *arguments), arguments


def _backward(one: Network, block: int, scope: str, kept: tuple[Any, ...], dy_RD: Array) -> tuple[Any, ...]:
    weights, rows_RD, gate_R, number_R2, key, order = kept

    @jax.named_scope(scope)
    def work(made: Tree, dw: Tree, w: Tree, index_B: Array, at: Array) -> tuple[Tree, Tree]:
        dx, dgate = made
        numbers = None if number_R2 is None else _take(number_R2, index_B)
        x_BD, gate_B = _take(rows_RD, index_B), _take(gate_R, index_B)
        _, pull = jax.vjp(lambda w, x, gate: one(w, x, gate, numbers, key), w, x_BD, gate_B)
        more, dx_BD, dgate_B = pull(_take(dy_RD, index_B))
        # Sums over blocks are in float32, whatever the products are in.
        dw = jax.tree.map(lambda a, b: a + b.astype(a.dtype), dw, more)
        return (_put(dx, dx_BD, at), _put(dgate, dgate_B, at)), dw

    first = (_zeros(block, rows_RD), _zeros(block, gate_R))
    (dx, dgate), dw = _loop(
        order, block, weights, first, lambda w: jax.tree.map(lambda x: zeros_like(x, jnp.float32), w), work
    )
    dw = jax.tree.map(lambda g, w: g.astype(w.dtype), dw, weights)
    return dw, jnp.take(dx, order.place_R, axis=0), jnp.take(dgate, order.place_R, axis=0), None, None, None


by_blocks.defvjp(_forward, _backward)


def block_experts(
    s: Setting, moe: Moe, x_GND: Array, choices: Choices, p: Tree, noise: Noise | None, token_GN: Array
) -> Array:
    """y_GND of all choices that are made, none dropped."""
    axes, ranks, tokens = s.axes.expert, s.degrees.expert, x_GND.shape[1]
    here = moe.experts // ranks
    # A token has at most `here` of its K choices on one rank.
    most = tokens * min(moe.top_k, here)
    block = rows_per_block(tokens * ranks * moe.top_k / moe.experts)
    noise = noise if s.job.training.learning.expert_dropout else None
    with s.scope("moe.dispatch"):
        # To the exchange a rank is what an expert is to capacity slots, with slots for everything.
        seats = assign_slots(replace(choices, expert_GNK=choices.expert_GNK // here), ranks, most)
        buffer = checkpoint_name(dispatch.slots_dispatch(x_GND, seats), "dispatch")
        gate = varying(dispatch.gates(choices.gate_GNK, seats).astype(s.compute), s.axes.expert_tensor)
        owner = checkpoint_name(_in_seats(choices.expert_GNK % here, seats, here), "router")

    def arrived(x: Array) -> Array:
        return dispatch.send(x, axes, ranks)[0] if ranks > 1 else x.reshape(-1, x.shape[-1])

    with s.scope("moe.dispatch_all_to_all"):
        rows_RD = checkpoint_name(arrived(buffer), "dispatch")
        gate_R = checkpoint_name(arrived(gate[..., None]), "dispatch")[:, 0]
        owner_R = checkpoint_name(arrived(owner[..., None]), "router")[:, 0]
        numbers = None
        if noise is not None:
            # Whose row it is travels with it where its dropout is drawn: token and choice.
            shape = seats.place_GNK.shape
            both = jnp.broadcast_to(token_GN[..., None], shape), jnp.broadcast_to(jnp.arange(shape[-1]), shape)
            numbers = arrived(jnp.stack([_in_seats(x, seats, 0) for x in both], axis=-1))
    with s.scope("moe.dispatch"):
        order = order_by_expert(owner_R, here, block)
    y_RD = _network(s, moe, rows_RD, gate_R, p, numbers, noise, order, block)
    with s.scope("moe.combine_all_to_all"):
        back = dispatch.send_back(y_RD[None], axes, ranks, 1) if ranks > 1 else y_RD[None, None]
    with s.scope("moe.combine"):
        return dispatch.slots_combine(back, seats)


def _in_seats(x_GNK: Array, seats: Any, empty: int) -> Array:
    """[P, G, C]: of each seat its choice's value, `empty` where nobody sits."""
    flat = jnp.concatenate([x_GNK.reshape(-1), jnp.full((1,), empty, x_GNK.dtype)])
    return jnp.take(flat, seats.choice_GEC, axis=0).swapaxes(0, 1)


def _network(
    s: Setting, moe: Moe, rows_RD: Array, gate_R: Array, p: Tree, numbers: Any, noise: Noise | None, order: Order,
    block: int,
) -> Array:  # fmt: skip
    """The rows through their experts' networks, times the gates; biases and expert dropout included."""
    slices = s.axes.size(s.axes.expert_tensor)

    def one(w: Tree, x_BD: Array, gate_B: Array, number_B2: Any, key: Any) -> Array:
        drop = None
        if key is not None:
            drop = expert_dropout(s, Noise(key, number_B2[:, 0]), number_B2[:, 0], number_B2[:, 1])
        names = ("experts", "expert_activation")
        y = network(s, x_BD, w, moe.expert, "moe.experts", names, factor=gate_B[:, None], drop=drop)
        if "down_bias" in w:
            # Slices of an expert each add their share, so that the sum over them has it once.
            y = y + w["down_bias"] / slices * gate_B[:, None]
        return y

    floats = (rows_RD, gate_R, *p.values())
    axes = tuple(sorted(frozenset().union(*map(axes_of, floats))))
    weights = {k: varying(w.astype(s.compute), axes) for k, w in p.items()}
    key = None if noise is None else noise.key
    with s.scope("moe.dispatch"):
        # The products of a block have scopes of their own; outside of the loop are clearing and ordering.
        scope = f"{s.stack}.moe.experts.up"
        y_RD = by_blocks(one, block, scope, weights, varying(rows_RD, axes), varying(gate_R, axes), numbers, key, order)
        return checkpoint_name(y_RD, "experts")
