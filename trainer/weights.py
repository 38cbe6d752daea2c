"""Weights on their way from where they are kept to where they are used: in the compute format, and whole again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from trainer.optimizer import DTYPES
from trainer.parameters import Parameter, is_parameter, shard_axes
from trainer.remat import WEIGHTS

if TYPE_CHECKING:
    from trainer.setting import Setting

Array = jax.Array
Tree = dict[str, Any]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def whole_weight(w: Array, axes: tuple[str, ...], at: int, kind: Any, reduction: Any) -> Array:
    """FSDP's gather: the weight in format `kind` from its shards; gradients are summed into shards in `reduction`."""
    return lax.all_gather(w.astype(kind), axes, axis=at, tiled=True)


def _whole_forward(w: Array, axes: tuple[str, ...], at: int, kind: Any, reduction: Any) -> tuple[Array, Array]:
    return whole_weight(w, axes, at, kind, reduction), jnp.zeros((), w.dtype)


def _whole_backward(axes: tuple[str, ...], at: int, kind: Any, reduction: Any, like: Array, g: Array) -> tuple[Array]:
    return (lax.psum_scatter(g.astype(reduction), axes, scatter_dimension=at, tiled=True).astype(like.dtype),)


whole_weight.defvjp(_whole_forward, _whole_backward)


def gathered(s: Setting, abstract: Tree, params: Tree) -> Tree:
    """Weights as a layer uses them: in the compute format, whole again where FSDP splits them.

    The name `weights` lets no remat policy keep these copies for the backward pass: it makes them again.
    """
    whole = s.job.plan.shard == "parameters"

    def one(path: Any, p: Parameter, w: Array) -> Array:
        router = any(getattr(k, "key", None) == "router" for k in path)
        kind = w.dtype if router or not p.trained else s.compute
        axes, at = shard_axes(p, s.axes), p.shard_dimension()
        if whole and axes:
            assert at is not None
            given = s.job.training.dtypes.gradient_reduction
            with s.scope("experts.parameters.all_gather" if p.expert else "parameters.all_gather"):
                w = whole_weight(w, axes, at, kind, DTYPES[given] if given else kind)
        return checkpoint_name(w.astype(kind), WEIGHTS)

    return jax.tree_util.tree_map_with_path(one, abstract, params, is_leaf=is_parameter)
