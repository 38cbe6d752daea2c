"""Random valid jobs as mappings, over chips, models, plans and training choices, and their answers."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from hw_profiles import resolve_cluster
from simulator.analysis.forecast import forecast
from simulator.job.load import job_from_mapping, load_job
from simulator.results.forecast import Forecast

Data = dict[str, Any]

CLUSTERS: tuple[Data, ...] = (
    {"chip": "tpu-v3", "slice": "4x4"},
    {"chip": "tpu-v4", "slice": "4x4x4", "slices": 2},
    {"chip": "tpu-v5e", "slice": "4x4"},
    {"chip": "tpu-v5p", "slice": "2x2x4"},
    {"chip": "tpu-v6e", "slice": "16x16"},
    {"chip": "tpu7x", "slice": "4x4x4"},
    {"chip": "v100", "nodes": 2},
    {"chip": "a100-80", "nodes": 8},
    {"chip": "h100-sxm", "nodes": 1},
    {"chip": "h100-sxm", "nodes": 16},
    {"chip": "h800", "nodes": 4, "oversubscription": 2.0},
    {"chip": "mi300x", "nodes": 2},
    {"chip": "b200", "nodes": 4, "chips_per_node": 4},
    {"chip": "gb200", "racks": 2, "devices_per_domain": 64},
    {"chip": "gb200", "racks": 1},
    {"chip": "cpu-host", "devices": 8},
)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe")
REMATS = ("none", "full", "selective", {"recompute": ["norms", "moe_act"]}, {"save": ["qkv", "mlp"]},
          {"offload": ["layer_input"], "recompute": ["core_attention", "ffn_activation"]})  # fmt: skip
PRECISIONS = ("fp32", "bf16", "selective-bf16", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4", "int8")
STACKS = ("generic", "moecast", "t5x", "mesh-tensorflow", "maxtext", "megatron", "torchtitan")
PRESETS = ("mixtral-8x7b", "deepseek-v3-4l", "gpt-oss-20b", "qwen3-30b-a3b", "llama3-8b", "switch-base-128", "t5-base",
           "gemma4-26b-a4b", "moe-256-h")  # fmt: skip


def two_to(draw: st.DrawFn, most: int) -> int:
    """A power of two that divides the power of two `most`."""
    return 2 ** draw(st.integers(0, most.bit_length() - 1))


def some(draw: st.DrawFn, **choices: Any) -> Data:
    """Some of the entries, each with a value drawn from its list."""
    return {key: draw(st.sampled_from(values)) for key, values in choices.items() if draw(st.booleans())}


def draw_moe(draw: st.DrawFn, layers: int) -> Data:
    """An MoE layer: plain, with shared experts, in two levels or in groups; in all or some of the layers."""
    experts = 2 ** draw(st.integers(1, 6))
    moe: Data = {
        "experts": experts,
        "top_k": two_to(draw, min(experts, 8)),
        "expert": {"hidden": 512, "activation": draw(st.sampled_from(["relu", "swiglu"]))},
    }
    kind = draw(st.sampled_from(["plain", "shared", "hierarchy", "groups"]))
    if kind == "shared":
        moe |= {"shared_experts": 2, "shared_hidden": 1024, "shared_gate": draw(st.booleans())}
    elif kind == "hierarchy":
        branches = two_to(draw, experts)
        first = two_to(draw, min(moe["top_k"], branches))
        # A branch has experts / branches to choose from.
        moe["top_k"] = first * min(moe["top_k"] // first, experts // branches)
        moe["hierarchy"] = {"branches": branches, "top_k": first}
    elif kind == "groups":
        groups = two_to(draw, experts)
        kept = two_to(draw, groups)
        moe["top_k"] = min(moe["top_k"], kept * experts // groups)
        moe["router"] = {"kind": "sigmoid", "bias": True, "groups": groups, "top_groups": kept}
    where = draw(st.sampled_from(["all", "every", "first_dense", "layers", "dense_ffn"]))
    if where == "every":
        moe |= {"every": 2, "offset": 1}
    elif where == "first_dense":
        moe["first_dense"] = draw(st.integers(0, layers))
    elif where == "layers":
        moe["layers"] = draw(st.lists(st.integers(0, layers - 1), max_size=layers, unique=True))
    elif where == "dense_ffn":
        moe["dense_ffn"] = True
    return moe


def draw_stack(draw: st.DrawFn, *, lstm: bool, dense: bool) -> Data:
    """An encoder or decoder; `dense` has no experts."""
    layers = draw(st.integers(1, 9))
    stack: Data = {"layers": layers, "ffn": {"hidden": 2048, "activation": draw(st.sampled_from(["gelu", "geglu"]))}}
    if lstm:
        stack |= {"lstm": {"cells": 512} | some(draw, projection=[256])}
    else:
        heads = 2 ** draw(st.integers(2, 4))
        attention: Data = {"heads": heads, "kv_heads": two_to(draw, heads), "head_dim": 64}
        attention |= some(draw, sinks=[True], qk_norm=[True], qkv_bias=[True])
        if draw(st.booleans()):
            attention["kv_heads"] = heads
            attention["mla"] = {"kv_lora_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_dim": 64}
            attention["mla"] |= some(draw, q_lora_rank=[256])
        elif draw(st.booleans()):
            stack |= {"variants": {"near": {"window": 128}}, "attention_pattern": ["near", "base"]}
        stack["attention"] = attention
    if not dense:
        stack["moe"] = draw_moe(draw, layers)
    return stack


def draw_model(draw: st.DrawFn) -> Any:
    """A preset's name, or a model as a mapping."""
    kind = draw(st.sampled_from(["decoder", "decoder", "encoder-decoder", "lstm", "preset"]))
    if kind == "preset":
        return draw(st.sampled_from(PRESETS))
    dense = draw(st.integers(0, 3)) == 0
    model: Data = {"hidden": 1024, "vocab": 32768, "decoder": draw_stack(draw, lstm=kind == "lstm", dense=dense)}
    model |= some(draw, tied_embeddings=[True], norm=["layernorm", "none"], post_norms=[True], sampled_softmax=[8192])
    if kind == "encoder-decoder":
        model["encoder"] = draw_stack(draw, lstm=False, dense=draw(st.booleans()))
        if "moe" in model["decoder"] and "moe" in model["encoder"]:
            model["encoder"]["moe"]["experts"] = model["decoder"]["moe"]["experts"]
            model["encoder"]["moe"] = {k: v for k, v in model["encoder"]["moe"].items() if k in ("experts", "expert")}
            model["encoder"]["moe"]["top_k"] = 1
    elif kind == "decoder" and draw(st.booleans()):
        model["mtp_layers"] = 1
    return model


def draw_training(draw: st.DrawFn, *, moe: bool) -> Data:
    """Formats, optimiser, recomputation; with `moe`, capacity, dispatch and routing too."""
    training = some(draw, precision=PRECISIONS, optimizer=["adamw", "adam", "adafactor", "sgd"], remat=REMATS)
    if draw(st.booleans()):
        training["dtypes"] = some(draw, master=["fp32", "bf16"], gradients=["bf16"], second_moment=["bf16", "fp8"])
    if not moe:
        return training
    if draw(st.booleans()):
        training["capacity"] = {
            "factor": draw(st.sampled_from([0.5, 1.0, 1.25, 2.0])),
            "basis": draw(st.sampled_from(["tokens", "assignments"])),
        } | some(draw, group_tokens=[64, 512, 10**6], rounding=["ceil", "round"], minimum=[1, 8])
    layouts = ["one_hot", "slots", "ragged"] if "capacity" in training else ["ragged"]
    training["dispatch"] = some(draw, layout=layouts, transport=["deepep", "hybridep", "fused"])
    training["routing"] = draw(
        st.sampled_from([
            {"model": "even"}, {"model": "chance"}, {"model": "zipf", "exponent": 0.7},
            {"model": "dirichlet", "concentration": 2.0},
        ])
    )  # fmt: skip
    return training


def draw_plan(draw: st.DrawFn, model: Any, devices: int) -> tuple[Data, int]:
    """A plan that fits, and how many sequences the batch needs at least."""
    job = job_from_mapping({"model": model, "cluster": "cpu-8", "batch": {"sequences": 1, "length": 1}})
    layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
    twos = devices & -devices
    tensor = context = pipeline = 1
    if job.model.family != "lstm":
        tensor = two_to(draw, min(twos, 4))
        context = two_to(draw, min(twos // tensor, 2))
        pipeline = draw(
            st.sampled_from(
                [p for p in (1, 1, 2, 3, 4, 8) if devices // tensor // context % p == 0 and p <= layers + 2]
            )
        )
    inner = devices // pipeline
    plan: Data = {"tensor": tensor, "context": context, "pipeline": pipeline} | some(
        draw, sequence_parallel=[True], shard=["optimizer", "gradients", "parameters"]
    )
    data = inner // tensor // context
    if moes := job.model.moes:
        experts = math.gcd(*(m.experts for m in moes))
        plan["expert"] = two_to(draw, min(experts & -experts, inner & -inner))
        plan["expert_tensor"] = two_to(draw, min(4, (inner // plan["expert"]) & -(inner // plan["expert"])))
    if "shard" in plan and draw(st.booleans()):
        plan["shard_degree"] = two_to(draw, (data * context) & -(data * context))
    if draw(st.booleans()):
        order = draw(st.permutations(["tensor", "context", "data"]))
        # Experts lie over these three, which have to be neighbours.
        at = draw(st.sampled_from((0, 3) if moes else (0, 1, 2, 3)))
        plan["placement"] = {"order": [*order[:at], "pipeline", *order[at:]]}
    microbatches = draw(st.integers(1, 6))
    schedule = draw(st.sampled_from(SCHEDULES))
    if pipeline > 1:
        if schedule == "interleaved" and 2 * pipeline <= layers + 2:
            plan["virtual_stages"] = 2
            microbatches *= pipeline
        if schedule == "dualpipe":
            microbatches = 2 * (pipeline + microbatches)
            schedule = schedule if pipeline % 2 == 0 else "1f1b"
    plan["schedule"] = schedule
    plan["microbatch_sequences"] = draw(st.sampled_from([1, 2, 4]))
    return plan, data * microbatches * plan["microbatch_sequences"]


@st.composite
def jobs(draw: st.DrawFn, moe: bool = False) -> Data:
    """A valid job as a mapping; with `moe`, one with experts."""
    model = draw_model(draw)
    cluster = dict(draw(st.sampled_from(CLUSTERS)))
    plan, sequences = draw_plan(draw, model, resolve_cluster(cluster).devices)
    whole = job_from_mapping({"model": model, "cluster": cluster, "batch": {"sequences": 1, "length": 1}}).model
    assume(whole.moes or not moe)
    length = draw(st.sampled_from([256, 1024, 4096]))
    batch: Data = {"sequences": sequences, "length": length}
    if whole.encoder is not None:
        batch["length"] = {"encoder": length, "decoder": 256}
    elif draw(st.booleans()):
        batch["document_length"] = draw(st.integers(1, length))
    overlap = {key: draw(st.booleans()) for key in ("all_to_all", "gradients", "parameters")}
    return {
        "model": model, "cluster": cluster, "plan": plan, "batch": batch,
        "training": draw_training(draw, moe=bool(whole.moes)),
        "software": {"stack": draw(st.sampled_from(STACKS)), "overlap": overlap},
    }  # fmt: skip


def small(layers: int, experts: int = 0) -> Data:
    """A stack of attention and a dense network, or experts."""
    moe = {"moe": {"experts": experts, "top_k": 1, "expert": {"hidden": 512, "activation": "relu"}}} if experts else {}
    attention = {"heads": 4, "kv_heads": 1, "head_dim": 64}
    return {"layers": layers, "attention": attention, "ffn": {"hidden": 2048, "activation": "gelu"}} | moe


def answer(data: Data) -> Forecast:
    """By the closed form."""
    return forecast(load_job(data), engine="closed-form")
