"""Plans that were really used, beside our optimum by forecast: `python -m benchmarks.published_plans [TABLE.csv]`.

Of the fully specified published steps (train_steps.csv), the models that were run with several plans. Each row's plan
is forecast in closed form, and the space of plans that its software has is searched on the same cluster and batch: all
degrees, microbatches, virtual stages, remat and shardings, schedules 1F1B and interleaved (and the row's own). A row
whose plan is more than 3 % slower than our optimum says why: by forecast it does not fit, or which fields differ and
what part of the step they shorten. `--model NAME` chooses; `--json` prints records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.score_steps import chosen_rows
from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from moecast.progress import bar
from reports.parts import USUAL
from simulator.analysis.comparison import compare
from simulator.analysis.forecast import forecast_on
from simulator.calibration.step_rows import step_job
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.planner.search import Search
from simulator.planner.space import SpaceFile, space_of
from simulator.planner.table import FIELDS, get, row, with_plan

NEAR = 0.03
DEGREES = ("TP", "PP", "VPP", "CP", "EP", "ETP", "micro_batch", "recompute", "FSDP_DP")
SHARDS = {"maxtext": ("parameters",), "megatron": ("none", "optimizer", "parameters")}


def jobs_of(table: Path) -> dict[str, list[tuple[str, Job]]]:
    """The jobs of every model that was run with several plans, by model; a plan on a cluster once."""
    found: dict[str, dict[tuple[str, ...], tuple[str, Job]]] = defaultdict(dict)
    for entry in chosen_rows(table).entries:
        columns = entry.columns
        try:
            job = load_job(step_job(columns))
        except QuestionError:
            continue  # `moecast validate` lists these with their reasons
        same = ("hardware", "num_devices", "precision", "seq_len", "global_batch", *DEGREES)
        found[columns["model"]].setdefault(tuple(columns[name] for name in same), (entry.id, job))
    return {model: list(rows.values()) for model, rows in sorted(found.items()) if _plans(rows) > 1}


def _plans(rows: Mapping[tuple[str, ...], Any]) -> int:
    return len({key[-len(DEGREES) :] for key in rows})


def space_file(job: Job) -> SpaceFile:
    """What the row's software could have done instead."""
    schedules = sorted({"1f1b", "interleaved", job.plan.schedule})
    shards = sorted({*SHARDS.get(job.software.stack, ("none", "optimizer", "parameters")), job.plan.shard})
    return SpaceFile.model_validate({"plan": {"schedule": schedules, "shard": shards}})


def beside(name: str, job: Job) -> dict[str, Any]:
    """The used plan's forecast beside the optimum's, and why they differ."""
    cluster = resolve_cluster(job.cluster)
    used = forecast_on(job, cluster, "published plan")
    out: dict[str, Any] = {"id": name, "cluster": cluster.name, "used_s": used.step_time_s}
    out |= {"used_bytes": used.memory.peak_bytes, "capacity_bytes": used.memory.capacity_bytes}
    space = space_of(job, cluster, space_file(job))
    try:
        found = Search(job, cluster, space, top=1).run()
    except QuestionError as error:
        return out | {"best_s": None, "over": None, "why": str(error)}
    best = row(dict(zip(FIELDS, found.best.codes.T, strict=True)), 0)
    best_s, best_bytes = (float(found.best.column(what)[0]) for what in ("step_time_s", "memory_peak_bytes"))
    out |= {"best_s": best_s, "best_bytes": best_bytes, "over": used.step_time_s / best_s - 1, "plans": found.valid}
    own = {f: get(job, f) for f in FIELDS}
    own["plan.placement.order"] = own["plan.placement.order"] or USUAL
    # What the job leaves to its defaults, and a remat of its own, are not changes.
    changed = {f.rpartition(".")[2]: (own[f], best[f]) for f in FIELDS if best[f] not in (own[f], "job", None)}
    said = ", ".join(f"{field} {a} -> {b}" for field, (a, b) in changed.items())
    if used.memory.peak_bytes > used.memory.capacity_bytes:
        over = used.memory.peak_bytes / used.memory.capacity_bytes - 1
        return out | {"why": f"by forecast it does not fit ({over:.0%} over); {said}"}
    if out["over"] <= NEAR:
        return out | {"why": ""}
    parts = compare((job, cluster, None), (with_plan(job, best), cluster, None)).parts
    most = min(parts, key=lambda p: p.difference_s)
    part = most.part.removesuffix("_s").replace("_", " ")
    return out | {"why": f"{said}: {part} {most.difference_s / used.step_time_s:+.0%} of the step"}


def main() -> int:
    """Print a line for each row, and how many are within 3 %."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("table", type=Path, nargs="?", default=Path("../shared/measured/train_steps.csv"))
    parser.add_argument("--model", help="one model alone")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    jobs = jobs_of(asked.table)
    if asked.model:
        if asked.model not in jobs:
            parser.error(f"--model {asked.model}: models with several plans are {', '.join(jobs)}")
        jobs = {asked.model: jobs[asked.model]}
    rows = [(model, *found) for model, each in jobs.items() for found in each]
    records = []
    with bar("searching", len(rows)) as done:
        for model, name, job in rows:
            records.append({"model": model} | beside(name, job))
            done.advance()
            if not asked.json:
                show(records[-1])
    near = [r for r in records if r["over"] is not None and r["over"] <= NEAR]
    reasons = [r for r in records if r not in near]
    if asked.json:
        print(json.dumps(records, indent=2))
    else:
        print(
            f"{len(near)} of {len(records)} used plans within {NEAR:.0%} of our optimum; {len(reasons)} with a reason"
        )
    return 0


def show(r: Mapping[str, Any]) -> None:
    """A record in two lines."""
    if r["over"] is None:
        print(f"{r['id']:16} {r['model']:16} {r['cluster']:14} no plan fits: {r['why']}", flush=True)
        return
    full = r["best_bytes"] / r["capacity_bytes"]
    print(
        f"{r['id']:16} {r['model']:16} {r['cluster']:14} used {r['used_s']:7.3f} s, best {r['best_s']:7.3f} s"
        f" ({full:.0%} of memory): {r['over']:+.1%}", flush=True,
    )  # fmt: skip
    if r["why"]:
        print(f"{'':16} {r['why']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
