"""What a forecast rests on, its interval, and its price: from the profile's own words to the forecast's."""

from __future__ import annotations

from collections.abc import Sequence

from hw_profiles.cluster import Cluster
from hw_profiles.schema import Chip, Curve, Price, Quantity
from simulator.analysis.spread import calibrated_interval
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.results.forecast import Cost, Evidence, OpRow
from simulator.workload.habits import Habits

# Measured over forecast step time, 10th and 90th percentile, over published steps that nothing here is fitted to
# (benchmarks/score_steps.py, November 2026), rounded outwards and at most 1 at the low end; and how many steps.
# Forecasts lean fast, since kernels measured alone outrun the same kernels in a step. The CPU has no published steps:
# an assumption.
UNCALIBRATED = {
    ("gpu", False): (1.0, 1.6, 42),
    ("gpu", True): (0.9, 2.1, 46),
    ("tpu", False): (0.9, 1.35, 7),
    ("tpu", True): (1.0, 2.9, 10),
    ("cpu", False): (0.5, 2.0, 0),
    ("cpu", True): (0.5, 2.0, 0),
}


def interval(job: Job, chip: Chip, ops: Sequence[OpRow], step_s: float) -> tuple[tuple[float, float], str]:
    """Low and high step time, seconds, and what the interval is; `ops` are the forecast's."""
    calibrated = calibrated_interval(ops, chip, step_s)
    if calibrated is not None:
        return calibrated
    experts = bool(job.model.moes)
    low, high, steps = UNCALIBRATED[chip.kind, experts]
    what = f"{'MoE' if experts else 'dense'} models on {chip.kind.upper()}s"
    if steps:
        meaning = (
            f"80 % of {steps} published steps of {what} took {low:g} to {high:g} times their uncalibrated forecast"
        )
    else:
        meaning = f"assumed {low:g} to {high:g} times the forecast: no published steps on a {chip.kind.upper()}"
    return (step_s * low, step_s * high), meaning


BASES = {
    "data sheet": "its data sheet",
    "borrowed": "the curve of a sibling chip",
    "assumption": "an assumed curve",
}


def _curve_text(name: str, curve: Curve) -> str:
    rows = f", {curve.rows} rows" if curve.rows else ""
    return f"{name}: {curve.basis}{rows} ({curve.source}, {curve.date}; confidence {curve.confidence})"


def _quantity_text(name: str, q: Quantity) -> str:
    return f"{name} {q.value:g}: {q.confidence} ({q.source}, {q.date})"


def gather_evidence(
    job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, kernels: Kernels, warnings: list[str], profile: str
) -> Evidence:
    """Sources of the numbers that weigh most, and warnings a reader should see."""
    chip: Chip = cluster.chip
    dtype, runs_as = habits.matmul_dtype, kernels.runs_as(habits.matmul_dtype)
    curve = kernels.curve(dtype)
    rests = [
        _curve_text(f"products in {runs_as}", curve),
        _quantity_text("attention, fraction of peak", chip.efficiency.attention_forward),
        _quantity_text("memory streams, fraction of data sheet", chip.efficiency.memory),
        _quantity_text(f"{chip.scale_up.kind}, fraction in all-to-all", chip.scale_up.all_to_all_efficiency),
    ]
    if chip.scale_out is not None and (len(cluster.levels) > 1 or cluster.slices > 1):
        rests.append(
            _quantity_text(f"{chip.scale_out.kind}, fraction in all-to-all", chip.scale_out.all_to_all_efficiency)
        )
    remat = job.training.remat if isinstance(job.training.remat, str) else "by name"
    rests.append(f"software {job.software.stack}: {habits.attention} attention, recompute {remat}")
    rests.append(f"routing: {job.training.routing.model}")
    notes = list(warnings)
    if runs_as != dtype and not (dtype == "fp32" and chip.kind == "tpu"):
        notes.append(f"{chip.name} has no measured {dtype} products: they are forecast as {runs_as}")
    if dtype == "fp32" and chip.kind == "tpu":
        notes.append(
            "fp32 products run as one bf16 pass on a TPU (jax_default_matmul_precision), so the peak is bf16's"
        )
    peak = chip.peak_tflops.get("fp8" if runs_as == "fp8_block" else runs_as)  # type: ignore[call-overload]
    if peak is not None and peak.disputed:
        others = ", ".join(f"{a.value:g} ({a.source})" for a in peak.disputed)
        notes.append(f"the {runs_as} peak of {chip.name} is disputed: {peak.value:g} TFLOP/s here, {others}")
    if curve.basis not in ("measured", "compiler"):
        notes.append(f"no kernel measurements of {chip.name} in {runs_as}: compute times rest on {BASES[curve.basis]}")
    return Evidence(
        profile=profile,
        calibration=_calibration(chip),
        peak_dtype=runs_as,
        peak_flops_per_s=kernels.peak(dtype),
        rests_on=tuple(rests),
        warnings=tuple(notes),
    )


def _calibration(chip: Chip) -> str:
    """In how far the profile rests on what ran."""
    if not chip.op_classes:
        return "uncalibrated: no trace of this job or chip was used"
    jobs = max(c.jobs for c in chip.op_classes.values())
    return f"calibrated: {len(chip.op_classes)} classes of ops as they ran in {jobs} traced jobs"


def price_of(chip: Chip) -> Price | None:
    """The on-demand price of the profile, else the first of any terms."""
    on_demand = [p for p in chip.prices if p.terms == "on_demand"]
    known = on_demand or list(chip.prices)
    return known[0] if known else None


def cost_of(cluster: Cluster, step_s: float, tokens: float) -> Cost:
    """Dollars of a step at the profile's price; None where it has none. Energy at thermal design power."""
    chip, price = cluster.chip, price_of(cluster.chip)
    kwh = None if chip.power_tdp_w is None else chip.power_tdp_w.value * cluster.chips * step_s / 3.6e6
    if price is None:
        return Cost(None, None, None, cluster.chips, None, f"no price for {chip.name} in its profile", None, kwh)
    usd = price.usd_per_chip_hour * cluster.chips * step_s / 3600
    return Cost(
        usd, usd / tokens * 1e9, price.usd_per_chip_hour, cluster.chips, price.terms, price.source, price.date, kwh
    )
