"""Parameter counts of a model, from its dimensions alone.

Every count is exact for the architecture as the model section states it. Sources: Vaswani et al. 2017 (attention, ffn),
Shazeer 2020 (arXiv:2002.05202, gated ffn), DeepSeek-V2 (arXiv:2405.04434, MLA), Shazeer et al. 2017 (arXiv:1701.06538,
noisy gating has two matrices), Sak et al. 2014 (LSTM with projection).
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.job.model import Attention, Ffn, Layer, Lstm, Model, Moe, count_kinds


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer, by part. `expert` is one routed expert, `routed` all of them.

    `active_router` leaves out the gates of branches that a token does not choose (two-level MoE).
    """

    mixer: int
    cross_attention: int
    ffn: int
    router: int
    active_router: int
    expert: int
    routed: int
    active_routed: int
    shared: int
    norms: int

    @property
    def dense(self) -> int:
        """All but the routed experts: what is replicated over expert ranks."""
        return self.mixer + self.cross_attention + self.ffn + self.router + self.shared + self.norms

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.dense + self.routed

    @property
    def active(self) -> int:
        """Parameters one token meets."""
        return self.dense - self.router + self.active_router + self.active_routed


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a whole model. `active` is what one token meets, embedding and logit tables included."""

    embedding: int
    logits: int
    final_norms: int
    layers: int
    active_layers: int
    routed: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.logits + self.final_norms + self.layers

    @property
    def active(self) -> int:
        """Total less the experts that a token does not choose."""
        return self.embedding + self.logits + self.final_norms + self.active_layers

    @property
    def without_embeddings(self) -> int:
        """Total less embedding and logit tables."""
        return self.layers + self.final_norms


def attention_parameters(a: Attention, hidden: int) -> int:
    """Weights and biases of the projections of one attention, its norms over q/k and its sinks."""
    if a.mla is not None:
        m = a.mla
        q_out = a.heads * (m.nope_dim + m.rope_dim)
        q = hidden * m.q_lora_rank + m.q_lora_rank * q_out + m.q_lora_rank if m.q_lora_rank else hidden * q_out
        kv = hidden * (m.kv_lora_rank + m.rope_dim) + m.kv_lora_rank
        kv += m.kv_lora_rank * a.heads * (m.nope_dim + m.value_dim)
        return q + kv + a.heads * m.value_dim * hidden
    q_out = a.heads * a.head_dim
    kv_out = a.kv * a.head_dim * (1 if a.shared_kv else 2)
    total = hidden * (q_out + kv_out) + q_out * hidden
    if a.qkv_bias:
        total += q_out + kv_out
    if a.output_bias:
        total += hidden
    if a.sinks:
        total += a.heads
    if a.qk_norm:
        total += 2 * a.head_dim
    if a.qk_norm_full:
        total += q_out + a.kv * a.head_dim
    return total


def lstm_parameters(lstm: Lstm, hidden: int) -> int:
    """Four gates over input and recurrent state, and the projection; biases are left out as in Shazeer 2017."""
    state = lstm.projection or lstm.cells
    return 4 * lstm.cells * (hidden + state) + (lstm.cells * lstm.projection if lstm.projection else 0)


def ffn_parameters(ffn: Ffn, hidden: int) -> int:
    """Matrices (three when gated, more when deeper) and biases."""
    matrices = hidden * ffn.hidden * (3 if ffn.gated else 2) + (ffn.depth - 1) * ffn.hidden**2
    biases = (ffn.hidden * (2 if ffn.gated else 1) * ffn.depth + hidden) if ffn.bias else 0
    return matrices + biases


def router_outputs(moe: Moe) -> int:
    """Gates of all experts and branches."""
    return moe.experts + (moe.hierarchy.branches if moe.hierarchy else 0)


def router_matrices(moe: Moe) -> int:
    """Gating matrices: one, or two with learnt noise."""
    return 2 if moe.router.kind == "noisy_top_k" else 1


def router_parameters(moe: Moe, hidden: int) -> int:
    """Gating matrices: one, or two with learnt noise; both levels of a hierarchy; balance and linear biases."""
    biases = (moe.experts if moe.router.bias else 0) + (moe.experts if moe.router.linear_bias else 0)
    return hidden * router_outputs(moe) * router_matrices(moe) + biases + (hidden if moe.shared_gate else 0)


def norm_parameters(model: Model) -> int:
    """Parameters of one normalisation."""
    return {"rmsnorm": model.hidden, "layernorm": 2 * model.hidden, "none": 0}[model.norm]


def layer_parameters(layer: Layer, model: Model) -> LayerParameters:
    """Parameters of one layer of `model`."""
    d = model.hidden
    if layer.attention is not None:
        mixer = attention_parameters(layer.attention, d)
        sublayers = 1
    else:
        assert layer.lstm is not None
        mixer, sublayers = lstm_parameters(layer.lstm, d), 0
    cross = attention_parameters(layer.attention, d) if layer.cross_attention and layer.attention else 0
    sublayers += 1 if cross else 0
    ffn = ffn_parameters(layer.ffn, d) if layer.ffn else 0
    sublayers += 1 if layer.ffn else 0
    router = active_router = expert = routed = active = shared = 0
    if layer.moe is not None:
        moe = layer.moe
        sublayers += 1
        router = router_parameters(moe, d)
        active_router = router - (router_outputs(moe) - moe.gate_outputs) * d * router_matrices(moe)
        expert = ffn_parameters(moe.expert, d)
        routed, active = expert * moe.experts, expert * moe.top_k
        if moe.shared_hidden:
            shared = ffn_parameters(moe.expert.model_copy(update={"hidden": moe.shared_hidden}), d)
    norms = sublayers * norm_parameters(model) * (2 if model.post_norms else 1)
    return LayerParameters(mixer, cross, ffn, router, active_router, expert, routed, active, shared, norms)


def count_parameters(model: Model) -> ParameterCount:
    """All parameters of `model`, embedding, logits, positions, norms and MTP modules included."""
    d = model.hidden
    embedding = model.vocab * d * model.embedding_tables
    if model.positions == "learned":
        assert model.position_count is not None
        embedding += model.position_count * d
    total = active = routed = 0
    mtp = model.decoder_layers[-1:] * model.mtp_layers
    for layer, n in count_kinds((*model.encoder_layers, *model.decoder_layers, *mtp)):
        p = layer_parameters(layer, model)
        total, active, routed = total + n * p.total, active + n * p.active, routed + n * p.routed
    if model.positions == "relative_bias":
        # T5 shares one table of buckets x heads between the layers of a stack.
        for stack in (model.encoder, model.decoder):
            if stack is not None and stack.attention is not None:
                total += model.relative_buckets * stack.attention.heads
                active += model.relative_buckets * stack.attention.heads
    # An MTP module: two norms on its inputs, one before its head, and the 2D -> D projection.
    mtp_extra = model.mtp_layers * (2 * d * d + 3 * norm_parameters(model))
    stacks = 2 if model.encoder is not None else 1
    return ParameterCount(
        embedding=embedding,
        logits=0 if model.tied_embeddings else model.vocab * d,
        final_norms=stacks * norm_parameters(model) if model.decoder.lstm is None else 0,
        layers=total + mtp_extra,
        active_layers=active + mtp_extra,
        routed=routed,
    )
