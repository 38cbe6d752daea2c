"""Load on experts by a model of routing: tokens dropped by capacity, and the busiest rank over the mean.

`chance`: every token chooses k different experts of E uniformly and independently. That is the least imbalance real
routing can have; a trained router is at best near it (facts: Switch drops under 1 % at capacity factor 1.25).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from simulator.job.job import Capacity
from simulator.job.model import Moe
from simulator.job.popularity import chosen_shares, dirichlet_popularity
from simulator.job.rules import slots_per_expert
from simulator.numbers import Number, maximum, minimum


@dataclass(frozen=True, slots=True)
class Slots:
    """Capacity of one expert for one group of `group` tokens, and the tokens it drops by chance."""

    group: Number
    per_expert: Number
    dropped_fraction: Number


def capacity_slots(capacity: Capacity, moe: Moe, group: int) -> Slots:
    """Slots per expert for a group of `group` tokens (the code bases' formulas: docs/model.md), and chance's drops."""
    slots = slots_per_expert(capacity, moe.top_k, moe.experts, group)
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


def zipf_busiest(
    moe: Moe,
    ranks: int,
    exponent: float,
    tokens: float | None = None,
    placement: str = "contiguous",
    replicas: int = 0,
) -> float:
    """Expected load of the busiest rank over the mean when expert popularity falls as 1/rank^exponent.

    `tokens` of a group add the noise of their choices; without them the popularity alone counts.
    """
    return _skewed_busiest(moe.experts, moe.top_k, ranks, exponent, None, tokens, placement, replicas)


def dirichlet_busiest(
    moe: Moe,
    ranks: int,
    concentration: float,
    tokens: float | None = None,
    placement: str = "contiguous",
    replicas: int = 0,
) -> float:
    """Expected load of the busiest rank over the mean when expert popularity is drawn from Dirichlet(concentration)."""
    return _skewed_busiest(moe.experts, moe.top_k, ranks, None, concentration, tokens, placement, replicas)


def choice_spread(shares: Number, top_k: int, rounds: int = 8) -> Number:
    """Numbers c, [..., E], such that the counts of one token vary with diag(c) - c c^T / sum(c).

    The covariance of the most random choice of k different experts with given shares (Hajek 1964); c is found by fixed
    point so that each variance is share (1 - share). Exact for equal shares and for k = 1.
    """
    import numpy as np

    if top_k == 1:
        return shares
    variance = shares * (1 - shares)
    c = variance * (shares.shape[-1] / max(1, shares.shape[-1] - 1))
    for _ in range(rounds):
        # Below one half the fixed point is quick; a single expert with most of the spread only nears it.
        c = variance / (1 - np.minimum(0.95, c / np.maximum(c.sum(axis=-1, keepdims=True), 1e-300)))
    return c


# Numbers drawn for one expectation: milliseconds at most, and within 1 % of the limit.
SAMPLE, NOISE = 100_000, 10_000


@lru_cache(maxsize=1024)
def _skewed_busiest(
    experts: int,
    top_k: int,
    ranks: int,
    exponent: float | None,
    concentration: float | None,
    tokens: float | None,
    placement: str,
    replicas: int,
) -> float:
    """Mean of the busiest rank's load over the mean, by a sample with a fixed seed."""
    import numpy as np

    if ranks == 1:
        return 1.0
    loads = _skewed_loads(experts, top_k, ranks, exponent, concentration, placement, replicas)
    if tokens:
        # The spread of the average expert of a rank is precise enough for noise on top of the skew.
        spread = loads if top_k == 1 else loads * np.maximum(1 - loads * ranks / experts, 0.0)
        z = np.random.default_rng(1).standard_normal((max(1, NOISE // ranks), ranks))
        # Whichever sample is shorter is gone through again.
        rows = max(len(z), len(loads))
        loads, spread = np.resize(loads, (rows, ranks)), np.resize(spread, (rows, ranks))
        z = np.resize(z, (rows, ranks)) * np.sqrt(spread / tokens)
        total = np.maximum(spread.sum(axis=-1, keepdims=True), 1e-300)
        loads = loads + z - spread / total * z.sum(axis=-1, keepdims=True)
    return float(min(loads.max(axis=-1).mean() * ranks / top_k, ranks, experts / top_k))


@lru_cache(maxsize=64)
def _skewed_loads(
    experts: int,
    top_k: int,
    ranks: int,
    exponent: float | None,
    concentration: float | None,
    placement: str,
    replicas: int,
) -> Number:
    """Choices of a token that fall on each rank, [draws, R]."""
    import numpy as np

    rng = np.random.default_rng(0)
    each, draws = experts // ranks, max(16, SAMPLE // experts)
    if exponent is not None:
        shares = chosen_shares(np.arange(1.0, experts + 1)[None] ** -exponent, top_k)
        if placement == "contiguous":
            shares = rng.permuted(np.repeat(shares, draws, axis=0), axis=1)
    else:
        assert concentration is not None
        if placement == "contiguous" and experts * concentration > 20 * top_k:
            # No expert comes near every token: a rank's popularity is one gamma variate.
            units = dirichlet_popularity(rng, concentration * each, (max(16, SAMPLE // 2 // ranks), ranks))
            return top_k * units / units.sum(axis=-1, keepdims=True)
        # Where few experts have it all, the busiest rank differs most from draw to draw.
        draws *= 4 if placement == "contiguous" else 1
        shares = chosen_shares(dirichlet_popularity(rng, concentration, (draws, experts)), top_k)
    if placement == "balanced":
        return _packed(shares, ranks, each, min(replicas, experts - each))
    if placement == "dealt":
        return -np.sort(-shares, axis=-1).reshape(-1, each, ranks).sum(axis=1)
    return shares.reshape(-1, ranks, each).sum(axis=-1)


def _packed(shares: Number, ranks: int, each: int, replicas: int) -> Number:
    """Loads of ranks, [draws, R], at the lower bound of packing: what a good packing comes close to.

    The i-th rank holds at least the i-th largest copy and the smallest that fill its slots; the others are level.
    """
    import numpy as np

    falling = -np.sort(-shares, axis=-1)
    copies = np.ones_like(falling)
    if replicas:
        low, high = falling.sum(axis=-1, keepdims=True) / (shares.shape[-1] * ranks), falling[:, :1]
        for _ in range(30):
            middle = (low + high) / 2
            fits = np.clip(np.ceil(falling / middle), 1, ranks).sum(axis=-1, keepdims=True)
            fits = fits <= shares.shape[-1] + ranks * replicas
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        copies = np.clip(np.ceil(falling / high), 1, ranks)
    floors = np.zeros((len(falling), ranks))
    for row, (values, counts) in enumerate(zip(falling, copies.astype(int), strict=True)):
        single = np.sort(np.repeat(values / counts, counts))[::-1]
        floors[row] = single[:ranks] + (single[len(single) - each + 1 :].sum() if not replicas else 0.0)
    total = shares.sum(axis=-1, keepdims=True)
    above = np.cumsum(floors, axis=-1) - floors
    levels = (total - above) / (ranks - np.arange(ranks))
    first = np.minimum((floors > levels).sum(axis=-1, keepdims=True), ranks - 1)
    return np.maximum(floors, np.take_along_axis(levels, first, axis=-1))


def distinct_domains(moe: Moe, domains: Number) -> Number:
    """Domains (nodes) that hold at least one of a token's k experts, on average, experts spread evenly.

    N (1 - (1 - 1/N)^k), N limited to the top groups of a group-limited router (DeepSeek-V3: 8 experts on at most 4 of 8
    nodes). Independent choices: within 2 % of drawing without replacement for 64 experts and more.
    """
    reach = domains
    if moe.router.groups > 1:
        reach = maximum(1.0, domains * moe.router.top_groups / moe.router.groups)
    return reach * (1 - (1 - 1 / reach) ** moe.top_k)
