"""How fast plans are searched: columns against the scalar forecast in the same run, and two whole searches.

1. Plans a second on one core, rules, memory and step time included: every plan of a grid that keeps the rules, by
   columns, over the same plans one by one (a sample of them), and the largest difference between the two.
2. GPT-3 175B on 4,096 H100: all degrees, microbatches, virtual stages, remat, ZeRO, sequence parallelism and overlap
   (benchmarks/gpt3-space.yaml), with pruning and, given --exhaustive, without.
3. DeepSeek-V3 on 2,048 H800, the 20 best timed by events.

Usage: python benchmarks/bench_plan.py [--exhaustive]
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast_on
from simulator.job.load import load_job
from simulator.planner.answer import answer_of
from simulator.planner.array_form import ArrayForm
from simulator.planner.flags import BLOCK, CORE, FLAGS
from simulator.planner.search import Search
from simulator.planner.space import read_space, space_of
from simulator.planner.table import FIELDS, value, with_plan

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "benchmarks/gpt3-space.yaml"
SAMPLE = 400


def peak_mib() -> float:
    """Largest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def columns_against_scalar() -> None:
    """Plans a second of the array form and of the scalar loop, and how far they are apart."""
    job = load_job(ROOT / "examples/gpt3-175b.yaml")
    cluster = resolve_cluster(job.cluster)
    space = space_of(job, cluster, read_space(SPACE))
    flags, rng = space.flags(), np.random.default_rng(0)
    form, plans, worst = ArrayForm(job, cluster), 0, 0.0
    samples = []
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for place in space.places():
        for core in space.cores():
            for part in form.parts(place, core, flags, Counter()):
                for flag, step, memory, _ in part.answers:
                    known = np.flatnonzero(~np.isnan(step))
                    plans += len(known)
                    if len(known) and rng.random() < 0.02:
                        i = int(rng.choice(known))
                        values = dict(zip(BLOCK, place, strict=True)) | dict(zip(FLAGS, flag, strict=True))
                        values |= {name: c[part.rows[i]] for name, c in zip(CORE, core, strict=True)}
                        samples.append((values, step[i], memory[i]))
    array_s, array_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    chosen = [samples[i] for i in rng.choice(len(samples), min(SAMPLE, len(samples)), replace=False)]
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for values, step, memory in chosen:
        answer = forecast_on(with_plan(job, {f: value(f, values[f]) for f in FIELDS}), cluster, "benchmark")
        worst = max(worst, abs(step / answer.step_time_s - 1), abs(memory / answer.memory.peak_bytes - 1))
    scalar_s, scalar_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    fast, slow = plans / array_s, len(chosen) / scalar_s
    print(f"space {space.count:,} combinations; {plans:,} keep the rules; {array_s:.1f} s")
    print(f"columns {fast:,.0f} plans/s, scalar {slow:,.0f} plans/s: {fast / slow:,.0f} x")
    each, one = plans / array_cpu_s, len(chosen) / scalar_cpu_s
    print(f"a second of one core's own time: columns {each:,.0f}, scalar {one:,.0f}: {each / one:,.0f} x")
    print(f"combinations looked at: {space.count / array_s:,.0f} /s")
    print(f"largest relative difference over {len(chosen)} plans: {worst:.1e}; peak RSS {peak_mib():,.0f} MiB")


def search(example: str, space_file: Path | None, engine_top: int, exhaustive: bool = False) -> None:
    """One search from the example's file to its answer."""
    begin = time.perf_counter()
    job = load_job(ROOT / f"examples/{example}.yaml")
    cluster = resolve_cluster(job.cluster)
    space = space_of(job, cluster, read_space(space_file) if space_file else None)
    found = Search(job, cluster, space, exhaustive=exhaustive)
    answer = answer_of(found, found.run(), engine_top=engine_top)
    whole = time.perf_counter() - begin
    best = answer.best[0]
    print(f"{example}{', exhaustive' if exhaustive else ''}: {answer.space:,} combinations, {answer.valid:,} keep the"
          f" rules, {answer.pruned:,} dropped before their time, {answer.evaluated:,} worked out, {answer.feasible:,}"
          f" feasible")  # fmt: skip
    print(f"  search {answer.seconds:.1f} s ({answer.valid / answer.seconds:,.0f} valid plans/s), with {engine_top} by"
          f" events and why not {whole:.1f} s; peak RSS {peak_mib():,.0f} MiB")  # fmt: skip
    print(f"  best {best.step_time_s:.4f} s ({best.engine}), {best.memory_peak_bytes / 2**30:.1f} GiB:"
          f" {' '.join(best.overrides)}")  # fmt: skip


def main() -> None:
    """Print all three."""
    columns_against_scalar()
    search("gpt3-175b", SPACE, 0)
    if "--exhaustive" in sys.argv[1:]:
        search("gpt3-175b", SPACE, 0, exhaustive=True)
    search("deepseek-v3", None, 20)


if __name__ == "__main__":
    main()
