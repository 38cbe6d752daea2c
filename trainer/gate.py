"""The router of a layer at work: its logits and noise, the seats it gives, and what it reports.

The rules by which logits become choices are in `trainer.routing`; here they meet the job, the mesh and the noise.

Letters: G groups of this device, N tokens of a group, D hidden, E experts, K choices, C slots, Z spans of a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from simulator.job.rules import group_tokens
from trainer import routing
from trainer.losses import Spans, Sums, router_sums
from trainer.setting import Noise, Setting, varying

if TYPE_CHECKING:
    from simulator.job.model import Moe

Array = jax.Array
Tree = dict[str, Any]


@dataclass(frozen=True)
class Routed:
    """What the router decided: either tokens chose (`choices`, `assignment`), or experts did (`token`, `gate`)."""

    logits_GNE: Array
    choices: routing.Choices | None
    assignment: routing.Assignment | None
    token_GEC: Array | None = None
    gate_GEC: Array | None = None
    load: Sums | None = None


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
    return checkpoint_name(out if bias is None else out + bias.astype(jnp.float32), "router")


def _noisy(
    moe: Moe, x: Array, logits_GNE: Array, router: Tree, noise: Noise | None, token_GN: Array
) -> tuple[Any, ...]:
    """Choices and loads of Shazeer's routers, from the experts' clean logits; noise only in training."""

    def level(name: str, noise_name: str, draw: int, k: int, branches: int | None = None) -> tuple[Any, Any]:
        clean = logits_GNE if name == "kernel" else logits_of(x, router[name])
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
    forced = None
    if s.forced is not None and noise is not None:
        length = s.job.batch.encoder_length if s.stack == "encoder" else s.job.batch.decoder_length
        forced = s.forced.experts(noise, token_GN, length, moe.top_k)
    if moe.router.kind == "noisy_top_k":
        logits = logits_of(x, router["kernel"])
        choices, load = _noisy(moe, x, logits, router, noise, token_GN)
    else:
        logits = logits_of(x, router["kernel"], router.get("bias"))
        if moe.router.kind == "expert_choice":
            assert capacity is not None
            token, gate = routing.expert_choice(logits, capacity)
            return Routed(logits, None, None, token, gate)
        if moe.router.kind == "sigmoid":
            choices = routing.sigmoid_choices(logits, moe, router.get("balance_bias"), forced)
        else:
            chance = noise.uniform(24, (moe.top_k,), token_GN) if noise is not None else None
            choices = routing.softmax_choices(logits, moe, how, chance, forced)
    if capacity is None:
        return Routed(logits, choices, None, load=load)
    sure = None
    if how.priority == "probability" and s.stack == "encoder":
        sure = lax.stop_gradient(choices.probabilities_GNE.max(-1))
    seats = routing.assign_slots(choices, moe.experts, capacity, sure)
    return Routed(logits, choices, seats, load=load)


def spans_of(s: Setting, n: int, tokens: int, length: int, sequences: int) -> Spans:
    """Over what the balance loss takes its means: groups of n tokens, or sequences, which devices may share.

    Where nothing is dropped there are no groups, and sequences stand for them.
    """
    by_group = s.job.training.capacity != "dropless"
    if s.job.training.learning.router.balance_scope != "sequence" and by_group:
        return Spans(n, n)
    if tokens == sequences * length or (not s.sequence_axes and tokens % length == 0):
        return Spans(length, length)
    # Tensor ranks share a sequence: each of them has a piece of every one, or a piece of a single one.
    ranks = s.axes.size(s.axes.token_split)
    piece = tokens // sequences if s.sequence_axes else tokens
    assert length % piece == 0, f"{tokens} tokens of a device are no part of a sequence of {length}"

    def join(x_ZE: Array) -> Array:
        if s.sequence_axes:
            return lax.psum(varying(x_ZE, s.axes.tensor), s.axes.tensor) / s.axes.size(s.axes.expert_tensor)
        at = lax.axis_index(s.axes.token_split) * tokens // length
        whole = jnp.zeros((sequences, x_ZE.shape[-1]), x_ZE.dtype)
        return lax.psum(jnp.where(jnp.arange(sequences)[:, None] == at, x_ZE, whole), s.axes.token_split)

    return Spans(length, piece, join, ranks)


def observe(s: Setting, routed: Routed, length: int, sequences: int) -> tuple[Sums, Tree]:
    """Sums for the router's losses and for telemetry; the device's tokens are parts of `sequences` of `length`."""
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
        }
        # Experts that choose are balanced, whatever the loss is taken over.
        nothing = {"counts_E": 0 * taken, "probabilities_E": 0 * taken}
        sums |= nothing if how.balance_scope == "batch" else {"balance": jnp.float32(0)}
        return sums, jax.tree.map(lax.stop_gradient, seen)
    choices = routed.choices
    hot = jax.nn.one_hot(choices.expert_GNK, e, dtype=jnp.float32) * choices.made_GNK[..., None]
    wanted = hot.sum((0, 1, 2))
    kept = wanted
    if routed.assignment is not None:
        k = choices.expert_GNK.shape[-1]
        kept = (routed.assignment.choice_GEC < n * k).sum((0, 2)).astype(jnp.float32)
    spans = spans_of(s, n, groups * n, length, sequences)
    sums = router_sums(routed.logits_GNE, choices, how, spans, routed.load)
    seen = routing.statistics(lax.stop_gradient(routed.logits_GNE), wanted, kept)
    return sums, jax.tree.map(lax.stop_gradient, seen)
