"""Rows of published training steps as jobs (columns of the measurements' train_steps table).

What a row leaves out is filled by the rules of the table's own description: blank degrees are 1; ZeRO 1 for Megatron
rows unless FSDP is on, fully sharded parameters for MaxText rows; sequence parallel with tensor; expert-tensor 1 but
for DG rows; DeepEP on Hopper and HybridEP on Blackwell where a flex dispatcher is not named; 64 of 72 GPUs of a rack.
A row that a job cannot express is refused with its reason, never approximated in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.presets import load_preset, preset_names

GPUS = {
    "A100": "a100-80", "A100-80 SXM": "a100-80", "H100": "h100-sxm", "H100 SXM": "h100-sxm", "H200": "h200",
    "H200 SXM": "h200", "H800": "h800", "B200": "b200", "B300": "b300", "GB200": "gb200", "GB300": "gb300",
    "MI300X": "mi300x", "MI355X": "mi355x",
}  # fmt: skip
PRECISIONS = {
    "bf16": "bf16", "fp8": "fp8-tensorwise", "fp8-cs": "fp8-tensorwise", "fp8_full (qwix)": "fp8-tensorwise",
    "fp8-blockwise": "fp8-blockwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int8 (aqt)": "int8",
}  # fmt: skip
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "shared_experts", "moe")

Row = Mapping[str, str]


def _fail(row: Row, why: str) -> QuestionError:
    return QuestionError(f"{row['id']}: {why}")


def _count(row: Row, name: str) -> int:
    text = row.get(name) or "1"
    try:
        return int(float(text))
    except ValueError:
        raise _fail(row, f"{name} = {text!r} is not a number") from None


def _tpu_cluster(row: Row) -> Any:
    name, chips = row["hardware"].lower(), _count(row, "num_devices")
    chip = next((c for k, c in (("v6e", "tpu-v6e"), ("v5p", "tpu-v5p"), ("v5e", "tpu-v5e")) if k in name), "tpu7x")
    shape = re.search(r"\d+x\d+(x\d+)?", row["topology"] or "")
    if shape:
        return {"chip": chip, "slice": shape.group(0)}
    if chip in ("tpu-v5e", "tpu-v6e"):
        if chips > 256 and chips % 256 == 0:
            return {"chip": chip, "slice": "16x16", "slices": chips // 256}
        return {"chip": chip, "slice": "16x16"} if chips == 256 else f"{chip.removeprefix('tpu-')}-{chips}"
    return f"v5p-{2 * chips}" if chip == "tpu-v5p" else f"tpu7x-{2 * chips}"


def _gpu_cluster(row: Row) -> dict[str, Any]:
    chip, gpus = GPUS.get(row["hardware"]), _count(row, "num_devices")
    if chip is None:
        raise _fail(row, f"hardware {row['hardware']!r} has no profile")
    if chip.startswith("gb"):
        domain = min(64, gpus)
        return {"chip": chip, "racks": math.ceil(gpus / domain), "devices_per_domain": domain}
    if gpus < 8:
        return {"chip": chip, "nodes": 1, "chips_per_node": gpus}
    return {"chip": chip, "nodes": gpus // 8}


def _tpu_training(row: Row) -> dict[str, Any]:
    remat, dispatcher = row["recompute"].lower(), row["dispatcher"].lower()
    out: dict[str, Any] = {"remat": "none" if "none" in remat and "custom" not in remat else "full"}
    if "minimal" in remat:
        out["remat"] = {"save": ["qkv", "attention_output", "ffn", "experts"]}
    elif "custom" in remat:
        kept = [n for n in re.findall(r"(\w+)=(?:offload|device)", remat) if n != "remat_policy"]
        offloaded = re.search(r"offload ([\w,]+)", remat)
        names = kept + (offloaded.group(1).split(",") if offloaded else [])
        known = {"query_proj", "key_proj", "value_proj", "qkv_proj", "out_proj", "mlpwi", "mlpwi_0", "mlpwi_1", "mlpwo"}
        saved = [n for n in names if n in known]
        out["remat"] = {"save": saved} if saved else "full"
    factor = re.search(r"(?:cf|capacity factor)\s*([\d.]+)", dispatcher)
    if factor:
        out["capacity"] = {
            "factor": float(factor.group(1).rstrip(".")), "basis": "assignments",
            "group_tokens": _count(row, "seq_len"), "minimum": 1,
        }  # fmt: skip
        out["dispatch"] = {"layout": "one_hot"}
    return out


def _gpu_training(row: Row, chip: str) -> dict[str, Any]:
    remat, dispatcher = row["recompute"].lower(), row["dispatcher"].lower()
    out: dict[str, Any] = {}
    listed = remat.split("recompute_modules")[-1]
    modules = [m for m in MODULES if re.search(rf"\b{m}\b", listed)]
    if "recompute_modules=none" in remat or "num-layers 0" in remat:
        out["remat"] = "none"
    elif "full" in remat:
        out["remat"] = "full"
    else:
        out["remat"] = {"recompute": modules} if modules else "none"
    blackwell = chip.startswith(("b", "gb"))
    if "hybridep" in dispatcher or (blackwell and ("unset" in dispatcher or "recipe" in dispatcher)):
        out["dispatch"] = {"transport": "hybridep"}
    elif "deepep" in dispatcher or "unset" in dispatcher or "recipe" in dispatcher:
        out["dispatch"] = {"transport": "deepep"}
    if "pad_to_capacity" in dispatcher:
        out["capacity"] = {"factor": 1.0, "basis": "assignments", "minimum": 1}
        out["dispatch"] = {"layout": "slots"}
    return out


def step_job(row: Row) -> dict[str, Any]:
    """The job of a row; QuestionError with the reason where the job schema cannot express it."""
    model = row["model"].lower()
    if row["kind"] == "moe-hybrid":
        raise _fail(
            row, f"{row['model']}: hybrid layers (Mamba, linear or compressed attention) are not in the model section"
        )
    if model not in preset_names():
        raise _fail(row, f"model {row['model']!r} has no preset")
    precision = PRECISIONS.get(row["precision"])
    if precision is None:
        raise _fail(row, f"precision {row['precision']!r} is not one of a job's")
    tensor, experts = _count(row, "TP"), bool(load_preset(model).moes)
    plan: dict[str, Any] = {
        "tensor": tensor, "pipeline": _count(row, "PP"), "context": _count(row, "CP"), "sequence_parallel": tensor > 1,
    }  # fmt: skip
    training: dict[str, Any] = {"precision": precision, "routing": {"model": "even"}}
    if row["hardware"].startswith("TPU"):
        cluster = _tpu_cluster(row)
        training |= _tpu_training(row)
        plan |= {"shard": "parameters", "expert_tensor": tensor if experts else 1, "expert": _count(row, "EP")}
        software: dict[str, Any] = {"stack": "maxtext"}
    else:
        cluster = _gpu_cluster(row)
        training |= _gpu_training(row, cluster["chip"])
        virtual, flags = _count(row, "VPP"), row["overlap_flags"].lower()
        plan |= {"microbatch_sequences": _count(row, "micro_batch"), "expert": _count(row, "EP") if experts else 1}
        if virtual > 1:
            plan |= {"schedule": "interleaved", "virtual_stages": virtual}
        sharded = row["FSDP_DP"].startswith("FSDP") and not row["FSDP_DP"].startswith("FSDP=0")
        plan["shard"] = "parameters" if sharded else "optimizer"
        if experts:
            plan["expert_tensor"] = _count(row, "ETP") if row["ETP"] else tensor if row["id"].startswith("DG") else 1
        beside = any(f in flags for f in ("a2a_overlap=true", "expert_parallel_comm=true", "a2a overlap on"))
        software = {"stack": "torchtitan" if "torchtitan" in row["source"].lower() else "megatron"}
        software["overlap"] = {"all_to_all": beside, "gradients": "no overlap-grad-reduce" not in row["FSDP_DP"]}
    if not experts:
        training.pop("capacity", None)
        training.pop("dispatch", None)
    return {
        "name": row["id"], "model": model, "cluster": cluster, "plan": plan, "training": training, "software": software,
        "batch": {"sequences": _count(row, "global_batch"), "length": _count(row, "seq_len")},
    }  # fmt: skip
