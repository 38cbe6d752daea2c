"""torchtitan's TOML from a job."""

from __future__ import annotations

import json
from typing import Any

from simulator.job.convert.refusal import cannot
from simulator.job.convert.torchtitan_import import SCHEDULES, P, split
from simulator.job.convert.torchtitan_read import MODELS
from simulator.job.job import Job
from simulator.job.presets import load_preset
from simulator.job.rules import Degrees

_TEXTS = {"notes", "source", "published", "name"}


def torchtitan_keys(job: Job, degrees: Degrees) -> dict[str, Any]:
    """`section.name` and value."""
    dump = job.model.model_dump(exclude=_TEXTS)
    pair = next((p for p, n in MODELS.items() if load_preset(n).model_dump(exclude=_TEXTS) == dump), None)
    if pair is None:
        cannot(job, "torchtitan", "model", f"its models are {', '.join(' '.join(p) for p in MODELS)}")
    training, learning = job.training, job.training.learning
    rate = learning.learning_rate
    rank = job.batch.sequences // degrees.data
    keys: dict[str, Any] = {
        "job.description": job.name, "model.name": pair[0], "model.flavor": pair[1],
        "optimizer.name": "Adam" if training.optimizer == "adam" else "AdamW", "optimizer.lr": rate.peak,
        "optimizer.beta1": learning.beta1, "optimizer.beta2": learning.beta2,
        "optimizer.weight_decay": learning.weight_decay, "lr_scheduler.warmup_steps": rate.warmup_steps,
        "lr_scheduler.decay_type": "cosine" if rate.schedule == "cosine" else "linear",
        "lr_scheduler.min_lr_factor": rate.final if rate.schedule == "cosine" else 0.0,
        "lr_scheduler.decay_ratio": None if rate.schedule == "cosine" else 0.0,
        "training.local_batch_size": rank if degrees.pipeline > 1 else degrees.microbatch_sequences,
        "training.global_batch_size": job.batch.sequences, "training.seq_len": job.batch.decoder_length,
        "training.max_norm": learning.clip_norm or 0.0, "training.steps": training.run.steps,
        "training.mixed_precision_param": "float32" if training.precision == "fp32" else "bfloat16",
        "activation_checkpoint.mode": training.remat if training.remat in ("none", "full") else "selective",
        "activation_checkpoint.selective_ac_option": None if training.remat in ("none", "full") else "op",
        "debug.seed": learning.seed,
        "debug.moe_force_load_balance": True if training.routing.model == "even" else None,
    }  # fmt: skip
    if training.precision == "fp8-tensorwise":
        keys |= {"model.converters": ["quantize.linear.float8"], "quantize.linear.float8.recipe_name": "tensorwise"}
    if training.precision == "mxfp8":
        keys["model.converters"] = ["quantize.linear.mx"]
    return {n: v for n, v in (keys | _plan(job, degrees)).items() if v is not None}


def _plan(job: Job, degrees: Degrees) -> dict[str, Any]:
    shard, context = job.plan.shard, degrees.context
    ways = max(1, degrees.shard // context) if shard != "none" else 1
    while degrees.data % ways:
        ways -= 1
    keys: dict[str, Any] = {
        P + "data_parallel_replicate_degree": degrees.data // ways, P + "data_parallel_shard_degree": ways,
        P + "fsdp_reshard_after_forward": "never" if shard == "gradients" else "always",
        P + "tensor_parallel_degree": degrees.tensor, P + "context_parallel_degree": context,
        P + "pipeline_parallel_degree": degrees.pipeline,
    }  # fmt: skip
    if job.model.decoder.moe is not None:
        keys |= {
            P + "expert_parallel_degree": degrees.expert, P + "expert_tensor_parallel_degree": degrees.expert_tensor,
            P + "expert_parallel_comm_backend": "deepep" if job.training.dispatch.transport == "deepep" else "standard",
        }  # fmt: skip
    if degrees.pipeline == 1:
        return keys
    names = {own: name for name, own in SCHEDULES.items()}
    virtual, layers = degrees.virtual_stages, job.model.decoder.layers
    schedule = "Interleaved1F1B" if virtual > 1 else names.get(job.plan.schedule, "1F1B")
    schedule = "1F1B" if virtual == 1 and schedule == "Interleaved1F1B" else schedule
    stages = degrees.pipeline * virtual
    chunks = [degrees.chunks[i % degrees.pipeline][i // degrees.pipeline].layers for i in range(stages)]
    ways_out = [(a, b) for a in (1, 0) for b in (1, 0) if split(layers, stages, a, b) == chunks]
    first, last = ways_out[0] if ways_out else (1, 1)
    keys |= {
        P + "pipeline_parallel_schedule": schedule,
        P + "pipeline_parallel_microbatch_size": degrees.microbatch_sequences,
        P + "pipeline_parallel_first_stage_less_layers": first, P + "pipeline_parallel_last_stage_less_layers": last,
    }  # fmt: skip
    if virtual != (2 if schedule == "Interleaved1F1B" else 1):
        each = -(-(layers + first + last) // stages)
        if -(-(layers + first + last) // each) == stages:
            keys[P + "pipeline_parallel_layers_per_stage"] = each
    return keys


def as_toml(keys: dict[str, Any]) -> str:
    """The TOML text, a table for each section."""
    tables: dict[str, list[str]] = {}
    for name, value in keys.items():
        section, _, key = name.rpartition(".")
        tables.setdefault(section, []).append(f"{key} = {json.dumps(value)}")
    return "\n".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in tables.items())
