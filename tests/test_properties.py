"""Laws that hold for every job: random ones over chips, models, plans and training choices, by the closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hw_profiles import load_chip, resolve_cluster
from hw_profiles.overrides import quantities
from job_draws import Data, answer, jobs, small
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job
from simulator.results.forecast import Forecast

# An answer adds up


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


# More of something

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
