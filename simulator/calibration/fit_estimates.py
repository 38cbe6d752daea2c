"""Fits a TPU's efficiencies on what its compiler expects: curve of products, memory share, start of a kernel.

The model is the one that uses them (simulator/kernels/roofline.py): time = max(FLOPs / (peak x fraction x tile fill),
bytes / (bandwidth x share)) + start. An estimate is no measurement: `confidence` stays low.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Literal

from hw_profiles.errors import QuestionError
from hw_profiles.estimates import Estimates
from hw_profiles.schema import Chip, Curve, Quantity
from simulator.calibration.fit_machine import quantiles
from simulator.kernels.roofline import CurveTable, Kernels
from simulator.results.measurement import Measurement

DTYPE: Literal["bf16"] = "bf16"
# A stream's first microsecond is small beside these.
LARGE_STREAM_BYTES = 2.0**27
# A product says something about arithmetic where it takes this much longer than its traffic.
BEYOND_TRAFFIC = 1.15
BINS_PER_DECADE = 2
FEWEST = 6
# Of rows, depth and columns per expert in a grouped product; smaller ones are all start and padding.
LEAST_GROUPED = 128


def fit_estimates(chip: Chip, rows: Sequence[Measurement]) -> Estimates:
    """Estimates of `chip` from rows of kind `compiler-estimate`.

    QuestionError for rows of another chip or kind, and where too few are left to fit on.
    """
    wrong = next((r for r in rows if r.kind != "compiler-estimate" or r.chip != chip.name), None)
    if wrong is not None:
        raise QuestionError(
            f"{wrong.id}: a {wrong.kind} row of {wrong.chip}; fitted are compiler estimates of {chip.name}"
        )
    start_s = _start(rows)
    share = _memory_share(chip, rows)
    tried = [r for r in rows if r.dtype == DTYPE and r.flops]
    fit = _Products(chip, start_s, share)
    dense = [r for r in tried if r.name == "product" and fit.is_arithmetic(r)]
    if len(dense) < FEWEST:
        raise QuestionError(f"{chip.name}: {len(dense)} {DTYPE} products whose arithmetic shows; {FEWEST} are needed")
    per_expert = [r for r in tried if r.name == "grouped_product" and min(r.shape[1:]) >= LEAST_GROUPED]
    grouped = [r for r in per_expert if fit.is_arithmetic(r)]
    points = monotone_points([(r.flops or 0.0, fit.fraction(r)) for r in dense])
    curve = Curve(
        points=points, source=_source(dense[0]), date=dense[0].date, confidence="low", basis="compiler",
        rows=len(dense),
    )  # fmt: skip
    table = CurveTable(curve)
    ratios = [(r.seconds or 0.0) / fit.seconds(r, table) for r in dense]
    spread = {name: round(value, 3) for name, value in quantiles(ratios).items()}
    slow = [float(table.at(r.flops or 0.0)) / fit.fraction(r) for r in grouped] or [1.0]
    return Estimates(
        matmul={DTYPE: curve.model_copy(update={"residuals": spread})},
        grouped_slowdown=_quantity(max(1.0, median(slow)), dense[0], f"median of {len(grouped)} products per expert"),
        memory=_quantity(share, dense[0], f"streams of {LARGE_STREAM_BYTES / 2**21:g} MiB and more, read and written"),
        kernel_overhead_us=_quantity(start_s * 1e6, dense[0], "a product of 8 x 8"),
    )


class _Products:
    """What the model says of products on one chip, but for the curve."""

    def __init__(self, chip: Chip, start_s: float, share: float) -> None:
        self.kernels, self.start_s = Kernels(chip), start_s
        self.peak = self.kernels.peak(DTYPE)
        self.bytes_per_s = chip.device_memory_bytes_per_s * share

    def is_arithmetic(self, r: Measurement) -> bool:
        """Whether the row outlasts its start and its traffic."""
        return self._busy_s(r) > BEYOND_TRAFFIC * self._traffic_s(r)

    def fraction(self, r: Measurement) -> float:
        """Of the peak, padding to whole tiles taken out."""
        return min(1.0, self._full_s(r) / self._busy_s(r))

    def seconds(self, r: Measurement, table: CurveTable) -> float:
        """By the model."""
        return max(self._full_s(r) / float(table.at(r.flops or 0.0)), self._traffic_s(r)) + self.start_s

    def _busy_s(self, r: Measurement) -> float:
        return (r.seconds or 0.0) - self.start_s

    def _traffic_s(self, r: Measurement) -> float:
        return (r.bytes or 0.0) / self.bytes_per_s

    def _full_s(self, r: Measurement) -> float:
        """Seconds at the peak, whole tiles."""
        _, rows, depth, columns = r.shape
        return (r.flops or 0.0) / (self.peak * float(self.kernels.fill(rows, columns, depth)))


def monotone_points(found: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Medians over half decades of FLOPs, made never to fall; the FLOPs are the medians' too."""
    from scipy.optimize import isotonic_regression

    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for flops, fraction in found:
        bins[math.floor(math.log10(flops) * BINS_PER_DECADE)].append((math.log10(flops), fraction))
    ordered = [bins[key] for key in sorted(bins)]
    middles = [median(x for x, _ in own) for own in ordered]
    smooth = isotonic_regression(
        [median(y for _, y in own) for own in ordered], weights=[len(own) for own in ordered]
    ).x
    last = len(middles) - 1
    # A point between two equal ones says nothing.
    kept = [i for i in range(last + 1) if i in (0, last) or not smooth[i - 1] == smooth[i] == smooth[i + 1]]
    return tuple((float(f"{10 ** middles[i]:.3g}"), round(float(smooth[i]), 3)) for i in kept)


def _start(rows: Sequence[Measurement]) -> float:
    """Seconds of the row that does next to nothing."""
    found = [r.seconds for r in rows if r.name == "launch" and r.seconds]
    if not found:
        raise QuestionError(f"{rows[0].id if rows else 'the table'}: no row named launch in this table")
    return median(found)


def _memory_share(chip: Chip, rows: Sequence[Measurement]) -> float:
    """Of the data-sheet bandwidth; QuestionError where there is no large stream or one beyond the bandwidth."""
    rates = [
        (r.bytes or 0.0) / (r.seconds or 1.0)
        for r in rows
        if r.name == "stream" and (r.bytes or 0) >= LARGE_STREAM_BYTES
    ]
    if not rates:
        raise QuestionError(f"{chip.name}: no stream of {LARGE_STREAM_BYTES / 2**21:g} MiB or more in this table")
    share = median(rates) / chip.device_memory_bytes_per_s
    if share > 1:
        raise QuestionError(f"{chip.name}: streams at {share:.2f} of the memory bandwidth: the clock cannot be right")
    return share


def _source(row: Measurement) -> str:
    return f"estimated_cycles of {row.software.partition(', ')[2]}; {row.source}"


def _quantity(value: float, row: Measurement, note: str) -> Quantity:
    return Quantity(value=float(f"{value:.3g}"), source=_source(row), date=row.date, confidence="low", note=note)
