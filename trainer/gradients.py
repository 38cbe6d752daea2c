"""Losses and gradients of a step, as every device computes them inside of `shard_map`.

Gradients are those of the sum over devices of what each computed, accumulated over microbatches without communication,
and reduced once.

Letters: B sequences of this device, M microbatches, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.losses import finish, weighted
from trainer.model import forward
from trainer.optimizer import DTYPES
from trainer.parameters import Parameter, shard_axes, tree_map, varying_axes
from trainer.pipeline import pipelined_forward
from trainer.setting import Setting, axes_of, varying, zeros_like

if TYPE_CHECKING:
    from trainer.step import Trainer

Array = jax.Array
Tree = Any


def total_weight(s: Setting, batch: Tree) -> Array:
    """Targets that count in the whole global batch, so that microbatches and devices weigh as their tokens do."""
    total = batch["weights_BS"].sum().astype(jnp.float32)
    with jax.named_scope("step.sums"):
        return jnp.maximum(lax.psum(total, s.axes.data) if s.axes.data else total, 1)


def local_gradients(t: Trainer, s: Setting, params: Tree, batch: Tree, step: Array) -> tuple[Tree, Tree]:
    """Gradients of the mean loss, in this device's shards of them, and metrics; to be called in `shard_map`."""
    whole = t.job.plan.shard == "parameters"
    # Marked as differing between devices, gradients stay local until they are reduced, once, below.
    local = tree_map(lambda p, w: varying(w, varying_axes(p, t.axes, gathered=whole)), t.abstract, params)
    key = jax.random.fold_in(jax.random.key(t.job.training.learning.seed + 1), step)
    count = t.degrees.microbatches
    at_once = count == 1 or t.degrees.pipeline > 1
    weight = None if at_once else total_weight(s, batch)

    def loss(w: Tree, b: Tree) -> tuple[Array, Tree]:
        return local_losses(t, s, w, b, key, weight)

    grad = jax.value_and_grad(loss, has_aux=True)
    if at_once:
        (_, metrics), gradients = grad(local, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

        def add(total: Tree, b: Tree) -> tuple[Tree, Tree]:
            (_, seen), g = grad(local, b)
            if t.job.plan.shard == "gradients":
                g = _reduced(t, g)
            return jax.tree.map(jnp.add, total, g), seen

        first = jax.tree.map(zeros_like, local)
        if t.job.plan.shard == "gradients":
            first = tree_map(lambda p, w: _shard_zeros(t, p, w), t.abstract, params)
        gradients, seen = lax.scan(add, first, parts)
        metrics = _over_microbatches(seen)
    if t.job.plan.shard != "gradients" or at_once:
        gradients = _reduced(t, gradients)
    return gradients, metrics


def _shard_zeros(t: Trainer, p: Parameter, w: Array) -> Array:
    """Zeros in the shape of this device's shard of a gradient."""
    axes, at = shard_axes(p, t.axes), p.shard_dimension()
    shape = list(w.shape)
    if axes and at is not None:
        shape[at] //= t.axes.size(axes)
    return varying(jnp.zeros(shape, w.dtype), tuple(axes_of(w)) + axes)


def _reduced(t: Trainer, gradients: Tree) -> Tree:
    """Sums over the devices that hold copies; with ZeRO each keeps its shard of the sum."""
    whole, zero = t.job.plan.shard == "parameters", t.job.plan.shard in ("optimizer", "gradients")
    kind = DTYPES[t.job.training.dtypes.gradient_reduction or "fp32"]

    def one(p: Parameter, g: Array) -> Array:
        if not p.trained:
            g = jnp.zeros_like(g)
        axes = [a for a in varying_axes(p, t.axes, gathered=whole) if a in axes_of(g)]
        piece = "experts.gradients" if p.expert else "gradients"
        given, shards, at = g.dtype, shard_axes(p, t.axes), p.shard_dimension()
        if zero and shards and at is not None:
            with jax.named_scope(f"{piece}.reduce_scatter"):
                g = lax.psum_scatter(varying(g, shards).astype(kind), shards, scatter_dimension=at, tiled=True)
            axes = [a for a in axes if a not in shards]
        if axes:
            with jax.named_scope(f"{piece}.all_reduce"):
                g = lax.psum(g.astype(kind), tuple(axes))
        return g.astype(given)

    return tree_map(one, t.abstract, gradients)


def local_losses(
    t: Trainer, s: Setting, params: Tree, batch: Tree, key: Array | None, weight: Array | None = None
) -> tuple[Array, Tree]:
    """The loss of a microbatch (its share of the step's mean), and metrics, summed over all devices.

    `weight` is the step's; where `batch` is all of it, the sum comes with the others at the end: XLA:CPU has as many
    threads as cores, and a device that waits for a sum at the start holds one that another device would compute on.
    `share` is the number of microbatches over which the router's losses are averaged: in training those of the step,
    in evaluation one, since its batch is not cut, but by a pipeline.
    """
    run = pipelined_forward if t.degrees.pipeline > 1 else forward
    sums, reports = run(s, t.abstract, params, batch, key)
    with jax.named_scope("step.sums"):
        return _finished(t, s, sums, reports, weight)


def _finished(t: Trainer, s: Setting, sums: Tree, reports: Tree, weight: Array | None) -> tuple[Array, Tree]:
    """The loss and the metrics from what the devices' layers have summed up."""
    learning, how = t.job.training.learning, t.job.training.learning.router
    axes = tuple(dict.fromkeys((*s.axes.pipeline, *s.axes.data)))
    sums = _summed(sums, axes)
    reports = _over_tokens(s, reports)
    weight = jnp.maximum(sums["weights"], 1) if weight is None else weight
    loss = (sums["loss"] + learning.logits_z_loss * sums["z"]) / weight
    share = t.degrees.microbatches if s.train or t.degrees.pipeline > 1 else 1
    router: dict[str, Array] = {}
    experts: dict[str, list[Tree]] = {}
    for stack, found in reports.items():
        for parts, seen in found:
            losses = finish(parts, how)
            loss = loss + _over_stages(s, weighted(losses, how)) / share
            for name, value in losses.items():
                router[name] = router.get(name, jnp.float32(0)) + _over_stages(s, value.sum()) / share
            experts.setdefault(stack, []).append(_all_layers(s, seen))
    metrics = {
        "loss": sums["loss"] / weight,
        "right": sums["right"] / weight,
        "weights": sums["weights"],
        "router": router,
        "experts": experts,
    }
    return loss, jax.tree.map(lax.stop_gradient, metrics)


def _over_stages(s: Setting, x: Array) -> Array:
    """The sum over pipeline stages, each of which has layers of its own."""
    return lax.psum(varying(x, s.axes.pipeline), s.axes.pipeline) if s.axes.pipeline else x


def _all_layers(s: Setting, seen: Tree) -> Tree:
    """Telemetry of the layers of all stages, [L, ...], from that of this stage, [M, layers here, ...]."""
    if not s.axes.pipeline:
        return seen

    def gather(x: Array) -> Array:
        x = lax.all_gather(varying(lax.stop_gradient(x), s.axes.pipeline), s.axes.pipeline, to="invarying")
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(gather, _over_microbatches(seen))


def _over_tokens(s: Setting, tree: Tree) -> Tree:
    """Sums (and the largest of what is called largest) over all devices that routed different tokens.

    Under sequence parallelism the slices of an expert see the same tokens without the types knowing: each counts as a
    part of one.
    """
    axes = (*s.axes.data, *(s.axes.tensor if s.sequence_axes else s.axes.token_split))
    copies = s.axes.size(s.axes.expert_tensor) if s.sequence_axes else 1
    if not axes:
        return tree
    named, shape = jax.tree_util.tree_flatten_with_path(tree)
    largest = ["largest" in jax.tree_util.keystr(path) for path, _ in named]
    tops = _joined([lax.stop_gradient(x) for (_, x), top in zip(named, largest, strict=True) if top], axes, lax.pmax)
    sums = _joined([x / copies for (_, x), top in zip(named, largest, strict=True) if not top], axes, lax.psum)
    return jax.tree.unflatten(shape, [tops.pop(0) if top else sums.pop(0) for top in largest])


def _summed(tree: Tree, axes: tuple[str, ...]) -> Tree:
    """Sums over `axes`."""
    if not axes:
        return tree
    leaves, shape = jax.tree.flatten(tree)
    return jax.tree.unflatten(shape, _joined(leaves, axes, lax.psum))


def _joined(leaves: list[Array], axes: tuple[str, ...], reduction: Any) -> list[Array]:
    """All leaves reduced as one array (of those that differ along the same further axes).

    XLA:CPU reduces the arrays of a merged all-reduce one by one, so that each costs a start of its own.
    """
    out = list(leaves)
    groups: dict[frozenset[str], list[int]] = {}
    for i, x in enumerate(leaves):
        groups.setdefault(frozenset(axes_of(x)) - set(axes), []).append(i)
    for group in groups.values():
        parts = [varying(leaves[i].astype(jnp.float32).ravel(), axes) for i in group]
        whole = reduction(jnp.concatenate(parts), axes)
        cuts = [sum(x.size for x in parts[:n]) for n in range(1, len(parts))]
        for i, part in zip(group, jnp.split(whole, cuts), strict=True):
            out[i] = part.reshape(leaves[i].shape)
    return out


def _over_microbatches(seen: Tree) -> Tree:
    """Metrics of a step from those of its microbatches, [M, ...]: sums, or the largest."""

    def one(path: Any, x: Array) -> Array:
        return x.max(0) if "largest" in jax.tree_util.keystr(path) else x.sum(0)

    return jax.tree_util.tree_map_with_path(one, seen)
