"""What the compiled programs of small jobs execute: formats, all-to-alls, gathers, work made again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from trainer.hlo import read_program
from trainer_jobs import DECODER, merged, plan
from trainer_runs import Mapping, difference, make_batch, make_trainer, named, start


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside of it, once each."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def shapes_of(trainer: Any) -> tuple[Any, ...]:
    """What a trainer's gradients are functions of."""
    return (trainer.state_shapes().params, trainer.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32))


def precisions() -> Mapping:
    """Formats of operands and results of the router's and the experts' products, and of what is sent, in bf16."""
    trainer = make_trainer(merged(merged(DECODER, plan(8, expert=8)), {"training": {"precision": "bf16"}}))
    out: Mapping = {"router": [], "experts": [], "all_to_all": []}
    for eqn in equations(jax.make_jaxpr(trainer.gradients)(*shapes_of(trainer)).jaxpr):
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
    """(trainer, the compiled gradients of its step)."""
    trainer = make_trainer(mapping)
    return trainer, jax.jit(trainer.gradients).lower(*shapes_of(trainer)).compile()


def by_phase(program: Any, kind: str) -> dict[str, int]:
    """How often collectives of a kind run, by phase."""
    out: dict[str, int] = {}
    for one in program.collectives:
        if one.kind == kind:
            out[one.phase] = out.get(one.phase, 0) + one.count
    return out


def audit(remat: Any) -> Mapping:
    """All-to-alls of three layers, and the figures from which their size follows.

    In fp32: XLA:CPU would widen bf16. What a device gives to the exchange counts, its own part too.
    """
    change = {"training": {"remat": remat}, "model": {"decoder": {"layers": 3}}}
    program = read_program(compiled(merged(merged(DECODER, plan(8, expert=4)), change))[1], "cpu")
    sent = [(c.phase, c.bytes, c.count) for c in program.collectives if c.kind == "all-to-all"]
    # One sequence of 32 tokens on a device: groups of 8, and 0.75 x 2 x 8 / 8 = 1.5 slots an expert, rounded down.
    return {"sent": sent, "layers": 3, "E": 8, "G": 4, "C": 1, "D": 32, "width": 4}


def remats() -> Mapping:
    """Loss, gradients and FLOPs of a decoder under each policy, beside the FLOPs that the policy should add."""
    small = merged(DECODER, {"model": {"decoder": {"layers": 2}}, "batch": {"sequences": 2}})
    tokens, d, f, heads, length, layers, slots = 64, 32, 32, 4, 32, 2, 64 // 8 * 8
    scores = 2 * tokens * length * heads * 8
    projections = 2 * tokens * d * (32 + 16 + 16 + 32)
    experts, router = 3 * 2 * slots * d * f, 2 * tokens * d * 8
    added = {
        "none": 0,
        # The weighted sum of values is named like the scores; both are made again.
        "selective": 2 * scores,
        # The last product's result is not needed: gates are applied before it.
        "recompute": experts * 2 // 3,
        "save": 2 * scores + projections + router,
        "full": 2 * scores + projections + experts * 2 // 3 + router,
    }
    policies = {
        "none": "none", "selective": "selective", "full": "full", "save": {"save": ["experts"]},
        "recompute": {"recompute": ["experts", "expert_activation"]},
    }  # fmt: skip
    out: Mapping = {}
    plain = None
    for name, remat in policies.items():
        trainer, program = compiled(merged(small, {"training": {"remat": remat}}))
        gradients, metrics = jax.device_get(program(start(trainer), make_batch(trainer), jnp.int32(3)))
        plain = gradients if plain is None else plain
        far = [difference(a, b) for (_, a), (_, b) in zip(named(gradients), named(plain), strict=True)]
        out[name] = {
            "difference": max(far), "loss": float(np.asarray(metrics["loss"])), "expected": layers * added[name],
            "flops": read_program(program, "cpu").flops.total,
        }  # fmt: skip
    return out


def fsdp() -> Mapping:
    """How often FSDP gathers, and in what format it sums gradients, as the program is before XLA:CPU widens it."""
    job = merged(merged(DECODER, plan(8, expert=2, shard="parameters")), {"training": {"precision": "bf16"}})
    program = read_program(compiled(job)[1], "cpu")

    def reduced(mapping: Mapping) -> list[str]:
        trainer = make_trainer(mapping)
        text = jax.jit(trainer.gradients).lower(*shapes_of(trainer)).as_text()
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
