"""Rows of published training steps as jobs (columns of the measurements' train_steps table).

What a row leaves out is filled by the rules of the table's own description: blank PP, VPP, CP and EP are 1, other
blanks unknown; ZeRO 1 for Megatron rows unless FSDP is on, fully sharded parameters for MaxText rows, over `ici_fsdp`
x its transpose where that is stated; sequence parallel with tensor unless the row says no; expert-tensor 1 but for DG;
layers on stages as `pp_layout` says, else the first and last one layer fewer where that comes out even; DeepSeek-V3
with its MTP module where its FLOPs a token say so; DeepEP on Hopper and HybridEP on Blackwell where a flex dispatcher
is not named; 64 of 72 GPUs of a rack.
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
# A DeepSeek-V3 of as many model FLOPs a token has its MTP module (2.606e11 with it, 2.504e11 without).
MTP_FLOPS_PER_TOKEN = 2.55e11
FACTOR = r"(?:\bcf|capacity factor)\s*(\d+(?:\.\d+)?)"
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


def _stated(row: Row, name: str) -> int:
    """A number that may not be blank: blank is 1 for degrees only."""
    if not row.get(name):
        raise _fail(row, f"{name} is not stated")
    return _count(row, name)


def _tpu_cluster(row: Row) -> Any:
    name, chips = row["hardware"].lower(), _stated(row, "num_devices")
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
    chip, gpus = GPUS.get(row["hardware"]), _stated(row, "num_devices")
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
    factor = re.search(FACTOR, dispatcher)
    if factor:
        out["capacity"] = {
            "factor": float(factor.group(1)), "basis": "assignments",
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
    factor = re.search(FACTOR, dispatcher)
    if factor or "pad_to_capacity" in dispatcher:
        out["capacity"] = {"factor": float(factor.group(1)) if factor else 1.0, "basis": "assignments", "minimum": 1}
        out["dispatch"] = {"layout": "slots"}
    return out


def _layout(row: Row) -> str:
    """The pipeline layout that a row states, or an empty text."""
    found = re.search(r"pp_layout=([^;\s]+)", f"{row['sharding_notes']} {row['overlap_flags']}")
    return found.group(1) if found else ""


def _model(row: Row, name: str, layout: str) -> Any:
    """The preset, with the MTP module of DeepSeek-V3 where the row's own FLOPs or layout show it."""
    flops, rate = row["model_TFLOPs_per_device"], row["tokens_per_s_per_device"]
    per_token = float(flops) * 1e12 / float(rate) if flops and rate else 0.0
    shown = "m" in layout or (name == "deepseek-v3" and per_token >= MTP_FLOPS_PER_TOKEN)
    return {"preset": name, "mtp_layers": 1} if shown else name


def _stages(row: Row, name: str, layout: str) -> Any:
    """Layers on (virtual) stages where the even split is not what ran: None leaves it to the job."""
    chunks = _count(row, "PP") * _count(row, "VPP")
    if chunks == 1:
        return None
    if layout:
        return layout
    each, rest = divmod(load_preset(name).decoder.layers + 2, chunks)
    return None if rest or each < 2 else (each - 1, *[each] * (chunks - 2), each - 1)


def _sharding(row: Row) -> dict[str, Any]:
    """How far MaxText splits its parameters: `ici_fsdp` x its transpose, or all that `ici_data` leaves (-1)."""
    text = row["FSDP_DP"]
    found = {k: int(v) for k, v in re.findall(r"ici_(fsdp_transpose|fsdp|data)_parallelism=(-?\d+)", text)}
    degree = found.get("fsdp", -1)
    if degree < 1:
        return {"shard": "parameters"}
    return {"shard": "parameters", "shard_degree": degree * max(1, found.get("fsdp_transpose", 1))}


def step_job(row: Row) -> dict[str, Any]:
    """The job of a row; QuestionError with the reason where the job schema cannot express it."""
    model = row["model"].lower()
    if row["kind"] == "moe-hybrid":
        raise _fail(
            row, f"{row['model']}: hybrid layers (Mamba, linear or compressed attention) are not in the model section"
        )
    if model not in preset_names():
        raise _fail(row, f"model {row['model']!r} has no preset")
    if model == "gpt3-175b" and "v5p" in row["hardware"]:
        raise _fail(row, "GPT3-175B on v5p: its description says not to use it")
    precision = PRECISIONS.get(row["precision"])
    if precision is None:
        raise _fail(row, f"precision {row['precision']!r} is not one of a job's")
    tensor, experts = _count(row, "TP"), bool(load_preset(model).moes)
    layout, flags = _layout(row), row["overlap_flags"].lower()
    plan: dict[str, Any] = {
        "tensor": tensor, "pipeline": _count(row, "PP"), "context": _count(row, "CP"),
        "sequence_parallel": tensor > 1 and "no sp" not in flags,
    }  # fmt: skip
    stages = _stages(row, model, layout)
    if stages is not None:
        plan["stages"] = stages
    training: dict[str, Any] = {"precision": precision, "routing": {"model": "even"}}
    if row["hardware"].startswith("TPU"):
        cluster = _tpu_cluster(row)
        training |= _tpu_training(row)
        plan |= {**_sharding(row), "expert_tensor": tensor if experts else 1, "expert": _count(row, "EP")}
        software: dict[str, Any] = {"stack": "maxtext"}
    else:
        cluster = _gpu_cluster(row)
        training |= _gpu_training(row, cluster["chip"])
        virtual = _count(row, "VPP")
        _stated(row, "TP")
        plan |= {"microbatch_sequences": _stated(row, "micro_batch"), "expert": _count(row, "EP") if experts else 1}
        if virtual > 1:
            plan |= {"schedule": "interleaved", "virtual_stages": virtual}
        sharded = re.search(r"\bFSDP=(?!0\b)", row["FSDP_DP"]) is not None
        plan["shard"] = "parameters" if sharded else "optimizer"
        if experts:
            plan["expert_tensor"] = _count(row, "ETP") if row["ETP"] else tensor if row["id"].startswith("DG") else 1
        beside = any(f in flags for f in ("a2a_overlap=true", "expert_parallel_comm=true", "a2a overlap on"))
        software = {"stack": "torchtitan" if "torchtitan" in row["source"].lower() else "megatron"}
        alone = "no overlap-grad-reduce" in row["FSDP_DP"] or "no tp/dp/pp overlap" in flags
        software["overlap"] = {"all_to_all": beside, "gradients": not alone}
    if not experts:
        training.pop("capacity", None)
        training.pop("dispatch", None)
    return {
        "name": row["id"], "model": _model(row, model, layout), "cluster": cluster, "plan": plan, "training": training,
        "software": software,
        "batch": {"sequences": _stated(row, "global_batch"), "length": _stated(row, "seq_len")},
    }  # fmt: skip
