"""The compiler's estimates beside published TPU measurements: `python -m benchmarks.score_estimates [DIR] [--rows]`.

DIR (../shared/measured) holds `kernels.csv` and `train_steps.csv`. Three profiles of each chip are scored: its data
sheet (all of the peaks reached), the shipped one, and that of `cluster: {curves: compiler}`. No profile was fitted to a
step; the shipped curves and memory shares of v6e and 7x were fitted to these kernels.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.score_steps import rows_to_score
from hw_profiles import Chip, QuestionError, load_chip
from hw_profiles.estimates import estimate_names, with_estimates
from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast
from simulator.calibration.step_rows import step_job
from simulator.job.load import load_job
from simulator.kernels.roofline import Kernels
from simulator.workload.ops import Op

PROFILES = ("data sheet", "shipped", "compiler")
CHIPS = {"TPU v6e": "tpu-v6e", "TPU7x": "tpu7x"}
LARGE_STREAM_BYTES = 2**25
HOST_TIMER = "host timer"
Errors = dict[str, list[float]]


def as_profile(chip: Chip, profile: str) -> Chip:
    """`chip` by its data sheet, as shipped, or as its compiler expects it."""
    if profile == "compiler":
        return with_estimates(chip)
    if profile == "shipped":
        return chip
    e = chip.efficiency
    whole = {name: curve.model_copy(update={"points": ((1.0, 1.0),)}) for name, curve in e.matmul.items()}
    full = e.memory.model_copy(update={"value": 1.0})
    return chip.model_copy(update={"efficiency": e.model_copy(update={"matmul": whole, "memory": full})})


def kernel_errors(path: Path, show: bool) -> dict[str, Errors]:
    """Forecast over measured seconds, less one, of products and of large streams."""
    out: dict[str, Errors] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["chip"].startswith("TPU") and HOST_TIMER not in r["library"]]
    for row in rows:
        chip = load_chip(next(ours for theirs, ours in CHIPS.items() if row["chip"].startswith(theirs)))
        per = chip.devices_per_chip if "per chip" in row["chip"] else 1
        if row["kind"] == "gemm_dense":
            m, n, k = (int(row[x]) for x in "mnk")
            op = Op(
                scope="product", remat="", kind="matmul", dtype="bf16", rows=m, columns=n, depth=k,
                flops=2.0 * m * n * k, bytes=2.0 * (m * k + k * n + m * n),
            )  # fmt: skip
            seconds, what = float(row["time_us"]) * 1e-6, f"product {m} x {k} x {n}"
        elif int(row["bytes"]) >= LARGE_STREAM_BYTES:
            op, moved = None, 2.0 * int(row["bytes"])
            seconds, what = moved / (float(row["gbps"]) * 1e9 / per), f"stream of {moved / 2**21:g} MiB"
        else:
            continue
        for name in PROFILES:
            kernels = Kernels(as_profile(chip, name))
            forecast_s = kernels.forward_s(op) if op else kernels.stream_s(moved)
            out["products" if op else "streams"][name].append(float(forecast_s) / seconds - 1)
        if show:
            errors = out["products" if op else "streams"]
            print(
                f"{chip.name:9}{what:28}{seconds * 1e6:10.1f} us "
                + "".join(f"{errors[n][-1]:+12.0%}" for n in PROFILES)
            )
    return out


def step_errors(path: Path, show: bool) -> dict[str, Errors]:
    """Forecast over measured seconds, less one, of training steps on chips that the compiler was asked about."""
    out: dict[str, Errors] = defaultdict(lambda: defaultdict(list))
    for row in rows_to_score(path):
        if not row["hardware"].startswith("TPU"):
            continue
        try:
            job = load_job(step_job(row))
            chip = resolve_cluster(job.cluster).chip
            answers = [forecast(job, engine="closed-form", chip=as_profile(chip, n)).step_time_s for n in PROFILES]
        except QuestionError as error:
            print(f"not scored: {error}")
            continue
        errors = [s / float(row["step_time_s"]) - 1 for s in answers]
        for name, error in zip(PROFILES, errors, strict=True):
            for group in ("steps, all", f"steps, {chip.name}"):
                out[group][name].append(error)
        if show:
            print(
                f"{row['id']:9}{row['model'][:22]:23}{chip.name:9}{row['precision'][:8]:9}"
                + "".join(f"{e:+12.0%}" for e in errors)
            )
    return out


def main(folder: Path, show: bool) -> None:
    """Print median absolute error and bias of every group and profile."""
    print(f"asked: {', '.join(estimate_names())}; errors are forecast / measured - 1")
    found = kernel_errors(folder / "kernels.csv", show) | step_errors(folder / "train_steps.csv", show)
    print(f"{'median |error|, bias':24}{'n':>4}" + "".join(f"{n:>18}" for n in PROFILES))
    for group in sorted(found):
        errors = found[group]
        cells = "".join(f"{median(map(abs, errors[n])):9.1%}, {median(errors[n]):+7.1%}" for n in PROFILES)
        print(f"{group:24}{len(errors[PROFILES[0]]):4}{cells}")


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(Path(words[0] if words else "../shared/measured"), "--rows" in sys.argv)
