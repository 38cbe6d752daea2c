"""Fit the efficiencies of the chip files: `python -m benchmarks.fit_profiles DIRECTORY [--chip NAME] [--json]`.

DIRECTORY holds `kernels.csv` and `collectives.csv`. Fitted are, per chip: the share of the data-sheet memory bandwidth
that streams reach; the fixed time of a kernel; per number format, the fraction of the peak over FLOPs (schema.Curve);
the slow-down of grouped products; latency and efficiencies of the scale-up network (fit_efficiencies.py). The models
are those of `simulator/kernels`, written once more here so that this command imports the ground floor only. Every fit
prints its rows and the quantiles p10, p50, p90 of measured/modelled time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls

from benchmarks.fit_efficiencies import link_fits
from benchmarks.fit_tables import CHIPS, Row, number, quantiles, read_rows, sources
from hw_profiles import Chip, QuestionError, load_chip

Array = NDArray[np.float64]

# fp16 has the peak and the kernels of bf16 on these chips; nvfp4 carries a scale of one byte for 16 values.
FORMATS = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "fp4"}
OPERAND_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "fp4": 0.5625}
PEAK_OF = {"fp8_block": "fp8"}
STREAMS = {"hbm_copy", "hbm_triad", "hbm_add", "hbm_scale", "hbm_mul", "hbm_stream"}
QUANTISING_LIBRARY = "TensorRT-LLM"
BINS_PER_DECADE = 2
MOST_POINTS = 8


def number_format(row: Row) -> str:
    """Our name of the row's number format, or an empty string; DeepGEMM's fp8 has block scales."""
    if row["dtype"] == "fp8" and "DeepGEMM" in row["library"]:
        return "fp8_block"
    return FORMATS.get(row["dtype"], "")


def fill(chip: Chip, m: float, n: float, k: float) -> float:
    """Share of the product padded to whole tiles that is asked for."""
    tile = chip.efficiency.tile
    sizes = ((m, tile.rows), (n, tile.columns), (k, tile.depth))
    return math.prod(size / (math.ceil(size / step) * step) for size, step in sizes)


def product_bytes(m: float, n: float, k: float, fmt: str) -> float:
    """Bytes of both operands and of a bf16 result."""
    return OPERAND_BYTES[fmt] * (m * k + k * n) + 2.0 * m * n


def share_at(points: Sequence[Sequence[float]], flops: float) -> float:
    """The curve's fraction at `flops`, linear in log10(FLOPs), constant outside."""
    return float(np.interp(math.log10(flops), [math.log10(p[0]) for p in points], [p[1] for p in points]))


class ChipFit:
    """The fits of one chip on the rows of both tables."""

    def __init__(self, chip: Chip, kernels: Sequence[Row]) -> None:
        self.chip = chip
        self.rows = [r for r in kernels if r["profile"] == chip.name]
        # The rows behind each number that came of them, by what they were used for (benchmarks/fitted_rows.py).
        self.used: dict[str, list[Row]] = {}
        self.dense = [r for r in self.rows if r["kind"] == "gemm_dense" and r["time_us"] and number_format(r)]
        self.memory = self._memory()
        share = self.memory["value"] if self.memory else chip.efficiency.memory.value
        self.bytes_per_s = chip.device_memory_bytes_per_s * share
        self.overhead = self._overhead()
        self.overhead_s = (self.overhead["value"] if self.overhead else chip.kernel_overhead_us.value) * 1e-6
        formats = [f for f in OPERAND_BYTES if PEAK_OF.get(f, f) in chip.peak_tflops]
        self.quantise = {f: self._quantise_bytes(f) for f in formats}
        curves = {f: self._curve(f) for f in formats}
        self.curves = {f: curve for f, curve in curves.items() if curve}

    def peak(self, fmt: str) -> float:
        """Dense peak of one device, FLOP/s."""
        return self.chip.device_peak_flops_per_s(PEAK_OF.get(fmt, fmt))

    def _memory(self) -> dict[str, Any] | None:
        """Median share of the data-sheet bandwidth over streams that read and write."""
        used = [r for r in self.rows if r["kind"] in STREAMS and r["gbps"]]
        if not used:
            return None
        self.used["memory"] = used
        shares = [number(r, "gbps") * 1e9 / self.chip.device_memory_bytes_per_s for r in used]
        return {"value": round(float(np.median(shares)), 3), "source": sources(used), "rows": len(used)}

    def _overhead(self) -> dict[str, Any] | None:
        """Median time of thin bf16 products (16 rows at most) beyond reading their weights, microseconds."""
        used = [r for r in self.dense if number_format(r) == "bf16" and number(r, "m") <= 16]
        if len(used) < 4:
            return None
        self.used["kernel overhead"] = used
        left = []
        for r in used:
            m, n, k = (number(r, x) for x in "mnk")
            left.append(number(r, "time_us") - product_bytes(m, n, k, "bf16") / self.bytes_per_s * 1e6)
        note = "thin bf16 products inside a CUDA graph, beyond reading their weights"
        return {"value": round(float(np.median(left)), 2), "source": sources(used), "rows": len(used), "note": note}

    def _quantise_bytes(self, fmt: str) -> float:
        """Memory traffic per activation that TensorRT-LLM's low-precision rows hold beside the product, bytes.

        Its fp8 and fp4 layers quantise their input first: at equal FLOPs, time grows with m x k. bf16 rows show none.
        """
        if fmt == "bf16":
            return 0.0
        data, used = [], []
        for r in self.dense:
            m, n, k = (number(r, x) for x in "mnk")
            if number_format(r) == fmt and QUANTISING_LIBRARY in r["library"] and m >= 1024 and m * n * k > 5e10:
                seconds = number(r, "time_us") * 1e-6
                fixed = 2 * self.overhead_s / seconds
                used.append(r)
                data.append((2 * m * n * k / self.peak(fmt) / seconds, m * k / self.bytes_per_s / seconds, 1 - fixed))
        if len(data) < 8:
            return 0.0
        self.used[f"quantising, {fmt}"] = used
        table = np.array(data)
        return float(nnls(table[:, :2], table[:, 2])[0][1])

    def _parts(self, r: Row, fmt: str) -> tuple[float, float, float, float]:
        """FLOPs, tile fill, memory seconds of the product, and seconds around it (launches, quantisation)."""
        m, n, k = (number(r, x) for x in "mnk")
        quantises = QUANTISING_LIBRARY in r["library"] and fmt != "bf16"
        around = self.overhead_s * (2 if quantises else 1)
        if quantises:
            around += self.quantise[fmt] * m * k / self.bytes_per_s
        return 2 * m * n * k, fill(self.chip, m, n, k), product_bytes(m, n, k, fmt) / self.bytes_per_s, around

    def _curve(self, fmt: str) -> dict[str, Any] | None:
        """The fraction of the peak over FLOPs, from rows whose arithmetic outlasts their memory traffic."""
        used, flops, shares = [], [], []
        for r in self.dense:
            if number_format(r) != fmt or number(r, "m") < 64:
                continue
            work, full, memory_s, around_s = self._parts(r, fmt)
            busy_s = number(r, "time_us") * 1e-6 - around_s
            if busy_s > 1.15 * memory_s:
                used.append(r)
                flops.append(work)
                shares.append(min(1.0, work / (busy_s * self.peak(fmt) * full)))
        if len(used) < 6:
            return None
        self.used[f"curve of {fmt}"] = used
        points = monotone_points(np.array(flops), np.array(shares))
        ratios = []
        for r in used:
            work, full, memory_s, around_s = self._parts(r, fmt)
            product_s = max(work / (self.peak(fmt) * share_at(points, work) * full), memory_s)
            ratios.append(number(r, "time_us") * 1e-6 / (product_s + around_s))
        note = ""
        if self.quantise[fmt]:
            note = f"quantising of activations taken out of TensorRT-LLM rows: {self.quantise[fmt]:.1f} bytes each"
        fit = {"points": points, "source": sources(used), "rows": len(used), "residuals": quantiles(ratios)}
        return fit | ({"note": note} if note else {})

    def grouped(self) -> dict[str, Any] | None:
        """Median of a bf16 expert layer, less its streams, over dense products of the same FLOPs.

        Rows are gated MLPs (up: K x 2N, down: N x K) of one rank's experts, balanced, 128 rows or more an expert.
        """
        ratios: list[float] = []
        used: list[Row] = []
        by_width: dict[int, list[float]] = {}
        for r in self.rows:
            if r["kind"] != "moe_layer_local_experts" or r["routing"] != "balanced" or number_format(r) != "bf16":
                continue
            m, n, k, groups, topk, ep = (number(r, x) for x in ("m", "n", "k", "groups", "topk", "ep"))
            local, experts = m * topk / ep, groups / ep
            if local / experts < 128 or "bf16" not in self.curves:
                continue
            dense_s = 0.0
            for columns, depth in ((2 * n, k), (k, n)):
                work = 2 * local * columns * depth
                weights = 2 * (local * depth + experts * columns * depth + local * columns) / self.bytes_per_s
                share = share_at(self.curves["bf16"]["points"], work) * fill(self.chip, local / experts, columns, depth)
                dense_s += max(work / (self.peak("bf16") * share), weights)
            # Permute (read, write), activation (read 2N, write N), weighted sum (read, write 1/topk).
            streams_s = 2 * local * (2 * k + 3 * n + k + k / topk) / self.bytes_per_s
            ratio = (number(r, "time_us") * 1e-6 - streams_s - 5 * self.overhead_s) / dense_s
            ratios.append(ratio)
            used.append(r)
            by_width.setdefault(int(n), []).append(ratio)
        if len(ratios) < 5:
            return None
        self.used["grouped slow-down"] = used
        widths = ", ".join(f"{np.median(v):.2f} at width {n} ({len(v)} rows)" for n, v in sorted(by_width.items()))
        return {
            "value": round(max(1.0, float(np.median(ratios))), 2),
            "source": sources(used),
            "rows": len(ratios),
            "residuals": quantiles(ratios),
            "note": f"bf16 expert layers less their streams, over dense products of the same FLOPs; medians {widths}",
        }

    def all(self, collectives: Sequence[Row]) -> dict[str, Any]:
        """Every fit that the tables allow, by name."""
        found = {
            "memory": self.memory,
            "kernel_overhead_us": self.overhead,
            "matmul": self.curves,
            "grouped_slowdown": self.grouped(),
            **link_fits(self.chip, collectives),
        }
        return {key: fit for key, fit in found.items() if fit}


def monotone_points(flops: Array, share: Array) -> list[list[float]]:
    """Bin medians over log10(FLOPs), made monotone, as at most 8 points [FLOPs, fraction]."""
    x = np.log10(flops)
    bins = np.floor(x * BINS_PER_DECADE)
    keys, counts = np.unique(bins, return_counts=True)
    middle = np.array([np.median(x[bins == key]) for key in keys])
    median = np.array([np.median(share[bins == key]) for key in keys])
    smooth = np.minimum(isotonic_regression(median, weights=counts.astype(float)).x, 1.0)
    last = len(smooth) - 1
    # A point between two equal fractions says nothing; beyond 8 the one nearest to its neighbours' line goes first.
    keep = [i for i in range(last + 1) if i in (0, last) or not smooth[i - 1] == smooth[i] == smooth[i + 1]]
    while len(keep) > MOST_POINTS:
        bends = []
        for before, i, after in zip(keep, keep[1:], keep[2:], strict=False):
            line = np.interp(middle[i], middle[[before, after]], smooth[[before, after]])
            bends.append(abs(float(line) - smooth[i]))
        del keep[1 + int(np.argmin(bends))]
    return [[float(f"{10 ** middle[i]:.2g}"), round(float(smooth[i]), 3)] for i in keep]


def report(name: str, fits: dict[str, Any]) -> None:
    """Print one chip's fits, a line for the value and one for the rows and their source."""
    print(f"\n{name}")
    flat = {f"efficiency.matmul.{k}": v for k, v in fits.get("matmul", {}).items()}
    flat |= {k: v for k, v in fits.items() if k != "matmul"}
    for key, fit in flat.items():
        value = f"{fit['value']:g}" if "value" in fit else " ".join(f"{x:.1e}:{y:g}" for x, y in fit["points"])
        print(f"  {key}: {value}")
        spread = f"measured/modelled {fit['residuals']}; " if "residuals" in fit else ""
        note = f"{fit['note']}; " if "note" in fit else ""
        print(f"      {fit['rows']} rows; {spread}{note}{fit['source']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Read both tables and print the fits, as text or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder with kernels.csv and collectives.csv")
    parser.add_argument("--chip", help="fit this profile only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        kernels, collectives = (read_rows(args.directory / f"{n}.csv") for n in ("kernels", "collectives"))
        chips = [load_chip(name) for name in ([args.chip] if args.chip else sorted(set(CHIPS.values())))]
        fits = {chip.name: ChipFit(chip, kernels).all(collectives) for chip in chips}
    except (OSError, QuestionError) as error:
        print(f"fit_profiles: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"fit_profiles: {args.directory}: a table lacks the column {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(fits, indent=1))
    else:
        for name, fit in fits.items():
            report(name, fit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
