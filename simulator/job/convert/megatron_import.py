"""A job from Megatron-LM's arguments: plan, batch, training and software; the model is in `megatron_model`."""

from __future__ import annotations

from typing import Any

from simulator.job.convert.megatron_flags import KNOWN, WITHOUT
from simulator.job.convert.megatron_layers import stages
from simulator.job.convert.megatron_model import model_of
from simulator.job.convert.settings import Settings

MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
STRATEGIES = {
    "no_shard": "none", "optim": "optimizer", "optim_grads": "gradients", "optim_grads_params": "parameters"
}  # fmt: skip
RECIPES = {"tensorwise": "fp8-tensorwise", "delayed": "fp8-tensorwise", "blockwise": "fp8-blockwise", "mxfp8": "mxfp8"}
DECAYS = {"constant": "constant", "linear": "constant", "cosine": "cosine", "inverse-square-root": "rsqrt"}


def devices_of(s: Settings) -> int | None:
    """GPUs that the launcher starts, None where the text does not say."""
    per_node, nodes, world = s.count("nproc-per-node"), s.count("nnodes"), s.count("world-size")
    return world or (per_node * (nodes or 1) if per_node else None)


def megatron_job(s: Settings, devices: int) -> dict[str, Any]:
    """The job in the settings without its cluster, which has `devices` GPUs."""
    tensor = s.needed("tensor-model-parallel-size", 1)
    model = model_of(s, tensor)
    layers = model["decoder"]["layers"]
    plan, data = _plan(s, layers, tensor, devices, "moe" in model["decoder"])
    micro = s.needed("micro-batch-size")
    sequences = s.count("global-batch-size", None) or micro * data
    if sequences % (micro * data):
        s.refuse("global-batch-size", f"must be a multiple of --micro-batch-size {micro} x data-parallel ranks {data}")
    plan["microbatch_sequences"] = micro
    length = s.needed("seq-length")
    training = _training(s, model)
    if "moe" in model["decoder"]:
        split = plan["context"] * (tensor if plan["sequence_parallel"] else 1)
        training |= _experts(s, micro * length // split)
    job = {
        "model": model,
        "plan": plan,
        "batch": {"sequences": sequences, "length": length},
        "training": training,
        "software": _software(s),
    }
    s.count("train-samples")
    if s.given("train-iters"):
        training["run"] = {"steps": s.needed("train-iters")}
    for name in s.unread():
        if name in WITHOUT:
            s.leave(name, WITHOUT[name])
        elif name in KNOWN:
            s.leave(name, "has no effect with the other flags")
    return job


def _plan(s: Settings, layers: int, tensor: int, devices: int, moe: bool) -> tuple[dict[str, Any], int]:
    """The plan, and its data-parallel ranks."""
    pipeline = s.needed("pipeline-model-parallel-size", 1)
    context = s.needed("context-parallel-size", 1)
    others = tensor * pipeline * context
    if devices % others:
        rule = f"x pipeline {pipeline} x context {context} must divide the {devices} GPUs"
        s.data.setdefault("tensor-model-parallel-size", tensor)
        s.refuse("tensor-model-parallel-size", rule)
    data = devices // others
    plan: dict[str, Any] = {"data": data, "tensor": tensor, "pipeline": pipeline, "context": context}
    plan["sequence_parallel"] = s.flag("sequence-parallel") and tensor > 1
    if moe:
        plan["expert"] = s.needed("expert-model-parallel-size", 1)
        plan["expert_tensor"] = s.count("expert-tensor-parallel-size") or tensor
    plan |= stages(s, layers, pipeline)
    plan |= _sharding(s, data * context)
    if s.flag("use-tp-pp-dp-mapping"):
        plan["placement"] = {"order": ["tensor", "context", "pipeline", "data"]}
    return plan, data


def _sharding(s: Settings, replicas: int) -> dict[str, Any]:
    strategy = s.choice("data-parallel-sharding-strategy", STRATEGIES, "no_shard")
    own, fsdp, torch = s.flag("use-distributed-optimizer"), s.flag("use-megatron-fsdp"), s.flag("use-torch-fsdp2")
    shard = "parameters" if torch else STRATEGIES[strategy] if fsdp else "optimizer" if own else "none"
    if strategy != "no_shard" and not fsdp:
        s.leave("data-parallel-sharding-strategy", "has no effect without --use-megatron-fsdp")
    copies = s.needed("num-distributed-optimizer-instances", 1)
    if copies == 1 or shard == "none":
        return {"shard": shard}
    if replicas % copies:
        s.refuse("num-distributed-optimizer-instances", f"must divide the {replicas} data x context ranks")
    return {"shard": shard, "shard_degree": replicas // copies}


def _training(s: Settings, model: dict[str, Any]) -> dict[str, Any]:
    optimizer = s.choice("optimizer", ("adam", "sgd"), "adam")
    training: dict[str, Any] = {"optimizer": "adamw" if optimizer == "adam" else "sgd"}
    bf16, fp16 = s.flag("bf16"), s.flag("fp16")
    if bf16 and fp16:
        s.refuse("fp16", "goes not together with --bf16")
    training["precision"] = "bf16" if bf16 or fp16 else "fp32"
    if fp16:
        s.leave("fp16", "a job has no fp16; read as bf16, which has the same bytes and speed")
    recipe, fp8 = s.choice("fp8-recipe", RECIPES, "delayed"), s.given("fp8-format")
    if fp8:
        s.choice("fp8-format", ("e4m3", "hybrid"), "hybrid")
        training["precision"] = RECIPES[recipe]
        if recipe == "delayed":
            s.data["fp8-recipe"] = "delayed"
            s.leave("fp8-recipe", "delayed scaling is read as fp8-tensorwise, whose products cost the same")
    if s.given("fp4-format"):
        if fp8:
            s.refuse("fp4-format", "goes not together with --fp8-format")
        s.choice("fp4-format", ("e2m1",), "e2m1")
        training["precision"] = "nvfp4"
    for name in ("first-last-layers-bf16", "fp8-param-gather"):
        s.leave(name, "a job has one precision for all layers, and gathers weights in 16 bits")
    training["remat"] = _remat(s)
    training["dtypes"] = _dtypes(s)
    learning = _learning(s, "moe" in model["decoder"])
    if learning:
        training["learning"] = learning
    return training


def _remat(s: Settings) -> Any:
    granularity = s.get("recompute-granularity")
    if s.flag("recompute-activations") and granularity is None:
        granularity = "selective"
    modules = s.words("recompute-modules", ("core_attn",))
    if s.flag("moe-layer-recompute"):
        granularity, modules = granularity or "selective", (*(modules if s.given("recompute-modules") else ()), "moe")
    if granularity is None:
        s.leave("recompute-modules", "has no effect without --recompute-granularity selective")
        return "none"
    if granularity == "full":
        method, number = s.get("recompute-method", None), s.count("recompute-num-layers")
        if method == "block" or (number or 1) != 1:
            s.leave("recompute-num-layers", "a job recomputes every layer by itself; read as all layers")
            s.leave("recompute-method", "a job recomputes every layer by itself; read as all layers")
        return "full"
    if granularity != "selective":
        s.refuse("recompute-granularity", "must be full or selective")
    for module in modules:
        if module not in MODULES:
            from hw_profiles.errors import nearest

            s.refuse("recompute-modules", f"{module!r} is not one of {', '.join(MODULES)}{nearest(module, MODULES)}")
    return "selective" if modules == ("core_attn",) else {"recompute": list(modules)}


def _dtypes(s: Settings) -> dict[str, str]:
    found = {}
    if s.flag("grad-reduce-in-bf16"):
        found["gradient_reduction"] = "bf16"
    s.flag("accumulate-allreduce-grads-in-fp32")
    aware = s.flag("use-precision-aware-optimizer")
    for flag, name in (("main-grads-dtype", "gradients"), ("main-params-dtype", "master"),
                       ("exp-avg-dtype", "first_moment"), ("exp-avg-sq-dtype", "second_moment")):  # fmt: skip
        value = s.choice(flag, ("fp32", "fp16", "bf16", "fp8"), "fp32")
        if s.given(flag) and aware:
            found[name] = value
        elif s.given(flag):
            s.leave(flag, "has no effect without --use-precision-aware-optimizer")
    return found


def _learning(s: Settings, moe: bool) -> dict[str, Any]:
    """What only a run reads; a learning rate that is not given stays the job's."""
    learning: dict[str, Any] = {
        "weight_decay": s.number("weight-decay", 0.01, 0),
        "beta1": s.number("adam-beta1", 0.9, 0),
        "beta2": s.number("adam-beta2", 0.999, 0),
        "clip_norm": s.number("clip-grad", 1.0, 0) or None,
        "dropout": s.number("hidden-dropout", 0.1, 0),
        "seed": s.count("seed", 1234, 0),
    }
    if s.number("attention-dropout", 0.1, 0) != learning["dropout"]:
        s.leave("attention-dropout", "a job has one rate of dropout, that of --hidden-dropout")
    lr = s.number("lr", least=0)
    decay, least = s.choice("lr-decay-style", DECAYS, "linear"), s.number("min-lr", 0.0, 0) or 0.0
    warm, until = s.count("lr-warmup-iters", 0, 0), s.count("lr-decay-iters") or s.count("train-iters")
    if lr:
        rate: dict[str, Any] = {"peak": lr, "schedule": DECAYS[decay], "warmup_steps": warm or 1}
        if decay == "cosine" and until:
            rate |= {"decay_steps": until, "final": least / lr}
        elif decay in ("cosine", "linear"):
            rate["schedule"] = "constant"
            s.data.setdefault("lr-decay-style", decay)
            s.leave(
                "lr-decay-style", "a job has constant, rsqrt, and cosine with its number of steps; read as constant"
            )
        learning["learning_rate"] = rate
    if moe:
        learning["router"] = _router(s)
    return learning


def _router(s: Settings) -> dict[str, Any]:
    scopes = {"aux_loss": "group", "seq_aux_loss": "sequence", "global_aux_loss": "batch", "none": "group"}
    kinds = s.words("moe-router-load-balancing-type", ("aux_loss",))
    coefficients = [float(c) for c in s.words("moe-aux-loss-coeff", ("0.0",)) if _is_number(s, c)]
    if len(kinds) != 1 or kinds[0] not in scopes:
        s.refuse("moe-router-load-balancing-type", f"must be one of {', '.join(scopes)}; a job has one such loss")
    return {
        "balance_loss": 0.0 if kinds[0] == "none" else coefficients[0],
        "balance_scope": scopes[kinds[0]],
        "z_loss": s.number("moe-z-loss-coeff", None, 0) or 0.0,
        "jitter": s.number("moe-input-jitter-eps", None, 0) or 0.0,
        "bias_update": s.number("moe-router-bias-update-rate", 1e-3, 0),
    }


def _is_number(s: Settings, text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        s.refuse("moe-aux-loss-coeff", "must be a number of at least 0")


def _experts(s: Settings, tokens: int) -> dict[str, Any]:
    """Capacity over the `tokens` of a microbatch on a rank, dispatch and routing."""
    found: dict[str, Any] = {}
    factor, pad = s.number("moe-expert-capacity-factor", None), s.flag("moe-pad-expert-input-to-capacity")
    if factor is not None and factor > 0:
        # moe_utils.py, get_capacity: the factor times k x tokens / experts, rounded up, without a least number.
        found["capacity"] = {
            "factor": factor, "basis": "assignments", "group_tokens": tokens, "rounding": "ceil", "minimum": 1
        }  # fmt: skip
        found["dispatch"] = {"layout": "slots" if pad else "ragged"}
    kind = s.choice("moe-token-dispatcher-type", ("allgather", "alltoall", "flex"), "allgather")
    backend = s.choice("moe-flex-dispatcher-backend", ("deepep", "hybridep"), "deepep")
    deepep = s.flag("moe-enable-deepep") or s.given("moe-flex-dispatcher-backend")
    if kind == "flex" and deepep:
        found["dispatch"] = found.get("dispatch", {}) | {"transport": backend}
    elif deepep:
        s.leave("moe-enable-deepep", "has no effect without --moe-token-dispatcher-type flex")
    if kind == "allgather" and s.count("expert-model-parallel-size", 1) != 1:
        s.data.setdefault("moe-token-dispatcher-type", kind)
        s.leave("moe-token-dispatcher-type", "a job sends tokens by all-to-all; read as alltoall")
    if not s.flag("moe-grouped-gemm"):
        s.data.setdefault("moe-grouped-gemm", False)
        s.leave("moe-grouped-gemm", "a job's experts are one grouped product; read as if it were given")
    # Random logits: balanced but for chance.
    s.flag("moe-router-force-load-balancing")
    found["routing"] = {"model": "chance"}
    return found


def _software(s: Settings) -> dict[str, Any]:
    software: dict[str, Any] = {
        "stack": "megatron",
        "overlap": {
            "all_to_all": s.flag("overlap-moe-expert-parallel-comm"),
            "gradients": s.flag("overlap-grad-reduce"),
            "parameters": s.flag("overlap-param-gather"),
        },
    }
    kernel = s.choice("attention-backend", ("auto", "flash", "fused", "unfused", "local"), "auto")
    s.flag("use-flash-attn"), s.flag("use-mcore-models")
    if kernel != "auto":
        software["attention"] = "unfused" if kernel in ("unfused", "local") else "fused"
    graphs = s.choice("cuda-graph-impl", ("none", "local", "transformer_engine"), "none")
    if s.flag("enable-cuda-graph") or s.flag("external-cuda-graph") or graphs != "none":
        software["graphs"] = True
    elif s.given("cuda-graph-impl"):
        software["graphs"] = False
    return software
