"""From measurement tables and a base profile to a calibrated profile: what was fitted, how far off, and on what.

Order: the machine alone (products, memory, launches, sharing), the network (collectives alone and in steps), then the
classes of ops on whole steps; last the spread of whole steps, from fits that had not seen them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING

from hw_profiles.cluster import Cluster
from hw_profiles.cluster_spec import plain_spec
from hw_profiles.errors import QuestionError
from hw_profiles.loader import SCALE_OUT_NAMES, resolve_cluster
from hw_profiles.schema import Calibration, Chip, FittedTable, OpClass, Sharing, StepSpread
from simulator.analysis.forecast import forecast
from simulator.analysis.spread import own_spread
from simulator.calibration.fit_machine import fit_machine, fit_sharing
from simulator.calibration.fit_network import Timed, card_rate, fit_network
from simulator.calibration.fit_ops import FEWEST_APART, Seen, fit_classes, total_s
from simulator.calibration.observations import Observed, host_seconds, observed
from simulator.calibration.terms import Pass, Terms, fillable_s, scaled, terms_of
from simulator.job.load import job_from_mapping
from simulator.results.measurement import Measurement, MeasurementTable, measurement_hash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FEWEST_JOBS = 3
# Of the stated interval.
COVERED = 0.8
# What calls could fill of a step's compute has to differ by so much between jobs, to tell how much they do.
FEWEST_FILLABLE = 0.05
# No step is known better than its own timing.
FLOOR = 0.01
TermsOf = Mapping[Pass, Terms]


@dataclass
class Calibrated:
    """The new profile, what was learnt in words, and each left-out step's (name, measured, forecast) seconds."""

    chip: Chip
    notes: list[str]
    left_out: list[tuple[str, float, float]] = field(default_factory=list)


def calibrate(tables: Sequence[MeasurementTable], base: Chip, sums: Mapping[str, str] | None = None) -> Calibrated:
    """Fit `base` on all rows of `tables` that are of its kind; `sums` are the SHA-256 of their files, by name.

    QuestionError, naming table and rule, where there is nothing to fit, too few jobs, or rows of another chip.
    """
    _check_chip(tables, base)
    kernels = [r for t in tables for r in t.rows if r.kind in ("kernel", "collective") and not r.job_hash]
    chip, notes = fit_machine(base, [r for r in kernels if r.kind == "kernel"])
    sharing = fit_sharing(kernels)
    if sharing:
        chip = chip.model_copy(update={"sharing": sharing})
    jobs = observed(tables, host_seconds(tables))
    names = {o.job.hash for o in jobs}
    if jobs and len(names) < FEWEST_JOBS:
        raise QuestionError(
            f"{', '.join(t.name for t in tables)}: {len(names)} jobs were measured; a fit needs at least {FEWEST_JOBS}"
        )
    linked = _linked(tables, chip)
    if not jobs and not kernels and not linked:
        raise QuestionError(f"{', '.join(t.name for t in tables)}: no kernels, collectives or steps to fit on")
    source, date = _provenance(tables)
    chip, more = fit_network(chip, [*_timed(kernels, jobs, chip), *linked], source, date)
    notes += more
    jobs = [_less_network(o, chip) for o in jobs]
    traced = [o for o in jobs if o.traced]
    out = Calibrated(chip, notes)
    if traced:
        known = {o.job.hash: terms_of(o.job, chip) for o in traced}
        out.chip = _with_classes(chip, traced, known, residuals=True)
        out.left_out = _left_out(chip, traced, known)
        out.chip = out.chip.model_copy(update={"step_spread": _spread(out.chip, traced, out.left_out)})
        together = [name for name, c in out.chip.op_classes.items() if c.together and c.arithmetic]
        if together:
            notes.append(
                f"{len(together)} of {len(out.chip.op_classes)} op classes have one factor: launches, arithmetic and"
                f" traffic could not be told apart ({', '.join(together[:3])}, ...)"
            )
    notes += [
        f"{s.devices} devices at work: compute {s.compute:.2f}, memory {s.memory:.2f}, a collective's start"
        f" {s.start:.2f}, its bytes {s.wire:.2f} times as long"
        + (f"; other groups compute in {s.filled:.2f} of a call" if s.filled else "")
        for s in out.chip.sharing
    ]
    out.chip = out.chip.model_copy(update={"calibration": _fitted_on(tables, base, sums or {})})
    return out


def _check_chip(tables: Sequence[MeasurementTable], base: Chip) -> None:
    for table in tables:
        for row in table.rows:
            if row.chip not in (base.name, *base.aliases):
                raise QuestionError(f"{table.name}: {row.id} is of {row.chip!r:.40}; the base profile is {base.name}")


def _fitted_on(tables: Sequence[MeasurementTable], base: Chip, sums: Mapping[str, str]) -> Calibration:
    """What the profile says of the rows it was fitted on, so that none of them is taken for a test of it."""
    listed = tuple(
        FittedTable(name=t.name, sha256=sums.get(t.name, ""), rows=len(t.rows),
                    ids_sha256=tuple(measurement_hash(r) for r in t.rows))
        for t in tables
    )  # fmt: skip
    return Calibration(
        tables=listed, date=_provenance(tables)[1], moecast_version=version("moecast"),
        base=f"{base.name}, {base.title}",
    )  # fmt: skip


def _provenance(tables: Sequence[MeasurementTable]) -> tuple[str, str]:
    rows = [r for t in tables for r in t.rows]
    software = sorted({r.software for r in rows})
    return f"measured: {', '.join(t.name for t in tables)} ({'; '.join(software)})", max(r.date for r in rows)


def _timed(kernels: Sequence[Measurement], jobs: Sequence[Observed], chip: Chip) -> list[Timed]:
    """Collectives alone, within a host or between all of its hosts, and those of steps."""
    out = []
    for r in kernels:
        if r.kind == "collective" and r.bytes and r.seconds:
            alone = resolve_cluster(plain_spec(chip, r.devices, r.nodes), chip=chip) if r.nodes > 1 else None
            card = card_rate(alone, r.group_size, r.stride) if alone else 0.0
            if card is not None:
                at_once = r.devices_per_node if card == 0 else r.devices
                out.append(Timed(r.name, r.group_size, r.bytes, r.seconds, at_once, False, card_bytes_per_s=card))
    for o in jobs:
        cluster = resolve_cluster(o.job.cluster, chip=chip)
        for s in o.collectives:
            card = card_rate(cluster, s.size, s.stride)
            # Between hosts a trace of one process does not show who came last: those of steps may have waiting in them.
            if s.bytes > 0 and card == 0:
                weight = s.seconds * s.samples
                out.append(Timed(s.kind, s.size, s.bytes, s.seconds, o.devices, True, weight, arrays=s.arrays))
    return out


def _less_network(seen: Observed, chip: Chip) -> Observed:
    """A job over several hosts with the rest of its step, once its collectives alone are taken off, as its compute.

    A trace of one process does not show what of a collective between hosts was waiting; it goes with the compute that
    made them late.
    """
    if resolve_cluster(seen.job.cluster).levels[-1].name not in SCALE_OUT_NAMES.values():
        return seen
    sent_s = sum(c.time_s for c in forecast(seen.job, engine="closed-form", chip=chip).collectives)
    before = sum(seen.compute_s.values())
    left = max(0.0, before + seen.sent_s - sent_s)
    compute_s = {key: s * left / before for key, s in seen.compute_s.items()} if before else {}
    return replace(seen, compute_s=compute_s, sent_s=sent_s)


def _linked(tables: Sequence[MeasurementTable], chip: Chip) -> list[Timed]:
    """Collectives alone between hosts: rows that name their level, and a job whose cluster says how fast its links are.

    QuestionError for rows of a job that their table does not carry.
    """
    out = []
    for table in tables:
        clusters: dict[str, Cluster] = {}
        for r in table.rows:
            if r.kind != "collective" or not r.job_hash or not r.level or not r.bytes or not r.seconds:
                continue
            if r.job_hash not in table.jobs:
                raise QuestionError(f"{table.name}: {r.id}: the table does not carry its job ({r.job_hash[:12]})")
            if r.job_hash not in clusters:
                job = job_from_mapping(table.jobs[r.job_hash], where=f"{table.name}: the job of {r.id}")
                clusters[r.job_hash] = resolve_cluster(job.cluster, chip=chip)
            card = card_rate(clusters[r.job_hash], r.group_size, r.stride)
            if card is not None:
                out.append(Timed(r.name, r.group_size, r.bytes, r.seconds, r.devices, False, card_bytes_per_s=card))
    return out


def _with_classes(chip: Chip, jobs: Sequence[Observed], known: Mapping[str, TermsOf], *, residuals: bool) -> Chip:
    """`chip`, whose machine and network are fitted already, with the op classes that `jobs` show.

    What sharing a host costs in a step differs from what it costs benchmarks, which keep all cores busy: there classes
    are fitted on the fewest devices, then what more devices lose, so that their steps' compute comes out; these say how
    far off the classes are. Where the fewest devices ran too few jobs to tell the terms of a class apart, classes are
    fitted once more on all.
    """
    own, rest = list(jobs), list[Observed]()
    counts = sorted({o.devices for o in jobs})
    base = [o for o in jobs if o.devices == counts[0]]
    several = len({o.job.hash for o in base})
    if len(counts) > 1 and chip.sharing and several >= FEWEST_JOBS - 1:
        own, rest = base, [o for o in jobs if o.devices > counts[0]]
        first = fit_classes(_points(own, known), residuals=False)
        shared = {n: _shared([o for o in rest if o.devices == n], chip, first, known) for n in counts[1:]}
        chip = chip.model_copy(update={"sharing": tuple(_slowed(s, shared.get(s.devices)) for s in chip.sharing)})
        known = {o.job.hash: scaled(known[o.job.hash], shared.get(o.devices, (1.0, 0.0))[0]) for o in jobs}
        rest = [_whole(o, chip, shared) for o in rest]
        if several < FEWEST_APART:
            own, rest = [*own, *rest], []
    classes = fit_classes(_points(own, known), _points(rest, known), residuals=residuals)
    # Robust fits of single classes pass by slow outliers, of which every step has some: their sum has to come out.
    whole = median(sum(o.compute_s.values()) / total_s(classes, known[o.job.hash]) for o in own)
    return chip.model_copy(update={"op_classes": {name: _longer(c, whole) for name, c in classes.items()}})


def _points(jobs: Sequence[Observed], known: Mapping[str, TermsOf]) -> list[Seen]:
    return [(o.job.hash, o.step_s, o.compute_s, known[o.job.hash]) for o in jobs]


def _shared(
    jobs: Sequence[Observed], chip: Chip, classes: Mapping[str, OpClass], known: Mapping[str, TermsOf]
) -> tuple[float, float]:
    """What so many devices at work cost: a factor on compute, and the share of calls that other groups fill.

    The latter from jobs whose groups leave different shares of their devices outside; 0 where there are none such.
    """
    import numpy as np
    from scipy.optimize import least_squares

    seconds = np.array([sum(o.compute_s.values()) for o in jobs])
    whole = np.array([total_s(classes, known[o.job.hash]) for o in jobs])
    of_job = {o.job.hash: fillable_s(o.job, chip) for o in jobs}
    fillable = np.array([of_job[o.job.hash] for o in jobs])
    shares = fillable / whole
    if len(of_job) < FEWEST_JOBS or shares.max() - shares.min() < FEWEST_FILLABLE:
        return median((seconds / whole).tolist()), 0.0

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = np.log(np.maximum(x[0] * whole - x[1] * fillable, 1e-9) / seconds)
        return out

    x = least_squares(off, [1.0, 0.5], bounds=([0.05, 0.0], [20.0, 1.0]), loss="soft_l1", f_scale=0.05).x
    return float(x[0]), float(x[1])


def _whole(o: Observed, chip: Chip, shared: Mapping[int, tuple[float, float]]) -> Observed:
    """`o` with its compute as it would be if no call were filled."""
    more = shared.get(o.devices, (1.0, 0.0))[1]
    if not more:
        return o
    before = sum(o.compute_s.values())
    factor = (before + more * fillable_s(o.job, chip)) / before
    return replace(o, compute_s={key: s * factor for key, s in o.compute_s.items()})


def _longer(c: OpClass, factor: float) -> OpClass:
    scaled = {name: getattr(c, name) * factor for name in ("launches", "arithmetic", "traffic")}
    return c.model_copy(update={**scaled, "residuals": {q: r / factor for q, r in c.residuals.items()}})


def _slowed(s: Sharing, more: tuple[float, float] | None) -> Sharing:
    if more is None:
        return s
    factor, filled = more
    return s.model_copy(update={"compute": s.compute * factor, "memory": s.memory * factor, "filled": filled})


def _left_out(chip: Chip, jobs: Sequence[Observed], known: Mapping[str, TermsOf]) -> list[tuple[str, float, float]]:
    """Each job's step, measured, and as forecast (in closed form) from the others."""
    out = []
    for name in sorted({o.job.hash for o in jobs}):
        rest = [o for o in jobs if o.job.hash != name]
        if len({o.job.hash for o in rest}) < FEWEST_JOBS - 1:
            continue
        other = _with_classes(chip, rest, known, residuals=False)
        own = [o for o in jobs if o.job.hash == name]
        step_s = forecast(own[0].job, engine="closed-form", chip=other).step_time_s
        out += [(o.name, o.step_s, step_s) for o in own]
    return out


def _spread(chip: Chip, jobs: Sequence[Observed], left_out: Sequence[tuple[str, float, float]]) -> StepSpread | None:
    """How many of its own spreads each left-out step was off, and the number that an interval has to reach."""
    if not left_out:
        return None
    import numpy as np

    own = {o.name: max(own_spread(forecast(o.job, engine="closed-form", chip=chip).ops, chip), FLOOR) for o in jobs}
    logs = {name: math.log(measured / modelled) for name, measured, modelled in left_out}
    centre = float(np.median(list(logs.values())))
    off = [abs(x - centre) / own[name] for name, x in logs.items()]
    reach = float(np.quantile(off, COVERED))
    return StepSpread(
        centre=math.exp(centre), quantile=reach, floor=FLOOR, steps=len(off),
        covered=sum(x <= reach for x in off) / len(off),
    )  # fmt: skip
