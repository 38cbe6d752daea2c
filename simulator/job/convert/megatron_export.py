"""Megatron-LM's arguments from a job."""

from __future__ import annotations

from typing import Any

from hw_profiles.cluster import Cluster
from simulator.job.convert.megatron_layers import pattern_of
from simulator.job.convert.refusal import cannot
from simulator.job.job import REMAT_ALIASES, Job, RematPolicy
from simulator.job.rules import Degrees

ACTIVATIONS = {"swiglu": "--swiglu", "relu2": "--squared-relu", "gelu": None}
FORMATS = {
    "fp8-tensorwise": ("hybrid", "tensorwise"), "fp8-blockwise": ("e4m3", "blockwise"), "mxfp8": ("e4m3", "mxfp8")
}  # fmt: skip
SCOPES = {"group": "aux_loss", "sequence": "seq_aux_loss", "batch": "global_aux_loss"}
Flags = dict[str, Any]


def megatron_flags(job: Job, degrees: Degrees) -> Flags:
    """Flags by name in the order of Megatron's own scripts; True is a flag without a value."""
    flags = _model(job, degrees.tensor)
    flags |= _plan(job, degrees)
    flags |= {
        "micro-batch-size": degrees.microbatch_sequences,
        "global-batch-size": job.batch.sequences,
        "seq-length": job.batch.decoder_length,
        "train-iters": job.training.run.steps,
    }
    flags |= _training(job)
    if job.model.decoder.moe is not None:
        flags |= _experts(job, degrees)
    flags |= _software(job)
    return {name: value for name, value in flags.items() if value is not None and value is not False}


def command(flags: Flags, cluster: Cluster) -> str:
    """A launch line with `flags`, one a line."""
    size = min(cluster.chip.chips_per_host, cluster.devices)
    lines = [f"torchrun --nproc-per-node {size} --nnodes {cluster.devices // size} pretrain_gpt.py"]
    for name, value in flags.items():
        text = " ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
        quoted = f'"{text}"' if any(c in text for c in "()|*[] ") and not isinstance(value, list) else text
        lines.append(f"--{name}" if value is True else f"--{name} {quoted}")
    return " \\\n  ".join(lines) + "\n"


def _model(job: Job, tensor: int) -> Flags:
    model, decoder = job.model, job.model.decoder
    if model.encoder is not None or decoder.attention is None:
        cannot(job, "Megatron-LM", "model", "only decoders with attention convert")
    attention = decoder.attention
    networks = [f for f in (decoder.ffn, decoder.moe.expert if decoder.moe else None) if f is not None]
    first = networks[0] if networks else cannot(job, "Megatron-LM", "model.decoder", "has no feed-forward network")
    if first.activation not in ACTIVATIONS:
        cannot(job, "Megatron-LM", "model.decoder.ffn.activation", f"{first.activation} has no flag")
    rope = attention.mla
    flags: Flags = {
        "num-layers": decoder.layers,
        "hidden-size": model.hidden,
        "ffn-hidden-size": decoder.ffn.hidden if decoder.ffn else first.hidden,
        "num-attention-heads": attention.heads,
        "group-query-attention": attention.kv_heads is not None,
        "num-query-groups": attention.kv_heads,
        "kv-channels": None if rope else attention.head_dim,
        "qk-layernorm": attention.qk_norm or rope is not None,
        "softmax-type": "learnable" if attention.sinks else None,
        "window-size": f"{attention.window},0" if attention.window else None,
        "multi-latent-attention": rope is not None,
    }
    if rope is not None:
        flags |= {
            "q-lora-rank": rope.q_lora_rank, "kv-lora-rank": rope.kv_lora_rank, "qk-head-dim": rope.nope_dim,
            "qk-pos-emb-head-dim": rope.rope_dim, "v-head-dim": rope.value_dim,
        }  # fmt: skip
    positions = {"rope": "rope", "learned": "learned_absolute", "relative_bias": "relative", "none": "none"}
    activation = ACTIVATIONS[first.activation]
    flags |= {
        "position-embedding-type": positions[model.positions],
        "max-position-embeddings": max(model.position_count or 0, job.batch.decoder_length),
        "relative-attention-num-buckets": model.relative_buckets if model.positions == "relative_bias" else None,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "disable-bias-linear": not first.bias,
        "add-qkv-bias": attention.qkv_bias and not first.bias,
        "untie-embeddings-and-output-weights": not model.tied_embeddings,
        "mtp-num-layers": model.mtp_layers or None,
    }
    if activation:
        flags[activation[2:]] = True
    return flags | _vocabulary(model.vocab, tensor)


def _vocabulary(vocab: int, tensor: int) -> Flags:
    """A padding that leaves the table as it is."""
    step = 128
    while step > 1 and vocab % (step * tensor):
        step //= 2
    if vocab % (step * tensor):
        return {"vocab-size": vocab, "padded-vocab-size": vocab}
    return {"vocab-size": vocab, "make-vocab-size-divisible-by": step}


def _plan(job: Job, degrees: Degrees) -> Flags:
    plan = job.plan
    flags: Flags = {
        "tensor-model-parallel-size": degrees.tensor,
        "sequence-parallel": plan.sequence_parallel and degrees.tensor > 1,
        "pipeline-model-parallel-size": degrees.pipeline,
        "context-parallel-size": degrees.context,
    }
    if job.model.decoder.moe is not None:
        flags |= {"expert-model-parallel-size": degrees.expert, "expert-tensor-parallel-size": degrees.expert_tensor}
    virtual, layers = degrees.virtual_stages, job.model.decoder.layers
    if degrees.pipeline > 1 and (plan.stages is not None or layers % (degrees.pipeline * virtual)):
        flags["pipeline-model-parallel-layout"] = plan.stages if isinstance(plan.stages, str) else _layout(degrees)
    elif virtual > 1:
        flags["num-virtual-stages-per-pipeline-rank"] = virtual
    if plan.shard == "optimizer":
        flags["use-distributed-optimizer"] = True
    elif plan.shard != "none":
        flags |= {
            "use-megatron-fsdp": True,
            "data-parallel-sharding-strategy": "optim_grads" if plan.shard == "gradients" else "optim_grads_params",
            "ckpt-format": "fsdp_dtensor",
        }
    replicas = degrees.data * degrees.context
    if plan.shard != "none" and degrees.shard != replicas:
        flags["num-distributed-optimizer-instances"] = replicas // degrees.shard
    if plan.placement is not None and plan.placement.order == ("tensor", "context", "pipeline", "data"):
        flags["use-tp-pp-dp-mapping"] = True
    return flags


def _layout(degrees: Degrees) -> str:
    """The layout text of the chunks, in the order of execution."""
    pipeline = degrees.pipeline
    chunks = [degrees.chunks[i % pipeline][i // pipeline] for i in range(pipeline * degrees.virtual_stages)]
    return "|".join("E" * c.embedding + "t" * c.layers + "m" * c.mtp + "L" * c.logits for c in chunks)


def _training(job: Job) -> Flags:
    training, dtypes, learning = job.training, job.training.dtypes, job.training.learning
    flags: Flags = {"bf16": training.precision != "fp32", "optimizer": "sgd" if training.optimizer == "sgd" else "adam"}
    if training.precision in FORMATS:
        flags["fp8-format"], flags["fp8-recipe"] = FORMATS[training.precision]
    if training.precision == "nvfp4":
        flags["fp4-format"] = "e2m1"
    flags |= _remat(training.remat)
    aware = {
        "main-grads-dtype": dtypes.gradients, "main-params-dtype": dtypes.master,
        "exp-avg-dtype": dtypes.first_moment, "exp-avg-sq-dtype": dtypes.second_moment,
    }  # fmt: skip
    allowed = {"main-grads-dtype": ("fp32", "bf16"), "main-params-dtype": ("fp32", "fp16")}
    aware = {n: v for n, v in aware.items() if v is not None and v in allowed.get(n, ("fp32", "fp16", "bf16", "fp8"))}
    if aware:
        flags |= {"use-precision-aware-optimizer": True} | aware
    flags["grad-reduce-in-bf16"] = dtypes.gradient_reduction == "bf16"
    rate = learning.learning_rate
    styles = {"constant": "constant", "rsqrt": "inverse-square-root", "cosine": "cosine"}
    flags |= {
        "lr": rate.peak,
        "lr-decay-style": styles[rate.schedule],
        "lr-warmup-iters": rate.warmup_steps,
        "lr-decay-iters": rate.decay_steps,
        "min-lr": rate.final * rate.peak if rate.schedule == "cosine" else None,
        "weight-decay": learning.weight_decay,
        "adam-beta1": learning.beta1,
        "adam-beta2": learning.beta2,
        "clip-grad": learning.clip_norm or 0.0,
        "hidden-dropout": learning.dropout,
        "attention-dropout": learning.dropout,
        "seed": learning.seed,
    }
    return flags


def _remat(remat: Any) -> Flags:
    if remat == "full":
        return {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    if remat == "selective":
        return {"recompute-granularity": "selective", "recompute-modules": ["core_attn"]}
    if not isinstance(remat, RematPolicy) or not remat.recompute:
        return {}
    wanted = set(remat.recompute)
    modules = {"mla_up_proj": ("mla_up_proj",)} | {
        m: REMAT_ALIASES[m] for m in ("core_attn", "moe", "moe_act", "layernorm", "mlp", "shared_experts")
    }
    found: list[str] = []
    for module, names in sorted(modules.items(), key=lambda item: -len(item[1])):
        if wanted >= set(names):
            found.append(module)
            wanted -= set(names)
    return {"recompute-granularity": "selective", "recompute-modules": found} if found else {}


def _experts(job: Job, degrees: Degrees) -> Flags:
    moe, training = job.model.decoder.moe, job.training
    assert moe is not None
    router, learnt = moe.router, training.learning.router
    if router.kind not in ("softmax", "sigmoid"):
        cannot(job, "Megatron-LM", "model.decoder.moe.router.kind", f"{router.kind} has no flag")
    transport = training.dispatch.transport
    flags: Flags = {
        "num-experts": moe.experts,
        "moe-ffn-hidden-size": moe.expert.hidden,
        "moe-layer-freq": pattern_of([layer.moe is not None for layer in job.model.decoder_layers]),
        "moe-router-topk": moe.top_k,
        "moe-router-score-function": router.kind,
        "moe-router-pre-softmax": router.kind == "softmax" and (moe.top_k == 1 or not router.renormalise),
        "moe-router-enable-expert-bias": router.bias,
        "moe-router-num-groups": router.groups if router.groups > 1 else None,
        "moe-router-group-topk": router.top_groups if router.groups > 1 else None,
        "moe-router-topk-scaling-factor": router.scale if router.scale != 1 else None,
        "moe-shared-expert-intermediate-size": moe.shared_hidden or None,
        "moe-grouped-gemm": True,
        "moe-token-dispatcher-type": "flex" if transport in ("deepep", "hybridep") else "alltoall",
        "moe-enable-deepep": transport == "deepep",
        "moe-flex-dispatcher-backend": "hybridep" if transport == "hybridep" else None,
        "moe-router-force-load-balancing": training.routing.model == "even",
        "moe-router-load-balancing-type": SCOPES[learnt.balance_scope],
        "moe-aux-loss-coeff": learnt.balance_loss,
        "moe-z-loss-coeff": learnt.z_loss or None,
        "moe-input-jitter-eps": learnt.jitter or None,
        "moe-router-bias-update-rate": learnt.bias_update,
    }
    if training.capacity != "dropless":
        flags["moe-expert-capacity-factor"] = training.capacity.factor
        flags["moe-pad-expert-input-to-capacity"] = degrees.layout != "ragged"
    return flags


def _software(job: Job) -> Flags:
    overlap, software = job.software.overlap, job.software
    return {
        "overlap-grad-reduce": overlap.gradients,
        "overlap-param-gather": overlap.gradients and overlap.parameters and job.plan.shard != "none",
        "overlap-moe-expert-parallel-comm": overlap.all_to_all and job.model.decoder.moe is not None,
        "attention-backend": {"fused": "flash", "unfused": "unfused", None: None}[software.attention],
        "cuda-graph-impl": {True: "local", False: "none", None: None}[software.graphs],
    }
