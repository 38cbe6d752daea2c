"""Laws that hold for every job: random ones over chips, models, plans and training choices, by the closed form."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hw_profiles import QuestionError, load_chip, resolve_cluster
from hw_profiles.overrides import quantities
from simulator.analysis.forecast import forecast
from simulator.job.job import Capacity
from simulator.job.load import job_from_mapping, load_job
from simulator.job.model import Ffn, Moe
from simulator.results.forecast import Forecast
from simulator.workload.routing import capacity_slots, dirichlet_busiest, expected_maximum, zipf_busiest

ROOT = Path(__file__).parents[1]
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
    return forecast(load_job(data), engine="closed-form")


def numbers(data: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of every number in `data`."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from numbers(value, f"{path}.{i}")
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield path, data


# An all-to-all so short that its line's latency is longer.
@example({
    "model": {"hidden": 1024, "vocab": 32768, "decoder": small(1, experts=2)},
    "cluster": {"chip": "a100-80", "nodes": 8}, "plan": {"expert": 2, "microbatch_sequences": 1},
    "batch": {"sequences": 64, "length": 256}, "training": {"routing": {"model": "chance"}},
})  # fmt: skip
@given(jobs())
def test_every_valid_job_has_a_finite_answer_whose_parts_add_up(data: Data) -> None:
    got = answer(data)
    out = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert not [path for path, value in numbers(out) if not math.isfinite(value) or value < 0]
    assert math.fsum(out["time"]["parts"].values()) == pytest.approx(got.step_time_s, rel=1e-9)
    for stage in got.memory.by_stage:
        assert stage.peak_bytes <= got.memory.peak_bytes
    memory = out["memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "dispatch", "other")
    assert sum(memory[f"{name}_bytes"] for name in parts) == pytest.approx(memory["peak_bytes"], rel=1e-12)
    assert memory["fits"] == (memory["peak_bytes"] <= memory["capacity_bytes"])
    # Dropped tokens count as model FLOPs, so that little capacity may lift MFU, but never HFU, above one.
    assert 0 < got.hfu < 1
    assert 0 < got.mfu < (math.inf if "capacity" in data["training"] else 1)
    low, high = got.step_time_interval_s
    assert low <= got.step_time_s <= high
    devices = resolve_cluster(data["cluster"]).devices
    assert got.tokens_per_s_per_device * devices * got.step_time_s == pytest.approx(got.job.tokens_per_step)
    assert got.sequences_per_s * got.step_time_s == pytest.approx(data["batch"]["sequences"])
    assert 0 <= got.routing.dropped_token_fraction <= 1 <= got.routing.max_over_mean_load
    for c in (got.all_to_all, *got.collectives):
        assert c.exposed_s <= c.time_s * (1 + 1e-9)


@settings(max_examples=20)
@given(jobs())
def test_every_valid_job_has_an_answer_by_events(data: Data) -> None:
    """The same question, the same memory and FLOPs; the clock ticks, so the parts add up to a millionth."""
    job = load_job(data)
    got, formula = forecast(job, engine="events"), answer(data)
    out = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert math.fsum(out["time"]["parts"].values()) == pytest.approx(got.step_time_s, rel=1e-6)
    assert not [path for path, value in numbers(out["time"]) if value < 0]
    assert got.memory == formula.memory and got.flops == formula.flops
    assert got.step_time_interval_s[0] <= got.step_time_s <= got.step_time_interval_s[1]


@given(jobs())
def test_rows_add_up_to_their_totals(data: Data) -> None:
    """Without a pipeline the busiest stage is every stage: ops make up the FLOPs, collectives the all-to-all."""
    data["plan"] |= {"pipeline": 1, "schedule": "1f1b", "virtual_stages": 1}
    devices = resolve_cluster(data["cluster"]).devices
    sequences = devices // data["plan"]["tensor"] // data["plan"]["context"] * data["plan"]["microbatch_sequences"]
    got = answer(data | {"batch": data["batch"] | {"sequences": 2 * sequences}})
    assert sum(op.flops for op in got.ops) == pytest.approx(got.flops.executed_per_device, rel=1e-9)
    assert sum(op.time_s for op in got.ops) <= got.parts.compute_s * (1 + 1e-9)
    exchanges = [c for c in got.collectives if c.kind == "all_to_all"]
    assert sum(c.bytes for c in exchanges) == pytest.approx(got.all_to_all.bytes_per_device, rel=1e-9)
    assert sum(c.time_s for c in exchanges) == pytest.approx(got.all_to_all.time_s, rel=1e-9)
    assert all(c.group_size > 1 and c.count > 0 for c in got.collectives)


@given(jobs())
def test_what_runs_is_what_the_model_needs_and_more(data: Data) -> None:
    """Without dropped tokens, executed FLOPs are model FLOPs plus recomputation and padding."""
    data["training"].pop("capacity", None)
    data["training"].pop("dispatch", None)
    got = answer(data)
    assert got.hfu >= got.mfu * (1 - 1e-9)
    more = answer(data | {"training": data["training"] | {"remat": "full"}})
    less = answer(data | {"training": data["training"] | {"remat": "none"}})
    assert more.flops.model_per_step == less.flops.model_per_step
    assert more.flops.executed_per_device >= got.flops.executed_per_device >= less.flops.executed_per_device


RATES = (
    "memory_bandwidth_gb_per_s", "scale_up.link_gb_per_s", "scale_up.total_gb_per_s", "scale_out.nic_gb_per_s",
    "host_link_gb_per_s", "peak_tflops.fp32", "peak_tflops.fp16", "peak_tflops.bf16", "peak_tflops.fp8",
    "peak_tflops.int8",
)  # fmt: skip


def beside(model: Any, cluster: Data, plan: Data, batch: Data, *overlapped: str) -> Data:
    """A job whose communication runs beside its compute where `overlapped` says so."""
    overlap = {key: key in overlapped for key in ("all_to_all", "gradients", "parameters")}
    return {
        "model": model, "cluster": cluster, "plan": {"microbatch_sequences": 1} | plan, "batch": batch,
        "training": {"routing": {"model": "even"}}, "software": {"overlap": overlap},
    }  # fmt: skip


SHORT = {"sequences": 256, "length": 256}
V5P, V6E = {"chip": "tpu-v5p", "slice": "2x2x4"}, {"chip": "tpu-v6e", "slice": "16x16"}
CASES = (
    # One second of compute hides one second of communication, not one of each kind.
    ("peak_tflops.bf16", beside(
        "qwen3-30b-a3b", V5P, {"shard": "parameters", "expert": 2, "expert_tensor": 2}, SHORT | {"sequences": 16},
        "all_to_all", "parameters",
    )),
    ("peak_tflops.bf16", beside(
        {"hidden": 1024, "vocab": 32768, "decoder": small(4, experts=8)}, V6E, {"expert": 8}, SHORT,
        "all_to_all", "gradients",
    )),
    # Late weight gradients that become shorter do not make a pipeline of few microbatches longer.
    ("memory_bandwidth_gb_per_s", beside(
        "qwen3-30b-a3b", V6E, {"pipeline": 2, "schedule": "zb-h1", "shard": "gradients"}, SHORT, "gradients",
    )),
    # Nor do chunks of unequal compute whose gradients take equally long.
    ("peak_tflops.bf16", beside(
        {"hidden": 1024, "vocab": 32768, "sampled_softmax": 8192, "decoder": small(5), "encoder": small(1, experts=2)},
        {"chip": "a100-80", "nodes": 8},
        {"pipeline": 4, "virtual_stages": 2, "schedule": "interleaved", "shard": "gradients"},
        {"sequences": 64, "length": {"encoder": 256, "decoder": 256}},
    )),
)  # fmt: skip


def slowdown(data: Data, rate: str) -> float:
    """The step with twice the `rate` of the chip over the step as it is."""
    faster = data | {"cluster": data["cluster"] | {"chip": {"name": data["cluster"]["chip"], rate: "*2"}}}
    return answer(faster).step_time_s / answer(data).step_time_s


@pytest.mark.parametrize(("rate", "data"), CASES, ids=["gathers", "gradients", "zb-h1", "interleaved"])
def test_doubling_a_rate_never_slows_a_step_where_work_overlaps(rate: str, data: Data) -> None:
    assert slowdown(data, rate) <= 1 + 1e-12


@given(jobs(), st.sampled_from(RATES))
def test_doubling_a_rate_never_slows_a_step(data: Data, rate: str) -> None:
    assume(rate in dict(quantities(load_chip(data["cluster"]["chip"]))))
    assert slowdown(data, rate) <= 1 + 1e-12


@given(jobs())
def test_more_data_ranks_never_need_more_memory_per_device(data: Data) -> None:
    """Twice the nodes, racks or slices and twice the batch, so that a rank does what it did."""
    key = next(key for key in ("nodes", "racks", "slice", "devices") if key in data["cluster"])
    assume(data["cluster"]["chip"] != "tpu-v3")
    key = "slices" if key == "slice" else key
    more = data | {
        "cluster": data["cluster"] | {key: 2 * data["cluster"].get(key, 1)},
        "batch": data["batch"] | {"sequences": 2 * data["batch"]["sequences"]},
    }

    def held(got: Forecast) -> list[float]:
        return [
            s.parameters_bytes + s.gradients_bytes + s.optimizer_bytes + s.activations_bytes
            for s in got.memory.by_stage
        ]

    assert all(b <= a * (1 + 1e-12) for a, b in zip(held(answer(data)), held(answer(more)), strict=True))


@given(jobs(moe=True), st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]), st.sampled_from([1.0, 1.01, 1.5, 4.0]))
def test_more_capacity_drops_no_more_and_runs_no_less(data: Data, factor: float, times: float) -> None:
    capacity = {"basis": "tokens"} | data["training"].get("capacity", {})
    less, more = (
        answer(data | {"training": data["training"] | {"capacity": capacity | {"factor": f}}})
        for f in (factor, factor * times)
    )
    assert more.routing.dropped_token_fraction <= less.routing.dropped_token_fraction + 1e-12
    assert more.flops.executed_per_device >= less.flops.executed_per_device * (1 - 1e-12)
    assert more.flops.model_per_step == pytest.approx(less.flops.model_per_step, rel=1e-12)


@pytest.mark.parametrize(
    "routing",
    [
        {"model": "even"},
        {"model": "chance"},
        {"model": "zipf", "exponent": 1},
        {"model": "dirichlet", "concentration": 1},
    ],
    ids=lambda routing: routing["model"],
)
def test_what_has_no_slot_is_dropped_however_even_the_router(routing: Data) -> None:
    """Slots for half of the tokens, two experts a token: three of four assignments find none."""
    got = answer({
        "model": "mixtral-8x7b", "cluster": "h100-64", "batch": {"sequences": 64, "length": 4096},
        "training": {"capacity": {"factor": 0.5, "basis": "tokens", "group_tokens": 4096}, "routing": routing},
    })  # fmt: skip
    assert got.routing.dropped_token_fraction >= 0.75 * (1 - 1e-12)


@given(
    st.integers(1, 64), st.integers(1, 8), st.integers(1, 4096), st.floats(0.01, 8), st.floats(1, 4),
    st.sampled_from(["floor", "ceil", "round"]), st.sampled_from(["tokens", "assignments"]),
)  # fmt: skip
def test_slots_grow_with_the_factor_and_drops_shrink(
    experts: int, top_k: int, group: int, factor: float, times: float, rounding: str, basis: str
) -> None:
    moe = moe_of(experts, min(top_k, experts))
    less, more = (
        capacity_slots(Capacity.model_validate({"factor": f, "basis": basis, "rounding": rounding}), moe, group)
        for f in (factor, factor * times)
    )
    assert 1 <= less.per_expert <= more.per_expert <= group
    assert 0 <= more.dropped_fraction <= less.dropped_fraction <= 1
    kept = 1 - less.dropped_fraction
    assert kept * group * moe.top_k <= less.per_expert * experts * (1 + 1e-9)


def moe_of(experts: int, top_k: int) -> Moe:
    return Moe(experts=experts, top_k=top_k, expert=Ffn(hidden=1, activation="relu"))


@settings(max_examples=20)
@given(st.integers(0, 7), st.integers(0, 3), st.floats(0.01, 3), st.floats(0.01, 20))
def test_fewer_and_larger_ranks_are_never_less_even(
    log_experts: int, log_k: int, exponent: float, spread: float
) -> None:
    """A rank's load is the sum over its experts, so it cannot matter how they stand within it."""
    experts = 2**log_experts
    moe = moe_of(experts, min(2**log_k, experts))
    ranks = [2**i for i in range(log_experts + 1)]
    for busiest in (
        [zipf_busiest(moe, r, exponent) for r in ranks],
        [dirichlet_busiest(moe, r, spread) for r in ranks],
    ):
        assert busiest[0] == 1 and busiest == sorted(busiest) and busiest[-1] <= experts / moe.top_k
    weights = sorted(((i + 1) ** -exponent for i in range(experts)), reverse=True)
    assert zipf_busiest(moe, experts, exponent) == pytest.approx(
        min(weights[0] / sum(weights) * experts, experts / moe.top_k)
    )
    assert expected_maximum(1) == 0


@given(jobs(), st.randoms(use_true_random=False))
def test_the_order_of_keys_and_of_listed_layers_changes_nothing(data: Data, random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    other = shuffled(data)
    if isinstance(other["model"], dict) and "layers" in other["model"]["decoder"].get("moe", {}):
        listed = other["model"]["decoder"]["moe"]
        listed["layers"] = listed["layers"][::-1]
    one, two = answer(data).to_dict(), answer(other).to_dict()
    one["job"]["hash"] = two["job"]["hash"]
    assert json.dumps(one) == json.dumps(two)


@given(jobs())
def test_the_same_job_has_the_same_answer_and_hash_however_it_is_written(data: Data) -> None:
    """Byte for byte; from YAML; from the resolved job's own mapping; the name is not part of the question."""
    job = load_job(data)
    text = json.dumps(forecast(job, engine="closed-form").to_dict())
    assert json.dumps(answer(copy.deepcopy(data)).to_dict()) == text
    written = load_job(yaml.safe_load(yaml.safe_dump(data)))
    resolved = load_job(job.model_dump(mode="json"))
    named = load_job(data | {"name": "other"})
    assert job.hash == written.hash == resolved.hash == named.hash and len(job.hash) == 64
    assert resolved == job


def test_the_answer_does_not_depend_on_the_order_of_sets() -> None:
    code = (
        "import json, moecast; job = moecast.load_job('examples/deepseek-v3.yaml');"
        "print(json.dumps(moecast.forecast(job, engine='closed-form').to_dict()))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(answers) == 1


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in `data`, sections included."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    out = copy.deepcopy(data)
    here = out
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return out


BASE: Data = {
    "model": {
        "hidden": 512, "vocab": 1024,
        "decoder": {
            "layers": 4, "attention": {"heads": 8, "kv_heads": 4, "head_dim": 64},
            "ffn": {"hidden": 1024, "activation": "gelu"},
            "moe": {"experts": 8, "top_k": 2, "expert": {"hidden": 512, "activation": "relu"}, "every": 2},
        },
    },
    "cluster": {"chip": {"name": "h100-sxm", "peak_tflops": {"bf16": 900.0}}, "nodes": 1},
    "plan": {
        "data": 2, "tensor": 2, "pipeline": 2, "expert": 2, "shard": "optimizer", "microbatch_sequences": 1,
        "stages": [2, 2], "placement": {"order": ["tensor", "context", "data", "pipeline"]},
    },
    "batch": {"sequences": 8, "length": 256},
    "training": {
        "precision": "bf16", "remat": {"recompute": ["norms"]}, "dtypes": {"master": "fp32"},
        "capacity": {"factor": 1.25, "basis": "tokens", "group_tokens": 64},
        "dispatch": {"layout": "slots"}, "routing": {"model": "zipf", "exponent": 1.0},
    },
    "software": {"stack": "megatron", "overlap": {"all_to_all": True}},
}  # fmt: skip


def test_the_hash_changes_with_every_field() -> None:
    base = load_job(BASE).hash
    seen = {base}
    for changes in (
        "model.hidden=1024", "model.vocab=2048", "model.decoder.layers=5", "model.decoder.attention.head_dim=32",
        "model.decoder.moe.top_k=1", "model.decoder.moe.expert.bias=true", "cluster.nodes=2", "cluster.chip=h800",
        "cluster.chip.peak_tflops.bf16=901", "plan.data=4", "plan.stages=null", "plan.shard=none",
        "plan.placement.order=[context, tensor, data, pipeline]", "batch.sequences=16", "batch.length=128",
        "training.precision=fp32", "training.remat=full", "training.dtypes.master=bf16", "training.capacity=dropless",
        "training.capacity.eval_factor=2", "training.dispatch.transport=deepep", "training.routing.exponent=2",
        "software.stack=maxtext", "software.overlap.all_to_all=false", "software.release='26.02'",
    ):  # fmt: skip
        changed = load_job(BASE, [changes]).hash
        assert changed not in seen, changes
        seen.add(changed)
    assert load_job(BASE, ["name=x", "model.name=y", "model.notes=z", "model.source=w"]).hash == base


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 20), st.sampled_from([10**9, 10**10, -(10**30), 10**400]),
    st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 9), max_size=3), st.just({}),
    st.dictionaries(st.sampled_from(["name", "model", "layers", "factor", "preset"]), st.integers(0, 3), max_size=2),
    st.sampled_from(["full", "dropless", "parameters", "interleaved", "Et|tttL", "t*9", "x2", "../x.yaml", "\0.json"]),
)  # fmt: skip


@settings(max_examples=400)
@given(st.data())
def test_any_field_may_hold_anything(more: st.DataObject) -> None:
    """A job with some of its entries replaced is answered or refused in one line, and nothing else."""
    data: Data = more.draw(st.one_of(st.just(BASE), jobs()))
    for _ in range(more.draw(st.integers(1, 3))):
        data = replaced(data, more.draw(st.sampled_from(list(leaves(data)))), more.draw(ANYTHING))
        if not isinstance(data, dict):
            break
    said = "answered"
    try:
        json.dumps(answer(data).to_dict(), allow_nan=False)
    except QuestionError as error:
        said = str(error)
    assert said and "\n" not in said and len(said) < 2000
