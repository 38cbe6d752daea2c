"""Routers: pure functions from logits to which expert each token goes to, with what gate, in which slot.

Letters: G groups, N tokens of a group, E experts, K choices, C slots of an expert (capacity), B branches of a
hierarchical router. All of it is in float32, whatever the model computes in (selective precision, Switch Transformer,
arXiv:2101.03961, section 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from simulator.job.learning import RouterTraining
    from simulator.job.model import Moe

Array = jax.Array
TINY = 1e-9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choices:
    """What tokens want: experts, gates, and whether the choice is made at all (a random second choice may not be).

    `probabilities_GNE` are what the balance loss averages: softmax, or sigmoid scores over their sum.
    """

    expert_GNK: Array
    gate_GNK: Array
    made_GNK: Array
    probabilities_GNE: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assignment:
    """What tokens get: row e C + slot of the buffers (E C where dropped), and the same seen from the slots.

    `choice_GEC` is n K + k of the token and choice in a slot, N K where it is empty.
    """

    place_GNK: Array
    choice_GEC: Array


def largest(x: Array, k: int) -> Array:
    """Indices [..., k] of the k largest, the earlier of equal ones first; argmax in turn is quick for small k."""
    if k > 8:
        return checkpoint_name(lax.top_k(x, k)[1], "router")
    picked = []
    for _ in range(k):
        at = jnp.argmax(x, axis=-1)
        picked.append(at)
        x = jnp.where(jax.nn.one_hot(at, x.shape[-1], dtype=bool), -jnp.inf, x)
    return checkpoint_name(jnp.stack(picked, axis=-1), "router")


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=-1)


def softmax_choices(
    logits_GNE: Array, moe: Moe, how: RouterTraining | None = None, chance_GNK: Array | None = None,
    forced_GNK: Array | None = None,
) -> Choices:  # fmt: skip
    """Softmax over all experts, then the k largest: Switch (k = 1), GShard and ST-MoE (k = 2), Mixtral, Qwen3.

    A single choice keeps its probability, else the gate would be 1 and the router would get no gradient; several are
    divided by their sum (`router.renormalise`). With `second_choice: random` a later choice of gate g is made with
    probability min(1, g / threshold), `chance_GNK` in [0, 1) deciding (ST-MoE, arXiv:2202.08906, appendix G; GShard's
    threshold is 0.5). With groups, a group's worth is its best expert's (DeepSeek-V2, arXiv:2405.04434, section 2.2.2).
    `forced_GNK` are the experts of forced routing instead; gates are as if the router had chosen them.
    """
    probabilities = jax.nn.softmax(logits_GNE, axis=-1)
    expert = forced_GNK
    if expert is None:
        expert = largest(limit_groups(lax.stop_gradient(probabilities), moe, 1), moe.top_k)
    gate = _take(probabilities, expert)
    if moe.router.renormalise and moe.top_k > 1:
        gate = gate / (gate.sum(-1, keepdims=True) + TINY)
    made = jnp.ones_like(gate, dtype=bool)
    if how is not None and how.second_choice == "random" and chance_GNK is not None:
        later = jnp.arange(moe.top_k) > 0
        made = ~later | (chance_GNK * how.threshold < gate)
    return Choices(expert, gate * moe.router.scale, made, probabilities)


def sigmoid_choices(
    logits_GNE: Array, moe: Moe, bias_E: Array | None = None, forced_GNK: Array | None = None
) -> Choices:
    """DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): chosen by score + bias, gated by the scores alone.

    With groups, only experts of the `top_groups` groups whose two best biased scores add up to most can be chosen;
    the others are masked with minus infinity, since a biased score may be negative. `forced_GNK` as above.
    """
    scores = jax.nn.sigmoid(logits_GNE)
    biased = lax.stop_gradient(scores if bias_E is None else scores + bias_E)
    expert = largest(limit_groups(biased, moe, 2), moe.top_k) if forced_GNK is None else forced_GNK
    gate = _take(scores, expert)
    if moe.router.renormalise and moe.top_k > 1:
        gate = gate / (gate.sum(-1, keepdims=True) + 1e-20)
    probabilities = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    return Choices(expert, gate * moe.router.scale, jnp.ones_like(gate, dtype=bool), probabilities)


def limit_groups(scores_GNE: Array, moe: Moe, best_of: int) -> Array:
    """Minus infinity for experts outside of the `top_groups` groups whose `best_of` best scores add up to most."""
    r = moe.router
    if r.top_groups >= r.groups:
        return scores_GNE
    grouped = scores_GNE.reshape(*scores_GNE.shape[:-1], r.groups, -1)
    best = lax.top_k(grouped, min(best_of, grouped.shape[-1]))[0].sum(-1)
    chosen = jax.nn.one_hot(lax.top_k(best, r.top_groups)[1], r.groups, dtype=bool).any(-2)
    return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(scores_GNE.shape)


def noisy_choices(
    clean_GNE: Array, deviation_GNE: Array | None, noise_GNE: Array | None, k: int
) -> tuple[Choices, Array]:
    """Noisy top-k of Shazeer 2017 (arXiv:1701.06538, eq. 3 to 5): softmax over the k largest noisy logits.

    Returns the choices and load_GNE, the probability that a token would keep the expert if its noise were drawn anew
    (eq. 8 to 10): smooth in the logits, its sum over tokens is the expert's load. `deviation_GNE` is
    softplus(x W_noise); tensor2tensor adds 0.01 to it, so that it never vanishes, and so do callers here. Without
    noise, or with k = E, the load counts gates and has no gradient.
    """
    noisy = clean_GNE if noise_GNE is None or deviation_GNE is None else clean_GNE + noise_GNE * deviation_GNE
    experts = clean_GNE.shape[-1]
    top = largest(lax.stop_gradient(noisy), min(k + 1, experts))
    expert = top[..., :k]
    gate = jax.nn.softmax(_take(noisy, expert), axis=-1)
    hot = jax.nn.one_hot(expert, experts, dtype=gate.dtype)
    gates = (hot * gate[..., None]).sum(-2)
    if noise_GNE is None or deviation_GNE is None or k >= experts:
        load = lax.stop_gradient((gates > 0).astype(gates.dtype))
    else:
        kept = hot.sum(-2) > 0
        last_in, first_out = _take(noisy, top[..., k - 1 : k]), _take(noisy, top[..., k : k + 1])
        # The k-th largest of the others: the (k+1)-th for one that is in, the k-th for one that is out.
        rival = jnp.where(kept, first_out, last_in)
        load = jax.scipy.stats.norm.cdf((clean_GNE - rival) / deviation_GNE)
    return Choices(expert, gate, jnp.ones_like(gate, dtype=bool), gates), load


def hierarchical_choices(
    first: tuple[Choices, Array], second: tuple[Choices, Array]
) -> tuple[Choices, dict[str, Array]]:
    """Two levels of noisy top-k (Shazeer 2017, appendix B): gates multiply; `second` is [G, N, B, ...] of all branches.

    Returns also the sums that make the load of expert j of branch i, Load_i Load_ij / |X_i| (eq. 13): of the branches'
    loads, of the experts' loads over the tokens X_i that came to the branch, and of the number of these.
    """
    (outer, outer_load), (inner, inner_load) = first, second
    k1, k2 = outer.expert_GNK.shape[-1], inner.expert_GNK.shape[-1]
    branches, per_branch = inner_load.shape[-2:]
    branch = outer.expert_GNK
    pick = jnp.take_along_axis
    inner_expert = pick(inner.expert_GNK, branch[..., None], axis=-2)
    inner_gate = pick(inner.gate_GNK, branch[..., None], axis=-2)
    expert = (branch[..., None] * per_branch + inner_expert).reshape(*branch.shape[:-1], k1 * k2)
    gate = (outer.gate_GNK[..., None] * inner_gate).reshape(expert.shape)
    gates = (outer.probabilities_GNE[..., None] * inner.probabilities_GNE).reshape(*branch.shape[:-1], -1)
    came = lax.stop_gradient(jax.nn.one_hot(branch, branches).sum(-2))
    sums = {
        "branch_load_B": outer_load.sum((0, 1)),
        "inner_load_BE": (inner_load * came[..., None]).sum((0, 1)),
        "visits_B": came.sum((0, 1)),
    }
    return Choices(expert, gate, jnp.ones_like(gate, dtype=bool), gates), sums


def sort_pairs(key: Array, value: Array, keys: int, values: int) -> tuple[Array, Array]:
    """Pairs of numbers below `keys` and `values` in order along the last dimension: by key, then by value.

    As single numbers, where int32 holds them, XLA:CPU sorts them in 40 % of the time (8 x 1024 pairs; 2026-11-22).
    """
    if keys * values >= 2**31:
        first, second = lax.sort((key, value), num_keys=2)
        return first, second
    both = lax.sort(key * values + value, is_stable=False)
    return both // values, both % values


def assign_slots(choices: Choices, experts: int, capacity: int, priority_GN: Array | None = None) -> Assignment:
    """Seats in order of choice, then of position: all first choices before any second one (GShard, flaxformer).

    `priority_GN` seats the tokens with the largest value first within each choice (batch-prioritised routing, V-MoE,
    arXiv:2106.05974, which ST-MoE uses in its encoder). One sort by expert and order; a seat is the place in its run.
    """
    groups, tokens, k = choices.expert_GNK.shape
    wanted = jnp.where(choices.made_GNK, choices.expert_GNK, experts)
    number = jnp.arange(tokens * k, dtype=jnp.int32).reshape(1, tokens, k)
    number = jnp.broadcast_to(number, wanted.shape)
    if priority_GN is not None:
        order = jnp.argsort(-priority_GN, axis=-1, stable=True)
        wanted, number = (jnp.take_along_axis(a, order[..., None], axis=1) for a in (wanted, number))
    wanted, number = (a.swapaxes(1, 2).reshape(groups, k * tokens) for a in (wanted, number))
    position = jnp.broadcast_to(jnp.arange(k * tokens, dtype=jnp.int32), wanted.shape)
    sorted_expert, order = sort_pairs(wanted, position, experts + 1, k * tokens)
    sorted_number = jnp.take_along_axis(number, order, axis=1)
    start = jax.vmap(lambda s: jnp.searchsorted(s, jnp.arange(experts + 1), side="left"))(sorted_expert)
    place = jnp.arange(k * tokens)[None] - jnp.take_along_axis(start, sorted_expert, axis=1)
    seated = (place < capacity) & (sorted_expert < experts)
    seat = jnp.where(seated, sorted_expert * capacity + place, experts * capacity).astype(jnp.int32)
    # Back to token order: numbers are all different, so sorting by them undoes the sort.
    place_back = sort_pairs(sorted_number, seat, k * tokens, experts * capacity + 1)[1].reshape(groups, tokens, k)
    ends = jnp.concatenate([start[:, 1:], jnp.full_like(start[:, :1], k * tokens)], axis=1)[:, :experts]
    at = start[:, :experts, None] + jnp.arange(capacity)[None, None]
    taken = at < ends[..., None]
    found = jnp.take_along_axis(sorted_number, jnp.minimum(at, k * tokens - 1).reshape(groups, -1), axis=1)
    choice = jnp.where(taken, found.reshape(at.shape), tokens * k).astype(jnp.int32)
    return Assignment(checkpoint_name(place_back, "router"), checkpoint_name(choice, "router"))


def expert_choice(logits_GNE: Array, capacity: int) -> tuple[Array, Array]:
    """Each expert takes its `capacity` surest tokens of the group (Zhou et al. 2022, arXiv:2202.09368, section 3.1).

    Returns token_GEC and gate_GEC, the softmax over experts. Shazeer 2017's strictly balanced gating (appendix F) is
    the same with capacity k N / E.
    """
    probabilities = jax.nn.softmax(logits_GNE, axis=-1)
    token = checkpoint_name(lax.top_k(lax.stop_gradient(probabilities).swapaxes(1, 2), capacity)[1], "router")
    gate = jnp.take_along_axis(probabilities.swapaxes(1, 2), token, axis=-1)
    return token.astype(jnp.int32), gate


def updated_bias(bias_LE: Array, counts_LE: Array, step: float) -> Array:
    """The balance bias after a step: up by `step` for experts below the mean count, down for those above.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2); counts are those of the global batch. The bias is centred, so that it
    does not drift: adding a constant to all of them changes nothing.
    """
    counts = counts_LE.astype(jnp.float32)
    moved = bias_LE + step * jnp.sign(counts.mean(-1, keepdims=True) - counts)
    return moved - moved.mean(-1, keepdims=True)


def statistics(logits_GNE: Array, choices_E: Array, kept_E: Array) -> dict[str, Any]:
    """Sums over tokens for telemetry: assignments wanted and kept per expert, entropy of the router, logits squared."""
    log_p = jax.nn.log_softmax(logits_GNE, axis=-1)
    return {
        "wanted_E": choices_E,
        "kept_E": kept_E,
        "entropy": -(jnp.exp(log_p) * log_p).sum(),
        "logit_squares": jnp.square(logits_GNE).mean(-1).sum(),
        "largest_logit": jnp.abs(logits_GNE).max(),
        "tokens": jnp.float32(logits_GNE.shape[0] * logits_GNE.shape[1]),
    }
