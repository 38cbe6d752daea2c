"""Attention: grouped queries, multi-head latent attention, windows, chunks, sinks, relative positions, rotary ones.

Scores are formed for 512 queries at a time, with the softmax in float32: a plain program that every device runs, and
the one the forecast counts for the stack `moecast`. Heads are split over the tensor ranks.

Letters: B sequences, S queries, T keys, D hidden, H heads of this device, K key/value heads, R queries per key head, h
head size, Q and L the low ranks of latent attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from trainer.layers import gather_sequence, norm, norm_parameters, post_norm, sum_tensor
from trainer.parameters import Parameter
from trainer.setting import Noise, Setting, dropped, varying

if TYPE_CHECKING:
    from simulator.job.model import Attention, Model

Array = jax.Array
Tree = dict[str, Any]
ROPE_BASE = 10_000.0
RELATIVE_REACH = 128
# Queries of a block, as in splash attention on TPU.
BLOCK = 512


def attention_parameters(a: Attention, model: Model, scale: float, tensor: int, *, cross: bool = False) -> Tree:
    """Parameters of one attention sublayer; key and value heads that do not split over `tensor` ranks are copied."""
    d, hd = model.hidden, a.head_dim

    def matrix(rows: int, columns: int, axes: tuple[str | None, str | None]) -> Parameter:
        return Parameter((rows, columns), axes, "fan_in", scale)

    out: Tree = {"norm": norm_parameters(model)}
    if a.mla is not None and not cross:
        m = a.mla
        queries = a.heads * (m.nope_dim + m.rope_dim)
        if m.q_lora_rank:
            out["q_down"] = matrix(d, m.q_lora_rank, ("hidden", None))
            out["q_down_norm"] = {"scale": Parameter((m.q_lora_rank,), (None,), "ones")}
            out["q"] = matrix(m.q_lora_rank, queries, ("hidden", "heads"))
        else:
            out["q"] = matrix(d, queries, ("hidden", "heads"))
        out["kv_down"] = matrix(d, m.kv_lora_rank + m.rope_dim, ("hidden", None))
        out["kv_down_norm"] = {"scale": Parameter((m.kv_lora_rank,), (None,), "ones")}
        out["kv_up"] = matrix(m.kv_lora_rank, a.heads * (m.nope_dim + m.value_dim), ("hidden", "heads"))
        out["output"] = matrix(a.heads * m.value_dim, d, ("heads", "hidden"))
    else:
        split = "heads" if a.kv % tensor == 0 else None
        out["q"] = matrix(d, a.heads * hd, ("hidden", "heads"))
        out["k"] = matrix(d, a.kv * hd, ("hidden", split))
        if not a.shared_kv:
            out["v"] = matrix(d, a.kv * hd, ("hidden", split))
        out["output"] = matrix(a.heads * hd, d, ("heads", "hidden"))
        if a.qkv_bias:
            out["q_bias"] = Parameter((a.heads * hd,), ("heads",), "zeros")
            out["k_bias"] = Parameter((a.kv * hd,), (split,), "zeros")
            out["v_bias"] = Parameter((a.kv * hd,), (split,), "zeros")
        if a.qk_norm:
            out["q_norm"] = {"scale": Parameter((hd,), (None,), "ones")}
            out["k_norm"] = {"scale": Parameter((hd,), (None,), "ones")}
        elif a.qk_norm_full:
            out["q_norm"] = {"scale": Parameter((a.heads * hd,), ("heads",), "ones")}
            out["k_norm"] = {"scale": Parameter((a.kv * hd,), (split,), "ones")}
    if a.output_bias:
        out["output_bias"] = Parameter((d,), ("hidden",), "zeros")
    if a.sinks:
        out["sinks"] = Parameter((a.heads,), ("heads",), "zeros")
    if model.post_norms:
        out["post_norm"] = norm_parameters(model)
    return out


def rotate(x: Array, positions_BS: Array) -> Array:
    """Rotary position embedding of [B, S, heads, h] (arXiv:2104.09864), halves paired as in GPT-NeoX."""
    half = x.shape[-1] // 2
    turn = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BS[..., None, None].astype(jnp.float32) * turn
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms(x: Array, p: Tree) -> Array:
    """RMS norm with a learnt scale over the last dimension, in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return (y * p["scale"].astype(jnp.float32)).astype(x.dtype)


def relative_bucket(distance: Array, buckets: int, both_ways: bool) -> Array:
    """T5's bucket of key minus query position: exact when near, logarithmic up to 128 (arXiv:1910.10683, 2.1)."""
    base = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        base = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(RELATIVE_REACH / exact) * (buckets - exact)
    return base + jnp.where(distance < exact, distance, jnp.minimum(exact + far.astype(jnp.int32), buckets - 1))


def relative_bias(table_BH: Array, length: int, *, causal: bool) -> Array:
    """bias_HST that all layers of a stack add to their scores, in float32."""
    at = jnp.arange(length)
    bucket = relative_bucket(at[None, :] - at[:, None], table_BH.shape[0], not causal)
    return jnp.take(table_BH.astype(jnp.float32), bucket, axis=0).transpose(2, 0, 1)


@dataclass(frozen=True)
class Sight:
    """Who sees whom: documents and positions of queries [B, S] and keys [B, T], and whether the future is hidden.

    Positions restart with a document, so within one their difference is that of the places.
    """

    documents_BS: Array
    documents_BT: Array
    at_BS: Array
    at_BT: Array
    causal: bool

    def mask(self, a: Attention, queries: slice = slice(None), keys: slice = slice(None)) -> Array:
        """mask_BST, true where a query sees a key: same document, not in the future, in the window or chunk."""
        mine, theirs = self.documents_BS[:, queries, None], self.documents_BT[:, None, keys]
        see = (mine == theirs) & (theirs > 0)
        if not self.causal:
            return see
        at, from_ = self.at_BT[:, None, keys], self.at_BS[:, queries, None]
        see &= at <= from_
        if a.window:
            see &= at - from_ > -a.window
        if a.chunk:
            see &= at // a.chunk == from_ // a.chunk
        return see


def attend(a: Attention, q: Array, k: Array, v: Array, sight: Sight, bias_HST: Array | None, sinks_H: Any) -> Array:
    """Attention of [B, S, K, R, h] to [B, T, K, h]: [B, S, H v]; long sequences in blocks of 512 queries.

    A block of causal attention meets only the keys that it can see, which leaves (n + 1) / 2n of n x n blocks to do;
    its scores are made again in the backward pass and never kept (FlashAttention's economy, arXiv:2205.14135, without
    its kernel).
    """
    length = q.shape[1]
    if length <= BLOCK:
        return core(q, k, v, sight.mask(a), bias_HST, sinks_H)

    def block(q: Array, k: Array, v: Array, mask: Array, bias: Array | None, sinks_H: Any) -> Array:
        return core(q, k, v, mask, bias, sinks_H, named=False)

    # Without a barrier XLA joins a block's second computation with its first, and keeps the scores of all blocks.
    remade = jax.checkpoint(block, prevent_cse=True)
    out = []
    for first in range(0, length, BLOCK):
        rows = slice(first, min(first + BLOCK, length))
        keys = slice(0, k.shape[1])
        if sight.causal:
            reach = min(n for n in (a.window, a.chunk, length) if n)
            keys = slice(max(0, first - reach + 1), rows.stop)
        bias = None if bias_HST is None else bias_HST[:, rows, keys]
        out.append(remade(q[:, rows], k[:, keys], v[:, keys], sight.mask(a, rows, keys), bias, sinks_H))
    return checkpoint_name(jnp.concatenate(out, axis=1), "core_attention")


def core(
    q_BSKRh: Array, k_BTKh: Array, v_BTKv: Array, mask_BST: Array, bias_HST: Array | None, sinks_H: Any,
    *, named: bool = True,
) -> Array:  # fmt: skip
    """Scores, softmax in float32, weighted sum of values: [B, S, H v]; `named` files them for remat policies."""
    b, s, kv, r, hd = q_BSKRh.shape
    scores = jnp.einsum("bskrh,btkh->bkrst", q_BSKRh, k_BTKh, preferred_element_type=jnp.float32) * hd**-0.5
    # Not the softmax: its derivative is written with its result before any name is given to it.
    scores = checkpoint_name(scores, "core_attention") if named else scores
    if bias_HST is not None:
        scores = scores + bias_HST.reshape(1, kv, r, *bias_HST.shape[1:])
    scores = jnp.where(mask_BST[:, None, None], scores, -1e30)
    if sinks_H is not None:
        sink = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, kv, r, 1, 1), (b, kv, r, s, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k_BTKh.shape[1]].astype(v_BTKv.dtype)
    out = jnp.einsum("bkrst,btkv->bskrv", weights, v_BTKv)
    out = out.reshape(b, s, -1)
    return checkpoint_name(out, "core_attention") if named else out


def _own_heads(s: Setting, x: Array, heads: int, size: int) -> Array:
    """The key/value heads [B, S, K, h] that this tensor rank's queries use; all where they are split already."""
    tensor = s.degrees.tensor
    x = x.reshape(*x.shape[:2], -1, size)
    if tensor == 1 or heads % tensor == 0:
        return x
    # A head serves tensor / heads ranks: all of them have computed all heads, and take their own.
    first = lax.axis_index(s.axes.tensor) * heads // tensor
    return lax.dynamic_slice_in_dim(varying(x, s.axes.tensor), first, 1, axis=2)


def _latent(s: Setting, a: Attention, h: Array, p: Tree, positions_BS: Array, prefix: str) -> tuple[Array, ...]:
    """Queries, keys and values of latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    m = a.mla
    assert m is not None
    down = h
    if m.q_lora_rank:
        with s.scope(f"{prefix}.q_down"):
            down = rms(checkpoint_name(jnp.einsum("bsd,dq->bsq", h, p["q_down"]), "qkv"), p["q_down_norm"])
    with s.scope(f"{prefix}.q_up"):
        q = checkpoint_name(jnp.einsum("bsq,qh->bsh", down, p["q"]), "mla_up_proj")
        q = q.reshape(*q.shape[:2], -1, m.nope_dim + m.rope_dim)
    with s.scope(f"{prefix}.kv_down"):
        c = checkpoint_name(jnp.einsum("bsd,dl->bsl", h, p["kv_down"]), "qkv")
        latent, shared = rms(c[..., : m.kv_lora_rank], p["kv_down_norm"]), c[..., None, m.kv_lora_rank :]
    with s.scope(f"{prefix}.kv_up"):
        kv = checkpoint_name(jnp.einsum("bsl,lh->bsh", latent, p["kv_up"]), "mla_up_proj")
        kv = kv.reshape(*kv.shape[:2], -1, m.nope_dim + m.value_dim)
    with s.scope(f"{prefix}.core"):
        q = jnp.concatenate([q[..., : m.nope_dim], rotate(q[..., m.nope_dim :], positions_BS)], axis=-1)
        turned = jnp.broadcast_to(rotate(shared, positions_BS), (*kv.shape[:3], m.rope_dim))
        k = jnp.concatenate([kv[..., : m.nope_dim], turned], axis=-1)
    return q[:, :, :, None], k, kv[..., m.nope_dim :]


def _plain(
    s: Setting, a: Attention, h: Array, memory: Array, p: Tree, positions: tuple[Array, Array] | None, prefix: str
) -> tuple[Array, ...]:
    """Queries, keys and values of grouped-query attention; `memory` is what keys and values are made of."""
    own = "q" if prefix == "cross_attention" else "qkv"
    with s.scope(f"{prefix}.{own}"):
        q = jnp.einsum("bsd,dh->bsh", h, p["q"])
        q = q + p["q_bias"] if "q_bias" in p else q
    with s.scope(f"{prefix}.{'kv' if own == 'q' else own}"):
        k = jnp.einsum("btd,dh->bth", memory, p["k"])
        v = k if a.shared_kv else jnp.einsum("btd,dh->bth", memory, p["v"])
        if "k_bias" in p:
            k, v = k + p["k_bias"], v + p["v_bias"]
        if a.qk_norm_full:
            q, k = rms(q, p["q_norm"]), rms(k, p["k_norm"])
        k, v = (_own_heads(s, checkpoint_name(x, "qkv"), a.kv, a.head_dim) for x in (k, v))
        q = checkpoint_name(q, "qkv").reshape(*q.shape[:2], -1, a.head_dim)
        if a.qk_norm:
            q, k = rms(q, p["q_norm"]), rms(k, p["k_norm"])
    if positions is not None:
        with s.scope(f"{prefix}.core"):
            q, k = rotate(q, positions[0]), rotate(k, positions[1])
    return q.reshape(*q.shape[:2], k.shape[2], -1, a.head_dim), k, v


def attention_layer(
    s: Setting,
    a: Attention,
    x_BSD: Array,
    p: Tree,
    *,
    sight: Sight,
    bias_HST: Array | None,
    memory: Array | None,
    noise: Noise | None,
) -> Array:
    """One attention sublayer with norm and residual sum; with `memory` [B, T, D] it is cross-attention."""
    model, rate = s.job.model, s.job.training.learning.dropout
    prefix = "attention" if memory is None else "cross_attention"
    with s.scope(f"{prefix}.norm"):
        h = norm(x_BSD, p["norm"], model)
    with s.scope(f"{prefix}.tensor_reduce"):
        h = gather_sequence(s, h)
    # Marked as differing between tensor ranks once, so that queries, keys and values share one sum on the way back.
    h = varying(h, s.axes.tensor)
    cast: Tree = {k: v if isinstance(v, dict) else v.astype(s.compute) for k, v in p.items()}
    if a.mla is not None and memory is None:
        q, k, v = _latent(s, a, h, cast, sight.at_BS, prefix)
    else:
        turned = (sight.at_BS, sight.at_BT) if model.positions == "rope" and memory is None else None
        q, k, v = _plain(s, a, h, h if memory is None else memory, cast, turned, prefix)
    with s.scope(f"{prefix}.core"):
        out = attend(a, q, k, v, sight, bias_HST, cast.get("sinks"))
    with s.scope(f"{prefix}.output"):
        out = jnp.einsum("bsh,hd->bsd", out, cast["output"])
    with s.scope(f"{prefix}.tensor_reduce"):
        out = checkpoint_name(sum_tensor(s, out, s.axes.tensor), "attention_output")
    with s.scope(f"{prefix}.residual"):
        out = post_norm(s, out + cast["output_bias"] if "output_bias" in cast else out, p)
        return x_BSD + dropped(out, rate, noise, 0 if memory is None else 2)
