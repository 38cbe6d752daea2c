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
    s: Setting, moe: Moe, rows_RD: Array, gate_R: Array, sizes_e: Array, p: Tree, drop: Callable[[Array], Array] | None
) -> Array:
    """The experts' networks times the gates, on rows sorted by expert, `sizes_e` of them each; `drop` is dropout."""
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
        out = checkpoint_name(lax.ragged_dot(h * gate_R[:, None], w["down"], sizes_e), "experts")
        if "down_bias" in w:
            share = w["down_bias"] / s.axes.size(s.axes.expert_tensor)
            out = out + jnp.take(share, owner_R, axis=0) * gate_R[:, None]
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
        gate_GNK = jnp.where(choices.made_GNK, choices.gate_GNK, 0).astype(s.compute)
        gate_R = varying(jnp.take(gate_GNK.reshape(t * k), order_R), s.axes.expert_tensor)
        sizes_E = (expert_R[:, None] == jnp.arange(moe.experts)).sum(0).astype(jnp.int32)
    if s.degrees.expert == 1:
        out_RD = grouped_network(s, moe, rows_RD, gate_R, sizes_E, p, _dropout(s, noise, number_R2))
    else:
        out_RD = _over_ranks(s, moe, rows_RD, gate_R, sizes_E, p, noise, number_R2)
    with s.scope("moe.combine"):
        back_TKD = jnp.take(out_RD, jnp.argsort(order_R), axis=0).reshape(groups, n, k, d)
        return back_TKD.sum(2)


def _dropout(s: Setting, noise: Noise | None, number_R2: Array) -> Callable[[Array], Array] | None:
    return None if noise is None else expert_dropout(s, noise, number_R2[:, 0], number_R2[:, 1])


def _over_ranks(
    s: Setting, moe: Moe, rows_RD: Array, gate_R: Array, sizes_E: Array, p: Tree, noise: Noise | None, number_R2: Array
) -> Array:
    """Rows to the ranks of their experts and back; buffers hold the worst case, all choices that can be on one rank.

    An expert's rows arrive in one run per sending rank; they are sorted by expert before the products, so that each
    expert is one group.
    """
    axes, ranks = s.axes.expert, s.degrees.expert
    here = moe.experts // ranks
    rows = rows_RD.shape[0]
    # A token has at most `here` of its K choices on one rank.
    most = rows // moe.top_k * min(moe.top_k, here) * ranks
    me = lax.axis_index(axes)

    def exchange(x: Array, size: int, *offsets: Array) -> Array:
        empty = varying(jnp.zeros((size, *x.shape[1:]), x.dtype), tuple(axes_of(x)))
        return checkpoint_name(lax.ragged_all_to_all(x, empty, *offsets, axis_name=axes), "dispatch")

    with s.scope("moe.dispatch_all_to_all"):
        counts_PE = checkpoint_name(lax.all_gather(sizes_E, axes, axis=0), "router")
        send_P = sizes_E.reshape(ranks, here).sum(-1)
        sent_PP = counts_PE.reshape(ranks, ranks, here).sum(-1)
        start_P = jnp.cumsum(send_P) - send_P
        # Where my rows begin at each receiver: after those of all ranks before me.
        before_PP = jnp.cumsum(sent_PP, axis=0) - sent_PP
        receive_P = sent_PP[:, me]
        there = (start_P, send_P, before_PP[me], receive_P)
        got_RD, got_gate_R = exchange(rows_RD, most, *there), exchange(gate_R, most, *there)
        number_R2 = exchange(number_R2, most, *there) if noise is not None else number_R2
    with s.scope("moe.dispatch"):
        mine_Pe = lax.dynamic_slice_in_dim(counts_PE, me * here, here, axis=1)
        owner = jnp.repeat(jnp.tile(jnp.arange(here), ranks), mine_Pe.reshape(-1), total_repeat_length=most)
        filled = jnp.arange(most) < mine_Pe.sum()
        order = checkpoint_name(jnp.argsort(jnp.where(filled, owner, here), stable=True), "router")
        got_RD, got_gate_R = jnp.take(got_RD, order, axis=0), jnp.take(got_gate_R, order, axis=0)
        drop = _dropout(s, noise, jnp.take(number_R2, order, axis=0) if noise is not None else number_R2)
    out = grouped_network(s, moe, got_RD, got_gate_R, mine_Pe.sum(0), p, drop)
    with s.scope("moe.combine_all_to_all"):
        out = jnp.take(out, jnp.argsort(order), axis=0)
        back_start = jnp.cumsum(receive_P) - receive_P
        # My rows lie at home where they were sent from: the sender's own offsets.
        home_PP = jnp.cumsum(sent_PP, axis=1) - sent_PP
        return exchange(out, rows, back_start, receive_P, home_PP[:, me], send_P)
