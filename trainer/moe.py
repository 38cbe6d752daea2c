"""The mixture-of-experts sublayer: norm, router, dispatch, all-to-all, experts, all-to-all, combine, residual sum.

Tokens are routed in groups that the job fixes (`training.capacity.group_tokens`), so that the number of devices changes
neither slots nor drops. The router and all losses are in float32; what travels between devices is in the model's
compute format (selective precision, Switch Transformer, arXiv:2101.03961, section 2.4).

Letters: B sequences, S tokens of a sequence, D hidden, G groups of this device, N tokens of a group, E experts, e
experts of this device, K choices, C slots, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from simulator.job.rules import group_tokens, slots_per_expert
from trainer import dispatch, routing
from trainer.layers import ffn_parameters, gather_sequence, network, norm, norm_parameters, post_norm, sum_tensor
from trainer.losses import Sums, router_sums
from trainer.parameters import Parameter
from trainer.ragged import ragged_experts
from trainer.setting import Noise, Setting, dropped, varying

if TYPE_CHECKING:
    from simulator.job.model import Model, Moe

Array = jax.Array
Tree = dict[str, Any]
ROUTER_DEVIATION = 0.02


@dataclass(frozen=True)
class Routed:
    """What the router decided: either tokens chose (`choices`, `assignment`), or experts did (`token`, `gate`)."""

    logits_GNE: Array
    choices: routing.Choices | None
    assignment: routing.Assignment | None
    token_GEC: Array | None = None
    gate_GEC: Array | None = None
    load: Sums | None = None


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


def group_of(s: Setting, length: int, tokens: int) -> int:
    """Tokens of a routing group among `tokens` of this device: the job's, or one sequence, at most a microbatch's."""
    capacity = s.job.training.capacity
    whole = s.degrees.microbatch_sequences * length
    if capacity == "dropless":
        return tokens
    return min(group_tokens(capacity, length, whole), tokens)


def logits_of(x_GND: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Router logits in float32: operands, product and result."""
    x, w = x_GND.astype(jnp.float32), kernel.astype(jnp.float32)
    out = jnp.einsum("...d,de->...e", x, w, precision=lax.Precision.HIGHEST)
    return out if bias is None else out + bias.astype(jnp.float32)


def _noisy(s: Setting, moe: Moe, x: Array, router: Tree, noise: Noise | None, token_GN: Array) -> tuple[Any, ...]:
    """Choices and loads of Shazeer's routers; noise only in training."""

    def level(name: str, noise_name: str, draw: int, k: int, branches: int | None = None) -> tuple[Any, Any]:
        clean = logits_of(x, router[name])
        deviation = jax.nn.softplus(logits_of(x, router[noise_name])) + 1e-2
        drawn = noise.normal(draw, (clean.shape[-1],), token_GN) if noise is not None else None
        if branches is not None:
            cut = (*clean.shape[:-1], branches, clean.shape[-1] // branches)
            clean, deviation = clean.reshape(cut), deviation.reshape(cut)
            drawn = drawn.reshape(cut) if drawn is not None else None
        return routing.noisy_choices(clean, deviation, drawn, k)

    h = moe.hierarchy
    if h is None:
        choices, load = level("kernel", "noise", 20, moe.top_k)
        return choices, {"load_E": load.sum((0, 1))}
    outer = level("branch", "branch_noise", 21, h.top_k)
    inner = level("kernel", "noise", 22, moe.top_k // h.top_k, h.branches)
    return routing.hierarchical_choices(outer, inner)


def route(
    s: Setting, moe: Moe, x_GND: Array, router: Tree, capacity: int | None, noise: Noise | None, token_GN: Array
) -> Routed:
    """Logits, choices and seats of each group; `capacity` None seats nobody (dropless)."""
    how = s.job.training.learning.router
    x = x_GND.astype(jnp.float32)
    if how.jitter and noise is not None:
        x = x * (1 - how.jitter + 2 * how.jitter * noise.uniform(23, (x.shape[-1],), token_GN))
    load: Sums | None = None
    if moe.router.kind == "noisy_top_k":
        logits = logits_of(x, router["kernel"])
        choices, load = _noisy(s, moe, x, router, noise, token_GN)
    else:
        logits = checkpoint_name(logits_of(x, router["kernel"], router.get("bias")), "router")
        if moe.router.kind == "expert_choice":
            assert capacity is not None
            token, gate = routing.expert_choice(logits, capacity)
            return Routed(logits, None, None, token, gate)
        if moe.router.kind == "sigmoid":
            choices = routing.sigmoid_choices(logits, moe, router.get("balance_bias"))
        else:
            chance = noise.uniform(24, (moe.top_k,), token_GN) if noise is not None else None
            choices = routing.softmax_choices(logits, moe, how, chance)
    if capacity is None:
        return Routed(logits, choices, None, load=load)
    sure = None
    if how.priority == "probability" and s.stack == "encoder":
        sure = lax.stop_gradient(choices.probabilities_GNE.max(-1))
    seats = routing.assign_slots(choices, moe.experts, capacity, sure)
    return Routed(logits, choices, seats, load=load)


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
                x_BSD = lax.all_gather(x_BSD, s.axes.expert_tensor, axis=1, tiled=True)
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


def run_experts(s: Setting, moe: Moe, rows_eRD: Array, gate_eR: Array, p: Tree, noise: Noise | None) -> Array:
    """The networks of this device's experts on their rows, times the gates; expert dropout included."""
    rate = s.job.training.learning.expert_dropout
    names = ("experts", "expert_activation")
    out = network(s, rows_eRD, p, moe.expert, "moe.experts", names, "erd,edf->erf", gate_eR[..., None])
    if "down_bias" in p:
        # Slices of an expert each add their share, so that the sum over them has it once.
        bias = p["down_bias"].astype(out.dtype)[:, None] / s.axes.size(s.axes.expert_tensor)
        out = out + bias * gate_eR[..., None].astype(out.dtype)
    if rate and noise is not None:
        keep = jax.random.uniform(jax.random.fold_in(noise.key, 25), out.shape) >= rate
        out = jnp.where(keep, out / (1 - rate), 0).astype(out.dtype)
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
        sums, seen = _observe(s, moe, routed, length)
    x_GND = varying(x_GND, s.axes.expert_tensor)
    if slots is None:
        assert routed.choices is not None
        y_GND = ragged_experts(s, moe, x_GND, routed.choices, p["experts"])
    else:
        y_GND = _through_slots(s, moe, x_GND, routed, p["experts"], noise)
    y_BSD = tokens_back(s, y_GND.reshape(x_TD.shape), x_BSD.shape)
    if model.family == "lstm":
        # The gate of the 2017 language models: a sigmoid on the mixture's output (appendix C.1).
        y_BSD = jax.nn.sigmoid(y_BSD)
    if moe.shared_hidden:
        y_BSD = y_BSD + _shared(s, moe, h_BSD, p)
    with s.scope("moe.residual"):
        return x_BSD + dropped(post_norm(s, y_BSD, p), learning.dropout, noise, 3), sums, seen


def _through_slots(s: Setting, moe: Moe, x_GND: Array, routed: Routed, experts: Tree, noise: Noise | None) -> Array:
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
    rows = run_experts(s, moe, rows, gate_eR, experts, noise)
    with s.scope("moe.combine_all_to_all"):
        back = dispatch.send_back(rows, s.axes.expert, ranks, x_GND.shape[0])
    with s.scope("moe.combine"):
        if seats is None or way is None:
            assert routed.token_GEC is not None
            return dispatch.chosen_combine(back, routed.token_GEC, x_GND.shape[1])
        return way[1](back, seats)


def _observe(s: Setting, moe: Moe, routed: Routed, length: int) -> tuple[Sums, Tree]:
    how = s.job.training.learning.router
    groups, n, e = routed.logits_GNE.shape
    if routed.choices is None:
        assert routed.token_GEC is not None
        taken = jnp.full((e,), float(groups * routed.token_GEC.shape[-1]))
        seen = routing.statistics(routed.logits_GNE, taken, taken)
        sums = {
            "spans": jnp.float32(1),
            "tokens": jnp.float32(groups * n),
            "z": jnp.square(jax.nn.logsumexp(routed.logits_GNE, axis=-1)).sum(),
            "balance": jnp.float32(0),
        }
        return sums, seen
    choices = routed.choices
    hot = jax.nn.one_hot(choices.expert_GNK, e, dtype=jnp.float32) * choices.made_GNK[..., None]
    wanted = hot.sum((0, 1, 2))
    kept = wanted
    if routed.assignment is not None:
        k = choices.expert_GNK.shape[-1]
        kept = (routed.assignment.choice_GEC < n * k).sum((0, 2)).astype(jnp.float32)
    span = length if how.balance_scope == "sequence" else n
    sums = router_sums(routed.logits_GNE, choices, how, span, routed.load)
    seen = routing.statistics(lax.stop_gradient(routed.logits_GNE), wanted, kept)
    return sums, jax.tree.map(lax.stop_gradient, seen)


def _shared(s: Setting, moe: Moe, h_BSD: Array, p: Tree) -> Array:
    with s.scope("moe.shared.tensor_reduce"):
        h = gather_sequence(s, h_BSD)
    ffn = moe.expert.model_copy(update={"hidden": moe.shared_hidden})
    y = network(s, h, p["shared"], ffn, "moe.shared", ("shared_expert", "shared_expert"))
    with s.scope("moe.shared.tensor_reduce"):
        y = sum_tensor(s, y, s.axes.tensor)
    if "down_bias" in p["shared"]:
        y = y + p["shared"]["down_bias"].astype(y.dtype)
    if "shared_gate" in p:
        gate = jnp.einsum("bsd,dg->bsg", h_BSD, p["shared_gate"].astype(s.compute))
        y = y * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y.dtype)
    return y
