"""Rows of the measurement table out of a profile: classes of kernels per step, collectives by size, the steps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simulator.calibration.readers.found import Found, Told, labelled, numbered, quantile
from simulator.calibration.readers.kernel_classes import scope_of
from simulator.calibration.readers.profile import Kernel, Profile, classed_share, sums, unclassed, uses
from simulator.results.measurement import Measurement


def found_in(profile: Profile, path: Path, form: str, told: Told, date: str) -> Found:
    """What a profile says: an `op` row per class, pass and device, `collective` rows, a `step` row.

    An op row's name is a scope where class and pass are all of one, else the class. Seconds are all kernels of a step
    together, the median over steps; kernels side by side count twice, as they do in the devices' own sums.
    """
    base = labelled(told, path, profile.date or date, profile.software)
    notes = list(profile.notes)
    rows: list[Measurement] = []
    devices = len(profile.devices)
    if profile.chips and not any(told.chip.partition("-")[0].upper() in chip.upper() for chip in profile.chips):
        notes.append(f"the chip is said to be {told.chip}, the trace was taken on {', '.join(profile.chips)}")
    for s in sums(profile):
        if not s.total:
            notes.append(
                f"{s.kind} {s.phase}".rstrip() + f" on device {s.device}: {s.calls} kernels of no time, no row"
            )
            continue
        times = [ns * 1e-9 for ns in s.per_step if ns]
        scope = scope_of(s.kind, s.phase, told.stack)
        seldom = f"in {len(times)} of {profile.step_count} steps" if len(times) < profile.step_count else ""
        note = "; ".join(filter(None, (s.kind if scope else "", seldom)))
        rows.append(
            replace(
                base, kind="op", name=scope or s.kind, phase=s.phase, calls=s.calls / len(times),
                device=s.device, devices=devices, note=note, **_spread(times),
            )
        )  # fmt: skip
    rows += _collectives(profile, base)
    if profile.steps:
        times = [(end - begin) * 1e-9 for begin, end in profile.steps if end > begin]
        if times:
            note = "ProfilerStep of the host; whether it is a whole training step the trace does not say"
            rows.append(replace(base, kind="step", name="step", devices=devices, note=note, **_spread(times)))
    return Found(str(path), form, numbered(rows, path), tuple(notes), summary(profile))


def _spread(times: list[float]) -> dict[str, Any]:
    several = len(times) > 1
    return {
        "seconds": quantile(times, 0.5), "statistic": "median", "samples": len(times),
        "p10_s": quantile(times, 0.1) if several else None, "p90_s": quantile(times, 0.9) if several else None,
    }  # fmt: skip


def _collectives(profile: Profile, base: Measurement) -> list[Measurement]:
    """One row for each kind, size and group of collectives whose bytes the profile states."""
    groups: dict[tuple[str, int, int, str, int], list[Kernel]] = defaultdict(list)
    for k in profile.kernels:
        if k.bytes and k.end > k.start:
            groups[k.kind, k.bytes, k.group_size, k.dtype, k.device].append(k)
    return [
        replace(
            base, kind="collective", name=kind, bytes=float(bytes_), group_size=size, dtype=dtype, device=device,
            devices=size, note="time of the kernel: waiting for the others is in it",
            **_spread([(k.end - k.start) * 1e-9 for k in kernels]),
        )
        for (kind, bytes_, size, dtype, device), kernels in sorted(groups.items())
    ]  # fmt: skip


def summary(profile: Profile) -> dict[str, Any]:
    """For people and JSON: classes with their time, the share classed, and each device's overlap, in seconds."""
    whole = sum(k.end - k.start for k in profile.kernels)
    return {
        "steps": len(profile.steps),
        "step_s": [(end - begin) * 1e-9 for begin, end in profile.steps],
        "kernels": len(profile.kernels),
        "kernel_s": whole * 1e-9,
        "classed_share": classed_share(profile.kernels),
        "unclassed": [{"name": name, "seconds": ns * 1e-9} for name, ns in unclassed(profile.kernels)],
        "chips": list(profile.chips),
        "classes": [
            {"class": s.kind, "phase": s.phase, "device": s.device, "kernels": s.calls, "seconds": s.total * 1e-9}
            for s in sums(profile)
        ],
        "devices": [_seconds(asdict(use)) for use in uses(profile.kernels)],
    }


def _seconds(use: dict[str, int]) -> dict[str, float | int]:
    return {name if name == "device" else f"{name}_s": v if name == "device" else v * 1e-9 for name, v in use.items()}
