"""Dropless experts: tokens sorted by expert, a ragged all-to-all, and products over ragged groups of rows.

For accelerators: XLA:CPU has no ragged all-to-all, and computes a ragged product once for every expert. On CPU it
therefore runs only where each device has all experts, which is how the tests hold it against the loop over experts.

Letters: G groups, N tokens of a group, T = G N, K choices, E experts, e experts of this device, D hidden, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from trainer.layers import ACTIVATIONS
from trainer.setting import Noise, Setting, axes_of, expert_dropout, varying

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.job.model import Moe
    from trainer.routing import Choices

Array = jax.Array
Tree = dict[str, Any]


def grouped_network(
    s: Setting, moe: Moe, rows_RD: Array, sizes_e: Array, p: Tree, drop: Callable[[Array], Array] | None
) -> Array:
    """The experts' networks on rows that are sorted by expert, `sizes_e` of them each; `drop` is expert dropout."""
    ffn, act = moe.expert, ACTIVATIONS[moe.expert.activation]
    w = {k: v.astype(s.compute) for k, v in p.items()}
    owner_R = jnp.repeat(jnp.arange(sizes_e.shape[0]), sizes_e, total_repeat_length=rows_RD.shape[0])
    sizes_e = sizes_e.astype(jnp.int32)
    with s.scope("moe.experts.up"):
        h = checkpoint_name(lax.ragged_dot(rows_RD, w["up"], sizes_e), "experts")
        if "up_bias" in w:
            h = h + jnp.take(w["up_bias"], owner_R, axis=0)
        gate = checkpoint_name(lax.ragged_dot(rows_RD, w["gate"], sizes_e), "experts") if ffn.gated else None
    with s.scope("moe.experts.activation"):
        h = checkpoint_name(act(h) if gate is None else act(gate) * h, "expert_activation")
    for i in range(1, ffn.depth):
        with s.scope("moe.experts.hidden"):
            h = checkpoint_name(lax.ragged_dot(h, w[f"hidden_{i}"], sizes_e), "experts")
            h = checkpoint_name(act(h), "expert_activation")
    h = h if drop is None else drop(h)
    with s.scope("moe.experts.down"):
        out = checkpoint_name(lax.ragged_dot(h, w["down"], sizes_e), "experts")
        if "down_bias" in w:
            out = out + jnp.take(w["down_bias"], owner_R, axis=0) / s.axes.size(s.axes.expert_tensor)
    return out


def ragged_experts(
    s: Setting, moe: Moe, x_GND: Array, choices: Choices, p: Tree, noise: Noise | None, token_GN: Array
) -> Array:
    """y_GND of all choices, none dropped; a choice that is not made has a gate of zero."""
    groups, n, d = x_GND.shape
    k, t = moe.top_k, groups * n
    with s.scope("moe.dispatch"):
        expert_R = choices.expert_GNK.reshape(t * k)
        order_R = checkpoint_name(jnp.argsort(expert_R, stable=True), "router")
        noise = noise if s.job.training.learning.expert_dropout else None
        # Whose row it is travels with it where its dropout is drawn: token and choice.
        number_R2 = jnp.stack([jnp.take(token_GN.reshape(t), order_R // k), order_R % k], axis=-1)
        rows_RD = checkpoint_name(jnp.take(x_GND.reshape(t, d), order_R // k, axis=0), "dispatch")
        sizes_E = (expert_R[:, None] == jnp.arange(moe.experts)).sum(0).astype(jnp.int32)
    if s.degrees.expert == 1:
        out_RD = grouped_network(s, moe, rows_RD, sizes_E, p, _dropout(s, noise, number_R2))
    else:
        out_RD = _over_ranks(s, moe, rows_RD, sizes_E, p, noise, number_R2)
    with s.scope("moe.combine"):
        back_TKD = jnp.take(out_RD, jnp.argsort(order_R), axis=0).reshape(groups, n, k, d)
        gate = jnp.where(choices.made_GNK, choices.gate_GNK, 0).astype(back_TKD.dtype)
        return jnp.einsum("gnkd,gnk->gnd", back_TKD, gate)


def _dropout(s: Setting, noise: Noise | None, number_R2: Array) -> Callable[[Array], Array] | None:
    return None if noise is None else expert_dropout(s, noise, number_R2[:, 0], number_R2[:, 1])


def _over_ranks(
    s: Setting, moe: Moe, rows_RD: Array, sizes_E: Array, p: Tree, noise: Noise | None, number_R2: Array
) -> Array:
    """Rows to the ranks of their experts and back; buffers hold the worst case, every row of every rank on one rank.

    An expert's rows arrive in one run per sending rank; they are sorted by expert before the products, so that each
    expert is one group.
    """
    axes, ranks = s.axes.expert, s.degrees.expert
    here = moe.experts // ranks
    rows, d = rows_RD.shape
    # A token has at most `here` of its K choices on one rank.
    most = rows // moe.top_k * min(moe.top_k, here) * ranks
    me = lax.axis_index(axes)
    with s.scope("moe.dispatch_all_to_all"):
        counts_PE = checkpoint_name(lax.all_gather(sizes_E, axes, axis=0), "router")
        send_P = sizes_E.reshape(ranks, here).sum(-1)
        sent_PP = counts_PE.reshape(ranks, ranks, here).sum(-1)
        start_P = jnp.cumsum(send_P) - send_P
        # Where my rows begin at each receiver: after those of all ranks before me.
        before_PP = jnp.cumsum(sent_PP, axis=0) - sent_PP
        place_P, receive_P = before_PP[me], sent_PP[:, me]

        def travel(x: Array) -> Array:
            buffer = varying(jnp.zeros((most, x.shape[1]), x.dtype), tuple(axes_of(x)))
            return lax.ragged_all_to_all(x, buffer, start_P, send_P, place_P, receive_P, axis_name=axes)

        got = checkpoint_name(travel(rows_RD), "dispatch")
        number_R2 = travel(number_R2) if noise is not None else number_R2
    with s.scope("moe.dispatch"):
        mine_Pe = lax.dynamic_slice_in_dim(counts_PE, me * here, here, axis=1)
        owner = jnp.repeat(jnp.tile(jnp.arange(here), ranks), mine_Pe.reshape(-1), total_repeat_length=most)
        filled = jnp.arange(most) < mine_Pe.sum()
        order = checkpoint_name(jnp.argsort(jnp.where(filled, owner, here), stable=True), "router")
        sorted_RD = jnp.take(got, order, axis=0)
        drop = _dropout(s, noise, jnp.take(number_R2, order, axis=0) if noise is not None else number_R2)
    out = grouped_network(s, moe, sorted_RD, mine_Pe.sum(0), p, drop)
    with s.scope("moe.combine_all_to_all"):
        out = jnp.take(out, jnp.argsort(order), axis=0)
        home = varying(jnp.zeros((rows, d), out.dtype), tuple(axes_of(out)))
        back_start = jnp.cumsum(receive_P) - receive_P
        # My rows lie at home where they were sent from: the sender's own offsets.
        home_PP = jnp.cumsum(sent_PP, axis=1) - sent_PP
        got = lax.ragged_all_to_all(out, home, back_start, receive_P, home_PP[:, me], send_P, axis_name=axes)
        return checkpoint_name(got, "dispatch")
