"""Rows of dense GPT steps on A100 (columns of gpt_a100_steps: every size and degree is stated) as jobs.

Megatron-DeepSpeed in fp16, all layers recomputed, 1F1B, attention by products and a softmax that write all scores.
Assumed, since the table is silent: the usual GPT-3 layout (feed-forward of four times the hidden size, GELU, biases,
learned positions, tied embeddings), no ZeRO, no sequence parallelism, gradients reduced after the backward pass. A job
has no fp16: bf16 stands for it, which on A100 has the same peak, the same kernels and the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hw_profiles.errors import QuestionError

CHIPS = {"A100-80 SXM": "a100-80"}
PER_NODE = 8


def gpt_job(row: Mapping[str, str]) -> dict[str, Any]:
    """The job of a row; QuestionError with the reason where the job schema cannot express it."""
    chip = CHIPS.get(row["hardware"])
    if chip is None:
        raise QuestionError(f"hardware {row['hardware']!r} has no profile")
    if "full recompute" not in row["software"] or "unfused attention" not in row["software"]:
        raise QuestionError(f"software {row['software']!r}: not the one of this table")
    names = (
        "num_devices",
        "hidden",
        "heads",
        "layers",
        "seq_len",
        "vocab",
        "global_batch",
        "micro_batch",
        "TP",
        "DP",
        "PP",
    )
    number = {name: _whole(row, name) for name in names}
    gpus, tensor, data, stages = (number[name] for name in ("num_devices", "TP", "DP", "PP"))
    if tensor * data * stages != gpus:
        raise QuestionError(f"TP x DP x PP = {tensor * data * stages}, and num_devices = {gpus}")
    hidden, heads = number["hidden"], number["heads"]
    if hidden % heads:
        raise QuestionError(f"hidden = {hidden} is no multiple of heads = {heads}")
    whole = gpus <= PER_NODE
    if not whole and gpus % PER_NODE:
        raise QuestionError(f"num_devices = {gpus}: no whole nodes of {PER_NODE}")
    return {
        "name": row["id"],
        "model": {
            "name": f"GPT {number['layers']} x {hidden}",
            "hidden": hidden,
            "vocab": number["vocab"],
            "tied_embeddings": True,
            "norm": "layernorm",
            "positions": "learned",
            "position_count": number["seq_len"],
            "decoder": {
                "layers": number["layers"],
                "attention": {"heads": heads, "head_dim": hidden // heads, "qkv_bias": True, "output_bias": True},
                "ffn": {"hidden": 4 * hidden, "activation": "gelu", "bias": True},
            },
        },
        "cluster": {"chip": chip, "nodes": 1 if whole else gpus // PER_NODE, "chips_per_node": min(gpus, PER_NODE)},
        "plan": {
            "data": data,
            "tensor": tensor,
            "pipeline": stages,
            "microbatch_sequences": number["micro_batch"],
            "schedule": "1f1b",
        },
        "batch": {"sequences": number["global_batch"], "length": number["seq_len"]},
        "training": {"precision": "bf16", "optimizer": "adamw", "remat": "full"},
        "software": {"stack": "megatron", "attention": "unfused", "overlap": {"gradients": False}},
    }


def _whole(row: Mapping[str, str], name: str) -> int:
    text = row[name]
    try:
        value = float(text)
    except ValueError:
        raise QuestionError(f"{name} = {text!r:.40} is not a number") from None
    if value < 1 or value != int(value):
        raise QuestionError(f"{name} = {text}: must be a whole number, at least 1")
    return int(value)
