"""Other people's ways to count FLOPs, so that a published figure can be compared with its own convention."""

from __future__ import annotations

from simulator.job.job import Batch
from simulator.job.model import Attention, Layer, Model, count_kinds
from simulator.workload.attention import mean_keys
from simulator.workload.parameters import layer_parameters


def score_flops(a: Attention, queries: int, keys: int, causal: bool, *, halved: bool) -> float:
    """Forward FLOPs of scores and values of one layer and sequence; causal masks halved, or not."""
    width = a.mla.nope_dim + a.mla.rope_dim + a.mla.value_dim if a.mla else 2 * a.head_dim
    return 2.0 * queries * a.heads * width * mean_keys(a, keys, causal and halved, None)


def _attention_forward(model: Model, batch: Batch, *, halved: bool) -> float:
    """Forward FLOPs of all scores of one sequence."""
    encoder, decoder = batch.encoder_length, batch.decoder_length
    total = 0.0
    mtp = model.decoder_layers[-1:] * model.mtp_layers
    stacks: tuple[tuple[tuple[Layer, ...], int], ...] = (
        (model.encoder_layers, encoder),
        ((*model.decoder_layers, *mtp), decoder),
    )
    for layers, length in stacks:
        for layer, n in count_kinds(layers):
            if layer.attention is None:
                continue
            total += n * score_flops(layer.attention, length, length, layer.causal, halved=halved)
            if layer.cross_attention:
                total += n * score_flops(layer.attention, length, encoder, False, halved=halved)
    return total


def full_attention_extra(model: Model, batch: Batch) -> float:
    """Forward FLOPs of a sequence that counting causal attention in full adds (MaxText before July 2025, dgxc)."""
    return _attention_forward(model, batch, halved=False) - _attention_forward(model, batch, halved=True)


def kaplan_forward_per_sequence(model: Model, batch: Batch) -> float:
    """Forward FLOPs of a sequence: 2 x active layer parameters x tokens, and scores, without logits and router.

    Kaplan et al. 2020 (arXiv:2001.08361), as the Switch Transformer's footnote 7 counts: keys and values of
    cross-attention are taken at the decoder's length, where the truth is the encoder's.
    """
    encoder, decoder = batch.encoder_length, batch.decoder_length
    weights = 0.0
    for layers, length in ((model.encoder_layers, encoder), (model.decoder_layers, decoder)):
        counts = [(layer_parameters(layer, model), n) for layer, n in count_kinds(layers)]
        weights += sum((p.active - p.active_router) * n for p, n in counts) * length
    return 2 * weights + _attention_forward(model, batch, halved=True)
