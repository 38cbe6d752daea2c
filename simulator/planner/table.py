"""Plans in columns: what a plan may vary, and how one row reads as changes to the job.

A table maps field names to arrays of equal length. Degrees and counts are integers; flags and names are codes into
`CHOICES`. A shard degree of 0 means all replicas, a microbatch of 0 sequences the default. What a table does not name
is as in the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError, nearest
from simulator.job.job import Axis, Job, Placement, RematPolicy, Schedule

Column = NDArray[Any]
Table = Mapping[str, Column]

ORDERS = tuple(permutations(get_args(Axis)))
FLAGS = (False, True)
CHOICES: dict[str, tuple[Any, ...]] = {
    "plan.schedule": get_args(Schedule),
    "plan.shard": ("none", "optimizer", "gradients", "parameters"),
    "plan.sequence_parallel": FLAGS,
    "plan.placement.order": ORDERS,
    "training.remat": ("none", "selective", "full", "job"),
    "training.dispatch.transport": ("collective", "deepep", "hybridep", "fused"),
    "training.dispatch.layout": (None, "one_hot", "slots", "ragged"),
    "software.overlap.all_to_all": FLAGS,
    "software.overlap.gradients": FLAGS,
    "software.overlap.parameters": FLAGS,
}  # fmt: skip
NUMBERS = (
    "plan.tensor", "plan.context", "plan.pipeline", "plan.expert", "plan.expert_tensor", "plan.shard_degree",
    "plan.microbatch_sequences", "plan.virtual_stages",
)  # fmt: skip
FIELDS = (*NUMBERS, *CHOICES)


def get(job: Job, field: str) -> Any:
    """The job's own value of a dotted field; None where a section above it is not there."""
    here: Any = job
    for name in field.split("."):
        here = getattr(here, name, None)
    return here


def code(field: str, value: Any) -> int:
    """`value` as a number of its column; QuestionError for what the column cannot hold."""
    if field in NUMBERS:
        return int(value or 0)
    if isinstance(value, RematPolicy):
        value = "job"
    if field == "plan.placement.order":
        value = tuple(value) if value else Placement().order
    if value not in CHOICES[field]:
        known = [str(v) for v in CHOICES[field]]
        raise QuestionError(f"{field} = {value!r:.60}: must be one of {', '.join(known)}{nearest(str(value), known)}")
    return CHOICES[field].index(value)


def value(field: str, number: Any) -> Any:
    """What a number of a column stands for; 0 of what may be left to its default is None."""
    if field in CHOICES:
        return CHOICES[field][int(number)]
    return int(number) or (None if field in ("plan.shard_degree", "plan.microbatch_sequences") else 0)


def filled(job: Job, table: Table) -> dict[str, Column]:
    """`table` with every field: what it does not name is the job's. QuestionError for a name that is no field."""
    for name in table:
        if name not in FIELDS:
            raise QuestionError(f"column {name!r:.60}: no field of a plan{nearest(name, FIELDS)}")
    n = max((len(c) for c in table.values()), default=1)
    out = {}
    for field in FIELDS:
        own = table.get(field)
        out[field] = np.full(n, code(field, get(job, field))) if own is None else np.asarray(own)
        if len(out[field]) != n:
            raise QuestionError(f"column {field}: {len(out[field])} rows; the others have {n}")
    return out


def row(table: Table, i: int) -> dict[str, Any]:
    """Row `i` as values by dotted field."""
    return {field: value(field, column[i]) for field, column in table.items()}


def with_plan(job: Job, plan: Mapping[str, Any]) -> Job:
    """`job` with the fields of `plan` changed; the data degree follows, and a layout of stages that does not fit goes.

    The same job as from `overrides`.
    """
    tree: dict[str, Any] = {}
    for field, what in plan.items():
        if field == "training.remat" and what == "job":
            continue
        *path, last = field.split(".")
        here = tree
        for name in path:
            here = here.setdefault(name, {})
        here[last] = what
    order = tree.get("plan", {}).pop("placement", None)
    plan_changes = {**tree.get("plan", {}), "data": None}
    if order is not None:
        own = job.plan.placement
        same = order["order"] == (own or Placement()).order
        plan_changes["placement"] = own if same else Placement(order=order["order"])
    if not keeps_stages(job, plan_changes.get("pipeline", job.plan.pipeline),
                        plan_changes.get("virtual_stages", job.plan.virtual_stages)):  # fmt: skip
        plan_changes["stages"] = None
    training, software = tree.get("training", {}), tree.get("software", {})
    if "dispatch" in training:
        training = {**training, "dispatch": job.training.dispatch.model_copy(update=training["dispatch"])}
    overlap = job.software.overlap.model_copy(update=software.get("overlap", {}))
    return job.model_copy(
        update={
            "plan": job.plan.model_copy(update=plan_changes),
            "training": job.training.model_copy(update=training),
            "software": job.software.model_copy(update={"overlap": overlap}),
        }
    )


def keeps_stages(job: Job, pipeline: int, virtual: int) -> bool:
    """Whether the job's own layout of stages, if it gives one, has a part for each of these."""
    stages = job.plan.stages
    parts = stages.count("|") + 1 if isinstance(stages, str) else len(stages or ())
    if isinstance(stages, str) and "*" in stages:
        return pipeline * virtual == job.plan.pipeline * job.plan.virtual_stages
    return stages is None or parts == pipeline * virtual


def overrides(job: Job, plan: Mapping[str, Any]) -> list[str]:
    """The texts after `--set` that make `job` this plan; fields that stay are left out."""
    changed = with_plan(job, plan)
    out = []
    for field in ("plan.data", "plan.stages", *FIELDS):
        old, new = get(job, field), get(changed, field)
        if field == "plan.placement.order":
            if new != old:
                out.append(f"{field}=[{', '.join(new)}]" if new else "plan.placement=null")
        elif new != old:
            out.append(f"{field}={_text(new)}")
    return out


def _text(what: Any) -> str:
    if what is None:
        return "null"
    return str(what).lower() if isinstance(what, bool) else str(what)
