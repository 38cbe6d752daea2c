"""Losses of the router, as sums that devices add up before anything is multiplied or divided.

Where the mean is taken decides the gradient, not only the logged value: averaging losses of shards is wrong for every
loss that is not linear in its sums. So layers return sums, the step adds them over devices, and `finish` makes losses.

Letters: L layers, G groups, N tokens of a group, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.job.learning import RouterTraining
    from trainer.routing import Choices

Array = jax.Array
Sums = dict[str, Array]


def counted(choices: Choices, experts: int, first_only: bool) -> Array:
    """Assignments per group and expert, [G, E]: of the first choices only, or of all; they carry no gradient."""
    expert = choices.expert_GNK[..., :1] if first_only else choices.expert_GNK
    made = choices.made_GNK[..., :1] if first_only else choices.made_GNK
    hot = jax.nn.one_hot(expert, experts, dtype=jnp.float32) * made[..., None]
    return jax.lax.stop_gradient(hot.sum((1, 2)))


@dataclass(frozen=True)
class Spans:
    """Stretches of `tokens` tokens over which the balance loss takes its means: a group, or a sequence.

    A device may hold only pieces of `piece` tokens: `join` then makes sums over spans [Z, E] of sums over its pieces,
    the same ones on `copies` devices.
    """

    tokens: int
    piece: int
    join: Callable[[Array], Array] = lambda x: x
    copies: int = 1


def router_sums(
    logits_GNE: Array, choices: Choices, how: RouterTraining, spans: Spans, load: Sums | None = None
) -> Sums:
    """What a layer contributes to the losses of its router: sums over its tokens.

    `balance`: sum over spans of E sum_e f_e P_e, f and P means over the span; `counts_E`, `probabilities_E` for the
    balance over a batch; `z`: sum over tokens of logsumexp squared; with `load` (the sums of loads of a noisy router)
    also `importance_E`, the sum of gates.
    """
    groups, tokens, experts = logits_GNE.shape
    pieces = groups * tokens // spans.piece

    def by_piece(x: Array) -> Array:
        return x.reshape(pieces, spans.piece, *x.shape[2:])

    cut = jax.tree.map(by_piece, choices)
    first_only = how.balance_counts == "first"
    k = 1 if first_only else choices.expert_GNK.shape[-1]
    counts = counted(cut, experts, first_only)
    sums: Sums = {
        "spans": jnp.float32(groups * tokens / spans.tokens),
        "tokens": jnp.float32(groups * tokens),
        "z": jnp.square(jax.nn.logsumexp(logits_GNE, axis=-1)).sum(),
    }
    if load is not None:
        sums |= {"importance_E": choices.probabilities_GNE.sum((0, 1))} | load
    elif how.balance_scope == "batch":
        sums |= {"counts_E": counts.sum(0) / k, "probabilities_E": choices.probabilities_GNE.sum((0, 1))}
    else:
        f, p = (spans.join(x) / spans.tokens for x in (counts / k, cut.probabilities_GNE.sum(1)))
        sums["balance"] = (experts * f * p).sum() / spans.copies
    return sums


def squared_variation(x_E: Array) -> Array:
    """Squared coefficient of variation, variance over squared mean (Shazeer 2017, eq. 7)."""
    return jnp.var(x_E, axis=-1) / (jnp.square(jnp.mean(x_E, axis=-1)) + 1e-10)


def finish(sums: Sums, how: RouterTraining) -> dict[str, Array]:
    """The losses of one layer (or of L, along leading axes) from sums over all devices, before their coefficients.

    - balance: E sum_e f_e P_e, 1 at perfect balance whatever k (f counts over N k); E when all first choices fall on
      one expert with certainty, E / k where all choices count. mesh-tf, Megatron and axlearn agree; flaxformer's
      and MaxText's is k times it.
    - z: mean over tokens of logsumexp squared. importance, load: squared coefficients of variation.
    """
    out = {"z": sums["z"] / sums["tokens"]}
    if "importance_E" in sums:
        if "load_E" in sums:
            load = sums["load_E"]
        else:
            share = sums["inner_load_BE"] / jnp.maximum(sums["visits_B"], 1)[..., None]
            load = (sums["branch_load_B"][..., None] * share).reshape(sums["importance_E"].shape)
        out |= {"importance": squared_variation(sums["importance_E"]), "load": squared_variation(load)}
    elif how.balance_scope == "batch":
        f, p = (sums[n] / sums["tokens"][..., None] for n in ("counts_E", "probabilities_E"))
        out["balance"] = sums["counts_E"].shape[-1] * (f * p).sum(-1)
    else:
        out["balance"] = sums["balance"] / sums["spans"]
    return out


def weighted(losses: dict[str, Array], how: RouterTraining) -> Array:
    """The sum of all layers' losses times their coefficients; each layer's is added (Switch, section 2.2)."""
    weights = {
        "balance": how.balance_loss,
        "z": how.z_loss,
        "importance": how.importance_loss,
        "load": how.load_loss,
    }
    total = jnp.float32(0)
    for name, value in losses.items():
        total = total + weights[name] * value.sum()
    return total
