"""A job from torchtitan's settings."""

from __future__ import annotations

from typing import Any

from hw_profiles.errors import nearest
from simulator.job.convert.settings import Settings
from simulator.job.convert.torchtitan_read import MODELS, SECTIONS, WITHOUT
from simulator.job.presets import load_preset

P = "parallelism."
SCHEDULES = {"1F1B": "1f1b", "GPipe": "gpipe", "Interleaved1F1B": "interleaved"}


def split(layers: int, stages: int, first: int, last: int) -> list[int]:
    """Layers per stage as `generate_llm_fqn_per_model_part` deals them: the ends count as `first` and `last` layers."""
    each, extra = divmod(layers + first + last, stages)
    found = [each + (i < extra) for i in range(stages)]
    found[0] -= first
    found[-1] -= last
    return found


def torchtitan_job(s: Settings, devices: int) -> dict[str, Any]:
    """The job in the settings without its cluster, which has `devices` GPUs."""
    pair = (str(s.get("model.name", "llama3")), str(s.get("model.flavor", "debugmodel")))
    if pair not in MODELS:
        known = [f"{n} {f}" for n, f in MODELS]
        s.data.setdefault("model.flavor", pair[1])
        s.refuse(
            "model.flavor", f"of {pair[0]} is no preset; known: {', '.join(known)}{nearest(' '.join(pair), known)}"
        )
    model = load_preset(MODELS[pair]).model_dump(mode="json")
    moe = model["decoder"].get("moe") is not None
    plan, data = _plan(s, devices, model["decoder"]["layers"], moe)
    local = s.needed("training.local_batch_size", 8)
    whole = s.count("training.global_batch_size", -1, -1) or -1
    sequences = whole if whole > 0 else local * data
    if sequences % (local * data):
        s.refuse("training.global_batch_size", f"must be a multiple of local_batch_size {local} x data ranks {data}")
    plan["microbatch_sequences"] = local
    micro = s.needed(P + "pipeline_parallel_microbatch_size", 1)
    if plan["pipeline"] > 1:
        if local % micro:
            s.data.setdefault(P + "pipeline_parallel_microbatch_size", micro)
            s.refuse(P + "pipeline_parallel_microbatch_size", f"must divide local_batch_size {local}")
        plan["microbatch_sequences"] = micro
        if sequences > local * data:
            s.leave(
                "training.global_batch_size", "the pipeline drains after each local batch; a job fills it once a step"
            )
    training = _training(s, moe)
    if moe and s.choice(P + "expert_parallel_comm_backend", ("standard", "deepep"), "standard") == "deepep":
        training["dispatch"] = {"transport": "deepep"}
    training["run"] = {"steps": s.needed("training.steps", 10_000)}
    for name in s.unread():
        section = name.partition(".")[0]
        if name in WITHOUT or section in SECTIONS:
            s.leave(name, WITHOUT.get(name) or SECTIONS[section])
    return {
        "model": model,
        "plan": plan,
        "batch": {"sequences": sequences, "length": s.needed("training.seq_len", 2048)},
        "training": training,
        "software": {"stack": "torchtitan"},
    }


def _plan(s: Settings, devices: int, layers: int, moe: bool) -> tuple[dict[str, Any], int]:
    tensor, pipeline = s.needed(P + "tensor_parallel_degree", 1), s.needed(P + "pipeline_parallel_degree", 1)
    context, copies = s.needed(P + "context_parallel_degree", 1), s.needed(P + "data_parallel_replicate_degree", 1)
    shard = s.needed(P + "data_parallel_shard_degree", -1, -1)
    others = tensor * pipeline * context * copies
    if devices % others or (shard > 0 and shard * others != devices) or shard == 0:
        s.data.setdefault(P + "data_parallel_shard_degree", shard)
        s.refuse(P + "data_parallel_shard_degree", f"times the other degrees {others} must be the {devices} GPUs")
    shard = devices // others
    data = copies * shard
    plan: dict[str, Any] = {
        "data": data, "tensor": tensor, "context": context, "pipeline": pipeline, "sequence_parallel": tensor > 1,
    }  # fmt: skip
    policy = s.choice(P + "fsdp_reshard_after_forward", ("default", "always", "never"), "default")
    if shard * context > 1:
        keeps = policy == "never" or (policy == "default" and pipeline > 1)
        plan["shard"] = "gradients" if keeps else "parameters"
        if copies > 1:
            plan["shard_degree"] = shard * context
    if moe:
        plan["expert"] = s.needed(P + "expert_parallel_degree", 1)
        plan["expert_tensor"] = s.needed(P + "expert_tensor_parallel_degree", 1)
        # Without expert parallelism the experts are split as all else (job_config: no effect when ep = 1).
        if plan["expert"] == 1:
            plan["expert_tensor"] = tensor
    schedule = s.choice(P + "pipeline_parallel_schedule", SCHEDULES, "1F1B")
    ends = [s.needed(P + f"pipeline_parallel_{e}_stage_less_layers", 1, 0) for e in ("first", "last")]
    each = s.count(P + "pipeline_parallel_layers_per_stage")
    if pipeline > 1:
        virtual = 2 if schedule == "Interleaved1F1B" else 1
        if each is not None:
            stages = -(-(layers + sum(ends)) // each)
            if stages % pipeline:
                s.refuse(P + "pipeline_parallel_layers_per_stage", f"makes {stages} stages, no multiple of {pipeline}")
            virtual = stages // pipeline
        plan["schedule"] = SCHEDULES[schedule]
        if (virtual > 1) != (schedule == "Interleaved1F1B"):
            s.data.setdefault(P + "pipeline_parallel_schedule", schedule)
            s.refuse(
                P + "pipeline_parallel_schedule", f"has {virtual} stages a rank; Interleaved1F1B alone has several"
            )
        plan |= {"virtual_stages": virtual} if virtual > 1 else {}
        plan["stages"] = split(layers, pipeline * virtual, *ends)
        if min(plan["stages"]) < 0:
            s.data.setdefault(P + "pipeline_parallel_degree", pipeline)
            s.refuse(P + "pipeline_parallel_degree", f"{layers} layers are too few for {pipeline * virtual} stages")
    return plan, data


def _training(s: Settings, moe: bool) -> dict[str, Any]:
    kinds = {"AdamW": "adamw", "Adam": "adam"}
    training: dict[str, Any] = {"optimizer": kinds[s.choice("optimizer.name", kinds, "AdamW")]}
    width = s.choice("training.mixed_precision_param", ("bfloat16", "float32"), "bfloat16")
    training["precision"] = "bf16" if width == "bfloat16" else "fp32"
    converters = s.words("model.converters")
    recipe = s.get("quantize.linear.float8.recipe_name")
    for converter in converters:
        if converter in ("float8", "quantize.linear.float8", "quantize.dense.float8"):
            training["precision"] = "fp8-tensorwise"
            if recipe not in (None, "tensorwise"):
                s.leave(
                    "quantize.linear.float8.recipe_name", "a job's FP8 is tensorwise or blockwise; read as tensorwise"
                )
        elif converter in ("mx", "quantize.linear.mx"):
            training["precision"] = "mxfp8"
        elif converter not in ("quantize.grouped_mm.float8", "quantize.grouped_mm.mx"):
            s.refuse("model.converters", f"{converter!r} is no precision of a job; known: float8, quantize.linear.mx")
    if s.choice("training.dtype", ("float32", "bfloat16"), "float32") == "bfloat16":
        training["dtypes"] = dict.fromkeys(("parameters", "gradients", "first_moment", "second_moment"), "bf16")
    mode = s.choice("activation_checkpoint.mode", ("selective", "full", "none"), "selective")
    option = str(s.get("activation_checkpoint.selective_ac_option", "2"))
    training["remat"] = mode
    if mode == "selective":
        # Every product but some is kept; a job cannot name every second one, nor every second layer.
        training["remat"] = "full" if option.isdecimal() else {"save": ["core_attention", "attention_output"]}
        why = "a job recomputes all layers alike: read as full" if option.isdecimal() else (
            "every second product is kept; read as attention and its output kept")  # fmt: skip
        if option != "1":
            s.data.setdefault("activation_checkpoint.selective_ac_option", option)
            s.leave("activation_checkpoint.selective_ac_option", why)
    steps, warm = s.needed("training.steps", 10_000), s.needed("lr_scheduler.warmup_steps", 200, 0)
    decay = s.choice("lr_scheduler.decay_type", ("linear", "sqrt", "cosine"), "linear")
    ratio, least = s.number("lr_scheduler.decay_ratio", None, 0), s.number("lr_scheduler.min_lr_factor", 0.0, 0)
    rate: dict[str, Any] = {
        "peak": s.number("optimizer.lr", 8e-4),
        "schedule": "constant",
        "warmup_steps": max(1, warm),
    }
    if decay == "cosine" and ratio is None and steps > max(1, warm):
        rate |= {"schedule": "cosine", "decay_steps": steps, "final": least}
    elif ratio is None or ratio > 0:
        s.data.setdefault("lr_scheduler.decay_type", decay)
        s.leave(
            "lr_scheduler.decay_type", "a job has constant, rsqrt, and cosine from the warm-up on; read as constant"
        )
    learning: dict[str, Any] = {
        "learning_rate": rate, "beta1": s.number("optimizer.beta1", 0.9), "beta2": s.number("optimizer.beta2", 0.95),
        "weight_decay": s.number("optimizer.weight_decay", 0.1),
        "clip_norm": s.number("training.max_norm", 1.0) or None,
        "seed": s.count("debug.seed", 0, 0) or 0,
    }  # fmt: skip
    if moe:
        training["routing"] = {"model": "even" if s.flag("debug.moe_force_load_balance") else "chance"}
    return training | {"learning": learning}
