"""The model section of a job: what is trained, as dimensions.

A model is one or two stacks of layers (encoder, decoder). A layer is a mixer (attention or LSTM) followed by a dense
feed-forward network, a mixture of experts, both, or nothing. Which layer has what follows from short rules
(`every`, `first_dense`, `attention_pattern`), so that presets stay a page long.

Letters: D hidden, F ffn hidden, E experts, K choices, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(strict=True, gt=0, le=10**9)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=10**9)]
Activation = Literal["relu", "gelu", "relu2", "geglu", "swiglu"]


class Section(BaseModel):
    """Base of all job sections: immutable, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


class Mla(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank queries, keys and values."""

    q_lora_rank: Count | None = None
    kv_lora_rank: Count
    nope_dim: Count
    rope_dim: Count
    value_dim: Count


class Attention(Section):
    """Self-attention (and cross-attention, where the stack has it) of one layer.

    `window` looks back that many tokens (sliding); `chunk` sees only its own block of that many (Llama 4). `sinks` adds
    one learnt logit per head. `shared_kv` uses one projection for keys and values. `qk_norm` is a learnt scale on
    queries and keys over a head, `qk_norm_full` one over the whole projection.
    """

    heads: Count
    kv_heads: Count | None = None
    head_dim: Count
    mla: Mla | None = None
    window: Count | None = None
    chunk: Count | None = None
    sinks: bool = False
    qk_norm: bool = False
    qk_norm_full: bool = False
    shared_kv: bool = False
    qkv_bias: bool = False
    output_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Attention:
        if self.heads % self.kv:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv}")
        if self.window and self.chunk:
            raise ValueError("window and chunk exclude each other")
        return self

    @property
    def kv(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads


class Lstm(Section):
    """LSTM layer with `cells`, its output projected to `projection` where given (Sak et al. 2014)."""

    cells: Count
    projection: Count | None = None


class Ffn(Section):
    """Feed-forward network D -> hidden (-> hidden ...) -> D; gated activations have two input matrices.

    `depth` is the number of hidden layers (MoE-1-Deep of Shazeer 2017 has four).
    """

    hidden: Count
    activation: Activation
    bias: bool = False
    depth: Count = 1

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies two projections."""
        return self.activation in ("geglu", "swiglu")


class Router(Section):
    """How tokens choose experts; `groups`/`top_groups` is DeepSeek-V3's group limit, `bias` its balance bias.

    `renormalise` divides the gates of the chosen experts by their sum (a single one keeps its probability, or the
    router would learn nothing), `scale` multiplies them.
    """

    kind: Literal["softmax", "sigmoid", "noisy_top_k", "expert_choice"] = "softmax"
    bias: bool = False
    linear_bias: bool = False
    groups: Count = 1
    top_groups: Count = 1
    renormalise: bool = True
    scale: Annotated[float, Field(gt=0, le=1e3)] = 1.0


class Hierarchy(Section):
    """Two-level MoE (Shazeer 2017, appendix B): `branches` groups of experts, `top_k` of them chosen first."""

    branches: Count
    top_k: Count


class Moe(Section):
    """Mixture of experts of one layer.

    Layer i (from 0) has it when i >= first_dense and (i - offset) is a multiple of `every`; `layers` lists them
    instead. `top_k` counts all routed experts of a token (for a hierarchy: those of both levels multiplied).
    `shared_hidden` is the hidden size of all shared experts together. `dense_ffn` keeps the dense network beside the
    experts in the same layer (ST-MoE). `shared_gate` is a sigmoid gate on the shared expert (Qwen2-MoE: D weights).
    """

    experts: Count
    top_k: Count
    expert: Ffn
    shared_experts: CountOrZero = 0
    shared_hidden: CountOrZero = 0
    shared_gate: bool = False
    hierarchy: Hierarchy | None = None
    router: Router = Router()
    every: Count = 1
    offset: CountOrZero = 0
    first_dense: CountOrZero = 0
    layers: tuple[CountOrZero, ...] | None = None
    dense_ffn: bool = False

    @model_validator(mode="after")
    def _check(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if bool(self.shared_experts) != bool(self.shared_hidden):
            raise ValueError("shared_experts and shared_hidden go together")
        if self.hierarchy:
            if self.experts % self.hierarchy.branches:
                raise ValueError(
                    f"experts {self.experts} is not a multiple of hierarchy.branches {self.hierarchy.branches}"
                )
            if self.top_k % self.hierarchy.top_k:
                raise ValueError(f"top_k {self.top_k} is not a multiple of hierarchy.top_k {self.hierarchy.top_k}")
            self._check_branches(self.hierarchy)
        if self.experts % self.router.groups:
            raise ValueError(f"experts {self.experts} is not a multiple of router.groups {self.router.groups}")
        if self.router.top_groups > self.router.groups:
            raise ValueError(f"router.top_groups {self.router.top_groups} exceeds router.groups {self.router.groups}")
        reach = self.router.top_groups * self.experts // self.router.groups
        if self.top_k > reach:
            raise ValueError(
                f"top_k {self.top_k} exceeds the {reach} experts in router.top_groups {self.router.top_groups}"
            )
        return self

    def _check_branches(self, h: Hierarchy) -> None:
        """A token must find as many branches, and experts in each of them, as it takes."""
        if h.top_k > h.branches:
            raise ValueError(f"hierarchy.top_k {h.top_k} exceeds hierarchy.branches {h.branches}")
        chosen, there = self.top_k // h.top_k, self.experts // h.branches
        if chosen > there:
            raise ValueError(f"top_k / hierarchy.top_k {chosen} exceeds experts / hierarchy.branches {there}")

    @property
    def gate_outputs(self) -> int:
        """Gate logits one token computes: all experts, or the branches and the experts of the chosen ones."""
        h = self.hierarchy
        return self.experts if h is None else h.branches + h.top_k * self.experts // h.branches

    def in_layer(self, i: int) -> bool:
        """Whether layer `i` (from 0) has the experts."""
        if self.layers is not None:
            return i in self.layers
        return i >= self.first_dense and (i - self.offset) % self.every == 0


class Layer(Section):
    """One kind of layer after all rules are applied; equal layers compare equal."""

    attention: Attention | None
    lstm: Lstm | None
    cross_attention: bool
    causal: bool
    ffn: Ffn | None
    moe: Moe | None


class Stack(Section):
    """A column of layers.

    `variants` are named changes to `attention`; `attention_pattern` names them layer by layer and repeats
    ("base" is the unchanged one). `ffn_layers` lists the layers with a dense network (default: all without experts).
    """

    layers: Count
    attention: Attention | None = None
    lstm: Lstm | None = None
    variants: dict[str, dict[str, int | bool | None]] = {}
    attention_pattern: tuple[str, ...] = ("base",)
    ffn: Ffn | None = None
    ffn_layers: tuple[CountOrZero, ...] | None = None
    moe: Moe | None = None

    @model_validator(mode="after")
    def _check(self) -> Stack:
        if (self.attention is None) == (self.lstm is None):
            raise ValueError("a stack has attention or lstm, and not both")
        unknown = [n for n in self.attention_pattern if n != "base" and n not in self.variants]
        if unknown:
            raise ValueError(f"attention_pattern names {unknown[0]!r}, which variants does not define")
        if not self.attention_pattern:
            raise ValueError("attention_pattern is empty")
        for name, listed in (("ffn_layers", self.ffn_layers), ("moe.layers", self.moe.layers if self.moe else None)):
            beyond = [i for i in listed or () if i >= self.layers]
            if beyond:
                raise ValueError(f"{name} names layer {beyond[0]}; the stack has layers 0 to {self.layers - 1}")
        for name in self.variants:
            self._attention(name)
        return self

    def _attention(self, name: str) -> Attention | None:
        if self.attention is None or name == "base":
            return self.attention
        return Attention.model_validate(self.attention.model_dump() | dict(self.variants[name]))

    def expand(self, *, causal: bool, cross_attention: bool) -> tuple[Layer, ...]:
        """The layers in order; layers of the same kind are the same object."""
        kinds: dict[tuple[str, bool, bool], Layer] = {}
        out = []
        for i in range(self.layers):
            name = self.attention_pattern[i % len(self.attention_pattern)]
            moe = self.moe is not None and self.moe.in_layer(i)
            if self.ffn_layers is not None:
                dense = i in self.ffn_layers
            else:
                dense = self.ffn is not None and (not moe or (self.moe is not None and self.moe.dense_ffn))
            key = (name, moe, dense)
            if key not in kinds:
                kinds[key] = Layer.model_construct(
                    attention=self._attention(name),
                    lstm=self.lstm,
                    cross_attention=cross_attention,
                    causal=causal,
                    ffn=self.ffn if dense else None,
                    moe=self.moe if moe else None,
                )
            out.append(kinds[key])
        return tuple(out)


def count_kinds(layers: Iterable[Layer]) -> list[tuple[Layer, int]]:
    """The different layers among `layers`, in order of first appearance, with how often each occurs."""
    found: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        kind, count = found.get(id(layer), (layer, 0))
        found[id(layer)] = (kind, count + 1)
    return list(found.values())


class Published(Section):
    """What the authors print, for tests and for people: parameter counts and where they stand."""

    total_parameters: float | None = None
    active_parameters: float | None = None
    excludes_embeddings: bool = False
    tolerance: float = 0.01
    active_tolerance: float = 0.01
    source: str
    note: str | None = None


class Model(Section):
    """A whole model.

    `embedding_tables` counts input tables (T5 shares one between the stacks); `tied_embeddings` uses the table for the
    logits too. `positions: learned` needs `position_count` rows. `norm` decides the parameters of each normalisation:
    rmsnorm D, layernorm 2 D, none 0; `post_norms` doubles them per layer. `mtp_layers` are DeepSeek-V3's multi-token
    prediction modules, each a decoder layer plus a 2D -> D projection, sharing embedding and output head.
    `sampled_softmax` is the number of classes scored in training (Shazeer 2017).
    """

    name: str
    source: str = "inline"
    notes: str | None = None
    published: Published | None = None
    hidden: Count
    vocab: Count
    tied_embeddings: bool = False
    embedding_tables: Count = 1
    positions: Literal["rope", "relative_bias", "learned", "none"] = "rope"
    position_count: Count | None = None
    relative_buckets: Count = 32
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    post_norms: bool = False
    encoder: Stack | None = None
    decoder: Stack
    mtp_layers: CountOrZero = 0
    sampled_softmax: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.positions == "learned" and self.position_count is None:
            raise ValueError("positions learned needs position_count")
        if self.mtp_layers and self.decoder.attention is None:
            raise ValueError("mtp_layers needs an attention decoder")
        return self

    @property
    def family(self) -> str:
        """encoder-decoder, decoder or lstm."""
        if self.encoder is not None:
            return "encoder-decoder"
        return "lstm" if self.decoder.lstm is not None else "decoder"

    @cached_property
    def encoder_layers(self) -> tuple[Layer, ...]:
        """Layers of the encoder, in order; empty without one."""
        return () if self.encoder is None else self.encoder.expand(causal=False, cross_attention=False)

    @cached_property
    def decoder_layers(self) -> tuple[Layer, ...]:
        """Layers of the decoder, in order, without MTP modules."""
        return self.decoder.expand(causal=True, cross_attention=self.encoder is not None)

    @cached_property
    def moes(self) -> tuple[Moe, ...]:
        """The mixtures of experts of the stacks, one per stack that has any."""
        return tuple(s.moe for s in (self.encoder, self.decoder) if s is not None and s.moe is not None)
