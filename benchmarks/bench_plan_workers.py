"""One Dask worker against two on this machine, over TCP: the same table, and the ratio of plans a second.

GPT-3 175B on 4,096 H100 (benchmarks/gpt3-space.yaml). Workers have one thread each, NumPy one thread in each, and have
imported and searched something before the clock starts. Where there are no two idle cores, the ratio says so; the
seconds that the workers' processes had of them, start and warming up included, tell what dividing the work costs.

Usage: python benchmarks/bench_plan_workers.py
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hw_profiles.loader import resolve_cluster
from moecast.measure import cores
from simulator.job.load import load_job
from simulator.planner.space import read_space, space_of
from simulator.planner.spread.drive import here, spread
from simulator.planner.spread.on_dask import on_dask
from simulator.planner.spread.question import Question

ROOT = Path(__file__).parents[1]


def question(example: str, space: Path | None, plans_per_part: int) -> Question:
    """The search of an example."""
    job = load_job(ROOT / f"examples/{example}.yaml")
    values = space_of(job, resolve_cluster(job.cluster), read_space(space) if space else None).values
    return Question(job=job, space=dict(values), plans_per_part=plans_per_part)


def timed(asked: Question, address: str | None) -> tuple[float, Any]:
    """Seconds of the whole search, and its outcome."""
    search = asked.search()
    runner = here(asked, search) if address is None else on_dask(address)
    begin = time.perf_counter()
    outcome = spread(asked, search, runner)
    return time.perf_counter() - begin, outcome


def main(arguments: Sequence[str]) -> None:
    """Print all three, and the ratio."""
    try:
        from distributed import LocalCluster
    except ImportError:
        print("skipped: needs Dask: pip install 'moecast[dask]'")
        return
    # Read by NumPy in the workers, which are started below.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    asked = question("gpt3-175b", ROOT / "benchmarks/gpt3-space.yaml", 1 << 22)
    small = question("mixtral-8x7b", None, 1 << 16)
    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f} before; {asked.search().space.count:,} plans,"
          f" {asked.search().parts.count} parts")  # fmt: skip
    alone_s, alone = timed(asked, None)
    print(f"this process   {alone_s:6.1f} s  {alone.searched / alone_s:11,.0f} plans/s")
    took = []
    for workers in (1, 2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        address = {"host": "127.0.0.1", "dashboard_address": None}
        with LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **address) as cluster:
            timed(small, cluster.scheduler_address)
            seconds, found = timed(asked, cluster.scheduler_address)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        took.append(seconds)
        name, rate = f"{workers} Dask worker{'s' * (workers > 1)}", found.searched / seconds
        print(f"{name:14} {seconds:6.1f} s  {rate:11,.0f} plans/s; {own_s:.1f} s of the cores")
        for one, other in ((found.best, alone.best), (found.front, alone.front)):
            if one.codes.tobytes() != other.codes.tobytes() or one.numbers.tobytes() != other.numbers.tobytes():
                sys.exit("the tables differ")
    print(f"two workers are {took[0] / took[1]:.2f} x as fast as one; the tables are the same, byte for byte")


if __name__ == "__main__":
    main(sys.argv[1:])
