"""The forecast: what the simulator answers about one job.

Seconds, bytes, FLOPs and dollars throughout; human units appear only where a person reads. `to_dict` is the JSON of
`moecast forecast --json`; its top-level names are a contract (docs/job.md) and change only with `VERSION`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from simulator.results.links import LinkUse

if TYPE_CHECKING:
    # NumPy stays out of a closed-form answer's start-up.
    from simulator.results.timeline import Timeline

VERSION = "1"


@dataclass(frozen=True, slots=True)
class Flops:
    """Model FLOPs of the whole step, and what one device executes (padding and recompute included).

    `variants` are the same model by other conventions that published figures use; their names say how and per what.
    """

    model_per_step: float
    executed_per_device: float
    model_per_token: float
    model_forward_per_sequence: float
    convention: str
    variants: dict[str, float]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on one device of one pipeline stage."""

    stage: int
    layers: int
    microbatches_in_flight: int
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    dispatch_bytes: float
    gathered_weights_bytes: float
    collective_buffers_bytes: float
    workspace_bytes: float
    reserve_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Sum of all parts."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + (self.dispatch_bytes + self.other_bytes)
        )

    @property
    def other_bytes(self) -> float:
        """Gathered weights, collective buffers, workspace and the framework's reserve."""
        return self.gathered_weights_bytes + self.collective_buffers_bytes + self.workspace_bytes + self.reserve_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """The fullest stage, against the capacity of one device; `by_stage` has them all."""

    capacity_bytes: float
    by_stage: tuple[StageMemory, ...]
    argument_bytes: float
    definition: str

    @property
    def worst(self) -> StageMemory:
        """The stage with the highest peak."""
        return max(self.by_stage, key=lambda s: s.peak_bytes)

    @property
    def peak_bytes(self) -> float:
        """Peak on the fullest device."""
        return self.worst.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the capacity."""
        return self.peak_bytes <= self.capacity_bytes


@dataclass(frozen=True, slots=True)
class Parts:
    """Disjoint parts of a step, seconds, mean over devices; they sum to the step.

    Priority where things overlap: compute, then all-to-all, then other communication, then host. Waiting is
    `imbalance` (for a slower rank) or `bubble` (for the pipeline).
    """

    compute_s: float
    all_to_all_s: float
    communication_s: float
    host_s: float
    imbalance_s: float
    bubble_s: float


@dataclass(frozen=True, slots=True)
class AllToAll:
    """All all-to-alls of a step on one device: total time, what is not hidden, and bytes sent (nccl-tests' size)."""

    time_s: float
    exposed_s: float
    bytes_per_device: float


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective at one scope, summed over a step of the busiest stage, per device."""

    scope: str
    kind: str
    group_size: int
    count: float
    bytes: float
    time_s: float
    exposed_s: float
    level: str


@dataclass(frozen=True, slots=True)
class OpRow:
    """Time, FLOPs and bytes of one compute op, summed over a step of the busiest stage, per device."""

    scope: str
    phase: str
    count: float
    flops: float
    bytes: float
    time_s: float
    bound: str


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routing model says: tokens that capacity drops, and the hottest expert rank over the mean."""

    model: str
    dropped_token_fraction: float
    max_over_mean_load: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars at a dated price; None where no price is known (`source` says so)."""

    usd_per_step: float | None
    usd_per_1b_tokens: float | None
    usd_per_chip_hour: float | None
    chips: int
    terms: str | None
    source: str
    date: str | None
    kwh_per_step: float | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the forecast rests on: profile, calibration, where each efficiency comes from, and what to beware of."""

    profile: str
    calibration: str
    peak_dtype: str
    peak_flops_per_s: float
    rests_on: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Events:
    """What only the run by events knows.

    `difference` is events over closed form, minus one; `missed` names what the formula left out where that is more than
    2 %. `percentiles_s` are p50, p95 and p99 of the step over draws of the routing; `out_of_memory_probability` the
    share of draws in which a dropless step exceeds the memory (both None where routing is not drawn).
    `critical_path_s` are the seconds of each kind of work on the critical path; `links` the busiest links.
    """

    closed_form_step_time_s: float
    difference: float
    missed: tuple[str, ...]
    seed: int
    folded: bool
    percentiles_s: dict[str, float] | None
    out_of_memory_probability: float | None
    critical_path_s: dict[str, float]
    links: tuple[LinkUse, ...]


@dataclass(frozen=True, slots=True)
class JobSummary:
    """The question in one place, for tables and reports."""

    name: str
    hash: str
    model: str
    total_parameters: float
    active_parameters: float
    cluster: str
    chip: str
    devices: int
    chips: int
    plan: dict[str, Any]
    sequences: int
    tokens_per_step: float
    precision: str
    optimizer: str
    remat: str
    capacity: str
    dispatch: str
    stack: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """The answer to one job."""

    job: JobSummary
    engine: str
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    interval_meaning: str
    sequences_per_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float
    hfu: float
    flops: Flops
    memory: Memory
    parts: Parts
    all_to_all: AllToAll
    collectives: tuple[Collective, ...]
    ops: tuple[OpRow, ...]
    routing: Routing
    cost: Cost
    evidence: Evidence
    events: Events | None = None
    timeline: Timeline | None = None
    version: str = field(default=VERSION)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        # The timeline is a table of its own (`--perfetto`, the report); JSON has its summary.
        out: dict[str, Any] = asdict(replace(self, timeline=None))
        del out["timeline"]
        memory, worst = out["memory"], self.memory.worst
        del out["parts"]
        out["time"] = {"parts": asdict(self.parts), "step_time_s": self.step_time_s}
        out["memory"] = {
            "peak_bytes": self.memory.peak_bytes,
            "capacity_bytes": self.memory.capacity_bytes,
            "fits": self.memory.fits,
            "parameters_bytes": worst.parameters_bytes,
            "gradients_bytes": worst.gradients_bytes,
            "optimizer_bytes": worst.optimizer_bytes,
            "activations_bytes": worst.activations_bytes,
            "dispatch_bytes": worst.dispatch_bytes,
            "other_bytes": worst.other_bytes,
            "other": {
                "gathered_weights_bytes": worst.gathered_weights_bytes,
                "collective_buffers_bytes": worst.collective_buffers_bytes,
                "workspace_bytes": worst.workspace_bytes,
                "reserve_bytes": worst.reserve_bytes,
            },
            "argument_bytes": self.memory.argument_bytes,
            "definition": self.memory.definition,
            "by_stage": [
                s | {"peak_bytes": r.peak_bytes} for s, r in zip(memory["by_stage"], self.memory.by_stage, strict=True)
            ],
        }
        out["step_time_interval_s"] = list(self.step_time_interval_s)
        return out
