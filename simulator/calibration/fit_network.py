"""Fits the network of one host on collectives, alone (benchmarks) and as they ran in steps, by family.

The model is the simulator's (network/collectives.py): a start, a time per step of the algorithm, and bytes on the wire
over a share of the rate, plus the part that stays on the device. All are at least zero; the share is at most one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip, CollectiveFamily, Quantity, Regime, Regimes, ScaleUp, Sharing
from hw_profiles.sharing import at_work
from simulator.calibration.fit_machine import quantiles
from simulator.network.collectives import PASSES, collective_rate

FAMILIES = {"all_gather": "ring", "reduce_scatter": "ring", "all_reduce": "all_reduce", "all_to_all": "all_to_all"}
FEWEST = 6


@dataclass(frozen=True)
class Timed:
    """One timed collective; `weight` is what its calls take of all the time that is fitted."""

    kind: str
    size: int
    bytes: float
    seconds: float
    devices: int
    in_step: bool
    weight: float = 1.0


def fit_network(chip: Chip, rows: Sequence[Timed], source: str, date: str) -> tuple[Chip, list[str]]:
    """`chip` with its scale-up network fitted; a line for each family, and for what the rows cannot tell apart."""
    notes: list[str] = []
    if not any(r.kind in FAMILIES for r in rows):
        return chip, notes
    up = chip.scale_up
    collectives = dict(up.collectives)
    changes: dict[str, object] = {}
    fewest = min(r.devices for r in rows)
    families: tuple[CollectiveFamily, ...] = ("ring", "all_reduce", "all_to_all")
    for family in families:
        own = [r for r in rows if FAMILIES.get(r.kind) == family]
        # What ran in steps is what is asked for; those alone find data in caches, and nobody late.
        within = [r for r in own if r.in_step]
        own = within if len(within) >= FEWEST else own
        # Those of the fewest devices at work; more of them are slower by `sharing`, fitted after.
        base = [r for r in own if r.devices == fewest]
        own = base if len(base) >= FEWEST else own
        if len(own) < FEWEST:
            notes.append(f"{family}: {len(own)} rows, at least {FEWEST} are needed: not fitted")
            continue
        start, step, share, stays, ratios, told = _fit(chip, own, family, changes)
        spread, wire = quantiles(ratios), share * chip.scale_up_bytes_per_s * 1e-9
        notes.append(
            f"{family}: start {start:.3g} us + {step:.3g} us a step, {wire:.3g} GB/s on the wire; {len(own)} rows,"
            f" measured/modelled {spread['p10']:.2f} to {spread['p90']:.2f}{told}"
        )
        unit = up.latency_us.value
        collectives[family] = Regimes(
            protocols=(Regime(start=start / unit, step=step / unit, share=1.0),), own=stays, source=source, date=date,
            confidence="medium", residuals=spread, rows=len(own),
        )  # fmt: skip
        if family != "all_reduce":
            name = "ring_efficiency" if family == "ring" else "all_to_all_efficiency"
            changes[name] = Quantity(value=share, source=source, date=date, confidence="medium")
    new: ScaleUp = up.model_copy(update={**changes, "collectives": collectives})
    chip = chip.model_copy(update={"scale_up": new})
    return chip.model_copy(update={"sharing": tuple(_shared(chip, s, rows) for s in chip.sharing)}), notes


def _shared(chip: Chip, known: Sharing, rows: Sequence[Timed]) -> Sharing:
    """`known` with its factors for a collective's start and bytes as collectives in steps show them, if enough do."""
    from scipy.optimize import least_squares

    own = [r for r in rows if r.devices == known.devices and r.in_step and r.kind in FAMILIES]
    if len(own) < FEWEST or known.devices == min(r.devices for r in rows):
        return known
    alone = resolve_cluster({"chip": chip.name, "devices": known.devices}, chip=chip.model_copy(update={"sharing": ()}))
    lines = [collective_rate(alone, r.kind, r.size, 1) for r in own]
    starts = np.array([line.latency_s for line in lines])
    wires = np.array([r.bytes * line.seconds_per_byte for r, line in zip(own, lines, strict=True)])
    seconds, weights = np.array([r.seconds for r in own]), _weights(own)

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = np.log((x[0] * starts + x[1] * wires) / seconds) * weights
        return out

    x = least_squares(off, [known.start, known.wire], bounds=(0.1, 1e3), loss="soft_l1").x
    return known.model_copy(update={"start": float(x[0]), "wire": float(x[1])})


def _weights(rows: Sequence[Timed]) -> NDArray[np.float64]:
    """A call that takes most of the time has to come out; one of a few bytes now and then does not."""
    share = np.array([r.weight for r in rows])
    out: NDArray[np.float64] = np.clip(np.sqrt(share / share.mean()), 0.1, 10.0)
    return out


def _fit(
    chip: Chip, rows: list[Timed], family: str, changes: dict[str, object]
) -> tuple[float, float, float, float, list[float], str]:
    """Start and step (us), share of the rate, cost of what stays; measured over modelled; what cannot be told apart."""
    from scipy.optimize import least_squares

    slow = [at_work(chip, r.devices) for r in rows]
    starts = np.array([s.scale_up.latency_us.value / chip.scale_up.latency_us.value for s in slow])
    rates = np.array([s.scale_up_bytes_per_s for s in slow])
    hops = np.array([1.0 if family == "all_reduce" and r.size == 2 else r.size - 1.0 for r in rows])
    bytes_ = np.array([r.bytes for r in rows])
    size = np.array([float(r.size) for r in rows])
    wire = np.array([PASSES.get(r.kind, 1.0) for r in rows]) * bytes_ * (size - 1) / size / rates
    stays = bytes_ / size / rates
    seconds = np.array([r.seconds for r in rows])
    weights = _weights(rows)
    # The ring's rate is the all-reduce's too: the simulator has one for both.
    ring = changes.get("ring_efficiency")
    fixed = 1 / ring.value if family == "all_reduce" and isinstance(ring, Quantity) else None

    def model(x: NDArray[np.float64]) -> NDArray[np.float64]:
        over = x[2] if fixed is None else fixed
        out: NDArray[np.float64] = (x[0] + x[1] * hops) * 1e-6 * starts + over * (wire + x[3] * stays)
        return out

    def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = np.log(model(x) / seconds) * weights
        return out

    several = len(set(hops.tolist())) > 1
    low, high = [0.0, 0.0, 1.0, 0.0], [1e6, 1e6 if several else 1e-9, 1e6, 1e3]
    guess = [float(np.median(seconds)) * 1e5, 0.1 if several else 0.0, 2.0, 0.1]
    x = least_squares(off, np.clip(guess, low, high), bounds=(low, high), loss="soft_l1", x_scale=[10, 10, 1, 1]).x
    told = "" if several else "; groups of one size only: start and steps cannot be told apart"
    ratios = [float(r) for r in seconds / model(x)]
    return float(x[0]), float(x[1]), 1 / float(x[2]) if fixed is None else 1 / fixed, float(x[3]), ratios, told
