"""Runs jobs on several CPU devices in a process of its own, and prints what tests compare as JSON.

The number of devices is fixed when JAX starts, so tests cannot change it: `python tests/trainer_runs.py SUITE` runs one
suite of programs; `run_suite` of conftest.py does so once per session.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
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


def make_trainer(mapping: Mapping) -> Any:
    """The trainer of a job, on the first devices."""
    import jax

    from hw_profiles.loader import resolve_cluster
    from simulator.job.load import load_job
    from simulator.job.rules import resolve
    from trainer.step import Trainer

    job = load_job(mapping)
    return Trainer.of(job, resolve(job, resolve_cluster(job.cluster)), jax.devices())


def make_batch(trainer: Any, seed: int = 0) -> Mapping:
    """A batch that no two devices see alike: words sorted over the batch, rare ones rarer, documents packed."""
    import jax
    import numpy as np

    draw = np.random.default_rng(seed)
    shapes = trainer.batch_shapes()
    vocab = trainer.job.model.vocab
    out: Mapping = {}
    for prefix in ("", "encoder_"):
        if f"{prefix}tokens_BS" not in shapes:
            continue
        b, s = shapes[f"{prefix}tokens_BS"].shape
        words = np.sort(draw.zipf(1.3, b * s) % vocab).reshape(b, s)
        cut = np.arange(s)[None] >= draw.integers(s // 4, s - 2, b)[:, None]
        segments = 1 + cut
        first = np.where(cut, cut.argmax(1)[:, None], 0)
        out[f"{prefix}tokens_BS"] = words
        out[f"{prefix}segments_BS"] = segments
        out[f"{prefix}positions_BS"] = np.arange(s)[None] - first
        if not prefix:
            out["targets_BS"] = (words * 7 + 3) % vocab
            # The last sequences have fewer targets that count.
            out["weights_BS"] = np.arange(s)[None] < s - 2 * np.arange(b)[:, None]
            out["sequence_B"] = np.arange(b)
    return {k: jax.device_put(v.astype(np.int32), shapes[k].sharding) for k, v in out.items()}


def stirred(path: Any, x: Any) -> Any:
    """An initial value as after some training: routers that prefer, biases that are not zero."""
    import zlib

    import numpy as np

    text = "/".join(str(getattr(k, "key", k)) for k in path)
    draw = np.random.default_rng(zlib.crc32(text.encode()))
    scale = 0.5 if "router" in text else 0.1
    return x + (scale * draw.standard_normal(x.size).reshape(x.shape)).astype(x.dtype)


def start(trainer: Any, reference: Any = None) -> Any:
    """Parameters on their devices: the trainer's own first values stirred, or those of the reference, reshaped."""
    import jax

    shapes = trainer.state_shapes().params
    if reference is None:
        reference = jax.tree_util.tree_map_with_path(stirred, jax.device_get(trainer.init().params))
    return jax.tree.map(lambda x, w: jax.device_put(x.reshape(w.shape), w.sharding), reference, shapes)


def difference(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    import numpy as np

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(float(np.abs(b).max(initial=0)), 1e-30)
    return float(np.abs(a.reshape(b.shape) - b).max(initial=0)) / scale


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths."""
    import jax

    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path), x


def one_step(mapping: Mapping, reference: Any = None) -> tuple[Any, Any, Any]:
    """(parameters, gradients, metrics) of the first step, on the host."""
    import jax
    import jax.numpy as jnp

    trainer = make_trainer(mapping)
    params = start(trainer, reference)
    gradients, metrics = jax.jit(trainer.gradients)(params, make_batch(trainer), jnp.int32(3))
    return jax.device_get((params, gradients, metrics))


def mesh_case(name: str) -> Mapping:
    """How far each plan's step is from that of one device: the largest differences and what has them."""
    from trainer_jobs import CASES, merged

    base, variants = CASES[name]
    params, gradients, metrics = one_step(base)

    def held(change: Mapping) -> Mapping:
        begin = time.perf_counter()
        try:
            _, g, m = one_step(merged(base, change), params)
        except Exception as error:
            if os.environ.get("TRACE"):
                import traceback

                traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error)[:1500]}"}
        far = {k: difference(a, b) for (k, a), (_, b) in zip(named(g), named(gradients), strict=True)}
        seen = {k: difference(a, b) for (k, a), (_, b) in zip(named(m), named(metrics), strict=True)}
        return {"gradients": far, "metrics": seen, "seconds": time.perf_counter() - begin}

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(variants, pool.map(held, variants.values()), strict=True))
    import numpy as np

    layers = [layer for stack in metrics["experts"].values() for layer in stack]
    return {
        "variants": found,
        "still": [k for k, g in named(gradients) if not np.any(g)],
        "loss": float(metrics["loss"]),
        "dropped": float(sum((x["wanted_E"] - x["kept_E"]).sum() for x in layers)),
        "wanted": float(sum(x["wanted_E"].sum() for x in layers)),
    }


SUITES: dict[str, Callable[[], Mapping]] = {}


def mesh(names: tuple[str, ...]) -> Callable[[], Mapping]:
    """The suite of some cases."""
    return lambda: {name: mesh_case(name) for name in names}


SUITES["mesh-decoder"] = mesh(("decoder",))
SUITES["mesh-others"] = mesh(("latent", "switch", "st_moe", "lstm", "hierarchy", "expert choice", "oddities"))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside of it, once each."""
    from jax.extend.core import jaxprs_in_params

    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def precisions() -> Mapping:
    """Formats of operands and results of the router's and the experts' products, and of what is sent, in bf16."""
    import jax
    import jax.numpy as jnp
    from trainer_jobs import DECODER, merged, plan

    trainer = make_trainer(merged(merged(DECODER, plan(8, expert=8)), {"training": {"precision": "bf16"}}))
    shapes = (trainer.state_shapes().params, trainer.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32))
    out: Mapping = {"router": [], "experts": [], "all_to_all": []}
    for eqn in equations(jax.make_jaxpr(trainer.gradients)(*shapes).jaxpr):
        scope = str(eqn.source_info.name_stack)
        if eqn.primitive.name == "dot_general":
            formats = [str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)]
            if "moe.router" in scope:
                out["router"].append(formats)
            if "moe.experts" in scope:
                out["experts"].append(formats)
        elif eqn.primitive.name == "all_to_all":
            out["all_to_all"].append(str(eqn.invars[0].aval.dtype))
    return out


def compiled(mapping: Mapping) -> tuple[Any, Any]:
    """(trainer, what the compiled gradients of its step execute)."""
    import jax
    import jax.numpy as jnp

    from trainer.hlo import read_program

    trainer = make_trainer(mapping)
    shapes = (trainer.state_shapes().params, trainer.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32))
    return trainer, read_program(jax.jit(trainer.gradients).lower(*shapes).compile(), "cpu")


def by_phase(program: Any, kind: str) -> dict[str, int]:
    """How often collectives of a kind run, by phase."""
    out: dict[str, int] = {}
    for one in program.collectives:
        if one.kind == kind:
            out[one.phase] = out.get(one.phase, 0) + one.count
    return out


def audit(remat: Any) -> Mapping:
    """All-to-alls of three layers, and the figures from which their size follows."""
    from trainer_jobs import DECODER, merged, plan

    change = {"training": {"precision": "bf16", "remat": remat}, "model": {"decoder": {"layers": 3}}}
    _, program = compiled(merged(merged(DECODER, plan(8, expert=4)), change))
    sent = [c for c in program.collectives if c.kind == "all-to-all"]
    # One sequence of 32 tokens on a device: groups of 8, and 0.75 x 2 x 8 / 8 = 1.5 slots an expert, rounded down.
    return {
        "calls": by_phase(program, "all-to-all"), "bytes": [c.bytes for c in sent], "layers": 3,
        "E": 8, "G": 4, "C": 1, "D": 32, "width": 2,
    }  # fmt: skip


def remats() -> Mapping:
    """Loss, gradients and FLOPs of a decoder under each policy, beside the FLOPs that the policy should add."""
    import numpy as np
    from trainer_jobs import DECODER, merged

    small = merged(DECODER, {"model": {"decoder": {"layers": 2}}, "batch": {"sequences": 2}})
    tokens, d, f, heads, length, layers, slots = 64, 32, 32, 4, 32, 2, 64 // 8 * 8
    scores = 2 * tokens * length * heads * 8
    projections = 2 * tokens * d * (32 + 16 + 16 + 32)
    experts, router = 3 * 2 * slots * d * f, 2 * tokens * d * 8
    added = {
        "none": 0,
        # The weighted sum of values is named like the scores; both are made again.
        "selective": 2 * scores,
        # The last product is not needed: what came back of it was kept.
        "recompute": experts * 2 // 3,
        "save": 2 * scores + projections + router,
        "full": 2 * scores + projections + experts + router,
    }
    policies = {
        "none": "none", "selective": "selective", "full": "full", "save": {"save": ["experts"]},
        "recompute": {"recompute": ["experts", "expert_activation"]},
    }  # fmt: skip
    out: Mapping = {}
    plain = None
    for name, remat in policies.items():
        mapping = merged(small, {"training": {"remat": remat}})
        _, gradients, metrics = one_step(mapping)
        plain = gradients if plain is None else plain
        far = [difference(a, b) for (_, a), (_, b) in zip(named(gradients), named(plain), strict=True)]
        out[name] = {
            "difference": max(far), "loss": float(np.asarray(metrics["loss"])), "expected": layers * added[name],
            "flops": compiled(mapping)[1].flops.total,
        }  # fmt: skip
    return out


def fsdp() -> Mapping:
    """How often FSDP gathers, and in what format it sums gradients, as the program is before XLA:CPU widens it."""
    import re

    import jax
    import jax.numpy as jnp
    from trainer_jobs import DECODER, merged, plan

    job = merged(merged(DECODER, plan(8, expert=2, shard="parameters")), {"training": {"precision": "bf16"}})
    _, program = compiled(job)

    def reduced(mapping: Mapping) -> list[str]:
        trainer = make_trainer(mapping)
        shapes = (trainer.state_shapes().params, trainer.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32))
        text = jax.jit(trainer.gradients).lower(*shapes).as_text()
        found = re.findall(r"stablehlo.reduce_scatter.*?-> tensor<[\dx]*x(\w+)>", text, re.DOTALL)
        # Routers are in float32, whatever the job says.
        return sorted(set(found), key=found.count)[-1:]

    fp32 = merged(job, {"training": {"dtypes": {"gradient_reduction": "fp32"}}})
    return {
        "gathers": by_phase(program, "all-gather"), "outside": 3, "reduced": reduced(job), "reduced_fp32": reduced(fp32)
    }  # fmt: skip


def programs() -> Mapping:
    """What compiled steps do."""
    cases = {"none": "none", "full": "full", "dispatch": {"save": ["dispatch"]}}
    with ThreadPoolExecutor(2) as pool:
        later = {name: pool.submit(audit, remat) for name, remat in cases.items()}
        others = {"remat": pool.submit(remats), "jaxpr": pool.submit(precisions), "fsdp": pool.submit(fsdp)}
        found = {name: one.result() for name, one in others.items()}
        return {**found, "audit": {name: one.result() for name, one in later.items()}}


SUITES["programs"] = programs


def two_steps(mapping: Mapping, reference: Any) -> tuple[Any, Any, float]:
    """(parameters after two steps, the second one's metrics, the loss of the evaluation), on the host."""
    import jax

    from trainer.step import State

    trainer = make_trainer(mapping)
    params = start(trainer, reference)
    evaluated = trainer.evaluate(params, make_batch(trainer))
    seen = float(evaluated["loss"]) + sum(float(x) for x in evaluated["router"].values())
    shapes = trainer.state_shapes()
    optimizer = jax.jit(trainer.optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes.optimizer))
    step = jax.device_put(np_zero(), shapes.step.sharding)
    state = State(step, params, optimizer(params))
    for seed in range(2):
        state, metrics = trainer.step(state, make_batch(trainer, seed))
    return jax.device_get(state.params), jax.device_get(metrics), seen


def np_zero() -> Any:
    """The number of the first step."""
    import numpy as np

    return np.zeros((), np.int32)


def steps() -> Mapping:
    """Two whole steps on one device and on eight, optimiser included."""
    import jax
    import numpy as np
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
    out: Mapping = {}
    for name, (base, change) in cases.items():
        params, gradients, _ = one_step(merged(base, plan(1)))
        alone, metrics, seen = two_steps(base, params)
        many, others, also = two_steps(merged(base, change), params)
        del gradients
        moved = {}
        for (k, a), (_, b), (_, w) in zip(named(many), named(alone), named(params), strict=True):
            moved[k] = float(np.abs(a - b).max()) / max(float(np.abs(b - w).max()), 1e-30)
        out[name] = {
            "norm": difference(others["gradient_norm"], metrics["gradient_norm"]), "moved": moved,
            "evaluation": difference(also, seen), "clip": 0.01,
        }  # fmt: skip
        trainer = make_trainer(merged(base, change))
        sharded, _ = jax.jit(trainer.gradients)(start(trainer, params), make_batch(trainer), np_zero())
        import optax

        norm = float(jax.jit(optax.tree.norm)(sharded))
        whole = [np.asarray(g, np.float64) for g in jax.tree.leaves(jax.device_get(sharded))]
        out[name] |= {"gradient_norm": norm, "norm_by_hand": float(np.sqrt(sum((g**2).sum() for g in whole)))}
    return out


SUITES["steps"] = steps

if __name__ == "__main__":
    set_up()
    chosen = SUITES.get(sys.argv[1]) or mesh((sys.argv[1],))
    sys.stdout.write(json.dumps(chosen()))
