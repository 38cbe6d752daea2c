"""A space of plans: values for every field; the plans are all their combinations that keep the rules.

The default follows from job and cluster; a space file narrows or widens it field by field (docs/planner.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml
from simulator.job.job import Job, Placement
from simulator.job.model import Count, Section
from simulator.planner.flags import BLOCK, CORE, FLAGS, Flags
from simulator.planner.table import CHOICES, FIELDS, Column, code, get

# About an hour at 300,000 plans a second: more is a slip of the pen, not a question.
MOST_PLANS = 1_000_000_000
# Raw rows of degrees that are looked at together; most of them break a rule.
CHUNK = 65_536
MOST_VALUES = 4_096


class PlanSpace(Section):
    """Values of fields of the plan; one value or a list."""

    tensor: Count | tuple[Count, ...] | None = None
    context: Count | tuple[Count, ...] | None = None
    pipeline: Count | tuple[Count, ...] | None = None
    expert: Count | tuple[Count, ...] | None = None
    expert_tensor: Count | tuple[Count, ...] | None = None
    shard_degree: Count | tuple[Count | None, ...] | None = None
    microbatch_sequences: Count | tuple[Count, ...] | None = None
    virtual_stages: Count | tuple[Count, ...] | None = None
    schedule: str | tuple[str, ...] | None = None
    shard: str | tuple[str, ...] | None = None
    sequence_parallel: bool | tuple[bool, ...] | None = None
    placement: tuple[Placement, ...] | None = None


class DispatchSpace(Section):
    """Values of fields of the dispatch."""

    transport: str | tuple[str, ...] | None = None
    layout: str | tuple[str, ...] | None = None


class TrainingSpace(Section):
    """Values of fields of the training; `job` among remat is the job's own mapping."""

    remat: str | tuple[str, ...] | None = None
    dispatch: DispatchSpace = DispatchSpace()


class OverlapSpace(Section):
    """Values of what runs beside compute."""

    all_to_all: bool | tuple[bool, ...] | None = None
    gradients: bool | tuple[bool, ...] | None = None
    parameters: bool | tuple[bool, ...] | None = None


class SoftwareSpace(Section):
    """Values of fields of the software."""

    overlap: OverlapSpace = OverlapSpace()


class SpaceFile(Section):
    """A space as a file gives it; what it leaves out is as in the default space."""

    plan: PlanSpace = PlanSpace()
    training: TrainingSpace = TrainingSpace()
    software: SoftwareSpace = SoftwareSpace()


# Rows in the order of these fields, the first changing slowest: rows near each other walk the same pipelines.
_PIPELINES = ("plan.pipeline", "plan.virtual_stages")
ROW_ORDER = (*_PIPELINES, *(name for name in CORE if name not in _PIPELINES))


@dataclass(frozen=True, slots=True)
class Space:
    """Codes of the values of every field of `table.FIELDS`, in their order; all combinations are the plans."""

    values: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """Combinations, those that break a rule included."""
        return math.prod(len(v) for v in self.values.values())

    def flags(self) -> list[Flags]:
        """Every combination of flags."""
        return [Flags(*(int(c[i]) for c in grid)) for grid in [self._product(FLAGS)] for i in range(len(grid[0]))]

    def places(self) -> list[tuple[int, ...]]:
        """Every combination of what a call's rows share."""
        grid = self._product(BLOCK)
        return [tuple(int(c[i]) for c in grid) for i in range(len(grid[0]))]

    def cores(self, low: int = 0, high: int | None = None) -> Iterator[list[Column]]:
        """Rows of degrees, all or from `low` to `high`, in columns of `CORE`, chunk by chunk: memory stays flat."""
        end = math.prod(len(self.values[name]) for name in CORE) if high is None else high
        for start in range(low, end, CHUNK):
            yield self.rows(np.arange(start, min(end, start + CHUNK)))

    def rows(self, which: Column) -> list[Column]:
        """Rows of degrees by their numbers, in columns of `CORE`; in the order of `ROW_ORDER`."""
        columns = {}
        for name in reversed(ROW_ORDER):
            values = np.array(self.values[name])
            which, at = np.divmod(which, len(values))
            columns[name] = values[at]
        return [columns[name] for name in CORE]

    def _product(self, names: tuple[str, ...]) -> list[Column]:
        grid = np.meshgrid(*(np.array(self.values[name]) for name in names), indexing="ij")
        return [g.reshape(-1) for g in grid]


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def default_space(job: Job, cluster: Cluster) -> dict[str, tuple[Any, ...]]:
    """The values that a search tries where nobody says otherwise (docs/planner.md says why these).

    Overlap, transport and layout are the job's: they say what the software can do, not how the job is split.
    """
    model, batch = job.model, job.batch
    ways = divisors(cluster.devices)
    near = cluster.levels[0].devices if cluster.torus is None else 16
    layers = len(model.encoder_layers) + len(model.decoder_layers)
    experts = math.gcd(*(m.experts for m in model.moes)) if model.moes else 1
    long = max(batch.encoder_length, batch.decoder_length) > 8192
    recurrent = model.family == "lstm"
    out: dict[str, tuple[Any, ...]] = {field: (get(job, field),) for field in FIELDS}
    out["plan.placement.order"] = ((job.plan.placement or Placement()).order,)
    if not model.moes and (cluster.torus is not None or len(cluster.levels) > 1):
        # Stages beside each other and replicas far apart, or the other way round: one of them has the fast links.
        out["plan.placement.order"] += (("tensor", "context", "pipeline", "data"),)
    out["training.remat"] = ("none", "selective", "full")
    if not isinstance(job.training.remat, str):
        out["training.remat"] += ("job",)
    out |= {
        "plan.tensor": tuple(d for d in ways if d <= near) if not recurrent else (1,),
        "plan.context": tuple(d for d in (1, 2, 4, 8, 16) if d in ways and long) or (1,),
        "plan.pipeline": tuple(d for d in ways if d <= min(layers, 64)) if not recurrent else (1,),
        "plan.expert": tuple(d for d in divisors(experts) if d <= cluster.devices),
        "plan.expert_tensor": tuple(d for d in ways if d <= min(near, 8)) if experts > 1 else (1,),
        "plan.shard_degree": (None,),
        "plan.microbatch_sequences": tuple(d for d in divisors(batch.sequences) if d <= 16),
        "plan.virtual_stages": tuple(v for v in (1, 2, 3, 4, 6, 8) if 2 * v <= layers) or (1,),
        "plan.schedule": ("1f1b", "interleaved", "zb-h1", "dualpipe", "gpipe"),
        "plan.shard": CHOICES["plan.shard"],
        "plan.sequence_parallel": (False, True) if not recurrent else (False,),
    }
    return out


def read_space(path: Path) -> SpaceFile:
    """The space in a YAML file; QuestionError, one line, for anything else."""
    return validate(SpaceFile, read_yaml(path), str(path))


def space_of(job: Job, cluster: Cluster, given: SpaceFile | None = None, where: str = "space") -> Space:
    """The space to search: the default, with the fields that `given` names replaced.

    QuestionError for a value that the field does not know, for an empty list (it leaves no plan), and for more plans
    than can be searched, with the fields that have most values.
    """
    values = default_space(job, cluster)
    for field, asked in _asked(given or SpaceFile()).items():
        values[field] = asked
    coded = {}
    for field in FIELDS:
        if not values[field]:
            raise QuestionError(f"{where}: {field}: an empty list leaves no plan")
        if len(values[field]) > MOST_VALUES:
            raise QuestionError(f"{where}: {field}: {len(values[field]):,} values; at most {MOST_VALUES:,}")
        try:
            coded[field] = tuple(dict.fromkeys(code(field, v) for v in values[field]))
        except QuestionError as error:
            raise QuestionError(f"{where}: {error}") from None
    for order in values["plan.placement.order"] if job.model.moes else ():
        # The strides of the expert axes are those of one run of devices: other orders would look faster than they are.
        if "pipeline" in order[1:-1]:
            rule = "experts lie over data, context and tensor, which must be neighbours: put pipeline first or last"
            raise QuestionError(f"{where}: plan.placement.order = {', '.join(order)}: {rule}")
    space = Space(coded)
    if space.count > MOST_PLANS:
        widest = sorted(coded, key=lambda f: -len(coded[f]))[:4]
        said = ", ".join(f"{f} ({len(coded[f])} values)" for f in widest)
        raise QuestionError(
            f"{where}: {space.count:,} plans; at most {MOST_PLANS:,} are searched: give fewer values, first of {said}"
        )
    return space


def _asked(given: SpaceFile) -> dict[str, tuple[Any, ...]]:
    """The fields that a space names, each as a list of values."""
    out: dict[str, tuple[Any, ...]] = {}
    for field in FIELDS:
        if field == "plan.placement.order":
            if given.plan.placement is not None:
                out[field] = tuple(p.order for p in given.plan.placement)
            continue
        section: Any = given
        *path, last = field.split(".")
        for name in path:
            section = getattr(section, name)
        if last in section.model_fields_set:
            asked = getattr(section, last)
            out[field] = asked if isinstance(asked, tuple) else (asked,)
    return out
