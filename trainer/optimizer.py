"""Optimisers and schedules from optax, put together so that stacked matrices stay matrices.

Adafactor factors the second moment of a matrix into a row and a column. optax picks the two largest dimensions of an
array, which mixes experts as soon as there are more of them than hidden units (a stack of 2,048 experts, say); here
each matrix of a stack is treated alone, by vmapping optax's own transformation over the stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from trainer.parameters import Parameter, is_parameter, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.job.job import Job
    from simulator.job.learning import Learning, LearningRate

Tree = Any
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def schedule_of(rate: LearningRate) -> optax.Schedule:
    """Learning rate of step n (from 0): linear warm-up to the peak, then constant, peak sqrt(warmup / n), or a cosine.

    The inverse square root is T5's (arXiv:1910.10683, section 3.1.2).
    """
    warmup = optax.linear_schedule(rate.peak / rate.warmup_steps, rate.peak, max(1, rate.warmup_steps - 1))
    if rate.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(rate.peak)
    elif rate.schedule == "rsqrt":

        def after(n: Any) -> Any:
            return rate.peak * jnp.sqrt(rate.warmup_steps / (n + rate.warmup_steps))
    else:
        assert rate.decay_steps is not None
        after = optax.cosine_decay_schedule(rate.peak, rate.decay_steps - rate.warmup_steps, rate.final)
    return optax.join_schedules([warmup, after], [rate.warmup_steps])


def per_matrix(make: Callable[[], optax.GradientTransformation], abstract: Tree) -> optax.GradientTransformation:
    """The transformation applied to each matrix of a stack alone: vmapped over its leading dimensions."""
    one = make()

    def lifted(f: Callable[..., Any], stacked: int) -> Callable[..., Any]:
        for _ in range(stacked):
            f = jax.vmap(f)
        return f

    def init(params: Tree) -> Tree:
        return tree_map(lambda p, w: lifted(one.init, p.stacked)(w), abstract, params)

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        flat: list[Parameter]
        treedef: Any
        flat, treedef = jax.tree.flatten(abstract, is_leaf=is_parameter)
        out = [
            lifted(one.update, p.stacked)(u, s, w)
            for p, u, s, w in zip(
                flat, treedef.flatten_up_to(updates), treedef.flatten_up_to(state), treedef.flatten_up_to(params),
                strict=True,
            )
        ]  # fmt: skip
        return treedef.unflatten([u for u, _ in out]), treedef.unflatten([s for _, s in out])

    return optax.GradientTransformation(init, update)


def adafactor_parts(learning: Learning, *, least: int = 128) -> optax.GradientTransformation:
    """Adafactor for one matrix, without its learning rate (arXiv:1804.04235, algorithm 4, with T5X's settings).

    Second moment decayed with 1 - t^-0.8, factored where both dimensions are at least 128; updates clipped to a root
    mean square of 1, and scaled by that of the matrix (at least 1e-3); no momentum.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=least),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
    )


def make_optimizer(job: Job, abstract: Tree) -> optax.GradientTransformation:
    """The job's optimiser: clipping by the global norm, the method, weight decay of matrices, the learning rate.

    What is not trained (balance biases) and what `start.freeze` names gets no update.
    """
    learning, training = job.training.learning, job.training
    parts: list[optax.GradientTransformation] = []
    if learning.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(learning.clip_norm))
    matrices = tree_map(lambda p: len(p.shape) - p.stacked > 1, abstract)
    if training.optimizer in ("adamw", "adam"):
        first = training.dtypes.first_moment
        parts.append(optax.scale_by_adam(learning.beta1, learning.beta2, mu_dtype=DTYPES[first] if first else None))
        if training.optimizer == "adamw" and learning.weight_decay:
            parts.append(optax.add_decayed_weights(learning.weight_decay, mask=matrices))
    elif training.optimizer == "adafactor":
        parts.append(per_matrix(lambda: adafactor_parts(learning), abstract))
        if learning.weight_decay:
            parts.append(optax.add_decayed_weights(learning.weight_decay, mask=matrices))
    parts.append(optax.scale_by_learning_rate(schedule_of(learning.learning_rate)))
    # First, so that what stands still does not count in the norm; and last, so that decay does not move it.
    still = optax.masked(optax.set_to_zero(), frozen_parts(job, abstract))
    return optax.chain(still, *parts, still)


def frozen_parts(job: Job, abstract: Tree, *, biases: bool = False) -> Tree:
    """True for every parameter that the optimiser does not move; with `biases`, of balance biases those that rest too.

    A balance bias is none of the optimiser's, but the bias of a frozen router has to stay as well.
    """
    start = job.training.learning.start
    names = start.freeze if start is not None else ()

    def stays(path: Any, p: Parameter) -> bool:
        keys = [str(getattr(k, "key", "")) for k in path]
        sparse = p.expert or "router" in keys
        named = any(n in keys for n in names)
        kind = "experts" if sparse else "others"
        return (not p.trained and not biases) or named or kind in names

    return jax.tree_util.tree_map_with_path(stays, abstract, is_leaf=is_parameter)
