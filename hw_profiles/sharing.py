"""A host's devices share its cores and memory: the profile of one of them while so many are at work."""

from __future__ import annotations

from math import exp, log

from hw_profiles.schema import Chip, CollectiveFamily, Curve, Quantity, Regimes, Sharing


def at_work(chip: Chip, devices: int) -> Chip:
    """`chip` as it is while `devices` of one host are at work at once; itself where its profile says nothing of it.

    Between two measured numbers of devices factors go by their logarithms; below the fewest they stay, beyond the most
    all but the start of a collective grow with the number of devices, since cores are shared out.
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
            "sharing": (),
        }
    )


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
    return Sharing(devices=devices, families=apart, **{n: between(getattr(a, n), getattr(b, n)) for n in names})


def _apart(fit: Regimes, s: Sharing, family: CollectiveFamily) -> Regimes:
    """A family's lines, where its factors differ from those that the whole network is given."""
    start, wire = (own / of_all for own, of_all in zip(s.of(family), (s.start, s.wire), strict=True))
    lines = tuple(p.model_copy(update={"start": p.start * start, "step": p.step * start}) for p in fit.protocols)
    return fit.model_copy(update={"protocols": lines, "passes": fit.passes * wire, "own": fit.own * wire})


def _slower(curve: Curve, factor: float) -> Curve:
    points = tuple((flops, min(1.0, share / factor)) for flops, share in curve.points)
    return curve.model_copy(update={"points": points})


def _scaled(q: Quantity, factor: float) -> Quantity:
    return q.model_copy(update={"value": q.value * factor})
