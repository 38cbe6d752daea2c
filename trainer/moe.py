"""The mixture-of-experts sublayer: norm, router, dispatch, all-to-all, experts, all-to-all, combine, residual sum.

Tokens are routed in groups that the job fixes (`training.capacity.group_tokens`), so that the number of devices changes
neither slots nor drops. The router and all losses are in float32; what travels between devices is in the model's
compute format (selective precision, Switch Transformer, arXiv:2101.03961, section 2.4).

Letters: B sequences, S tokens of a sequence, D hidden, G groups of this device, N tokens of a group, E experts, e
experts of this device, K choices, C slots, R rows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from simulator.job.rules import slots_per_expert
from trainer import dispatch
from trainer.blocks import block_experts
from trainer.gate import Routed, group_of, observe, route
from trainer.layers import ffn_parameters, gather_sequence, network, norm, norm_parameters, post_norm, sum_tensor
from trainer.parameters import Parameter
from trainer.ragged import ragged_experts
from trainer.setting import Noise, Setting, dropped, expert_dropout, varying

if TYPE_CHECKING:
    from simulator.job.model import Model, Moe
    from trainer.losses import Sums

Array = jax.Array
Tree = dict[str, Any]
ROUTER_DEVIATION = 0.02


def moe_parameters(moe: Moe, model: Model, scale: float) -> Tree:
    """Router, experts, shared experts.

    A router starts as N(0, 0.02) (T5X's configuration of Switch), a noisy one at zero, so that the first load is even
    (Shazeer 2017, appendix A).
    """
    d, r = model.hidden, moe.router
    noisy = r.kind == "noisy_top_k"

    def gate(columns: int) -> Parameter:
        return Parameter((d, columns), ("hidden", None), "zeros" if noisy else "normal", ROUTER_DEVIATION)

    router: Tree = {"kernel": gate(moe.experts)}
    if noisy:
        router["noise"] = gate(moe.experts)
    if moe.hierarchy:
        router["branch"] = gate(moe.hierarchy.branches)
        router["branch_noise"] = gate(moe.hierarchy.branches)
    if r.linear_bias:
        router["bias"] = Parameter((moe.experts,), (None,), "zeros")
    if r.bias:
        router["balance_bias"] = Parameter((moe.experts,), (None,), "zeros", trained=False)
    experts = ffn_parameters(moe.expert, d, scale, axis="expert_ffn", expert=True)
    out: Tree = {
        "norm": norm_parameters(model),
        "router": router,
        "experts": {k: p.stack(moe.experts, "experts") for k, p in experts.items()},
    }
    if moe.shared_hidden:
        out["shared"] = ffn_parameters(moe.expert.model_copy(update={"hidden": moe.shared_hidden}), d, scale)
        if moe.shared_gate:
            out["shared_gate"] = Parameter((d, 1), ("hidden", None), "fan_in", scale)
    if model.post_norms:
        out["post_norm"] = norm_parameters(model)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def own_share(x_TD: Array, axes: tuple[str, ...], parts: int) -> Array:
    """This rank's part of tokens that all ranks along `axes` hold; its gradient is gathered from them.

    JAX's own gradient of a slice pads it and sums over the ranks, which moves twice the bytes.
    """
    share = x_TD.shape[0] // parts
    return lax.dynamic_slice_in_dim(varying(x_TD, axes), lax.axis_index(axes) * share, share, 0)


def _own_share(x_TD: Array, axes: tuple[str, ...], parts: int) -> tuple[Array, None]:
    return own_share(x_TD, axes, parts), None


def _gathered_share(axes: tuple[str, ...], parts: int, _: None, dy: Array) -> tuple[Array]:
    return (lax.all_gather(dy, axes, axis=0, tiled=True, to="invarying"),)


own_share.defvjp(_own_share, _gathered_share)


def tokens_here(s: Setting, x_BSD: Array) -> Array:
    """The tokens [T, D] that this device routes: its share where tensor ranks split them, made explicit to the types.

    Under sequence parallelism the ranks that share an expert's hidden size first gather what they hold.
    """
    if s.sequence_axes:
        if s.axes.expert_tensor:
            with s.scope("moe.expert_tensor_gather"):
                x_BSD = checkpoint_name(lax.all_gather(x_BSD, s.axes.expert_tensor, axis=1, tiled=True), "norms")
        return x_BSD.reshape(-1, x_BSD.shape[-1])
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    split = s.axes.token_split
    return own_share(x_TD, split, s.axes.size(split)) if split else x_TD


def tokens_back(s: Setting, y_TD: Array, shape: tuple[int, ...]) -> Array:
    """The stream [B, S, D] from the tokens this device routed; sums over the slices of experts."""
    slices = s.axes.expert_tensor
    if s.sequence_axes:
        y = y_TD.reshape(shape[0], -1, shape[-1])
        if not slices:
            return y
        with s.scope("moe.expert_tensor_gather"):
            return lax.psum_scatter(y, slices, scatter_dimension=1, tiled=True)
    if slices:
        with s.scope("moe.expert_tensor_gather"):
            y_TD = lax.psum(y_TD, slices)
    if s.axes.token_split:
        with s.scope("moe.combine"):
            y_TD = lax.all_gather(y_TD, s.axes.token_split, axis=0, tiled=True, to="invarying")
    return y_TD.reshape(shape)


def run_experts(
    s: Setting, moe: Moe, rows_eRD: Array, gate_eR: Array, p: Tree, noise: Noise | None, group_G: Array
) -> Array:
    """The networks of this device's experts on their rows, times the gates; biases and expert dropout included.

    `group_G` numbers the groups: dropout is drawn for a group, an expert and its slot, whatever device they are on.
    """
    drop = None
    if s.job.training.learning.expert_dropout and noise is not None:
        here, rows = rows_eRD.shape[:2]
        ranks = s.axes.expert
        group = lax.all_gather(varying(group_G, ranks), ranks, axis=0, tiled=True) if ranks else group_G
        first = lax.axis_index(ranks) * here if ranks else 0
        capacity = rows // group.shape[0]
        expert = first + jnp.arange(here)[:, None, None]
        part = jnp.broadcast_to(expert * capacity + jnp.arange(capacity), (here, group.shape[0], capacity))
        token = jnp.broadcast_to(group[None, :, None], part.shape)
        drop = expert_dropout(s, noise, token.reshape(here, rows), part.reshape(here, rows))
    names = ("experts", "expert_activation")
    out = network(s, rows_eRD, p, moe.expert, "moe.experts", names, "erd,edf->erf", gate_eR[..., None], drop)
    if "down_bias" in p:
        # Slices of an expert each add their share, so that the sum over them has it once.
        bias = p["down_bias"].astype(out.dtype)[:, None] / s.axes.size(s.axes.expert_tensor)
        out = out + bias * gate_eR[..., None].astype(out.dtype)
    return out


def moe_layer(s: Setting, moe: Moe, x_BSD: Array, p: Tree, noise: Noise | None) -> tuple[Array, Sums, Tree]:
    """The sublayer: the new stream, sums for the router's losses, and sums for telemetry, all of this device alone."""
    model, learning = s.job.model, s.job.training.learning
    length = x_BSD.shape[1] * (s.axes.size(s.axes.tensor) if s.sequence_axes else 1)
    with s.scope("moe.norm"):
        h_BSD = norm(x_BSD, p["norm"], model)
    x_TD = tokens_here(s, h_BSD)
    with s.scope("moe.router"):
        numbers = noise.token_BS if noise is not None else jnp.zeros(x_BSD.shape[:2], jnp.int32)
        token_T = tokens_here(s, numbers[..., None])[:, 0]
        n = group_of(s, length, x_TD.shape[0])
        x_GND, token_GN = x_TD.reshape(-1, n, x_TD.shape[-1]), token_T.reshape(-1, n)
        capacity = s.job.training.capacity
        slots = (
            None
            if capacity == "dropless"
            else slots_per_expert(capacity, moe.top_k, moe.experts, n, evaluation=not s.train)
        )
        routed = route(s, moe, x_GND, p["router"], slots, noise, token_GN)
        sums, seen = observe(s, routed, length, x_BSD.shape[0])
    x_GND = varying(x_GND, s.axes.expert_tensor)
    if slots is None:
        assert routed.choices is not None
        dropless = block_experts if s.degrees.layout == "blocks" else ragged_experts
        y_GND = dropless(s, moe, x_GND, routed.choices, p["experts"], noise, token_GN)
    else:
        y_GND = _through_slots(s, moe, x_GND, routed, p["experts"], noise, token_GN[:, 0])
    y_BSD = checkpoint_name(tokens_back(s, y_GND.reshape(x_TD.shape), x_BSD.shape), "dispatch")
    if model.family == "lstm":
        # The gate of the 2017 language models: a sigmoid on the mixture's output (appendix C.1).
        y_BSD = jax.nn.sigmoid(y_BSD)
    if moe.shared_hidden:
        y_BSD = y_BSD + _shared(s, moe, h_BSD, p)
    with s.scope("moe.residual"):
        return x_BSD + dropped(post_norm(s, y_BSD, p), learning.dropout, noise, 3), sums, seen


def _through_slots(
    s: Setting, moe: Moe, x_GND: Array, routed: Routed, experts: Tree, noise: Noise | None, group_G: Array
) -> Array:
    way, ranks, seats = dispatch.WAYS.get(s.degrees.layout), s.degrees.expert, routed.assignment
    with s.scope("moe.dispatch"):
        if seats is None or routed.choices is None or way is None:
            assert routed.token_GEC is not None and routed.gate_GEC is not None
            buffer, gate = dispatch.chosen_dispatch(x_GND, routed.token_GEC), routed.gate_GEC.swapaxes(0, 1)
        else:
            buffer, gate = way[0](x_GND, seats), dispatch.gates(routed.choices.gate_GNK, seats)
        buffer = checkpoint_name(buffer, "dispatch")
        gate = varying(gate.astype(s.compute), s.axes.expert_tensor)
    with s.scope("moe.dispatch_all_to_all"):
        rows = checkpoint_name(dispatch.send(buffer, s.axes.expert, ranks), "dispatch")
        gate_eR = checkpoint_name(dispatch.send(gate[..., None], s.axes.expert, ranks), "dispatch")[..., 0]
    rows = run_experts(s, moe, rows, gate_eR, experts, noise, group_G)
    with s.scope("moe.combine_all_to_all"):
        back = dispatch.send_back(rows, s.axes.expert, ranks, x_GND.shape[0])
    with s.scope("moe.combine"):
        if seats is None or way is None:
            assert routed.token_GEC is not None
            return dispatch.chosen_combine(back, routed.token_GEC, x_GND.shape[1])
        return way[1](back, seats)


def _shared(s: Setting, moe: Moe, h_BSD: Array, p: Tree) -> Array:
    with s.scope("moe.shared.tensor_reduce"):
        h = gather_sequence(s, h_BSD)
    ffn = moe.expert.model_copy(update={"hidden": moe.shared_hidden})
    y_TD = network(s, h.reshape(-1, h.shape[-1]), p["shared"], ffn, "moe.shared", ("shared_expert", "shared_expert"))
    y = y_TD.reshape(h.shape)
    with s.scope("moe.shared.tensor_reduce"):
        y = checkpoint_name(sum_tensor(s, y, s.axes.tensor), "shared_expert")
    if "down_bias" in p["shared"]:
        y = y + p["shared"]["down_bias"].astype(y.dtype)
    if "shared_gate" in p:
        gate = checkpoint_name(jnp.einsum("bsd,dg->bsg", h_BSD, p["shared_gate"].astype(s.compute)), "shared_expert")
        y = y * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y.dtype)
    return y
