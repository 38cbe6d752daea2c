"""The model of a job: one abstract tree of parameters, and the forward pass over it.

Layers that repeat are stacked and scanned over, so that a program is as long as one period of the model: two layers for
Switch (dense, experts), four for ST-MoE; DeepSeek-V3's three dense layers and its 58 others are two scans.

Letters: B sequences, S tokens, D hidden, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.attention import Sight, attention_layer, attention_parameters, relative_bias
from trainer.layers import cross_entropy, embed, ffn_layer, ffn_parameters, gather_sequence, norm, norm_parameters
from trainer.lstm import lstm_layer, lstm_parameters
from trainer.moe import moe_layer, moe_parameters
from trainer.parameters import Parameter, shard_axes, tree_map
from trainer.remat import checkpointed
from trainer.setting import TOKENS, Noise, Setting, varying
from trainer.weights import gathered

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.job.job import Job
    from simulator.job.model import Layer, Model
    from simulator.job.rules import Degrees

Array = jax.Array
Tree = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """`count` repetitions of the layers in `period`; the first is layer `first` of its stack (or stage)."""

    first: int
    period: tuple[Layer, ...]
    count: int


def segments(layers: tuple[Layer, ...]) -> tuple[Segment, ...]:
    """The layers as repetitions: at each point the period that covers most layers, the shortest of equals."""
    out: list[Segment] = []
    at = 0
    while at < len(layers):
        best = (1, 1)
        for period in range(1, (len(layers) - at) // 2 + 1):
            count = 1
            while layers[at + count * period : at + (count + 1) * period] == layers[at : at + period]:
                count += 1
            if count > 1 and count * period > best[0] * best[1]:
                best = (period, count)
        period, count = best
        out.append(Segment(at, layers[at : at + period], count))
        at += period * count
    return tuple(out)


def layer_parameters(layer: Layer, model: Model, scale: float, tensor: int) -> Tree:
    """Parameters of one layer."""
    out: Tree = {}
    if layer.attention is not None:
        out["attention"] = attention_parameters(layer.attention, model, scale, tensor)
        if layer.cross_attention:
            out["cross_attention"] = attention_parameters(layer.attention, model, scale, tensor, cross=True)
    if layer.lstm is not None:
        out["lstm"] = lstm_parameters(layer.lstm, model.hidden, scale)
    if layer.ffn is not None:
        out["ffn"] = {
            "norm": norm_parameters(model),
            "network": ffn_parameters(layer.ffn, model.hidden, scale),
        }
        if model.post_norms:
            out["ffn"]["post_norm"] = norm_parameters(model)
    if layer.moe is not None:
        out["moe"] = moe_parameters(layer.moe, model, scale)
    return out


def stack_layers(job: Job, degrees: Degrees, stack: str) -> tuple[Layer, ...]:
    """The layers of `stack` that one pipeline stage runs."""
    layers = job.model.encoder_layers if stack == "encoder" else job.model.decoder_layers
    return layers[: len(layers) // degrees.pipeline]


def stacks(model: Model) -> tuple[str, ...]:
    """Names of the model's stacks, in order."""
    return ("encoder", "decoder") if model.encoder is not None else ("decoder",)


def model_parameters(job: Job, degrees: Degrees) -> Tree:
    """The abstract tree: embedding, stacks as lists of segments (each a list over its period), head."""
    model, scale = job.model, job.training.learning.init_scale
    tied = model.tied_embeddings
    table = Parameter((model.vocab, model.hidden), ("vocab", "hidden"), "normal", 1.0 if tied else 0.02)
    tree: Tree = {"embedding": {"table": table}}
    if model.positions == "learned":
        rows = model.position_count or 0
        tree["embedding"]["positions"] = Parameter((rows, model.hidden), (None, "hidden"), "normal", 0.02)
    for stack in stacks(model):
        parts = []
        for segment in segments(stack_layers(job, degrees, stack)):
            period = []
            for layer in segment.period:
                one = layer_parameters(layer, model, scale, degrees.tensor)
                one = tree_map(lambda p, n=segment.count: p.stack(n), one)
                if degrees.pipeline > 1:
                    one = tree_map(lambda p: p.stack(degrees.pipeline, "stage"), one)
                period.append(one)
            parts.append(period)
        tree[stack] = {"segments": parts, "norm": norm_parameters(model)}
        if model.positions == "relative_bias":
            spec = model.encoder if stack == "encoder" else model.decoder
            assert spec is not None and spec.attention is not None
            shape = (model.relative_buckets, spec.attention.heads)
            tree[stack]["relative_bias"] = Parameter(shape, (None, "heads"), "normal", 0.1)
    if not tied:
        tree["logits"] = {"table": Parameter((model.vocab, model.hidden), ("vocab", "hidden"), "normal", 0.02)}
    return tree


def own_sequence(s: Setting, x_BS: Array) -> Array:
    """This rank's part of something along the sequence, where the residual stream is split."""
    axes = s.sequence_axes
    if not axes:
        return x_BS
    share = x_BS.shape[1] // s.axes.size(axes)
    return lax.dynamic_slice_in_dim(varying(x_BS, axes), lax.axis_index(axes) * share, share, 1)


@dataclass(frozen=True)
class Surroundings:
    """What all layers of a stack see beside the stream; arrays of this microbatch."""

    positions_BS: Array
    segments_BS: Array
    memory_BTD: Array | None = None
    memory_segments_BT: Array | None = None
    bias_HST: Array | None = None


def apply_layer(
    s: Setting, layer: Layer, x: Array, p: Tree, around: Surroundings, noise: Noise | None
) -> tuple[Array, Any, Any]:
    """One layer: the stream, and what its mixture of experts reports (None without one)."""
    sums = seen = None
    if layer.attention is not None:
        seg, at = around.segments_BS, around.positions_BS
        sight = Sight(seg, seg, at, at, layer.causal)
        x = attention_layer(
            s, layer.attention, x, p["attention"], sight=sight, bias_HST=around.bias_HST, memory=None, noise=noise
        )
        if layer.cross_attention:
            keys, memory = around.memory_segments_BT, around.memory_BTD
            assert keys is not None and memory is not None
            sight = Sight(seg, keys, at, at, causal=False)
            x = attention_layer(
                s, layer.attention, x, p["cross_attention"], sight=sight, bias_HST=None, memory=memory, noise=noise
            )
    if layer.lstm is not None:
        x = lstm_layer(s, layer.lstm, x, around.positions_BS == 0, p["lstm"], noise)
    if layer.ffn is not None:
        x = ffn_layer(s, x, p["ffn"], layer.ffn, noise)
    if layer.moe is not None:
        x, sums, seen = moe_layer(s, layer.moe, x, p["moe"], noise)
    return x, sums, seen


def _period(
    s: Setting, segment: Segment, single: list[Any], around: Surroundings, noise: Noise | None
) -> Callable[[Array, Any], tuple[Array, list[Any]]]:
    """One repetition of a segment, as `lax.scan` wants it: (stream, (weights, number)) -> (stream, reports)."""

    def of(i: int) -> Callable[..., Any]:
        def layer(x: Array, weights: Any, own: Noise | None) -> Any:
            return apply_layer(s, segment.period[i], x, gathered(s, single[i], weights), around, own)

        return checkpointed(s, layer, scanned=segment.count > 1)

    def run(x: Array, now: Any) -> tuple[Array, list[Any]]:
        weights, number = now
        out = []
        for i in range(len(segment.period)):
            own = noise.at(number + i) if noise is not None else None
            x, sums, seen = of(i)(x, weights[i], own)
            out.append((sums, seen))
        return x, out

    return run


def run_layers(
    s: Setting, layers: tuple[Layer, ...], abstract: list[Any], params: list[Any], x: Array, around: Surroundings,
    noise: Noise | None, first: Array | int = 0,
) -> tuple[Array, list[Any]]:  # fmt: skip
    """The stream after `layers`, and per layer with experts (sums, seen), stacked over a segment's repetitions.

    `first` is the number of the first layer in the model, for the noise.
    """
    reports: list[Any] = []
    for segment, spec, held in zip(segments(layers), abstract, params, strict=True):
        single = [tree_map(Parameter.one, layer) for layer in spec]
        period = _period(s, segment, single, around, noise)
        numbers = first + segment.first + jnp.arange(segment.count) * len(segment.period)
        if segment.count == 1:
            x, out = period(x, (jax.tree.map(lambda w: w[0], held), numbers[0]))
            out = jax.tree.map(lambda v: v[None], out)
        else:
            x, out = lax.scan(period, x, (held, numbers))
        reports += [r for r in out if r[0] is not None]
    return x, reports


def surroundings(s: Setting, params: Tree, batch: Tree, prefix: str, length: int, *, causal: bool) -> Surroundings:
    """Positions, documents and relative bias of a stack."""
    bias = None
    if "relative_bias" in params:
        with s.scope("attention.core"):
            bias = relative_bias(params["relative_bias"], length, causal=causal)
    return Surroundings(batch[f"{prefix}positions_BS"], batch[f"{prefix}segments_BS"], bias_HST=bias)


def forward(
    s: Setting, abstract: Tree, params: Tree, batch: Tree, key: Array | None
) -> tuple[Tree, dict[str, list[Any]]]:
    """Sums over this device's tokens of one microbatch, and the reports of all layers with experts, by stack.

    The sums: `loss` (nats), `z` (squared logsumexp of the logits), `right`, `weights`.
    """
    model = s.job.model
    reports: dict[str, list[Any]] = {}
    table, shard = embedding(s, abstract, params)

    def noise_of(tokens_BS: Array, number: int) -> Noise | None:
        if key is None:
            return None
        numbers = batch["sequence_B"][:, None] * TOKENS + jnp.arange(tokens_BS.shape[1])
        return Noise(jax.random.fold_in(key, number), own_sequence(s, numbers))

    memory = memory_segments = None
    if model.encoder is not None:
        e = s.inside("encoder")
        tokens = batch["encoder_tokens_BS"]
        around = surroundings(e, params["encoder"], batch, "encoder_", tokens.shape[1], causal=False)
        x = embed(e, tokens, around.positions_BS, table, shard)
        layers = stack_layers(s.job, s.degrees, "encoder")
        x, reports["encoder"] = run_layers(
            e, layers, abstract["encoder"]["segments"], params["encoder"]["segments"], x, around, noise_of(tokens, 0)
        )
        with e.scope("attention.norm"):
            final = gathered(s, abstract["encoder"]["norm"], params["encoder"]["norm"])
            memory = gather_sequence(e, norm(x, final, model))
        memory_segments = around.segments_BS
    tokens = batch["tokens_BS"]
    around = surroundings(s, params["decoder"], batch, "", tokens.shape[1], causal=True)
    around = Surroundings(around.positions_BS, around.segments_BS, memory, memory_segments, around.bias_HST)
    x = embed(s, tokens, around.positions_BS, table, shard)
    layers = stack_layers(s.job, s.degrees, "decoder")
    x, reports["decoder"] = run_layers(
        s, layers, abstract["decoder"]["segments"], params["decoder"]["segments"], x, around, noise_of(tokens, 1),
        len(model.encoder_layers),
    )  # fmt: skip
    return head(s, abstract, params, x, batch), reports


def embedding(s: Setting, abstract: Tree, params: Tree) -> tuple[Tree, tuple[str, ...]]:
    """The input table as `embed` takes it, and the axes that split its hidden size; learnt positions are gathered."""
    spec, held = abstract["embedding"], params["embedding"]
    shard = shard_axes(spec["table"], s.axes) if s.job.plan.shard == "parameters" else ()
    out: Tree = {"table": held["table"]}
    if "positions" in spec:
        out |= gathered(s, {"positions": spec["positions"]}, {"positions": held["positions"]})
    return out, shard


def head(s: Setting, abstract: Tree, params: Tree, x: Array, batch: Tree) -> Tree:
    """Final norm, logits and the sums of the loss; the output table is gathered once for the microbatch."""
    tied = s.job.model.tied_embeddings
    final = gathered(s, abstract["decoder"]["norm"], params["decoder"]["norm"])
    name = "embedding" if tied else "logits"
    table = gathered(s, {"table": abstract[name]["table"]}, {"table": params[name]["table"]})["table"]
    weights = batch["weights_BS"].astype(jnp.float32)

    def loss(x: Array, final: Tree, table: Array) -> tuple[Array, ...]:
        return cross_entropy(s, x, batch["targets_BS"], weights, final, table, tied)

    total, z, right = loss(x, final, table)
    return {"loss": total, "z": z, "right": right, "weights": weights.sum()}
