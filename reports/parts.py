"""The parts that step time and memory fall into, with the words people read; order is the order of drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports import units
from simulator.results.forecast import Forecast, Memory, StageMemory

TIME_PARTS: tuple[tuple[str, str, str], ...] = (
    ("compute_s", "compute", "the device computes"),
    ("all_to_all_s", "all-to-all", "tokens travel to and from experts, nothing computes"),
    ("communication_s", "communication", "other collectives and sends, nothing computes"),
    ("host_s", "host", "the device waits for the host's launches"),
    ("imbalance_s", "imbalance", "waiting for a slower rank"),
    ("bubble_s", "bubble", "waiting for the pipeline"),
)
MEMORY_PARTS: tuple[tuple[str, str, bool], ...] = (
    # attribute, words, whether it is counted as "other" in the short form
    ("parameters_bytes", "parameters", False),
    ("gradients_bytes", "gradients", False),
    ("optimizer_bytes", "optimizer state", False),
    ("activations_bytes", "activations", False),
    ("dispatch_bytes", "dispatch buffers", False),
    ("gathered_weights_bytes", "gathered weights", True),
    ("collective_buffers_bytes", "collective buffers", True),
    ("workspace_bytes", "workspace", True),
    ("reserve_bytes", "framework reserve", True),
)


# The order of mesh axes that goes without saying, and what a shard setting is called.
USUAL = ("tensor", "context", "data", "pipeline")
ZERO = {"none": "", "optimizer": "zero1", "gradients": "zero2", "parameters": "fsdp"}


def time_parts(forecast: Forecast) -> list[tuple[str, float]]:
    """(words, seconds) of each part of the step."""
    return [(words, getattr(forecast.parts, name)) for name, words, _ in TIME_PARTS]


def memory_parts(stage: StageMemory) -> list[tuple[str, float]]:
    """(words, bytes) of each part of a stage's memory; they sum to its peak."""
    return [(words, getattr(stage, name)) for name, words, _ in MEMORY_PARTS]


def memory_parts_short(stage: StageMemory) -> list[tuple[str, float]]:
    """As `memory_parts`, with the small ones as `other`."""
    return [
        *((words, getattr(stage, name)) for name, words, other in MEMORY_PARTS if not other),
        ("other", stage.other_bytes),
    ]


def misfit_text(memory: Memory) -> str:
    """What does not fit, where and by how much; empty when all stages fit."""
    stages = [s.stage for s in memory.by_stage if s.peak_bytes > memory.capacity_bytes]
    if not stages:
        return ""
    several = len(memory.by_stage) > 1
    where = f"stage {memory.worst.stage} needs" if several else "needs"
    more = f"; {len(stages)} of {len(memory.by_stage)} stages too large" if several else ""
    share = units.percent(units.share(memory.peak_bytes, memory.capacity_bytes))
    return f"DOES NOT FIT: {where} {units.memory_of(memory.peak_bytes, memory.capacity_bytes)} ({share}){more}"


def routes(forecast: Forecast) -> bool:
    """Whether the job has experts to route to."""
    return forecast.routing.model not in ("", "none")


def devices(number: int) -> str:
    """1 device, 2,048 devices."""
    return f"{number:,} device" if number == 1 else f"{number:,} devices"


def unique_names(forecasts: Sequence[Forecast]) -> list[str]:
    """The job names in order, repeated ones numbered, so that each bar and row has its own."""
    out: list[str] = []
    for forecast in forecasts:
        name, n = forecast.job.name, 1
        while name in out:
            n += 1
            name = f"{forecast.job.name} ({n})"
        out.append(name)
    return out


def signed_percent(fraction: float) -> str:
    """A difference: +1.4 %, -0.02 %."""
    said = units.percent(abs(fraction))
    if said == units.percent(0.0) or said.startswith("<"):
        return said
    return f"{'+' if fraction > 0 else '-'}{said}"


def words(value: object) -> str:
    """A plan's or job's value as text: yes/no, lists with commas, mappings as `key value`."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(words(v) for v in value) or "none"
    return str(value)


def plan_line(plan: Mapping[str, Any]) -> str:
    """The plan in one line, without what is off, 1 or left to its default."""
    alone = plan.get("pipeline", 1) == 1
    hidden = ("schedule", "virtual_stages", "layers_per_stage") if alone else ()
    said = [
        (k, v)
        for k, v in plan.items()
        if k not in hidden and v is not None and v is not False and v != 1 and v != "none"
    ]
    text = ", ".join(k.replace("_", " ") if v is True else f"{k.replace('_', ' ')} {words(v)}" for k, v in said)
    return text or "no parallelism"


def plan_value(what: Any) -> str:
    """A field's value in a word; an order of axes by their initials."""
    if isinstance(what, (tuple, list)):
        return ",".join(str(w)[0] for w in what)
    if what is None:
        return "default"
    return {True: "on", False: "off"}[what] if isinstance(what, bool) else str(what)


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan in one line: T tensor, C context, P pipeline x virtual, E expert x its tensor, b sequences, and names."""
    p = {name.rpartition(".")[2]: what for name, what in plan.items()}
    virtual = f"x{p['virtual_stages']}" if p["virtual_stages"] > 1 else ""
    sliced = f"x{p['expert_tensor']}" if p["expert_tensor"] > 1 else ""
    parts = [f"T{p['tensor']}"]
    parts += [f"C{p['context']}"] * (p["context"] > 1)
    parts += [f"P{p['pipeline']}{virtual}"]
    parts += [f"E{p['expert']}{sliced}"] * (p["expert"] * p["expert_tensor"] > 1)
    parts += [f"b{p['microbatch_sequences'] or 'default'}"]
    parts += [p["schedule"]] * (p["pipeline"] > 1)
    parts += [ZERO[p["shard"]] + (f"/{p['shard_degree']}" if p["shard_degree"] else "")]
    parts += ["sp"] * bool(p["sequence_parallel"])
    parts += [f"remat-{p['remat']}"] * (p["remat"] != "none")
    parts += [plan_value(p["order"])] * (tuple(p["order"]) != USUAL)
    return " ".join(part for part in parts if part)
