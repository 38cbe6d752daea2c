"""Statistics of a validation: errors, ranks, coverage, and the one constant that every forecast is held against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from simulator.results.validation import ScoredRow, Scores

# A rank correlation of fewer rows says nothing.
FEWEST_RANKED = 3


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile by linear interpolation (NumPy's default); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation (scipy); None for fewer than three pairs, or where one side has one value only."""
    # What a constant gives differs in its last bits, and must not be ranked by them.
    first, second = ([float(f"{v:.9e}") for v in values] for values in (first, second))
    if len(first) < FEWEST_RANKED or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy import stats

    return float(stats.spearmanr(first, second).statistic)


def least_absolute(bases: Sequence[float], measured: Sequence[float]) -> float:
    """The constant c with the least sum of |c x basis / measured - 1|: the median of measured / basis, weighted.

    With r = measured / basis the sum is that of (1/r)|c - r|, which a median weighted by 1/r makes least. Bases and
    measurements are greater than zero, at least one of each.
    """
    ratios = sorted(m / b for b, m in zip(bases, measured, strict=True))
    half = sum(1 / r for r in ratios) / 2
    passed = 0.0
    for r in ratios:
        passed += 1 / r
        if passed >= half:
            return r
    return ratios[-1]


def score(rows: Sequence[ScoredRow]) -> Scores:
    """Scores of the forecasts of `rows`."""
    return _score(rows, [r.forecast for r in rows], covered=True)


def score_baseline(rows: Sequence[ScoredRow]) -> Scores | None:
    """Scores of the constants on those of `rows` that have one; None where none has."""
    told = [(r, r.baseline) for r in rows if r.baseline is not None]
    return _score([r for r, _ in told], [b for _, b in told], covered=False) if told else None


def _score(rows: Sequence[ScoredRow], said: Sequence[float], covered: bool) -> Scores:
    errors = [s / r.measured - 1 for r, s in zip(rows, said, strict=True)]
    off = [abs(e) for e in errors]
    one_unit = len({r.unit for r in rows}) == 1
    ranks = spearman(said, [r.measured for r in rows]) if one_unit else None
    work = [(r.work_flops, s, r.measured) for r, s in zip(rows, said, strict=True) if r.work_flops and s > 0]
    speeds = spearman([w / s for w, s, _ in work], [w / m for w, _, m in work]) if len(work) == len(rows) else None
    stated = [r for r in rows if r.interval is not None] if covered else []
    fresh = [r for r in stated if not r.interval_fitted]
    seen = [r for r in stated if r.interval_fitted]
    return Scores(
        rows=len(rows),
        median_abs_error=statistics.median(off) if off else None,
        mean_abs_error=statistics.fmean(off) if off else None,
        p90_abs_error=quantile(off, 0.9),
        bias=statistics.median(errors) if errors else None,
        spearman=ranks,
        flops_spearman=speeds,
        coverage=_coverage(fresh),
        intervals=len(fresh),
        coverage_in_sample=_coverage(seen),
        intervals_in_sample=len(seen),
    )


def _coverage(rows: Sequence[ScoredRow]) -> float | None:
    inside = [r.interval is not None and r.interval[0] <= r.measured <= r.interval[1] for r in rows]
    return sum(inside) / len(inside) if inside else None
