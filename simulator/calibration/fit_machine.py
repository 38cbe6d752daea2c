"""Fits a chip's own numbers on benchmarks: peak, efficiency over sizes, memory, launches, what sharing a host costs.

A number is fitted from the rows of the fewest devices at work (of two or more, where there are such: a device alone on
a CPU has all threads); those of more devices give `sharing`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Literal

import numpy as np

from hw_profiles.errors import QuestionError
from hw_profiles.schema import Chip, Curve, Quantity, Sharing
from simulator.kernels.roofline import Kernels
from simulator.results.measurement import Measurement

# Beyond the peak by more than this is not noise.
BEYOND = 1.05
# A peak nobody measured may be raised by a measurement; the data sheet's may not.
UNSURE = ("low", "assumption")
LARGE_STREAM, SMALL_CALL, LARGE_CALL = 2**22, 2**13, 2**20
FEWEST = 3


def base_devices(rows: Sequence[Measurement]) -> int:
    """Devices of a host at work in the benchmarks that the profile's own numbers are fitted on."""
    counts = sorted({r.devices_per_node for r in rows})
    several = [n for n in counts if n > 1]
    return (several or counts)[0]


def fit_machine(chip: Chip, rows: Sequence[Measurement]) -> tuple[Chip, list[str]]:
    """`chip` with what the kernel benchmarks `rows` say, and a line for each number that changed.

    QuestionError where a product is faster than a peak that is known for sure.
    """
    if not rows:
        return chip, []
    base = base_devices(rows)
    own = [r for r in rows if r.devices_per_node == base]
    notes: list[str] = []
    for dtype in sorted({r.dtype for r in own if r.flops}):
        chip = _matmul(chip, dtype, [r for r in own if r.dtype == dtype and r.flops], notes)
    chip = _memory(chip, own, notes)
    chip = _overheads(chip, own, notes)
    return chip, notes


def _quantity(value: float, rows: Sequence[Measurement], note: str) -> Quantity:
    source = f"measured: {rows[0].source}, {rows[0].software}, {len(rows)} rows"
    return Quantity(value=value, source=source, date=max(r.date for r in rows), confidence="medium", note=note)


def _rate(r: Measurement) -> float:
    return (r.flops or 0.0) / (r.seconds or 1.0)


def _matmul(chip: Chip, dtype: str, rows: list[Measurement], notes: list[str]) -> Chip:
    kernels = Kernels(chip)
    if dtype not in chip.peak_tflops:
        raise QuestionError(
            f"{rows[0].id}: {chip.name} has no {dtype} peak; its formats: {', '.join(chip.peak_tflops)}"
        )
    peak, best = kernels.peak(dtype), max(rows, key=_rate)
    if _rate(best) > peak * BEYOND:
        known = chip.peak_tflops[dtype]
        if known.confidence not in UNSURE:
            raise QuestionError(
                f"{best.id}: {_rate(best) * 1e-12:.4g} TFLOP/s is more than the {dtype} peak of {chip.name},"
                f" {known.value / chip.devices_per_chip:.4g} ({known.source}): is it another chip, or another unit?"
            )
        peak = _rate(best)
        new = _quantity(peak * chip.devices_per_chip * 1e-12, rows, f"the fastest product; was {known.value:g}")
        chip = chip.model_copy(update={"peak_tflops": {**chip.peak_tflops, dtype: new}})
        notes.append(f"{dtype} peak {known.value:g} -> {new.value:.4g} TFLOP/s: a product ran that fast")
    dense = [r for r in rows if r.name == "product"]
    if len(dense) < FEWEST:
        notes.append(f"{dtype} efficiency: {len(dense)} dense products, at least {FEWEST} are needed: not fitted")
        return chip
    points, ratios = _curve(kernels, dense, peak)
    curve = Curve(
        points=points, source=f"measured: {dense[0].source}, {dense[0].software}", date=max(r.date for r in dense),
        confidence="medium", basis="measured", rows=len(dense), residuals=quantiles(ratios),
    )  # fmt: skip
    chip = _efficiency(chip, matmul={**chip.efficiency.matmul, dtype: curve})
    notes.append(f"{dtype} products reach {points[0][1]:.2f} to {points[-1][1]:.2f} of the peak over their sizes")
    grouped = [r for r in rows if r.name == "grouped_product"]
    if len(grouped) >= FEWEST:
        table = Kernels(chip)
        slow = median((r.seconds or 0.0) / _modelled(table, r, peak) for r in grouped)
        chip = _efficiency(chip, grouped_slowdown=_quantity(max(slow, 1e-3), grouped, "median over groups and shapes"))
        notes.append(f"products per expert take {slow:.2f} times as long as dense ones of the same FLOPs")
    return chip


def _modelled(kernels: Kernels, r: Measurement, peak: float) -> float:
    """Seconds of a product by the curve, per group, without the slowdown of groups."""
    _, rows, depth, columns = r.shape
    fraction = kernels.curve(r.dtype)
    xs, ys = [np.log10(x) for x, _ in fraction.points], [y for _, y in fraction.points]
    reached = float(np.interp(np.log10(r.flops or 1.0), xs, ys))
    return (r.flops or 0.0) / (peak * reached * float(kernels.fill(rows, columns, depth)))


def _curve(
    kernels: Kernels, rows: list[Measurement], peak: float
) -> tuple[tuple[tuple[float, float], ...], list[float]]:
    """Points of a fraction of the peak that never falls with size, and measured over modelled seconds of the rows."""
    from scipy.optimize import isotonic_regression

    by_size: dict[float, list[float]] = defaultdict(list)
    for r in rows:
        _, n, depth, columns = r.shape
        by_size[r.flops or 0.0].append(_rate(r) / (peak * float(kernels.fill(n, columns, depth))))
    sizes = sorted(by_size)
    shares = np.array([min(1.0, median(by_size[s])) for s in sizes])
    smooth = np.clip(isotonic_regression(shares, weights=[len(by_size[s]) for s in sizes]).x, 1e-6, 1.0)
    points = tuple(zip(sizes, (float(y) for y in smooth), strict=True))
    ratios = []
    for r in rows:
        _, n, depth, columns = r.shape
        reached = float(np.interp(np.log10(r.flops or 1.0), np.log10(sizes), smooth))
        modelled = (r.flops or 0.0) / (peak * reached * float(kernels.fill(n, columns, depth)))
        ratios.append((r.seconds or 0.0) / modelled)
    return points, ratios


def quantiles(ratios: Sequence[float]) -> dict[Literal["p10", "p50", "p90"], float]:
    """The 10th, 50th and 90th percentile."""
    low, middle, high = (float(q) for q in np.quantile(np.asarray(ratios), (0.1, 0.5, 0.9)))
    return {"p10": low, "p50": middle, "p90": high}


def _memory(chip: Chip, rows: list[Measurement], notes: list[str]) -> Chip:
    streams = [r for r in rows if r.name == "stream" and r.bytes]
    largest = max((r.bytes or 0.0 for r in streams), default=0.0)
    large = [r for r in streams if (r.bytes or 0) >= max(2 * LARGE_STREAM, largest)]
    if not large:
        return chip
    rate = median((r.bytes or 0) / (r.seconds or 1.0) for r in large)
    share, sheet = rate / chip.device_memory_bytes_per_s, chip.memory_bandwidth_gb_per_s
    if share > 1:
        if sheet.confidence not in UNSURE:
            raise QuestionError(
                f"{large[0].id}: {rate * 1e-9:.4g} GB/s is more than the memory of {chip.name} gives,"
                f" {sheet.value / chip.devices_per_chip:.4g} ({sheet.source}): is it another chip, or another unit?"
            )
        new = _quantity(rate * chip.devices_per_chip * 1e-9, large, f"the largest streams; was {sheet.value:g}")
        chip = chip.model_copy(update={"memory_bandwidth_gb_per_s": new})
        notes.append(f"memory {sheet.value:g} -> {new.value:.4g} GB/s: streams ran that fast")
        share = 1.0
    notes.append(f"streams reach {share:.2f} of the memory bandwidth")
    caches = _caches(streams, rate)
    if caches:
        notes.append(f"streams of {caches[0][0]:,.0f} bytes move {caches[0][1]:.1f} times as fast as from memory")
    quantity = _quantity(share, large, f"streams of {LARGE_STREAM:,} bytes and more")
    return _efficiency(chip, memory=quantity, caches=caches)


def _caches(streams: list[Measurement], rate: float) -> tuple[tuple[float, float], ...]:
    """How many times as fast as from memory each size of stream moves, never rising with size; none for one size."""
    from scipy.optimize import isotonic_regression

    by_size: dict[float, list[float]] = defaultdict(list)
    for r in streams:
        by_size[r.bytes or 0.0].append((r.bytes or 0.0) / (r.seconds or 1.0) / rate)
    sizes = sorted(by_size)
    if len(sizes) < FEWEST:
        return ()
    faster = np.array([median(by_size[s]) for s in sizes])
    smooth = np.maximum(isotonic_regression(faster, increasing=False).x, 1.0)
    return tuple((s, float(y)) for s, y in zip(sizes, smooth, strict=True))


def _overheads(chip: Chip, rows: list[Measurement], notes: list[str]) -> Chip:
    for name, key in (("launch", "kernel_overhead_us"), ("program_launch", "host_step_overhead_us")):
        found = [r for r in rows if r.name == name]
        if found:
            value = median(r.seconds or 0.0 for r in found) * 1e6
            notes.append(f"{key} {getattr(chip, key).value:g} -> {value:.3g}")
            chip = chip.model_copy(update={key: _quantity(value, found, "median")})
    return chip


def _efficiency(chip: Chip, **changes: object) -> Chip:
    return chip.model_copy(update={"efficiency": chip.efficiency.model_copy(update=changes)})


def fit_sharing(rows: Sequence[Measurement]) -> tuple[Sharing, ...]:
    """What each number of devices at work costs over the base: medians over equal benchmarks."""
    kernels = [r for r in rows if r.kind == "kernel"]
    counts = sorted({r.devices_per_node for r in kernels})
    if len(counts) < 2:
        return ()
    base = base_devices(kernels)
    own = {_key(r): r for r in rows if r.devices_per_node == base}

    def ratio(count: int, wanted: str) -> float:
        found = [
            (r.seconds or 0.0) / (own[_key(r)].seconds or 1.0)
            for r in rows
            if r.devices_per_node == count and _key(r) in own and _part(r) == wanted
        ]
        return median(found) if found else 1.0

    return tuple(
        Sharing(
            devices=n, compute=ratio(n, "compute"), memory=ratio(n, "memory"), start=ratio(n, "start"),
            wire=ratio(n, "wire"),
        )
        for n in counts
    )  # fmt: skip


def _key(r: Measurement) -> tuple[object, ...]:
    return r.kind, r.name, r.shape, r.dtype, r.bytes, r.group_size, r.stride


def _part(r: Measurement) -> str:
    """Which factor of sharing a benchmark tells about."""
    if r.kind == "collective":
        size = r.bytes or 0.0
        return "start" if size <= SMALL_CALL else "wire" if size >= LARGE_CALL else ""
    if r.flops:
        return "compute"
    return "memory" if r.name == "stream" and (r.bytes or 0) >= 2 * LARGE_STREAM else ""
