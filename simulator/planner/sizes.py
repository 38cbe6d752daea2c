"""Sizes of a run: over chips and counts, the best plan of a small space, and what it takes in days and dollars.

Failures, restarts and goodput are left out: days are those of steps that all succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hw_profiles.cluster_spec import is_rack_scale
from hw_profiles.errors import QuestionError
from hw_profiles.loader import canonical_chip_name, load_chip, resolve_cluster
from hw_profiles.schema import Chip, Price, Record
from hw_profiles.slices import all_slices
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml
from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from simulator.kernels.roofline import Kernels
from simulator.planner.answer import records
from simulator.planner.search import Search
from simulator.planner.space import SpaceFile, divisors, space_of
from simulator.planner.table import with_plan
from simulator.results.plans import RankedPlan
from simulator.results.sizing import Phase, SizePoint
from simulator.workload.habits import habits_of
from simulator.workload.parameters import count_parameters

DAY_S = 86_400.0
MOST_CHIPS = 131_072
TERMS = ("on_demand", "reserved", "spot", "capacity_block")


class FilePrice(Record):
    """One price of a price file."""

    chip: str
    usd_per_chip_hour: float = Field(gt=0, allow_inf_nan=False)
    terms: Literal["on_demand", "reserved", "spot", "capacity_block"] = "on_demand"
    source: str = "price file"
    date: str


class PriceFile(Record):
    """Dated prices: `prices: [{chip, usd_per_chip_hour, terms, source, date}]`."""

    prices: tuple[FilePrice, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The run: tokens, days, dollars (None for no limit), terms of the price, and phases (tokens, changes)."""

    data: Mapping[str, Any]
    changes: tuple[str, ...]
    folder: Path
    name: str
    tokens: float
    days: float
    budget_usd: float | None
    terms: str
    phases: tuple[tuple[float, tuple[str, ...]], ...] = ()

    def job(self, cluster: Mapping[str, Any], more: Sequence[str] = ()) -> Job:
        """The job on a cluster, its plan left to the search."""
        data = {**{k: v for k, v in self.data.items() if k != "plan"}, "cluster": dict(cluster)}
        changes = [*self.changes, *more]
        return job_from_mapping(data, overrides=changes, folder=self.folder, where="", name=self.name)


def prices_of(chip: Chip, file: PriceFile | None) -> dict[str, Price]:
    """The first price of each terms: those of a price file for this chip, else the profile's."""
    own = [p for p in file.prices if canonical_chip_name(p.chip) == chip.name] if file else []
    found = [Price.model_validate(p.model_dump(exclude={"chip"})) for p in own] or list(chip.prices)
    out: dict[str, Price] = {}
    for price in found:
        out.setdefault(price.terms, price)
    return out


def read_prices(path: Path) -> PriceFile:
    """A price file; QuestionError, one line, for anything else or an unknown chip."""
    file = validate(PriceFile, read_yaml(path), str(path))
    for price in file.prices:
        canonical_chip_name(price.chip)
    return file


def clusters_of(chip: Chip) -> list[tuple[int, dict[str, Any]]]:
    """(chips, cluster) to try, small ones first: 1, 2, 3, 4, 6, 8, 12 ... hosts or racks; every slice size of a TPU."""
    if chip.kind == "tpu":
        sizes = {s.chips: {"chip": chip.name, "slice": s.shape} for s in all_slices() if s.chip == chip.name}
        return sorted(sizes.items())
    if chip.kind == "cpu":
        raise QuestionError(f"--chips {chip.name}: a CPU host is one machine; name GPUs or TPUs")
    rack = is_rack_scale(chip)
    each = (chip.scale_up.chips_per_domain or chip.chips_per_host) if rack else chip.chips_per_host
    units = sorted({k * 2**i for i in range(18) for k in (1, 3)})
    unit = "racks" if rack else "nodes"
    return [(n * each, {"chip": chip.name, unit: n}) for n in units if n * each <= MOST_CHIPS]


def least_chips(asked: Asked, chip: Chip, job: Job) -> float:
    """Chips below which even at the peak of every device the run would not end in time (6 FLOPs a parameter, token)."""
    peak = Kernels(chip).peak(habits_of(job, chip.kind).matmul_dtype) * chip.devices_per_chip
    return 6 * count_parameters(job.model).active * asked.tokens / (asked.days * DAY_S * peak)


def best_plan(job: Job) -> RankedPlan:
    """The fastest plan of a small space that fits; QuestionError where there is none."""
    cluster = resolve_cluster(job.cluster)
    ways = divisors(cluster.devices)
    layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
    near = cluster.levels[0].devices if cluster.torus is None else 8
    small = {
        "plan": {
            "tensor": [d for d in ways if d <= min(near, 8)],
            "pipeline": [d for d in ways if d <= min(layers, 16)],
            "expert_tensor": 1,
            "context": 1,
            "virtual_stages": 1,
            "microbatch_sequences": [m for m in (1, 2, 4) if job.batch.sequences % m == 0],
            "schedule": "1f1b",
            "shard": ["optimizer", "parameters"],
        },
        "training": {"remat": ["none", "selective", "full"]},
    }
    space = space_of(job, cluster, validate(SpaceFile, small, "size"), "size")
    search = Search(job, cluster, space, top=1)
    return records(job, search.run().best)[0]


def point(asked: Asked, chip: Chip, chips: int, spec: Mapping[str, Any], prices: Mapping[str, Price]) -> SizePoint:
    """The run on so many chips; every phase with its own best plan."""
    done = sum(tokens for tokens, _ in asked.phases)
    parts = [*asked.phases, *([(asked.tokens - done, ())] if asked.tokens > done else [])]
    phases, plan, job = [], None, None
    try:
        for tokens, changes in parts:
            job = asked.job(spec, changes)
            plan = best_plan(job)
            steps = tokens / job.tokens_per_step
            batch = job.batch
            length = batch.encoder_length + batch.decoder_length
            days = steps * plan.step_time_s / DAY_S
            phases.append(Phase(tokens, batch.sequences, length, plan.step_time_s, days, plan.overrides))
    except QuestionError as error:
        return SizePoint(chip.name, chips, resolve_cluster(dict(spec)).name, refused=str(error).removeprefix(": "))
    assert plan is not None and job is not None
    days = sum(p.days for p in phases)
    usd = {terms: p.usd_per_chip_hour * chips * days * 24 for terms, p in prices.items()}
    price = prices.get(asked.terms)
    step = None if price is None else price.usd_per_chip_hour * chips * plan.step_time_s / 3600
    cost = usd.get(asked.terms)
    return SizePoint(
        chip=chip.name,
        chips=chips,
        cluster=resolve_cluster(dict(spec)).name,
        phases=tuple(phases),
        days=days,
        in_time=days <= asked.days,
        in_budget=asked.budget_usd is None or (cost is not None and cost <= asked.budget_usd),
        mfu=plan.mfu,
        memory_peak_bytes=plan.memory_peak_bytes,
        tokens_per_s=plan.tokens_per_s,
        usd=usd,
        usd_per_step=step,
        usd_per_1b_tokens=None if step is None else step / job.tokens_per_step * 1e9,
        kwh=None if chip.power_tdp_w is None else chip.power_tdp_w.value * chips * days * 24 / 1000,
    )


def sweep(
    asked: Asked, chip_name: str, prices: PriceFile | None, more: int = 1, tell: Callable[[str], None] | None = None
) -> list[SizePoint]:
    """Counts of one chip from the least that could be in time up to `more` beyond the first that is.

    QuestionError where a budget is asked for and the chip has no price of these terms.
    """
    chip = load_chip(chip_name)
    known = prices_of(chip, prices)
    if asked.budget_usd is not None and asked.terms not in known:
        raise QuestionError(
            f"--budget: no {asked.terms} price for {chip.name}; give one with --prices FILE, a YAML with"
            f" prices: [{{chip: {chip.name}, usd_per_chip_hour: 2.5, terms: {asked.terms}, date: 2026-01}}]"
        )
    options = clusters_of(chip)
    least = least_chips(asked, chip, asked.job(options[0][1]))
    out: list[SizePoint] = []
    left = more
    for chips, spec in options:
        if chips < least:
            continue
        if tell is not None:
            tell(f"{chip.name}, {chips:,} chips")
        found = point(asked, chip, chips, spec, known)
        out.append(found)
        if any(p.in_time for p in out[:-1]):
            left -= 1
        if left <= 0:
            break
    if not out:
        most = options[-1][0]
        raise QuestionError(
            f"--days: even at its peak {chip.name} needs {least:,.0f} chips; at most {most:,} are tried"
        )
    return out


def checkpoint_bytes(job: Job, chip: Chip) -> float:
    """Bytes of a checkpoint: weights (the master copy where there is one) and both moments of every parameter."""
    h = habits_of(job, chip.kind)
    second = 0.0 if h.factored_second_moment else h.second_moment_bytes
    each = (h.master_bytes or h.parameter_bytes) + h.first_moment_bytes + second
    return each * count_parameters(job.model).total


def planned(asked: Asked, spec: Mapping[str, Any]) -> Job:
    """The job on a cluster with its best plan."""
    job = asked.job(spec)
    return with_plan(job, best_plan(job).plan)
