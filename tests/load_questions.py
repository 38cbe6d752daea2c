"""A job with experts, asked for the loads on their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hw_profiles.loader import resolve_cluster
from simulator.engine.loads import ExpertLoads, expert_loads
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.job.rules import Degrees, resolve


def question(routing: dict[str, Any], **changes: Any) -> tuple[Job, Degrees, Path]:
    """The job of `loads_of` with `changes` of what is popped here, its degrees, and the folder of its files."""
    layers, mtp = changes.pop("layers", 32), changes.pop("mtp", 0)
    experts, top_k = changes.pop("experts", 64), changes.pop("top_k", 4)
    folder = changes.pop("folder", Path())
    capacity = changes.pop("capacity", "dropless")
    stack = {
        "layers": layers,
        "attention": {"heads": 4, "head_dim": 16},
        "ffn": {"hidden": 64, "activation": "swiglu"},
        "moe": {"experts": experts, "top_k": top_k, "expert": {"hidden": 32, "activation": "swiglu"}}
        | changes.pop("moe", {}),
    }
    plan = {"pipeline": 2, "expert": 16, "microbatch_sequences": 1} | changes.pop("plan", {})
    job = load_job(
        {
            "model": {"hidden": 64, "vocab": 128, "mtp_layers": mtp, "decoder": stack},
            "cluster": {"chip": "h100-sxm", "nodes": 8},
            "plan": plan,
            "batch": {"sequences": 256, "length": changes.pop("length", 1024)},
            "training": {"routing": routing, "capacity": capacity},
        }
    )
    assert not changes
    return job, resolve(job, resolve_cluster(job.cluster)), folder


def loads_of(routing: dict[str, Any], *, seed: int = 0, groups: int = 2, **changes: Any) -> ExpertLoads:
    """32 layers of 64 experts, 4 a token, on 16 ranks; 2 stages, 8 microbatches of 1,024 tokens a rank."""
    job, degrees, folder = question(routing, **changes)
    return expert_loads(job, degrees, groups, seed, folder=folder)
