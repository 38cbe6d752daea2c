"""Fits what classes of ops take in a step, as multiples of their roofline terms; with residuals of left-out jobs."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.schema import OpClass
from simulator.calibration.fit_machine import quantiles
from simulator.calibration.terms import Pass, Terms

# Jobs below which only one factor is fitted for a class.
FEWEST_APART = 4
# Terms whose parts of the time change together over the rows by this much cannot be told apart.
ALIKE = 0.995
# A class whose largest share of any step is below this is a detail: one factor is fitted.
DETAIL = 0.002


@dataclass(frozen=True)
class Point:
    """One job's seconds of a class and pass, and what the roofline says."""

    job: str
    seconds: float
    terms: Terms


def fit_class(
    points: Sequence[Point], share: float, beside: Sequence[Point] = (), *, residuals: bool = True
) -> OpClass:
    """The class that fits `points` best; `share` is its largest share of a step.

    Residuals are of left-out jobs, and of those `beside`; without `residuals` they are not looked for, and are 1.
    """
    x, together = _solve(points, share)
    jobs = sorted({p.job for p in points})
    ratios = []
    for job in jobs if residuals else ():
        rest = [p for p in points if p.job != job]
        left = _solve(rest, share)[0] if rest else x
        ratios += [p.seconds / max(predicted(left, p.terms), 1e-12) for p in points if p.job == job]
    if residuals:
        ratios += [p.seconds / max(predicted(x, p.terms), 1e-12) for p in beside]
    sizes = [max(p.terms.size_s, 1e-12) for p in points]
    return OpClass(
        launches=float(x[0]), arithmetic=float(x[1]), traffic=float(x[2]), together=together,
        sizes=(min(sizes), max(sizes)), residuals=quantiles(ratios or [1.0]), rows=len(points),
        jobs=len(jobs),
    )  # fmt: skip


def predicted(x: Sequence[float] | NDArray[np.float64], terms: Terms) -> float:
    """Seconds by multiples of launches, arithmetic and traffic."""
    return float(x[0] * terms.launches_s + x[1] * terms.arithmetic_s + x[2] * terms.traffic_s)


def total_s(classes: Mapping[str, OpClass], terms: Mapping[Pass, Terms]) -> float:
    """Seconds of a step's compute by fitted classes."""
    known = {key: classes.get(f"{key[0]}:{key[1]}") for key in terms}
    return sum(predicted((k.launches, k.arithmetic, k.traffic), terms[key]) for key, k in known.items() if k)


def _solve(points: Sequence[Point], share: float) -> tuple[NDArray[np.float64], bool]:
    """Multiples of the terms, and whether one factor had to do for all."""
    columns = np.array([[p.terms.launches_s, p.terms.arithmetic_s, p.terms.traffic_s] for p in points])
    seconds = np.array([p.seconds for p in points])
    one = _one_factor(columns, seconds)
    if len({p.job for p in points}) < FEWEST_APART or share < DETAIL or _alike(columns):
        return one, True
    return _apart(columns, seconds, one), False


def _one_factor(columns: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median factor on launches + arithmetic + traffic, for all three."""
    return np.full(3, float(np.median(seconds / np.maximum(columns.sum(axis=1), 1e-15))))


def _alike(columns: NDArray[np.float64]) -> bool:
    """Whether the terms that are there grow together over the rows."""
    there = columns[:, columns.sum(axis=0) > 0]
    logs = np.log(there)
    if there.shape[1] < 2:
        return True
    spread = logs.std(axis=0)
    if (spread < 1e-9).sum() > 1:
        return True
    moving = logs[:, spread >= 1e-9]
    if moving.shape[1] < 2:
        return False
    related = np.corrcoef(moving.T)
    return bool(np.all(related > ALIKE))


def _apart(
    columns: NDArray[np.float64], seconds: NDArray[np.float64], guess: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Robust least squares of the logarithms; no term below zero."""
    from scipy.optimize import least_squares

    there = columns.sum(axis=0) > 0

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(np.maximum(columns @ x, 1e-15) / seconds)

    found = least_squares(
        off, np.maximum(guess, 1e-9), bounds=(0.0, np.inf), loss="soft_l1", f_scale=0.1, x_scale=np.maximum(guess, 1e-6)
    )
    out: NDArray[np.float64] = np.where(there, found.x, guess)
    return out


def home(key: Pass, known: Container[Pass]) -> Pass:
    """Where the measured seconds of `key` count, of the passes that the roofline knows.

    A recomputed forward that is part of the roofline's backward (blocks of attention scores, a compiler's own choice)
    goes there; bookkeeping goes with `layers.saved` of its pass, or else with the update.
    """
    name, phase = key
    backward = [(name, "backward")] if phase == "recompute" else []
    choices = [key, *backward, ("layers.saved", phase), ("optimizer.update", "forward")]
    return next((c for c in choices if c in known), choices[-1])


# Of one measurement: job, step seconds, measured seconds, terms.
Seen = tuple[str, float, Mapping[Pass, float], Mapping[Pass, Terms]]


def fit_classes(seen: Sequence[Seen], beside: Sequence[Seen] = (), *, residuals: bool = True) -> dict[str, OpClass]:
    """All classes from every measurement; those `beside` are not fitted on, and say how far off the fit is.

    What was measured of a class that the roofline has not counts elsewhere (`home`); what the roofline has and no trace
    shows takes no time of its own (XLA fused it with another).
    """
    points, shares = _by_class(seen)
    others, _ = _by_class(beside)
    out = {
        f"{name}:{phase}": fit_class(found, shares[name, phase], others.get((name, phase), ()), residuals=residuals)
        for (name, phase), found in points.items()
    }
    for name, phase in {key for _, _, _, terms in seen for key in terms} - set(points):
        sizes = [max(t[name, phase].size_s, 1e-12) for _, _, _, t in seen if (name, phase) in t]
        out[f"{name}:{phase}"] = OpClass(
            launches=0, arithmetic=0, traffic=0, sizes=(min(sizes), max(sizes)), residuals=quantiles([1.0]),
            rows=len(sizes), jobs=len(sizes),
        )  # fmt: skip
    return dict(sorted(out.items()))


def _by_class(seen: Sequence[Seen]) -> tuple[dict[Pass, list[Point]], dict[Pass, float]]:
    """What was measured of each class, and its largest share of a step."""
    points: dict[Pass, list[Point]] = {}
    shares: dict[Pass, float] = {}
    for job, step_s, measured, terms in seen:
        homed: dict[Pass, float] = {}
        for key, seconds in measured.items():
            there = home(key, terms)
            homed[there] = homed.get(there, 0.0) + seconds
        for key, seconds in homed.items():
            if seconds > 0 and terms[key].roofline_s > 0:
                points.setdefault(key, []).append(Point(job, seconds, terms[key]))
                shares[key] = max(shares.get(key, 0.0), seconds / step_s)
    return points, shares
