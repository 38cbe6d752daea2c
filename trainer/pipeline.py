"""Pipeline parallelism: microbatches travel round a ring of stages, one stage further with every tick.

All stages run the same program: at tick t stage p works on microbatch t - p, or on nothing that counts. Differentiated,
that is GPipe's schedule (arXiv:1811.06965): all forward passes, then all backward ones. Embedding is computed by every
stage, of which the first one's is used; logits, which would leave all stages but the last idle, are shared out: each
stage takes its part of the sequences.

Letters: P stages, M microbatches, b sequences of a microbatch, S tokens, D hidden, T = M + P - 1 ticks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.layers import embed
from trainer.mesh import PIPELINE
from trainer.model import Surroundings, embedding, head, own_sequence, run_layers, stack_layers, surroundings
from trainer.parameters import Parameter, tree_map
from trainer.setting import TOKENS, Noise, Setting, axes_of, varying

if TYPE_CHECKING:
    from collections.abc import Callable

Array = jax.Array
Tree = Any


def of_stage(tree: Tree, take: Callable[[Any], Any]) -> Tree:
    """The segments of a stack without their stage dimension."""
    return [[take(one) for one in period] for period in tree]


def pipelined_forward(
    s: Setting, abstract: Tree, params: Tree, batch: Tree, key: Array | None
) -> tuple[Tree, dict[str, list[Any]]]:
    """As `trainer.model.forward` for all microbatches at once: sums of this stage's share of the logits, and reports
    [M, layers of this stage, ...].
    """
    stages, count = s.degrees.pipeline, s.degrees.microbatches
    stage = lax.axis_index(PIPELINE)
    table, shard = embedding(s, abstract, params)
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    shapes = of_stage(abstract["decoder"]["segments"], lambda layer: tree_map(Parameter.one, layer))
    held = of_stage(params["decoder"]["segments"], lambda one: jax.tree.map(lambda w: w[0], one))
    layers = stack_layers(s.job, s.degrees, "decoder")
    x = embed(s, batch["tokens_BS"], batch["positions_BS"], table, shard)
    x_MbSD = varying(x.reshape(count, -1, *x.shape[1:]), (PIPELINE,))

    def tick(received: Array, t: Array) -> tuple[Array, Any]:
        number = jnp.clip(t - stage, 0, count - 1)
        now = jax.tree.map(lambda v: lax.dynamic_index_in_dim(v, number, keepdims=False), parts)
        entering = lax.dynamic_index_in_dim(x_MbSD, jnp.clip(t, 0, count - 1), keepdims=False)
        around: Surroundings = surroundings(s, params["decoder"], now, "", now["tokens_BS"].shape[1], causal=True)
        noise = None
        if key is not None:
            numbers = now["sequence_B"][:, None] * TOKENS + jnp.arange(now["tokens_BS"].shape[1])
            noise = Noise(jax.random.fold_in(key, 1), own_sequence(s, numbers))
        y = jnp.where(stage == 0, entering, received)
        y, reports = run_layers(s, layers, shapes, held, y, around, noise, stage * len(layers))
        with jax.named_scope("pipeline.permute"):
            onward = lax.ppermute(y, PIPELINE, [(i, (i + 1) % stages) for i in range(stages)])
        return onward, (y, reports)

    start = varying(jnp.zeros_like(x_MbSD[0]), tuple(axes_of(x_MbSD)))
    _, (y_TbSD, reports) = lax.scan(tick, start, jnp.arange(count + stages - 1))
    mine = jax.tree.map(lambda r: lax.dynamic_slice_in_dim(r, stage, count, 0), reports)
    done = jnp.where(stage == stages - 1, y_TbSD[stages - 1 :], 0)
    with jax.named_scope("pipeline.permute"):
        share = lax.psum_scatter(done.reshape(-1, *done.shape[2:]), PIPELINE, scatter_dimension=0, tiled=True)
    rows = share.shape[0]
    own = jax.tree.map(lambda v: lax.dynamic_slice_in_dim(varying(v, (PIPELINE,)), stage * rows, rows, 0), batch)
    return head(s, abstract, params, share, own), {"decoder": mine}
