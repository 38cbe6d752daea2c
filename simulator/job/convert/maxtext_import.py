"""A job from MaxText's keys."""

from __future__ import annotations

from typing import Any

from simulator.job.convert.maxtext_keys import AXES, MODELS, TENSORS, WITHOUT
from simulator.job.convert.settings import Settings
from simulator.job.presets import load_preset

BLOCKS = ("llama2", "mistral", "mixtral", "deepseek", "qwen3", "qwen3_moe", "gpt3")
_ATTENTION = ("query_proj", "key_proj", "value_proj", "qkv_proj", "out_proj")
POLICIES: dict[str, tuple[str, ...]] = {
    "minimal_with_context": (*_ATTENTION, "mlpwi_0", "mlpwi_1", "mlpwi", "mlpwo", "context"),
    "minimal_flash": (*_ATTENTION, "mlpwi_0", "mlpwi_1", "mlpwi", "mlpwo", "context"),
    "minimal": (*_ATTENTION, "mlpwi_0", "mlpwi_1", "mlpwi", "mlpwo"),
    "save_dot_with_context_except_mlp": (*_ATTENTION, "context"),
    "save_dot_except_mlpwi": (*_ATTENTION, "mlpwo"),
    "save_dot_except_mlp": _ATTENTION,
    "save_qkv_proj": _ATTENTION[:4],
    "save_out_proj": ("out_proj",),
}
ACTIVATIONS = {("silu", "linear"): "swiglu", ("gelu", "linear"): "geglu", ("gelu",): "gelu", ("relu",): "relu"}
WIDTHS = {"float32": "fp32", "bfloat16": "bf16"}


def slice_of(s: Settings) -> Any:
    """The cluster in `compile_topology`, None where there is none."""
    name = s.get("compile_topology") or None
    slices = s.count("compile_topology_num_slices", 1, -1) or 1
    if name is None or slices <= 1:
        return name
    from hw_profiles.loader import cluster_mapping

    return cluster_mapping(str(name)) | {"slices": slices}


def maxtext_job(s: Settings, devices: int) -> dict[str, Any]:
    """The job in the settings without its cluster, which has `devices` devices."""
    model = _model(s)
    layers = _layers_of(model)
    length = s.needed("max_target_length", 2048)
    plan = _plan(s, devices)
    if not _experts_of(model):
        plan.pop("expert_tensor", None)
    batch, micro = _batch(s, plan, devices)
    plan |= micro
    pipeline = plan["pipeline"]
    if pipeline > 1:
        plan |= _stages(s, layers, pipeline)
    s.get("hardware", "tpu"), s.get("run_name", "")
    training = _training(s, _experts_of(model))
    training |= _dispatch(s, length, _experts_of(model) > 0)
    if s.given("steps") and str(s.get("steps")) != "-1":
        training["run"] = {"steps": s.needed("steps", 150_001)}
    for name in s.unread():
        if name in WITHOUT:
            if name.endswith("_parallelism") and str(s.data[name]) != "1":
                s.refuse(name, WITHOUT[name])
            s.leave(name, WITHOUT[name])
    data: dict[str, Any] = {
        "model": model,
        "plan": plan,
        "batch": {"sequences": batch, "length": length},
        "training": training,
        "software": {"stack": "maxtext"},
    }
    if s.given("run_name"):
        data["name"] = str(s.get("run_name"))
    return data


def _layers_of(model: dict[str, Any]) -> int:
    return int(model["decoder"]["layers"])


def _experts_of(model: dict[str, Any]) -> int:
    """Choices of a token, 0 without experts."""
    moe = model["decoder"].get("moe")
    return int(moe["top_k"]) if moe else 0


def _model(s: Settings) -> dict[str, Any]:
    """The preset of `model_name`, or the dimensions."""
    name = str(s.get("model_name", "default"))
    s.flag("override_model_config")
    if name != "default":
        if name not in MODELS:
            from hw_profiles.errors import nearest

            known = ", ".join(MODELS)
            s.refuse("model_name", f"known: default with its dimensions, {known}{nearest(name, MODELS)}")
        return load_preset(MODELS[name]).model_dump(mode="json")
    block = s.choice("decoder_block", BLOCKS, "llama2")
    if s.needed("global_parameter_scale", 1) != 1:
        s.refuse("global_parameter_scale", "write the base_* dimensions out instead")
    activations = s.words("mlp_activations", ("silu", "linear"))
    words = tuple(w.strip("\"'") for w in activations)
    if words not in ACTIVATIONS:
        s.refuse("mlp_activations", f"must be one of {', '.join('+'.join(a) for a in ACTIVATIONS)}")
    bias = block == "gpt3"
    ffn = {"hidden": s.needed("base_mlp_dim", 7168), "activation": ACTIVATIONS[words], "bias": bias}
    decoder: dict[str, Any] = {"layers": s.needed("base_num_decoder_layers", 16), "attention": _attention(s, block)}
    experts = s.needed("num_experts", 1)
    first = s.needed("first_num_dense_layers", 0, 0)
    if experts > 1:
        decoder["moe"] = _moe(s, experts, ffn) | ({"first_dense": first} if first else {})
    if experts == 1 or first:
        decoder["ffn"] = ffn
    model: dict[str, Any] = {
        "hidden": s.needed("base_emb_dim", 2048),
        "vocab": s.needed("vocab_size", 32_000),
        "tied_embeddings": s.flag("logits_via_embedding"),
        "mtp_layers": s.count("mtp_num_layers", 0, 0),
        "decoder": decoder,
    }
    positions = s.count("trainable_position_size", -1, -1) or -1
    if block == "gpt3" or positions > 0:
        model |= {"norm": "layernorm" if block == "gpt3" else "rmsnorm"}
        if positions > 0:
            model |= {"positions": "learned", "position_count": positions}
    return model


def _attention(s: Settings, block: str) -> dict[str, Any]:
    heads = s.needed("base_num_query_heads", 16)
    kind = s.choice("attention_type", ("global", "mla"), "global")
    bias = s.flag("attention_bias") or block == "gpt3"
    attention: dict[str, Any] = {
        "heads": heads, "qkv_bias": bias, "output_bias": block == "gpt3", "sinks": s.flag("attention_sink"),
    }  # fmt: skip
    kv, head = s.needed("base_num_kv_heads", 16), s.needed("head_dim", 128)
    if kind == "mla":
        nope, rope = s.needed("qk_nope_head_dim", 128), s.needed("qk_rope_head_dim", 64)
        attention["mla"] = {
            "q_lora_rank": s.count("q_lora_rank", 0, 0) or None, "kv_lora_rank": s.needed("kv_lora_rank", 512),
            "nope_dim": nope, "rope_dim": rope, "value_dim": s.needed("v_head_dim", 128),
        }  # fmt: skip
        return attention | {"head_dim": nope + rope}
    return attention | {
        "kv_heads": kv, "head_dim": head, "qk_norm": s.flag("use_qk_norm") or block.startswith("qwen3"),
    }  # fmt: skip


def _moe(s: Settings, experts: int, ffn: dict[str, Any]) -> dict[str, Any]:
    hidden = s.count("base_moe_mlp_dim", -1, -1) or -1
    expert = ffn | {"hidden": hidden if hidden > 0 else ffn["hidden"]}
    score = s.choice("routed_score_func", ("", "softmax", "sigmoid"), "")
    groups, top = s.count("n_routing_groups", -1, -1) or -1, s.count("topk_routing_group", -1, -1) or -1
    s.flag("norm_topk_prob")
    router = {
        "kind": "sigmoid" if score == "sigmoid" else "softmax",
        "bias": s.flag("routed_bias"),
        "scale": s.number("routed_scaling_factor", 1.0),
        "groups": max(1, groups),
        "top_groups": max(1, top),
    }
    moe: dict[str, Any] = {
        "experts": experts, "top_k": s.needed("num_experts_per_tok", 1), "expert": expert, "router": router,
    }  # fmt: skip
    shared = s.count("shared_experts", 0, 0) or 0
    return moe | ({"shared_experts": shared, "shared_hidden": shared * expert["hidden"]} if shared else {})


def _plan(s: Settings, devices: int) -> dict[str, Any]:
    """The axes inside and between slices multiplied; -1 takes what the others leave."""
    free = {"dcn_data": -1, "ici_fsdp": -1}
    nets: dict[str, dict[str, int]] = {}
    for net in ("ici", "dcn"):
        degrees = {}
        for axis in AXES:
            name = f"{net}_{axis}_parallelism"
            degrees[axis] = s.needed(name, free.get(f"{net}_{axis}", 1), -1)
        nets[net] = degrees
    # The number of slices is the cluster's; a filled -1 needs only the product over both.
    holes = [(n, a) for n, d in nets.items() for a, v in d.items() if v < 1]
    total = 1
    for degrees in nets.values():
        for value in degrees.values():
            total *= max(1, value)
    if devices % total or (not holes and total != devices):
        name = next((f"{n}_{a}_parallelism" for n, d in nets.items() for a in d if s.given(f"{n}_{a}_parallelism")), "")
        s.refuse(name or "ici_fsdp_parallelism", f"the axes' product {total} must make up the {devices} devices")
    # Inside a slice first: one slice leaves nothing for -1 between slices.
    for place in sorted(holes, key=lambda p: p[0] == "dcn"):
        nets[place[0]][place[1]] = devices // total
        total = devices
    both = {axis: nets["ici"][axis] * nets["dcn"][axis] for axis in AXES}
    data = both["data"] * both["fsdp"] * both["expert"]
    plan: dict[str, Any] = {
        "data": data, "tensor": both["tensor"], "context": both["context"], "pipeline": both["pipeline"],
        "expert": both["expert"], "sequence_parallel": both["tensor"] > 1,
    }  # fmt: skip
    if both["expert"] > 1 or both["tensor"] > 1:
        plan["expert_tensor"] = both["tensor"]
    split = both["fsdp"] * both["context"] * both["expert"]
    over = s.flag("shard_optimizer_over_data")
    if split > 1:
        plan["shard"] = "parameters"
        if both["data"] > 1:
            plan["shard_degree"] = split
        if over:
            s.leave("shard_optimizer_over_data", "beside split weights a job splits the optimizer as them")
    elif over:
        plan["shard"] = "optimizer"
    return plan


def _batch(s: Settings, plan: dict[str, Any], devices: int) -> tuple[int, dict[str, Any]]:
    """Sequences a step, and those of a microbatch on a data rank."""
    each = s.number("per_device_batch_size", 12.0, 0) or 0.0
    steps = s.needed("gradient_accumulation_steps", 1)
    passes = each * devices
    if passes != int(passes) or passes < 1:
        s.refuse("per_device_batch_size", f"times {devices} devices must be a whole number of sequences")
    if passes % plan["data"]:
        s.refuse("per_device_batch_size", f"{passes:g} sequences must be a multiple of {plan['data']} batch shards")
    rank = int(passes) // plan["data"]
    if plan["pipeline"] == 1:
        return int(passes) * steps, {"microbatch_sequences": rank}
    micro = s.count("num_pipeline_microbatches", -1, -1) or -1
    number = plan["pipeline"] if micro < 1 else micro
    if rank % number:
        s.data.setdefault("num_pipeline_microbatches", number)
        s.refuse("num_pipeline_microbatches", f"must divide the {rank} sequences of a batch shard")
    if steps > 1:
        s.leave("gradient_accumulation_steps", "the pipeline drains after each; a job fills it once a step")
    return int(passes) * steps, {"microbatch_sequences": rank // number, "schedule": "gpipe"}


def _stages(s: Settings, layers: int, pipeline: int) -> dict[str, Any]:
    each = s.needed("num_layers_per_pipeline_stage", 1)
    if layers % (pipeline * each):
        s.data.setdefault("num_layers_per_pipeline_stage", each)
        s.refuse("num_layers_per_pipeline_stage", f"times {pipeline} stages must divide the {layers} layers")
    repeats = layers // pipeline // each
    said = s.count("num_pipeline_repeats", -1, -1)
    if said is not None and said > 0 and said != repeats:
        s.refuse("num_pipeline_repeats", f"{layers} layers in {pipeline} stages of {each} make {repeats}")
    if repeats == 1:
        return {}
    s.data["num_pipeline_repeats"] = repeats
    s.leave("num_pipeline_repeats", "the circular pipeline runs all forward passes first; read as interleaved 1F1B")
    return {"virtual_stages": repeats, "schedule": "interleaved"}


def _dispatch(s: Settings, length: int, moe: bool) -> dict[str, Any]:
    factor, sparse = s.number("capacity_factor", -1.0), s.flag("sparse_matmul", True)
    s.flag("megablox", True), s.flag("use_random_routing")
    if not moe:
        return {}
    if factor is not None and factor > 0 and not sparse:
        capacity = {"factor": factor, "basis": "assignments", "group_tokens": length, "minimum": 1}
        return {"capacity": capacity, "dispatch": {"layout": "one_hot"}}
    if not sparse:
        s.refuse("sparse_matmul", "without capacity_factor every expert computes all tokens, which a job cannot say")
    if factor is not None and factor > 0:
        s.leave("capacity_factor", "has no effect with sparse_matmul; no token is dropped")
    return {}


def _training(s: Settings, top_k: int) -> dict[str, Any]:
    formats = {"": "", "int8": "int8", "fp8": "fp8-tensorwise", "fp8_full": "fp8-tensorwise"}
    quantized = formats[s.choice("quantization", formats, "")]
    plain = "fp32" if s.choice("dtype", WIDTHS, "bfloat16") == "float32" else "bf16"
    kinds = {"adamw": "adamw", "adam_pax": "adam", "sgd": "sgd"}
    training: dict[str, Any] = {
        "precision": quantized or plain,
        "optimizer": kinds[s.choice("opt_type", kinds, "adamw")],
        "remat": _remat(s),
    }
    dtypes: dict[str, str] = {}
    weights, first = s.choice("weight_dtype", WIDTHS, "float32"), str(s.get("mu_dtype", "") or "")
    if weights == "bfloat16":
        dtypes |= {"parameters": "bf16", "second_moment": "bf16", "first_moment": WIDTHS.get(first, "bf16")}
    elif first:
        dtypes["first_moment"] = WIDTHS[s.choice("mu_dtype", WIDTHS, "float32")]
    if s.choice("grad_dtype", WIDTHS, "float32") == "bfloat16":
        dtypes["gradients"] = "bf16"
    return training | {"dtypes": dtypes, "learning": _learning(s, top_k)}


def _remat(s: Settings) -> Any:
    policy = s.choice("remat_policy", ("full", "none", "custom", *POLICIES), "full")
    if policy != "custom":
        for name in TENSORS:
            s.leave(name, "has no effect without remat_policy=custom")
        return policy if policy in ("full", "none") else {"save": list(POLICIES[policy])}
    places = {name: s.choice(name, ("remat", "device", "offload"), "remat") for name in TENSORS}
    save = [n for n in TENSORS if places[n] == "device"]
    offload = [n for n in TENSORS if places[n] == "offload"]
    return {"save": save, "offload": offload} if save or offload else "full"


def _learning(s: Settings, top_k: int) -> dict[str, Any]:
    rate = s.number("learning_rate", 3e-5, 0) or 3e-5
    steps = s.count("steps", 150_001, -1) or 1
    until = s.count("learning_rate_schedule_steps", -1, -1) or -1
    until = until if until > 0 else steps
    warm = round((s.number("warmup_steps_fraction", 0.1, 0) or 0.0) * until)
    kind, final = (
        s.choice("lr_schedule_type", ("cosine", "wsd"), "cosine"),
        s.number("learning_rate_final_fraction", 0.1),
    )
    schedule: dict[str, Any] = {"peak": rate, "schedule": "constant", "warmup_steps": max(1, warm)}
    if kind == "cosine" and until > max(1, warm):
        schedule |= {"schedule": "cosine", "decay_steps": until, "final": final}
    elif kind == "wsd":
        s.leave("lr_schedule_type", "a job has constant, rsqrt and cosine; read as constant")
    dropout, on = s.number("dropout_rate", 0.0, 0), s.flag("enable_dropout", True)
    learning: dict[str, Any] = {
        "learning_rate": schedule,
        "beta1": s.number("adam_b1", 0.9, 0),
        "beta2": s.number("adam_b2", 0.95, 0),
        "weight_decay": s.number("adam_weight_decay", 0.1, 0),
        "clip_norm": s.number("gradient_clipping_threshold", 1.0, 0) or None,
        "dropout": dropout if on else 0.0,
        "seed": s.count("init_weights_seed", 0, 0),
    }
    weight, bias = s.number("load_balance_loss_weight", 0.0, 0), s.number("routed_bias_update_rate", 0.0, 0)
    if top_k:
        # MaxText's loss is k at balance, a job's is 1.
        learning["router"] = {"balance_loss": (weight or 0.0) * top_k, "bias_update": bias, "balance_scope": "sequence"}
    return learning
