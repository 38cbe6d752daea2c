"""MaxText's command line from a job."""

from __future__ import annotations

from typing import Any

from hw_profiles.cluster import Cluster
from simulator.job.convert.maxtext_import import ACTIVATIONS, POLICIES, WIDTHS
from simulator.job.convert.maxtext_keys import MODELS, TENSORS
from simulator.job.convert.refusal import cannot
from simulator.job.job import REMAT_ALIASES, Job, RematPolicy
from simulator.job.presets import load_preset
from simulator.job.rules import Degrees

Keys = dict[str, Any]
START = "python3 -m maxtext.trainers.pre_train.train src/maxtext/configs/base.yml"
_LONG = {short: long for long, short in WIDTHS.items()}
_TEXTS = {"notes", "source", "published", "name"}


def maxtext_keys(job: Job, degrees: Degrees, cluster: Cluster) -> Keys:
    """Keys and values that differ from base.yml, or that a reader wants to see."""
    keys: Keys = {"run_name": job.name, "hardware": cluster.chip.kind}
    keys |= _model(job)
    keys |= _axes(job, degrees, cluster)
    rank = job.batch.sequences // degrees.data
    steps = 1 if degrees.pipeline > 1 else degrees.microbatches
    keys |= {
        "per_device_batch_size": _short(job.batch.sequences / steps / degrees.devices),
        "gradient_accumulation_steps": steps,
        "max_target_length": job.batch.decoder_length,
        "steps": job.training.run.steps,
    }
    if degrees.pipeline > 1:
        keys |= {
            "num_pipeline_microbatches": rank // degrees.microbatch_sequences,
            "num_layers_per_pipeline_stage": _per_stage(job, degrees),
        }
    keys |= _training(job)
    if job.model.decoder.moe is not None:
        keys |= _experts(job)
    return {name: value for name, value in keys.items() if value is not None}


def command_line(keys: Keys) -> str:
    """The launch line, one key a line."""
    lines = [START]
    for name, value in keys.items():
        if isinstance(value, bool):
            text = str(value).lower()
        else:
            text = "'[" + ",".join(f'"{v}"' for v in value) + "]'" if isinstance(value, list) else str(value)
        lines.append(f"{name}={text or repr('')}")
    return " \\\n  ".join(lines) + "\n"


def _short(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _per_stage(job: Job, degrees: Degrees) -> int:
    number, rest = divmod(job.model.decoder.layers, degrees.pipeline * degrees.virtual_stages)
    if rest:
        cannot(job, "MaxText", "plan.pipeline", f"{job.model.decoder.layers} layers do not divide into its stages")
    return number


def _model(job: Job) -> Keys:
    """`model_name` where MaxText has this very model, else its dimensions."""
    model, decoder = job.model, job.model.decoder
    if model.encoder is not None or decoder.attention is None:
        cannot(job, "MaxText", "model", "only decoders with attention convert")
    dump = model.model_dump(exclude=_TEXTS)
    for name, preset in MODELS.items():
        if load_preset(preset).model_dump(exclude=_TEXTS) == dump:
            return {"model_name": name}
    attention, moe = decoder.attention, decoder.moe
    first = decoder.ffn or (moe.expert if moe else None) or cannot(job, "MaxText", "model.decoder", "has no network")
    words = {activation: words for words, activation in ACTIVATIONS.items()}.get(first.activation)
    if words is None:
        cannot(job, "MaxText", "model.decoder.ffn.activation", f"{first.activation} is not among its mlp_activations")
    mla = attention.mla
    block = "gpt3" if model.norm == "layernorm" else "deepseek" if mla else "mixtral" if moe else "llama2"
    if attention.qk_norm and block in ("mixtral", "llama2"):
        block = "qwen3_moe" if moe else "qwen3"
    keys: Keys = {
        "model_name": "default",
        "decoder_block": block,
        "base_emb_dim": model.hidden,
        "base_num_query_heads": attention.heads,
        "base_num_kv_heads": attention.kv,
        "head_dim": None if mla else attention.head_dim,
        "base_mlp_dim": first.hidden,
        "base_num_decoder_layers": decoder.layers,
        "mlp_activations": list(words),
        "vocab_size": model.vocab,
        "logits_via_embedding": model.tied_embeddings,
        "attention_bias": attention.qkv_bias if block != "gpt3" else None,
        "attention_sink": attention.sinks or None,
        "trainable_position_size": model.position_count if model.positions == "learned" else None,
        "mtp_num_layers": model.mtp_layers or None,
    }
    if mla is not None:
        keys |= {
            "attention_type": "mla", "q_lora_rank": mla.q_lora_rank or 0, "kv_lora_rank": mla.kv_lora_rank,
            "qk_nope_head_dim": mla.nope_dim, "qk_rope_head_dim": mla.rope_dim, "v_head_dim": mla.value_dim,
        }  # fmt: skip
    if moe is not None:
        router = moe.router
        if router.kind not in ("softmax", "sigmoid"):
            cannot(job, "MaxText", "model.decoder.moe.router.kind", f"{router.kind} is no score of its router")
        keys |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "base_moe_mlp_dim": moe.expert.hidden,
            "first_num_dense_layers": moe.first_dense or None,
            "shared_experts": moe.shared_experts or None,
            "routed_score_func": "sigmoid" if router.kind == "sigmoid" else None,
            "routed_bias": router.bias or None,
            "routed_scaling_factor": router.scale if router.scale != 1 else None,
            "n_routing_groups": router.groups if router.groups > 1 else None,
            "topk_routing_group": router.top_groups if router.groups > 1 else None,
        }
    return keys


def _axes(job: Job, degrees: Degrees, cluster: Cluster) -> Keys:
    """Degrees as mesh axes; between slices only copies of the data."""
    shard, expert, context = job.plan.shard, degrees.expert, degrees.context
    rest = degrees.data // expert if degrees.data % expert == 0 else cannot(
        job, "MaxText", "plan.expert", f"its expert axis must divide the {degrees.data} data ranks"
    )  # fmt: skip
    fsdp = 1
    if shard == "parameters":
        # Weights are split over fsdp x context x expert.
        fsdp = min(rest, max(1, degrees.shard // (context * expert)))
        while rest % fsdp:
            fsdp -= 1
    sizes = {
        "data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": degrees.tensor, "expert": expert,
        "pipeline": degrees.pipeline,
    }  # fmt: skip
    between = dict.fromkeys(sizes, 1)
    left = cluster.slices
    for axis in ("data", "pipeline", "fsdp"):
        from math import gcd

        between[axis] = gcd(left, sizes[axis])
        left //= between[axis]
    if left > 1:
        cannot(job, "MaxText", "plan", f"no axis divides over the {cluster.slices} slices")
    keys = {f"ici_{axis}_parallelism": size // between[axis] for axis, size in sizes.items()}
    if cluster.slices > 1:
        keys |= {f"dcn_{axis}_parallelism": n for axis, n in between.items() if n > 1 or axis == "data"}
    return keys | ({"shard_optimizer_over_data": True} if shard == "optimizer" else {})


def _training(job: Job) -> Keys:
    training, dtypes = job.training, job.training.dtypes
    rate, learning = training.learning.learning_rate, training.learning
    quantized = {"int8": "int8", "fp8-tensorwise": "fp8"}.get(training.precision)
    keys: Keys = {
        "dtype": "float32" if training.precision == "fp32" else "bfloat16",
        "quantization": quantized,
        "weight_dtype": _LONG.get(dtypes.parameters or "fp32"),
        "mu_dtype": _LONG.get(dtypes.first_moment or ""),
        "grad_dtype": _LONG.get(dtypes.gradients or ""),
        "opt_type": {"adam": "adam_pax", "sgd": "sgd"}.get(training.optimizer, "adamw"),
    }
    keys |= _remat(training.remat)
    keys["learning_rate"] = rate.peak
    if rate.schedule == "cosine" and rate.decay_steps:
        keys |= {
            "learning_rate_schedule_steps": rate.decay_steps,
            "warmup_steps_fraction": rate.warmup_steps / rate.decay_steps,
            "learning_rate_final_fraction": rate.final,
        }
    keys |= {
        "adam_b1": learning.beta1,
        "adam_b2": learning.beta2,
        "adam_weight_decay": learning.weight_decay,
        "gradient_clipping_threshold": learning.clip_norm or 0.0,
        "dropout_rate": learning.dropout,
        "init_weights_seed": learning.seed,
    }
    return keys


def _remat(remat: Any) -> Keys:
    if remat in ("full", "none"):
        return {"remat_policy": remat}
    if not isinstance(remat, RematPolicy):
        return {"remat_policy": "minimal_with_context"}
    wanted = set(remat.save)
    if not remat.offload:
        for name, tensors in POLICIES.items():
            if name != "minimal_flash" and {own for t in tensors for own in REMAT_ALIASES[t]} == wanted:
                return {"remat_policy": name}
    keys: Keys = {"remat_policy": "custom"}
    for tensor in TENSORS:
        own = set(REMAT_ALIASES[tensor])
        if own <= set(remat.offload):
            keys[tensor] = "offload"
        elif own <= wanted or (remat.recompute and not own & set(remat.recompute)):
            keys[tensor] = "device"
    return keys


def _experts(job: Job) -> Keys:
    moe, training = job.model.decoder.moe, job.training
    assert moe is not None
    keys: Keys = {
        "load_balance_loss_weight": training.learning.router.balance_loss / moe.top_k,
        "routed_bias_update_rate": training.learning.router.bias_update if moe.router.bias else None,
    }
    if training.capacity == "dropless":
        return keys | {"sparse_matmul": True, "megablox": True}
    return keys | {"sparse_matmul": False, "megablox": False, "capacity_factor": training.capacity.factor}
