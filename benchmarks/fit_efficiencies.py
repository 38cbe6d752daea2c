"""Latency and efficiencies of the scale-up network of a chip, from NCCL sweeps inside a node; for `fit_profiles`.

One line for all sizes: steps x latency + bytes / (wire rate x efficiency). `fit_links` fits what smaller messages do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.fit_tables import Row, number, quantiles, sources
from hw_profiles import Chip

# From 64 MiB the rate is close to its limit; at 16 MiB rings take 1.2 to 1.5 times what latency and limit explain.
LARGE_BYTES = 64 * 2**20
SMALL_BYTES = 2**10


def collective_terms(r: Row) -> tuple[float, float, float]:
    """Ring or exchange steps, bytes on a device's wire, and measured seconds of a row."""
    n, size = number(r, "n_devices"), number(r, "message_bytes_per_rank")
    passes = 2.0 if r["collective"] == "all_reduce" else 1.0
    wire = passes * size * (n - 1) / n
    steps = 1.0 if r["collective"] == "all_to_all" else passes * (n - 1)
    seconds = number(r, "time_us") * 1e-6 if r["time_us"] else wire / (number(r, "busbw_GBps") * 1e9)
    return steps, wire, seconds


def is_ring(r: Row) -> bool:
    """Whether NCCL ran a ring: not an all-reduce inside the switch (NVLS, on Hopper and later)."""
    if r["collective"] in ("all_gather", "reduce_scatter"):
        return True
    no_switch = r["dtype"] == "int8" or "Ring" in r["library"] or r["chip"].startswith(("A100", "V100"))
    return r["collective"] == "all_reduce" and no_switch


def in_switch(r: Row) -> bool:
    """Whether NCCL surely added inside the switch."""
    return r["collective"] == "all_reduce" and "NVLS" in r["library"] and "disabled" not in r["library"]


def usable(r: Row, chip: Chip) -> bool:
    """Whether the row is a clean sweep on this chip inside one node with four devices or more.

    Groups of two reach less (one peer, fewer channels) and are left out.
    """
    return (
        r["profile"] == chip.name
        and r["fit"] == "yes"
        and r["n_nodes"] in ("1", "1.0")
        and bool(r["message_bytes_per_rank"])
        and bool(r["time_us"] or r["busbw_GBps"])
        and number(r, "n_devices") >= 4
        and number(r, "message_bytes_per_rank") >= SMALL_BYTES
    )


def switch_rows(chip: Chip, rows: Sequence[Row]) -> list[Row]:
    """Large all-reduces that surely ran in the switch."""
    mine = [r for r in rows if usable(r, chip)]
    return [r for r in mine if in_switch(r) and number(r, "message_bytes_per_rank") >= LARGE_BYTES]


def link_fits(chip: Chip, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Latency of a ring step (relative least squares, all sizes); with it, efficiencies (medians, large messages)."""
    speed = chip.scale_up_bytes_per_s
    mine = [r for r in rows if usable(r, chip)]
    out: dict[str, dict[str, Any]] = {}
    ring = [r for r in mine if is_ring(r)]
    if len(ring) < 8:
        return out
    steps, wire, seconds = (np.array(x) for x in zip(*map(collective_terms, ring), strict=True))
    columns = np.stack([steps / seconds, wire / speed / seconds], axis=1)
    latency_s = max(0.0, float(np.linalg.lstsq(columns, np.ones(len(ring)), rcond=None)[0][0]))
    groups = sorted({int(number(r, "n_devices")) for r in ring})
    out["nvlink_latency_us"] = {
        "value": round(latency_s * 1e6, 2),
        "source": sources(ring),
        "rows": len(ring),
        "note": f"one ring step, all sizes, groups of {', '.join(map(str, groups))}",
    }
    exchange = [r for r in mine if r["collective"] == "all_to_all"]
    for name, some in (("nvlink_ring_efficiency", ring), ("nvlink_all_to_all_efficiency", exchange)):
        large = [r for r in some if number(r, "message_bytes_per_rank") >= LARGE_BYTES]
        if len(large) >= 4:
            terms = [collective_terms(r) for r in large]
            share = float(np.median([w / speed / max(t - s * latency_s, 1e-9) for s, w, t in terms]))
            ratios = [t / (s * latency_s + w / (speed * share)) for s, w, t in terms]
            spread = quantiles(ratios)
            out[name] = {
                "value": round(share, 3),
                "source": sources(large),
                "rows": len(large),
                "residuals": spread,
                "note": f"rows from 64 MiB; measured/modelled p10 {spread['p10']:g}, p90 {spread['p90']:g}",
            }
    switch = switch_rows(chip, rows)
    if switch:
        # The port carries the buffer once up and once down.
        shares = [number(r, "message_bytes_per_rank") / speed / collective_terms(r)[2] for r in switch]
        out["nvlink_in_switch_efficiency"] = {
            "value": round(float(np.median(shares)), 3),
            "source": sources(switch),
            "rows": len(switch),
        }
    return out
