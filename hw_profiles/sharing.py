"""A host's devices share its cores and memory: the profile of one of them while so many are at work."""

from __future__ import annotations

from math import exp, log

from hw_profiles.schema import Chip, CollectiveFamily, Curve, Quantity, Regimes, Sharing


def at_work(chip: Chip, devices: int) -> Chip:
    """`chip` as it is while `devices` of one host are at work at once; itself where its profile says nothing of it.

    Between two measured numbers of devices factors go by their logarithms; below the fewest they stay, beyond the most
    all but the start of a collective grow with the number of devices, since cores are shared out. What is left to say,
    since it depends on the groups of a job, is how much of a call is filled: `sharing` of the result.
    """
    if not chip.sharing:
        return chip
    s = factors(chip.sharing, devices)
    efficiency = chip.efficiency
    curves = {name: _slower(curve, s.compute) for name, curve in efficiency.matmul.items()}
    slower = efficiency.model_copy(
        update={
            "matmul": curves,
            "attention_forward": _scaled(efficiency.attention_forward, 1 / s.compute),
            "attention_backward": _scaled(efficiency.attention_backward, 1 / s.compute),
            "memory": _scaled(efficiency.memory, 1 / s.memory),
        }
    )
    up = chip.scale_up
    wire = {"total_gb_per_s": up.total_gb_per_s, "link_gb_per_s": up.link_gb_per_s}
    network = up.model_copy(
        update={
            "latency_us": _scaled(up.latency_us, s.start),
            **{name: _scaled(q, 1 / s.wire) for name, q in wire.items() if q is not None},
            "collectives": {name: _apart(fit, s, name) for name, fit in up.collectives.items()},
        }
    )
    return chip.model_copy(
        update={
            "efficiency": slower,
            "scale_up": network,
            "kernel_overhead_us": _scaled(chip.kernel_overhead_us, s.compute),
            "sharing": (_filled(s),) if s.filled else (),
        }
    )


def _filled(s: Sharing) -> Sharing:
    """`s` with no factor but what it says of calls."""
    return Sharing(devices=s.devices, compute=1, memory=1, start=1, wire=1, filled=s.filled)


def factors(points: tuple[Sharing, ...], devices: int) -> Sharing:
    """The factors for `devices`, between the measured ones."""
    known = sorted(points, key=lambda p: p.devices)
    first, last = known[0], known[-1]
    if devices <= first.devices:
        return first.model_copy(update={"devices": devices})
    if devices >= last.devices:
        more = devices / last.devices
        grown = {name: getattr(last, name) * more for name in ("compute", "memory", "wire")}
        apart = {name: (start, wire * more) for name, (start, wire) in last.families.items()}
        return last.model_copy(update={"devices": devices, **grown, "families": apart})
    i = next(i for i, p in enumerate(known) if p.devices > devices)
    a, b = known[i - 1], known[i]
    share = log(devices / a.devices) / log(b.devices / a.devices)
    names = ("compute", "memory", "start", "wire")

    def between(low: float, high: float) -> float:
        return exp(log(low) * (1 - share) + log(high) * share)

    apart = {}
    for family in {**a.families, **b.families}:
        (low_start, low_wire), (high_start, high_wire) = a.of(family), b.of(family)
        apart[family] = between(low_start, high_start), between(low_wire, high_wire)
    filled = a.filled * (1 - share) + b.filled * share
    waits = {f: a.waits.get(f, 0.0) * (1 - share) + b.waits.get(f, 0.0) * share for f in {**a.waits, **b.waits}}
    grown = {n: between(getattr(a, n), getattr(b, n)) for n in names}
    return Sharing(devices=devices, families=apart, waits=waits, filled=filled, **grown)


def _apart(fit: Regimes, s: Sharing, family: CollectiveFamily) -> Regimes:
    """A family's lines, where its factors differ from those that the whole network is given."""
    start, wire = (own / of_all for own, of_all in zip(s.of(family), (s.start, s.wire), strict=True))
    waits = s.waits.get(family, 0.0) if family in ("ring", "all_to_all") else 0.0
    # A start of 1 + waits (1 - n / D) is less by waits / D a step of n - 1.
    first, less = start * (1 + waits - waits / s.devices), start * waits / s.devices
    lines = tuple(
        p.model_copy(update={"start": p.start * first, "step": p.step * start - p.start * less}) for p in fit.protocols
    )
    return fit.model_copy(update={"protocols": lines, "passes": fit.passes * wire, "own": fit.own * wire})


def _slower(curve: Curve, factor: float) -> Curve:
    points = tuple((flops, min(1.0, share / factor)) for flops, share in curve.points)
    return curve.model_copy(update={"points": points})


def _scaled(q: Quantity, factor: float) -> Quantity:
    return q.model_copy(update={"value": q.value * factor})
