"""Fits the networks of a chip on collectives, alone (benchmarks) and as they ran in steps, by level and family.

The model is the simulator's (network/collectives.py): a start, a time per step of the algorithm, and bytes on the wire
over a share of the rate, plus the part that stays on the device. All are at least zero; the share is at most one.
Within a host the rate is the profile's. Between hosts it is that of the cards each row was measured with, so that one
fit may see links of several rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.cluster import Cluster
from hw_profiles.loader import SCALE_OUT_NAMES, resolve_cluster
from hw_profiles.schema import Chip, CollectiveFamily, Quantity, Regime, Regimes, ScaleOut, ScaleUp, Sharing, Stepwise
from hw_profiles.sharing import at_work
from simulator.calibration.fit_machine import quantiles
from simulator.network.collectives import PASSES, collective_rate, merged_starts
from simulator.network.groups import level_members

FAMILIES = {"all_gather": "ring", "reduce_scatter": "ring", "all_reduce": "all_reduce", "all_to_all": "all_to_all"}
# Libraries between hosts need not scatter by a ring: gloo halves and doubles. Its bytes are told apart.
APART = {**FAMILIES, "reduce_scatter": "reduce_scatter"}
FEWEST = 6


@dataclass(frozen=True)
class Timed:
    """One timed collective.

    `weight` is what its calls take of all the time that is fitted, `card_bytes_per_s` the rate of a device's card where
    it went between hosts, else 0. An all-reduce may be merged of several `arrays`.
    """

    kind: str
    size: int
    bytes: float
    seconds: float
    devices: int
    in_step: bool
    weight: float = 1.0
    card_bytes_per_s: float = 0.0
    arrays: int = 1


# A row, the factor on its start, and the rate (bytes/s) that it was measured at.
Pace = tuple[Timed, float, float]


@dataclass(frozen=True)
class _Fit:
    """Start and step (us), wire time over that at the full rate, cost of what stays; measured over modelled.

    `array` is the start of a further array over the first's.
    """

    start: float
    step: float
    over: float
    stays: float
    ratios: list[float]
    told: str
    array: float


def card_rate(cluster: Cluster, size: int, stride: int) -> float | None:
    """Bytes/s of a device's card where a group crosses hosts, 0 where it stays in one; None where it does both."""
    members = level_members(cluster, size, stride)
    last = cluster.levels[-1] if cluster.levels else None
    if last is None or last.name not in SCALE_OUT_NAMES.values() or (len(members) > 1 and members[0] == size):
        return 0.0
    return last.bytes_per_s if len(members) == 1 or members[0] == 1 else None


def fit_network(chip: Chip, rows: Sequence[Timed], source: str, date: str) -> tuple[Chip, list[str]]:
    """`chip` with its networks fitted; a line for each family, and for what the rows cannot tell apart."""
    notes: list[str] = []
    inside = [r for r in rows if not r.card_bytes_per_s and r.kind in FAMILIES]
    outside = [r for r in rows if r.card_bytes_per_s and r.kind in FAMILIES]
    if inside:
        slow = [at_work(chip, r.devices) for r in inside]
        starts = [s.scale_up.latency_us.value / chip.scale_up.latency_us.value for s in slow]
        paces = list(zip(inside, starts, [s.scale_up_bytes_per_s for s in slow], strict=True))
        changes = _fitted(chip.scale_up, FAMILIES, paces, source, date, notes, chip.scale_up_bytes_per_s)
        chip = chip.model_copy(update={"scale_up": chip.scale_up.model_copy(update=changes)})
        chip = chip.model_copy(update={"sharing": tuple(_shared(chip, s, inside) for s in chip.sharing)})
    if outside and chip.scale_out is not None:
        found: list[str] = []
        paces = [(r, 1.0, r.card_bytes_per_s) for r in outside]
        changes = _fitted(chip.scale_out, APART, paces, source, date, found, None)
        notes += [f"between hosts, {note}" for note in found]
        chip = chip.model_copy(update={"scale_out": chip.scale_out.model_copy(update=changes)})
    return chip, notes


def _fitted(
    network: ScaleUp | ScaleOut,
    families: dict[str, str],
    paces: Sequence[Pace],
    source: str,
    date: str,
    notes: list[str],
    rate: float | None,
) -> dict[str, object]:
    """What changes in `network`; `rate` is its usual one, bytes/s.

    Between hosts (`rate` None) nothing stays on the device that would take longer on slower links.
    """
    collectives, changes = dict(network.collectives), dict[str, object]()
    fewest = min(row.devices for row, _, _ in paces)
    order: tuple[CollectiveFamily, ...] = ("ring", "reduce_scatter", "all_reduce", "all_to_all")
    for family in order:
        if family not in families.values():
            continue
        own = [p for p in paces if families[p[0].kind] == family]
        if rate is not None:
            own = _asked_for(own, fewest)
        if len(own) < FEWEST:
            notes.append(f"{family}: {len(own)} rows, at least {FEWEST} are needed: not fitted")
            continue
        fit = _fit(own, family, stays=rate is not None)
        # Rings and reductions share the network's one efficiency: what reductions take beyond it counts as more bytes.
        ring = changes.get("ring_efficiency", network.ring_efficiency)
        assert isinstance(ring, Quantity)
        passes = fit.over * ring.value if family in ("reduce_scatter", "all_reduce") else 1.0
        spread, share = quantiles(fit.ratios), 1 / fit.over
        wire = f"{share:.3g} of the card's rate" if rate is None else f"{share * rate * 1e-9:.3g} GB/s on the wire"
        notes.append(
            f"{family}: start {fit.start:.3g} us + {fit.step:.3g} us a step, {wire}; {len(own)} rows,"
            f" measured/modelled {spread['p10']:.2f} to {spread['p90']:.2f}{fit.told}"
        )
        unit = network.latency_us.value
        collectives[family] = Regimes(
            protocols=(Regime(start=fit.start / unit, step=fit.step / unit, share=1.0),), own=fit.stays, passes=passes,
            array=fit.array, source=source, date=date, confidence="medium", residuals=spread, rows=len(own),
        )  # fmt: skip
        if family in ("ring", "all_to_all"):
            name = "ring_efficiency" if family == "ring" else "all_to_all_efficiency"
            changes[name] = Quantity(value=share, source=source, date=date, confidence="medium")
    return {**changes, "collectives": collectives}


def _asked_for(paces: list[Pace], fewest: int) -> list[Pace]:
    """Of one host's collectives, those that tell most; the others where there are too few of them."""
    # What ran in steps is what is asked for; those alone find data in caches, and nobody late.
    within = [p for p in paces if p[0].in_step]
    own = within if len(within) >= FEWEST else paces
    # Those of the fewest devices at work; more of them are slower by `sharing`, fitted after.
    base = [p for p in own if p[0].devices == fewest]
    return base if len(base) >= FEWEST else own


def _shared(chip: Chip, known: Sharing, rows: Sequence[Timed]) -> Sharing:
    """`known` with what collectives in steps show: factors for a start and for bytes, of all and of each family.

    How much later a call of some devices starts, beside others that compute, is told by groups of several sizes.
    """
    own = [r for r in rows if r.devices == known.devices and r.in_step]
    if len(own) < FEWEST or known.devices == min(r.devices for r in rows):
        return known
    alone = resolve_cluster({"chip": chip.name, "devices": known.devices}, chip=chip.model_copy(update={"sharing": ()}))
    start, wire, _ = _factors(alone, own, (known.start, known.wire), waits=False)
    apart: dict[CollectiveFamily, tuple[float, float]] = {}
    waits: dict[Stepwise, float] = {}
    stepwise: dict[CollectiveFamily, Stepwise] = {"ring": "ring", "all_to_all": "all_to_all"}
    families: tuple[CollectiveFamily, ...] = ("ring", "all_reduce", "all_to_all")
    for family in families:
        members = [r for r in own if FAMILIES[r.kind] == family]
        if len(members) >= FEWEST:
            wait = family in stepwise and len({r.size for r in members}) > 1
            own_start, own_wire, waited = _factors(alone, members, (start, wire), waits=wait)
            apart[family] = own_start, own_wire
            if wait:
                waits[stepwise[family]] = waited
    return known.model_copy(update={"start": start, "wire": wire, "families": apart, "waits": waits})


def _factors(
    alone: Cluster, rows: Sequence[Timed], guess: tuple[float, float], *, waits: bool
) -> tuple[float, float, float]:
    """By how much starts and bytes of `rows` take longer than `alone` has them; and starts beside all others' compute.

    The last is 0 unless it is asked for (`waits`).
    """
    from scipy.optimize import least_squares

    lines = [collective_rate(alone, r.kind, r.size, 1) for r in rows]
    starts = np.array([line.latency_s * merged_starts(alone, r.arrays) for r, line in zip(rows, lines, strict=True)])
    wires = np.array([r.bytes * line.seconds_per_byte for r, line in zip(rows, lines, strict=True)])
    outside = np.array([1 - min(r.size, alone.devices) / alone.devices for r in rows])
    seconds, weights = np.array([r.seconds for r in rows]), _weights(rows)

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        model = x[0] * (1 + x[2] * outside) * starts + x[1] * wires
        out: NDArray[np.float64] = np.log(model / seconds) * weights
        return out

    low, high = [0.1, 0.1, 0.0], [1e3, 1e3, 1e2 if waits else 1e-9]
    x = least_squares(off, np.clip((*guess, 0.5), low, high), bounds=(low, high), loss="soft_l1").x
    return float(x[0]), float(x[1]), float(x[2]) if waits else 0.0


def _weights(rows: Sequence[Timed]) -> NDArray[np.float64]:
    """A call that takes most of the time has to come out; one of a few bytes now and then does not."""
    share = np.array([r.weight for r in rows])
    out: NDArray[np.float64] = np.clip(np.sqrt(share / share.mean()), 0.1, 10.0)
    return out


def _fit(paces: Sequence[Pace], family: str, *, stays: bool) -> _Fit:
    """Robust least squares of the logarithms."""
    from scipy.optimize import least_squares

    rows = [row for row, _, _ in paces]
    starts, rates = np.array([(start, rate) for _, start, rate in paces]).T
    hops = np.array([1.0 if family == "all_reduce" and r.size == 2 else r.size - 1.0 for r in rows])
    bytes_ = np.array([r.bytes for r in rows])
    size = np.array([float(r.size) for r in rows])
    wire = np.array([PASSES.get(r.kind, 1.0) for r in rows]) * bytes_ * (size - 1) / size / rates
    own = bytes_ / size / rates
    arrays = np.array([float(r.arrays) for r in rows])
    seconds = np.array([r.seconds for r in rows])
    weights = _weights(rows)

    def model(x: NDArray[np.float64]) -> NDArray[np.float64]:
        begun = (x[0] + x[1] * hops) * 1e-6 * starts * (1 + x[4] * (arrays - 1))
        out: NDArray[np.float64] = begun + x[2] * (wire + x[3] * own)
        return out

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = np.log(model(x) / seconds) * weights
        return out

    several = len(set(hops.tolist())) > 1
    # Without a merged call nothing tells what a further array costs: as much as the first.
    merged = 0.0 if arrays.max() > 1 else 1 - 1e-9
    low, high = [0.0, 0.0, 1.0, 0.0, merged], [1e6, 1e6 if several else 1e-9, 1e6, 1e3 if stays else 1e-9, 1.0]
    guess = np.clip([float(np.median(seconds)) * 1e5, 0.1 if several else 0.0, 2.0, 0.1, 0.5], low, high)
    x = least_squares(off, guess, bounds=(low, high), loss="soft_l1", x_scale=[10, 10, 1, 1, 1]).x
    told = "" if several else "; groups of one size only: start and steps cannot be told apart"
    ratios = [float(r) for r in seconds / model(x)]
    return _Fit(float(x[0]), float(x[1]), float(x[2]), float(x[3]), ratios, told, float(x[4]))
