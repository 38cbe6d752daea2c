"""Rows of MaxText programs compiled by XLA:TPU (facts: memory, FLOPs, collectives per device) as jobs.

Columns: id, model, topology (`v5p-128`: TensorCores on v5p, chips on v5e and v6e, devices on 7x), mesh (`fsdp64`,
`fsdp16xtensor4`, `fsdp8xexpert8`), per_device_batch, seq, remat, capacity_factor (-1 is dropless), ring_of_experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hw_profiles.errors import QuestionError

# MaxText's `minimal` remat keeps the products of a layer; XLA still makes attention again (facts/aot.md, point 9).
REMAT: dict[str, Any] = {
    "full": "full",
    "none": "none",
    "minimal": {"save": ["qkv", "attention_output", "ffn", "experts"]},
}


def maxtext_job(row: Mapping[str, str]) -> dict[str, Any]:
    """The job of a row; QuestionError with the reason where the job schema cannot express it."""
    if row.get("ring_of_experts") == "True":
        raise QuestionError(f"{row['id']}: ring of experts (all-gathered tokens) is not a transport of the job schema")
    if row["remat"] not in REMAT:
        raise QuestionError(f"{row['id']}: remat {row['remat']!r} is not one of {', '.join(REMAT)}")
    degrees = {name: int(n) for name, n in re.findall(r"(fsdp|tensor|expert|data|context)(\d+)", row["mesh"])}
    if "x".join(f"{name}{n}" for name, n in degrees.items()) != row["mesh"]:
        raise QuestionError(f"{row['id']}: mesh {row['mesh']!r} has an axis that a plan does not")
    expert, tensor, context = degrees.get("expert", 1), degrees.get("tensor", 1), degrees.get("context", 1)
    devices = int(row["n_devices"])
    data = devices // (tensor * context)
    factor = float(row["capacity_factor"] or -1)
    training: dict[str, Any] = {
        "precision": "bf16",
        "optimizer": "adamw",
        "remat": REMAT[row["remat"]],
        "routing": {"model": "even"},
    }
    if factor > 0:
        # MaxText counts capacity per sequence and multiplies assignments; its masks make it a one-hot dispatch. Without
        # a transport of tokens XLA gathers the experts, so the plan has no expert degree (facts/aot.md, point 6).
        training["capacity"] = {"factor": factor, "basis": "assignments", "group_tokens": int(row["seq"]), "minimum": 1}
        training["dispatch"] = {"layout": "one_hot"}
        expert = 1
    plan = {
        "data": data, "tensor": tensor, "context": context, "expert": expert, "expert_tensor": tensor,
        "shard": "parameters",
        "sequence_parallel": tensor > 1, "shard_degree": data * context // degrees.get("data", 1),
    }  # fmt: skip
    return {
        "name": row["id"],
        "model": row["model"],
        "cluster": row["topology"],
        "plan": plan,
        "batch": {"sequences": int(row["per_device_batch"]) * devices, "length": int(row["seq"])},
        "training": training,
        "software": {"stack": "maxtext"},
    }
