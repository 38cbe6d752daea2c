"""Runs jobs on several CPU devices in a process of its own, and prints what tests compare as JSON.

The number of devices is fixed when JAX starts, so tests cannot change it: `python tests/trainer_suites.py SUITE` runs
one suite of programs; `trainer_suite` of conftest.py does so once per session.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DEVICES = 8
Mapping = dict[str, Any]


def set_up() -> None:
    """Eight devices, and a compiler that hurries: these programs run once."""
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"


def mesh_case(name: str) -> Mapping:
    """How far each plan's step is from that of one device: the largest differences and what has them."""
    import numpy as np

    from trainer_jobs import CASES, merged
    from trainer_runs import difference, named, one_step

    base, variants = CASES[name]
    params, gradients, metrics = one_step(base)

    def held(change: Mapping) -> Mapping:
        begin = time.perf_counter()
        try:
            _, g, m = one_step(merged(base, change), params)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:1500]}"}
        far = {k: difference(a, b) for (k, a), (_, b) in zip(named(g), named(gradients), strict=True)}
        seen = {k: difference(a, b) for (k, a), (_, b) in zip(named(m), named(metrics), strict=True)}
        return {"gradients": far, "metrics": seen, "seconds": time.perf_counter() - begin}

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(variants, pool.map(held, variants.values()), strict=True))
    layers = [layer for stack in metrics["experts"].values() for layer in stack]
    return {
        "variants": found,
        "still": [k for k, g in named(gradients) if not np.any(g)],
        "loss": float(metrics["loss"]),
        "dropped": float(sum((x["wanted_E"] - x["kept_E"]).sum() for x in layers)),
        "wanted": float(sum(x["wanted_E"].sum() for x in layers)),
    }


def mesh(names: tuple[str, ...]) -> Callable[[], Mapping]:
    """The suite of some cases."""
    return lambda: {name: mesh_case(name) for name in names}


def programs() -> Mapping:
    """What compiled steps do."""
    import trainer_programs

    return trainer_programs.programs()


def steps() -> Mapping:
    """Two whole steps on one device and on eight, optimiser included."""
    from trainer_jobs import DECODER, LATENT, merged, plan

    clip = {"learning": {"clip_norm": 0.01, "learning_rate": {"warmup_steps": 1}}}
    small = {"model": {"decoder": {"layers": 2}}, "training": clip}
    cases = {
        "adamw": (merged(DECODER, small), plan(8, expert=4, shard="parameters", shard_degree=4)),
        "adafactor": (
            merged(merged(LATENT, small), {"training": {"optimizer": "adafactor"}}),
            plan(8, tensor=2, expert=4, shard="optimizer", microbatch_sequences=1),
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(steps_case, *case) for name, case in cases.items()}
        return {name: one.result() for name, one in found.items()}


def steps_case(base: Mapping, change: Mapping) -> Mapping:
    """How far two steps and an evaluation under a plan are from those of one device."""
    import jax
    import numpy as np

    from trainer_jobs import merged
    from trainer_runs import difference, named, one_step, two_steps

    params, gradients, _ = one_step(base, step=0)
    alone, first, metrics, seen = two_steps(base, params)
    many, begun, others, also = two_steps(merged(base, change), params)
    moved = {}
    for (k, a), (_, b), (_, w) in zip(named(many), named(alone), named(params), strict=True):
        moved[k] = float(np.abs(a - b).max()) / max(float(np.abs(b - w).max()), 1e-30)
    whole = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    return {
        "norm": difference(others["gradient_norm"], metrics["gradient_norm"]), "moved": moved,
        "evaluation": difference(also, seen), "clip": base["training"]["learning"]["clip_norm"],
        "gradient_norm": [float(x["gradient_norm"]) for x in (first, begun)],
        "norm_by_hand": float(np.sqrt(sum((g**2).sum() for g in whole))),
    }  # fmt: skip


SUITES: dict[str, Callable[[], Mapping]] = {
    "mesh-decoder": mesh(("decoder",)),
    "mesh-others": mesh(
        ("latent", "switch", "st_moe", "lstm", "hierarchy", "expert choice", "dropless", "forced", "oddities")
    ),
    "programs": programs,
    "steps": steps,
}

if __name__ == "__main__":
    set_up()
    chosen = SUITES.get(sys.argv[1]) or mesh((sys.argv[1],))
    sys.stdout.write(json.dumps(chosen()))
