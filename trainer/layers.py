"""The plain parts of a layer: norms, feed-forward networks, embeddings, logits and their loss.

Weights are `[in, out]`; tensor parallelism splits `out` of the first and `in` of the last product of a sublayer, as in
Megatron-LM (arXiv:1909.08053), and one sum over the tensor axes closes it. Where that sum stands is all that has to be
written: the type system of `shard_map` (`check_vma`) inserts its counterpart in the backward pass.

Letters: B sequences of a microbatch, S tokens, T = B S, D hidden, F ffn hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from trainer.parameters import Parameter
from trainer.setting import Noise, Setting, dropped

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.job.model import Ffn, Model

Array = jax.Array
Tree = dict[str, Any]


def norm_parameters(model: Model) -> Tree:
    """Scale (and bias) of one normalisation."""
    if model.norm == "none":
        return {}
    scale = {"scale": Parameter((model.hidden,), ("hidden",), "ones")}
    return scale | ({"bias": Parameter((model.hidden,), ("hidden",), "zeros")} if model.norm == "layernorm" else {})


def norm(x: Array, p: Tree, model: Model) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, in float32."""
    if model.norm == "none":
        return x
    y = x.astype(jnp.float32)
    if model.norm == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    y = y * p["scale"].astype(jnp.float32)
    if "bias" in p:
        y = y + p["bias"].astype(jnp.float32)
    return checkpoint_name(y.astype(x.dtype), "norms")


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "geglu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
}


def ffn_parameters(
    ffn: Ffn, hidden: int, scale: float, *, axis: str = "ffn", expert: bool = False
) -> dict[str, Parameter]:
    """Matrices (and biases) of a network D -> F (-> F ...) -> D."""
    f = ffn.hidden
    kw: dict[str, Any] = {"expert": expert}
    out = {"up": Parameter((hidden, f), ("hidden", axis), "fan_in", scale, **kw)}
    if ffn.gated:
        out["gate"] = Parameter((hidden, f), ("hidden", axis), "fan_in", scale, **kw)
    for i in range(1, ffn.depth):
        out[f"hidden_{i}"] = Parameter((f, f), (None, axis), "fan_in", scale, **kw)
    out["down"] = Parameter((f, hidden), (axis, "hidden"), "fan_in", scale, **kw)
    if ffn.bias:
        out["up_bias"] = Parameter((f,), (axis,), "zeros", **kw)
        out["down_bias"] = Parameter((hidden,), ("hidden",), "zeros", **kw)
    return out


def network(
    s: Setting, x: Array, p: Tree, ffn: Ffn, prefix: str, names: tuple[str, str], products: str = "...d,df->...f",
    factor: Array | None = None, drop: Callable[[Array], Array] | None = None,
) -> Array:  # fmt: skip
    """The network on [..., D] (experts: [e, R, D] with `products` = `erd,edf->erf`), before any sum over devices.

    `names` file products and activations for the remat policy; `factor` [..., 1] multiplies the input of the last
    product, an expert's gates; `drop` is dropout of the last hidden layer.
    """
    cast = {k: w.astype(s.compute) for k, w in p.items()}
    with s.scope(f"{prefix}.up"):
        h = jnp.einsum(products, x, cast["up"])
        if "up_bias" in cast:
            h = h + _bias(cast["up_bias"], h)
        h = checkpoint_name(h, names[0])
        gate = checkpoint_name(jnp.einsum(products, x, cast["gate"]), names[0]) if ffn.gated else None
    act = ACTIVATIONS[ffn.activation]
    with s.scope(f"{prefix}.activation"):
        h = checkpoint_name(act(h) if gate is None else act(gate) * h, names[1])
    for i in range(1, ffn.depth):
        with s.scope(f"{prefix}.hidden"):
            h = checkpoint_name(jnp.einsum(products, h, cast[f"hidden_{i}"]), names[0])
            h = checkpoint_name(act(h), names[1])
    h = h if drop is None else drop(h)
    with s.scope(f"{prefix}.down"):
        if factor is not None:
            h = h * factor
        return checkpoint_name(jnp.einsum(products, h, cast["down"]), names[0])


def _bias(bias: Array, like: Array) -> Array:
    """A bias [F], or [e, F] of experts beside [e, R, F]."""
    return bias[:, None] if bias.ndim == 2 and like.ndim == 3 else bias


def gather_sequence(s: Setting, x: Array) -> Array:
    """The whole sequence of a stream that is split over the tensor ranks; without sequence parallelism, `x`."""
    if not s.sequence_axes:
        return x
    return checkpoint_name(lax.all_gather(x, s.sequence_axes, axis=1, tiled=True), "norms")


def sum_tensor(s: Setting, x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over tensor ranks that closes a sublayer; with sequence parallelism each rank keeps its part of it."""
    if not axes:
        return x
    if s.sequence_axes:
        return lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)
    return lax.psum(x, axes)


def ffn_layer(s: Setting, x_BSD: Array, p: Tree, ffn: Ffn, noise: Noise | None) -> Array:
    """Dense feed-forward sublayer with its norm and residual sum."""
    model, rate = s.job.model, s.job.training.learning.dropout
    with s.scope("ffn.norm"):
        h = norm(x_BSD, p["norm"], model)
    with s.scope("ffn.tensor_reduce"):
        h = gather_sequence(s, h)
    h = network(s, h, p["network"], ffn, "ffn", ("ffn", "ffn_activation"))
    with s.scope("ffn.tensor_reduce"):
        h = checkpoint_name(sum_tensor(s, h, s.axes.tensor), "ffn")
    with s.scope("ffn.residual"):
        if "down_bias" in p["network"]:
            h = h + p["network"]["down_bias"].astype(h.dtype)
        h = post_norm(s, h, p)
        return x_BSD + dropped(h, rate, noise, 1)


def post_norm(s: Setting, x: Array, p: Tree) -> Array:
    """The norm after a sublayer, where the model has one."""
    return norm(x, p["post_norm"], s.job.model) if "post_norm" in p else x


def embed(s: Setting, tokens_BS: Array, positions_BS: Array, p: Tree, shard: tuple[str, ...]) -> Array:
    """Rows of the embedding table, [B, S, D]; the vocabulary is split over the tensor ranks.

    Where FSDP splits the hidden size over the `shard` axes, every rank looks its columns up for the tokens of all of
    them and they exchange what they found: activations travel, never the table.
    """
    table = p["table"].astype(s.compute)
    if shard:
        with jax.named_scope("embedding.exchange"):
            tokens_BS = lax.all_gather(tokens_BS, shard, axis=0)
    with jax.named_scope("embedding.lookup"):
        if s.axes.tensor:
            rows = table.shape[0]
            local = tokens_BS - lax.axis_index(s.axes.tensor) * rows
            here = (local >= 0) & (local < rows)
            x = jnp.where(here[..., None], jnp.take(table, jnp.clip(local, 0, rows - 1), axis=0), 0)
        else:
            x = jnp.take(table, tokens_BS, axis=0)
    if shard:
        with jax.named_scope("embedding.exchange"):
            # [ranks, B, S, D / ranks]: rank r's tokens go to rank r, which puts all columns side by side.
            x = lax.all_to_all(x, shard, split_axis=0, concat_axis=0)
            x = jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)
    with jax.named_scope("embedding.tensor_reduce"):
        x = sum_tensor(s, x, s.axes.tensor)
    if "positions" in p:
        x = x + jnp.take(p["positions"].astype(s.compute), positions_BS, axis=0)
    return x


def cross_entropy(
    s: Setting, x_BSD: Array, targets_BS: Array, weights_BS: Array, norm_p: Tree, table_VD: Array, tied: bool
) -> tuple[Array, Array, Array]:
    """Sums over tokens: loss in nats, squared logsumexp (for a z-loss), tokens predicted right; logits in float32.

    The vocabulary is split over the tensor ranks: their logsumexps are joined, logits never leave a device.
    """
    with jax.named_scope("logits.norm"):
        h = norm(x_BSD, norm_p, s.job.model)
    with jax.named_scope("logits.tensor_reduce"):
        h = gather_sequence(s, h)
    with jax.named_scope("logits.product"):
        if tied:
            # T5 scales tied logits: its table has unit variance as an embedding (Mesh-TensorFlow).
            h = h * (s.job.model.hidden**-0.5)
        logits = jnp.einsum("bsd,vd->bsv", h, table_VD.astype(s.compute), preferred_element_type=jnp.float32)
    with jax.named_scope("logits.loss"):
        axes, rows = s.axes.tensor, logits.shape[-1]
        first = lax.axis_index(axes) * rows if axes else 0
        local = targets_BS - first
        here = (local >= 0) & (local < rows)
        top = lax.stop_gradient(logits.max(-1))
        top = lax.pmax(top, axes) if axes else top
        total = jnp.exp(logits - top[..., None]).sum(-1)
        hit = jnp.take_along_axis(logits, jnp.clip(local, 0, rows - 1)[..., None], axis=-1)[..., 0]
        hit = jnp.where(here, hit, 0)
        if axes:
            total, hit = lax.psum((total, hit), axes)
        lse = jnp.log(total) + top
        right = (hit >= top).astype(jnp.float32)
        return (
            ((lse - hit) * weights_BS).sum(),
            (jnp.square(lse) * weights_BS).sum(),
            lax.stop_gradient((right * weights_BS).sum()),
        )
