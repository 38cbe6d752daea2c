"""How many arrays our trainer splits over FSDP or ZeRO ranks: on a CPU each is gathered and scattered by its own call.

XLA:CPU merges all-reduces but no other collective, so that the number of calls is the number of arrays that have the
hidden size as a dimension (trainer/`Parameter.shard_dimension`); XLA:TPU merges them all.
"""

from __future__ import annotations

from simulator.job.model import Attention, Ffn, Layer, Model, Moe


def layer_tensors(layer: Layer, model: Model) -> tuple[int, int]:
    """Arrays of one layer's weights that are split: those all ranks have, and those of experts."""
    dense = expert = 0
    if layer.attention is not None:
        dense += _attention(layer.attention, model, cross=False)
        if layer.cross_attention:
            dense += _attention(layer.attention, model, cross=True)
    if layer.lstm is not None:
        dense += 1
    if layer.ffn is not None:
        dense += _ffn(layer.ffn) + _norms(model)
    if layer.moe is not None:
        dense += _router(layer.moe) + _norms(model)
        expert += _ffn(layer.moe.expert)
        if layer.moe.shared_hidden:
            dense += _ffn(layer.moe.expert) + (1 if layer.moe.shared_gate else 0)
    return dense, expert


def norm_tensors(model: Model) -> int:
    """Arrays of one normalisation."""
    return {"none": 0, "layernorm": 2}.get(model.norm, 1)


def _norms(model: Model) -> int:
    return norm_tensors(model) * (2 if model.post_norms else 1)


def _ffn(ffn: Ffn) -> int:
    return 2 + (1 if ffn.gated else 0) + (1 if ffn.bias else 0)


def _router(moe: Moe) -> int:
    noisy = 2 if moe.router.kind == "noisy_top_k" else 1
    return noisy + (2 if moe.hierarchy else 0)


def _attention(a: Attention, model: Model, *, cross: bool) -> int:
    latent = a.mla is not None and not cross
    matrices = 4 - (1 if a.shared_kv and not latent else 0)
    if latent and a.mla is not None and a.mla.q_lora_rank:
        matrices += 1
    return matrices + (1 if a.output_bias else 0) + _norms(model)
