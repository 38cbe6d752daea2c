"""Small jobs for the trainer's tests: every kind of model, and the plans under which each must give the same step."""

from __future__ import annotations

import copy
from typing import Any

Mapping = dict[str, Any]


def merged(base: Mapping, change: Mapping) -> Mapping:
    """`base` with `change` laid over it, mapping by mapping."""
    out = copy.deepcopy(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


EXPERT = {"hidden": 32, "activation": "swiglu"}
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 8}
MOE = {"experts": 8, "top_k": 2, "expert": EXPERT}
TIGHT = {"factor": 0.75, "basis": "assignments", "group_tokens": 8, "minimum": 1}

DECODER: Mapping = {
    "name": "test",
    "model": {
        "name": "small",
        "hidden": 32,
        "vocab": 64,
        "decoder": {"layers": 4, "attention": ATTENTION, "moe": MOE},
    },
    "cluster": {"chip": "cpu-host", "devices": 1},
    "batch": {"sequences": 8, "length": 32},
    "training": {
        "precision": "fp32",
        "capacity": TIGHT,
        "learning": {"seed": 1, "init_scale": 1.0, "router": {"balance_loss": 0.1, "z_loss": 0.01, "jitter": 0.1}},
    },
}

LATENT = merged(
    DECODER,
    {
        "model": {
            "decoder": {
                "layers": 2,
                "attention": {
                    "kv_heads": 4,
                    "mla": {"q_lora_rank": 16, "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8},
                },
                "ffn": {"hidden": 64, "activation": "swiglu"},
                "moe": {
                    "first_dense": 1,
                    "shared_experts": 1,
                    "shared_hidden": 32,
                    "router": {"kind": "sigmoid", "bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
                },
            }
        },
        "training": {"learning": {"router": {"balance_scope": "sequence"}}},
    },
)

_T5_STACK: Mapping = {
    "layers": 2,
    "attention": {"heads": 4, "head_dim": 8},
    "ffn": {"hidden": 64, "activation": "relu"},
    "moe": {"experts": 8, "top_k": 1, "expert": {"hidden": 32, "activation": "relu"}, "every": 2, "offset": 1},
}
SWITCH: Mapping = {
    "name": "test",
    "model": {
        "name": "small",
        "hidden": 32,
        "vocab": 64,
        "positions": "relative_bias",
        "tied_embeddings": True,
        "encoder": _T5_STACK,
        "decoder": _T5_STACK,
    },
    "cluster": {"chip": "cpu-host", "devices": 1},
    "batch": {"sequences": 8, "length": {"encoder": 32, "decoder": 16}},
    "training": {
        "precision": "fp32",
        "capacity": {**TIGHT, "factor": 1.0},
        "learning": {
            "init_scale": 1.0,
            "dropout": 0.1,
            "expert_dropout": 0.3,
            "logits_z_loss": 0.01,
            "router": {"balance_loss": 0.1, "jitter": 0.1, "priority": "probability"},
        },
    },
}

ST_MOE = merged(
    SWITCH,
    {
        "model": {
            "tied_embeddings": False,
            "encoder": {"moe": {"top_k": 2, "dense_ffn": True, "expert": EXPERT}},
            "decoder": {"moe": {"top_k": 2, "dense_ffn": True, "expert": EXPERT}},
        },
        "training": {
            "learning": {
                "expert_dropout": None,
                "router": {
                    "z_loss": 0.01,
                    "second_choice": "random",
                    "threshold": 0.4,
                    "balance_scope": "batch",
                    "balance_counts": "first",
                },
            }
        },
    },
)

LSTM: Mapping = merged(
    DECODER,
    {
        "model": {
            "norm": "none",
            "positions": "none",
            "decoder": {
                "layers": 2,
                "attention": None,
                "lstm": {"cells": 48, "projection": 32},
                "moe": {
                    "router": {"kind": "noisy_top_k"},
                    "layers": [0],
                    "expert": {"hidden": 32, "activation": "relu", "depth": 2, "bias": True},
                },
            },
        },
        "training": {"learning": {"router": {"jitter": 0.0, "z_loss": 0.0}, "expert_dropout": 0.2}},
    },
)
HIERARCHY = merged(
    LSTM,
    {"model": {"decoder": {"moe": {"top_k": 4, "experts": 16, "hierarchy": {"branches": 4, "top_k": 2}}}}},
)

EXPERT_CHOICE = merged(
    DECODER,
    {
        "model": {"decoder": {"layers": 1, "moe": {"router": {"kind": "expert_choice"}}}},
        "training": {"learning": {"router": {"balance_scope": "batch"}}},
    },
)

ODDITIES = merged(
    DECODER,
    {
        "model": {
            "norm": "layernorm",
            "post_norms": True,
            "decoder": {
                "layers": 2,
                "attention": {
                    "kv_heads": 1,
                    "sinks": True,
                    "qkv_bias": True,
                    "output_bias": True,
                    "window": 9,
                },
                "variants": {"chunked": {"window": None, "chunk": 8, "qk_norm": True}},
                "attention_pattern": ["base", "chunked"],
                "moe": {
                    "expert": {**EXPERT, "bias": True},
                    "router": {"linear_bias": True, "renormalise": False},
                    "shared_experts": 1,
                    "shared_hidden": 32,
                    "shared_gate": True,
                },
            },
        },
    },
)

DROPLESS = merged(
    DECODER,
    {
        "model": {"decoder": {"layers": 2, "moe": {"expert": {**EXPERT, "bias": True}}}},
        "training": {"capacity": "dropless", "learning": {"expert_dropout": 0.3}},
    },
)
FORCED = merged(DROPLESS, {"training": {"routing": {"model": "zipf", "exponent": 1.0, "forced": True}}})


def plan(devices: int, **fields: Any) -> Mapping:
    """A change of the plan, on `devices` devices."""
    return {"cluster": {"devices": devices}, "plan": fields}


# Name -> the job, and by name the changes that must not change the step: each way to split something once.
CASES: dict[str, tuple[Mapping, dict[str, Mapping]]] = {
    "decoder": (
        DECODER,
        {
            "shard gradients, microbatches 2, one_hot": merged(
                plan(4, expert=4, microbatch_sequences=1, shard="gradients"),
                {"training": {"dispatch": {"layout": "one_hot"}}},
            ),
            "data 8, expert 8": plan(8, expert=8),
            "tensor 4, expert_tensor 2": plan(8, tensor=4, expert=2, expert_tensor=2),
            "sequence parallel, expert_tensor 2": plan(
                8, tensor=4, expert=2, expert_tensor=2, sequence_parallel=True, shard="parameters"
            ),
            "shard parameters, degree 2": plan(
                8, tensor=2, expert=2, shard="parameters", shard_degree=2, microbatch_sequences=1
            ),
            "pipeline 2, tensor 2": plan(8, pipeline=2, schedule="gpipe", tensor=2, expert=4, microbatch_sequences=1),
        },
    ),
    "latent": (
        LATENT,
        {
            "tensor 4, parts of sequences": plan(4, tensor=4, expert=4, microbatch_sequences=2),
            "sequence parallel": plan(8, tensor=4, expert=4, expert_tensor=2, sequence_parallel=True),
        },
    ),
    "switch": (
        SWITCH,
        {
            "data 8, expert 8": plan(8, expert=8),
            "expert_tensor 2": plan(4, tensor=2, expert=2, expert_tensor=2, microbatch_sequences=2),
        },
    ),
    "st_moe": (
        ST_MOE,
        {"sequence parallel": plan(8, tensor=2, expert=2, sequence_parallel=True, shard="parameters")},
    ),
    "lstm": (LSTM, {"shard parameters": plan(4, expert=2, shard="parameters")}),
    "hierarchy": (HIERARCHY, {"data 8, expert 8": plan(8, expert=8, microbatch_sequences=1)}),
    "expert choice": (EXPERT_CHOICE, {"data 4, expert 8": plan(8, tensor=2, expert=8)}),
    "dropless": (
        DROPLESS,
        {
            "data 2, expert 2": plan(2, expert=2),
            "data 4, expert 2, microbatches 2": plan(4, expert=2, microbatch_sequences=1, shard="optimizer"),
            "data 8, expert 8": plan(8, expert=8),
            "tensor 4, expert_tensor 2": plan(8, tensor=4, expert=4, expert_tensor=2, shard="parameters"),
            "sequence parallel": plan(8, tensor=4, expert=2, expert_tensor=2, sequence_parallel=True),
        },
    ),
    "forced": (FORCED, {"data 4, expert 2, microbatches 2": plan(4, expert=2, microbatch_sequences=1)}),
    "oddities": (
        ODDITIES,
        {"sequence parallel": plan(4, tensor=4, expert=2, expert_tensor=2, sequence_parallel=True)},
    ),
}
