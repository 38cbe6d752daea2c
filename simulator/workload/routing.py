"""Load on experts by a model of routing: tokens dropped by capacity, and the busiest rank over the mean.

`chance`: every token chooses k different experts of E uniformly and independently. That is the least imbalance real
routing can have; a trained router is at best near it (facts: Switch drops under 1 % at capacity factor 1.25).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from simulator.job.job import Capacity
from simulator.job.model import Moe
from simulator.numbers import Number, maximum, minimum


@dataclass(frozen=True, slots=True)
class Slots:
    """Capacity of one expert for one group of `group` tokens, and the tokens it drops by chance."""

    group: int
    per_expert: int
    dropped_fraction: float


def capacity_slots(capacity: Capacity, moe: Moe, group: int) -> Slots:
    """Slots per expert: max(minimum, round(factor x N x (k if basis is assignments) / E)), N the tokens of a group.

    Formulas of the code bases are in docs/model.md; MaxText's `int(max(ceil(N k / E) CF, CF))` differs by its own ceil
    before the factor, at most one slot in N k / E.
    """
    wanted = capacity.factor * group * (moe.top_k if capacity.basis == "assignments" else 1) / moe.experts
    # A billionth absorbs binary fractions: 1.1 x 10 is 11 slots, not 12 or 10.
    if capacity.rounding == "ceil":
        rounded = math.ceil(wanted - 1e-9)
    else:
        rounded = math.floor(wanted + (0.5 if capacity.rounding == "round" else 1e-9))
    slots = min(group, max(capacity.minimum, rounded))
    return Slots(group, slots, dropped_by_chance(group * moe.top_k / moe.experts, slots, group))


def dropped_by_chance(mean: float, slots: int, group: int) -> float:
    """Share of assignments over capacity when an expert's load is binomial with this mean over `group` tokens.

    E[(X - C)+] / mean, X ~ Binomial(group, mean/group): each token chooses an expert at most once. Exact summation from
    the top; beyond 10 standard deviations the terms are below 1e-20.
    """
    p = mean / group
    if slots >= group or p <= 0:
        return 0.0
    if p >= 1:
        return max(0.0, (group - slots) / group)
    sd = math.sqrt(group * p * (1 - p))
    lo = max(slots + 1, math.floor(mean - 10 * sd))
    hi = min(group, math.ceil(mean + 10 * sd) + 10)
    if lo > hi:
        return 0.0
    log_term = (
        math.lgamma(group + 1)
        - math.lgamma(lo + 1)
        - math.lgamma(group - lo + 1)
        + lo * math.log(p)
        + (group - lo) * math.log1p(-p)
    )
    term, odds, excess = math.exp(log_term), p / (1 - p), 0.0
    for x in range(lo, hi + 1):
        excess += (x - slots) * term
        term *= (group - x) / (x + 1) * odds
    if lo > slots + 1:  # everything below `lo` is under capacity only if slots >= lo; here it is not
        return max(0.0, 1 - slots / mean)
    return min(1.0, excess / mean)


def expected_maximum(n: Number) -> Number:
    """Expected largest of n independent standard normal values; 0 for one.

    Blom's approximation: the normal quantile of (n - 0.375)/(n + 0.25) (Blom 1958); within 2 % of the exact value for
    n >= 5 and 4 % below.
    """
    if isinstance(n, int | float):
        return 0.0 if n <= 1 else _normal_quantile((n - 0.375) / (n + 0.25))
    import numpy as np

    return np.vectorize(expected_maximum, otypes=[float])(n)


def _normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution for p > 0.5, by Newton's method on erfc."""
    x = math.sqrt(-2 * math.log(2 * (1 - p))) if p > 0.6 else (p - 0.5) * 2.5
    for _ in range(50):
        step = (0.5 * math.erfc(-x / math.sqrt(2)) - p) / (math.exp(-x * x / 2) / math.sqrt(2 * math.pi))
        x -= step
        if abs(step) < 1e-12:
            break
    return x


def busiest_over_mean(tokens: Number, moe: Moe, ranks: Number) -> Number:
    """Expected load of the busiest of `ranks` expert ranks over the mean, by chance, without capacity.

    A token's choices on a rank with e of E experts are hypergeometric: variance k (e/E)(1 - e/E)(E - k)/(E - 1) a
    token; over many tokens the load is normal, and the busiest rank is the expected maximum.
    """
    share = 1 / ranks
    k, experts = moe.top_k, moe.experts
    variance = tokens * k * share * (1 - share) * (experts - k) / max(1, experts - 1)
    mean = tokens * k * share
    peak = 1 + expected_maximum(ranks) * variance**0.5 / maximum(mean, 1e-9)
    # No rank can hold more than everything.
    return maximum(1.0, minimum(peak, ranks))


def zipf_busiest(moe: Moe, ranks: int, exponent: float) -> float:
    """Load of the busiest rank over the mean when expert popularity falls as 1/rank^exponent.

    Experts are dealt to ranks in order of popularity, round and round: the usual best effort of a planner.
    """
    weights = [1 / (i + 1) ** exponent for i in range(moe.experts)]
    loads = [sum(weights[r::ranks]) for r in range(ranks)]
    # An expert takes at most every token once: with k choices no share exceeds 1/k.
    return float(min(max(loads) / sum(weights) * ranks, ranks, moe.experts / moe.top_k))


def dirichlet_busiest(moe: Moe, ranks: int, concentration: float) -> float:
    """Load of the busiest rank over the mean when expert popularity is drawn from Dirichlet(concentration).

    A rank with e of E experts has a Beta(e a, (E - e) a) share: deviation sqrt(s(1-s)/(E a + 1)); the busiest is the
    expected maximum of `ranks` of them, taken as normal.
    """
    share = 1 / ranks
    deviation = (share * (1 - share) / (moe.experts * concentration + 1)) ** 0.5
    return float(min(1 + float(expected_maximum(ranks)) * deviation / share, ranks, moe.experts / moe.top_k))


def distinct_domains(moe: Moe, domains: Number) -> Number:
    """Domains (nodes) that hold at least one of a token's k experts, on average, experts spread evenly.

    N (1 - (1 - 1/N)^k), N limited to the top groups of a group-limited router (DeepSeek-V3: 8 experts on at most 4 of 8
    nodes). Independent choices: within 2 % of drawing without replacement for 64 experts and more.
    """
    reach = domains
    if moe.router.groups > 1:
        reach = maximum(1.0, domains * moe.router.top_groups / moe.router.groups)
    return reach * (1 - (1 - 1 / reach) ** moe.top_k)
