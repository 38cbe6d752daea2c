"""Rows of MaxText programs compiled by XLA:TPU (facts: memory, FLOPs, collectives per device) as jobs.

Columns: id, model, topology (`v5p-128`: TensorCores on v5p, chips on v5e and v6e, devices on 7x), mesh (`fsdp64`,
`fsdp16xtensor4`, `fsdp8xexpert8`), per_device_batch, seq, remat, capacity_factor (-1 is dropless), ring_of_experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.forecast import forecast
from simulator.calibration.questions import Answer, Question
from simulator.job.load import load_job
from simulator.results.forecast import Forecast

# MaxText's `minimal` remat keeps the products of a layer; XLA still makes attention again (facts/aot.md, point 9).
REMAT: dict[str, Any] = {
    "full": "full",
    "none": "none",
    "minimal": {"save": ["qkv", "attention_output", "ffn", "experts"]},
}


def maxtext_job(row: Mapping[str, str]) -> dict[str, Any]:
    """The job of a row; QuestionError with the reason where the job schema cannot express it."""
    if row.get("ring_of_experts") == "True":
        raise QuestionError(f"{row['id']}: ring of experts (all-gathered tokens) is not a transport of the job schema")
    if row["remat"] not in REMAT:
        raise QuestionError(f"{row['id']}: remat {row['remat']!r} is not one of {', '.join(REMAT)}")
    degrees = {name: int(n) for name, n in re.findall(r"(fsdp|tensor|expert|data|context)(\d+)", row["mesh"])}
    if "x".join(f"{name}{n}" for name, n in degrees.items()) != row["mesh"]:
        raise QuestionError(f"{row['id']}: mesh {row['mesh']!r} has an axis that a plan does not")
    expert, tensor, context = degrees.get("expert", 1), degrees.get("tensor", 1), degrees.get("context", 1)
    devices = int(row["n_devices"])
    data = devices // (tensor * context)
    factor = float(row["capacity_factor"] or -1)
    training: dict[str, Any] = {
        "precision": "bf16",
        "optimizer": "adamw",
        "remat": REMAT[row["remat"]],
        "routing": {"model": "even"},
    }
    if factor > 0:
        # MaxText counts capacity per sequence and multiplies assignments; its masks make it a one-hot dispatch. Without
        # a transport of tokens XLA gathers the experts, so the plan has no expert degree (facts/aot.md, point 6).
        training["capacity"] = {"factor": factor, "basis": "assignments", "group_tokens": int(row["seq"]), "minimum": 1}
        training["dispatch"] = {"layout": "one_hot"}
        expert = 1
    plan = {
        "data": data, "tensor": tensor, "context": context, "expert": expert, "expert_tensor": tensor,
        "shard": "parameters",
        "sequence_parallel": tensor > 1, "shard_degree": data * context // degrees.get("data", 1),
    }  # fmt: skip
    return {
        "name": row["id"],
        "model": row["model"],
        "cluster": row["topology"],
        "plan": plan,
        "batch": {"sequences": int(row["per_device_batch"]) * devices, "length": int(row["seq"])},
        "training": training,
        "software": {"stack": "maxtext"},
    }


# The collectives of a row by what they are for. XLA reduces gradients by all-reduces or by reduce-scatters, as it sees
# fit (facts/aot.md, point 4): what goes in is compared, of both kinds together.
BYTES = {
    "all_gather_bytes": (("all_gather",), ("all_gather_result_bytes",)),
    "reduced_bytes": (("all_reduce", "reduce_scatter"), ("all_reduce_operand_bytes", "reduce_scatter_operand_bytes")),
    "all_to_all_bytes": (("all_to_all",), ("all_to_all_operand_bytes",)),
}


def maxtext_questions(row: Mapping[str, str]) -> list[Question | QuestionError]:
    """The quantities that the compiler states of a row's program, or why one of them has no question.

    QuestionError where the row is no job. The baselines multiply: peak and arguments, the arguments as forecast; FLOPs,
    the model's; bytes, the parameters in 16 bits.
    """
    job = load_job(maxtext_job(row))
    chip_name = resolve_cluster(job.cluster).chip.name
    made: dict[tuple[int, str], Forecast] = {}

    def found(chip: Chip | None, engine: str) -> Forecast:
        key = (id(chip), engine)
        if key not in made:
            made[key] = forecast(job, engine=engine, chip=chip)
        return made[key]

    def question(quantity: str, unit: str, measured: float, answer: Any) -> Question:
        return Question(
            row["id"], quantity, unit, chip_name, row["model"], quantity.replace("_", " "), "", measured,
            lambda chip, engine: answer(found(chip, engine)),
        )  # fmt: skip

    def traffic(kinds: tuple[str, ...]) -> Any:
        def of(f: Forecast) -> Answer:
            return Answer(sum(c.bytes for c in f.collectives if c.kind in kinds), 2 * f.job.total_parameters)

        return of

    out: list[Question | QuestionError] = []
    peak = row["hbm_total_bytes"] or row["peak_memory_bytes"]
    if peak:
        out.append(
            question("peak", "bytes", float(peak), lambda f: Answer(f.memory.peak_bytes, f.memory.argument_bytes))
        )
    if row["argument_bytes"]:
        out.append(
            question("arguments", "bytes", float(row["argument_bytes"]), lambda f: Answer(f.memory.argument_bytes))
        )
    if row["flops_executed_balanced"]:
        executed = float(row["flops_executed_balanced"])
        out.append(
            question(
                "executed_flops", "FLOPs", executed,
                lambda f: Answer(f.flops.executed_per_device, f.flops.model_per_step / f.job.devices),
            )
        )  # fmt: skip
    for quantity, (kinds, columns) in BYTES.items():
        stated = [float(row[c]) for c in columns if row[c]]
        if quantity == "all_to_all_bytes" and float(row["ragged_all_to_all_ring_wire_bytes"] or 0):
            out.append(QuestionError("all_to_all_bytes: ragged ones are stated as bytes on a ring's wire"))
        elif stated and sum(stated):
            out.append(question(quantity, "bytes", sum(stated), traffic(kinds)))
    return out
