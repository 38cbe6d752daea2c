"""How long a closed-form answer takes: the whole command, and one evaluation in the process.

Prints each example's medians; the baseline of the same run is the bare interpreter, which the command is compared with.
The closed form first, then events. Usage: python benchmarks/bench_forecast.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast_on
from simulator.job.load import load_job

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
COMMAND_RUNS, EVALUATIONS = 7, 200


def median_command_s(arguments: list[str]) -> float:
    """Median wall seconds of a command over some runs, after one warm-up."""
    times = []
    for _ in range(COMMAND_RUNS + 1):
        begin = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def median_evaluation_s(path: Path) -> float:
    """Median seconds of one forecast of a loaded job on a resolved cluster."""
    job = load_job(path)
    cluster = resolve_cluster(job.cluster)
    times = []
    for _ in range(EVALUATIONS):
        begin = time.perf_counter()
        forecast_on(job, cluster, "benchmark")
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    bare = median_command_s([sys.executable, "-c", "pass"])
    print(f"{'bare interpreter':28} {bare * 1e3:7.0f} ms")
    print(f"{'example':28} {'command':>10} {'x bare':>7} {'evaluation':>12}")
    for path in EXAMPLES:
        command = median_command_s([sys.executable, "-m", "moecast", "forecast", str(path), "--engine", "closed-form"])
        evaluation = median_evaluation_s(path)
        print(f"{path.stem:28} {command * 1e3:7.0f} ms {command / bare:6.1f}x {evaluation * 1e3:9.2f} ms")


if __name__ == "__main__":
    main()
