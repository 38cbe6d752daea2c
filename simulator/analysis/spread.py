"""The spread of a calibrated forecast: from those of its op classes, wider the further it is from what was fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hw_profiles.schema import Chip, OpClass
from simulator.kernels.roofline import class_of
from simulator.results.forecast import OpRow

# A class's spread doubles with every decade of size outside those that were fitted.
PER_DECADE = 2.0
# Width of an 80 % interval of a normal in standard deviations: residuals give the former.
EIGHTY = 2 * 1.2816


def own_spread(ops: Sequence[OpRow], chip: Chip) -> float:
    """Standard deviation of the logarithm of the step, as far as op classes tell it; 0 for a profile without them."""
    total = sum(o.time_s for o in ops)
    if not total or not chip.op_classes:
        return 0.0
    square = sum((row.time_s / total * _class_spread(row, chip)) ** 2 for row in ops)
    return math.sqrt(square)


def calibrated_interval(ops: Sequence[OpRow], chip: Chip, step_s: float) -> tuple[tuple[float, float], str] | None:
    """Low and high of a calibrated forecast's 80 % interval, seconds, and what it is; None for an uncalibrated one."""
    known = chip.step_spread
    if known is None:
        return None
    reach = known.quantile * max(own_spread(ops, chip), known.floor)
    middle = step_s * known.centre
    meaning = (
        f"80 %, from {known.steps} steps that the fit had not seen ({known.covered:.0%} of them within theirs); wider"
        " for what was fitted worse and for sizes that were not measured"
    )
    return (middle * math.exp(-reach), middle * math.exp(reach)), meaning


def class_interval(ops: Sequence[OpRow], chip: Chip) -> tuple[float, float] | None:
    """80 % interval of the seconds of `ops`, all of one class and pass; None where the profile has not fitted it."""
    known = [chip.op_classes.get(f"{class_of(o.scope)}:{o.phase}") for o in ops]
    if not ops or any(k is None for k in known):
        return None
    low = high = 0.0
    for row, k in zip(ops, known, strict=True):
        assert k is not None
        wider = PER_DECADE ** decades_outside(row.time_s / max(row.count, 1.0), k)
        low += row.time_s * min(k.residuals["p10"], k.residuals["p50"]) ** wider
        high += row.time_s * max(k.residuals["p90"], k.residuals["p50"]) ** wider
    return low, high


def _class_spread(row: OpRow, chip: Chip) -> float:
    known = chip.op_classes.get(f"{class_of(row.scope)}:{row.phase}")
    if known is None:
        # Nothing was fitted: as wide as an uncalibrated forecast's.
        return math.log(2.0)
    inside = math.log(known.residuals["p90"] / known.residuals["p10"]) / EIGHTY
    return float(inside * PER_DECADE ** decades_outside(row.time_s / max(row.count, 1.0), known))


def decades_outside(seconds: float, known: OpClass) -> float:
    """Decades by which an op's time lies outside the sizes of its class's fit; sizes are roofline times."""
    factor = max(known.launches, known.arithmetic, known.traffic)
    if not factor:
        return 0.0
    low, high = known.sizes
    size = seconds / factor
    return max(math.log10(low / size), math.log10(size / high), 0.0) if size > 0 else 0.0
