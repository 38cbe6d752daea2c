"""Random plans of several jobs for the tests of the planner, and their scalar answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.planner.table import CHOICES, FIELDS, NUMBERS, Column, row, with_plan

SMALL = {"sequences": 64, "length": 2048}
JOBS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "model": "deepseek-v3-mtp", "cluster": "h800-2048", "batch": {"sequences": 15360, "length": 4096},
        "training": {"precision": "fp8-blockwise", "dispatch": {"transport": "deepep"}},
        "software": {"stack": "megatron", "overlap": {"all_to_all": True}},
    },
    "mixtral-gpu": {"model": "mixtral-8x7b", "cluster": "h100-64", "batch": SMALL},
    "mixtral-tpu": {
        "model": "mixtral-8x7b", "cluster": {"chip": "tpu-v5p", "slice": "4x4x4"}, "batch": SMALL,
        "training": {"capacity": {"factor": 1.25, "basis": "assignments", "group_tokens": 4096}},
        "software": {"stack": "maxtext"},
    },
    "gpt3": {"model": "gpt3-175b", "cluster": "h100-256", "batch": {"sequences": 1536, "length": 2048}},
    "switch-v3": {
        "model": "switch-base-128", "cluster": "tpu-v3-32",
        "batch": {"sequences": 256, "length": {"encoder": 512, "decoder": 128}},
        "training": {
            "optimizer": "adafactor", "capacity": {"factor": 1.25, "basis": "tokens", "group_tokens": 2048},
            "routing": {"model": "even"},
        },
        "software": {"stack": "t5x"},
    },
    "qwen3-own": {
        "model": "qwen3-30b-a3b", "cluster": {"chip": "tpu-v6e", "slice": "8x8"}, "batch": SMALL,
        "software": {"stack": "moecast"},
    },
    "mixtral-zipf": {
        "model": "mixtral-8x7b", "cluster": {"chip": "h100-sxm", "nodes": 4}, "batch": SMALL,
        "training": {"routing": {"model": "zipf", "exponent": 0.6}},
    },
    "own-cpu": {
        "model": "switch-base-16", "cluster": "cpu-8",
        "batch": {"sequences": 64, "length": {"encoder": 512, "decoder": 128}}, "software": {"stack": "moecast"},
        "training": {"capacity": {"factor": 1.25, "basis": "tokens", "group_tokens": 2048}},
    },
    "lstm": {
        "model": "moe-32", "cluster": "shazeer-k40-16", "batch": {"sequences": 512, "length": 20},
        "training": {"precision": "fp32", "optimizer": "adam"},
    },
    "olmoe-slices": {
        "model": "olmoe-1b-7b", "cluster": {"chip": "tpu-v4", "slice": "4x4x4", "slices": 2}, "batch": SMALL,
    },
}  # fmt: skip


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def draw_table(job: Job, devices: int, n: int, rng: np.random.Generator) -> dict[str, Column]:
    """`n` random plans, about half of which keep the rules: degrees that multiply to the cluster, flags at will."""
    ways = [d for d in _divisors(devices) if d <= 64]
    columns: dict[str, list[int]] = {field: [] for field in FIELDS}
    experts = max((m.experts for m in job.model.moes), default=1)
    whole = job.model.family == "lstm"
    for _ in range(n):
        tensor = 1 if whole else int(rng.choice([d for d in ways if d <= 16]))
        pipeline = 1 if whole else int(rng.choice([d for d in ways if d <= 16 and devices % (d * tensor) == 0]))
        context = 1 if whole else int(rng.choice([1, 1, 2, 4]))
        data = max(1, devices // (tensor * pipeline * context))
        inner = math.gcd(data * tensor * context, experts)
        per_rank = max(1, job.batch.sequences // data)
        schedule = int(rng.integers(len(CHOICES["plan.schedule"])))
        virtual = int(rng.choice([1, 2, 3])) if CHOICES["plan.schedule"][schedule] == "interleaved" else 1
        expert = int(rng.choice(_divisors(inner)))
        drawn = {
            "plan.tensor": tensor, "plan.pipeline": pipeline, "plan.context": context, "plan.expert": expert,
            "plan.expert_tensor": int(rng.choice([1, 1, 2])) if experts > 1 else 1,
            "plan.shard_degree": int(rng.choice([0, 0, 2, 8])),
            "plan.microbatch_sequences": int(rng.choice([0, *_divisors(per_rank)[:6]])),
            "plan.virtual_stages": virtual, "plan.schedule": schedule,
            "plan.placement.order": int(rng.choice([0, 0, int(rng.integers(24))])),
            "training.remat": int(rng.integers(3)), "training.dispatch.layout": 0,
        }  # fmt: skip
        for field in FIELDS:
            columns[field].append(drawn.get(field, int(rng.integers(len(CHOICES[field]))) if field in CHOICES else 1))
    return {field: np.array(values) for field, values in columns.items()}


def load(name: str) -> tuple[Job, Any]:
    """A job of `JOBS` and its cluster."""
    job = load_job(JOBS[name])
    return job, resolve_cluster(job.cluster)


def scalar_answers(job: Job, cluster: Any, table: dict[str, Column], i: int) -> dict[str, float] | str:
    """The scalar forecast of row `i`; the error's text where it breaks a rule."""
    try:
        answer = forecast_on(with_plan(job, row(table, i)), cluster, "test")
    except QuestionError as error:
        return str(error)
    return {
        "step_time_s": answer.step_time_s,
        "memory_peak_bytes": answer.memory.peak_bytes,
        "mfu": answer.mfu,
        "usd_per_1b_tokens": math.nan if answer.cost.usd_per_1b_tokens is None else answer.cost.usd_per_1b_tokens,
        "fits": float(answer.memory.fits),
    }


__all__ = ["JOBS", "NUMBERS", "draw_table", "load", "scalar_answers"]
