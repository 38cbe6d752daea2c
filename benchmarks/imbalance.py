"""A skewed router makes a step slower: by how much, beside what the engine forecasts.

    python -m benchmarks.imbalance [--profile PROFILE] [--rounds 200] [--minutes 5] [--skews 1.25 1.5 1.8] [--json]

Forecasts are by a profile of this machine, which is first fitted on balanced jobs of other widths (`moecast bench`,
`measure`, `calibrate`), or by the one that is named. One job on two CPU devices with two expert ranks, whose experts
take most of a step; its routing is forced by replayed counts (`training.routing: {model: replay, forced: true}`):
balanced, and with the busier rank at each of the skews over the mean. All take steps in turn, in another order every
round, in one process: what else the machine does meets all alike. Others' work stretches steps by more than a skew
does, so that steps in which our threads waited long for a processor (Linux counts it: /proc/self/task/*/schedstat) are
left out, whatever they took: medians are over the others, and over all steps beside them. The slowdown is a job's
median over the balanced one's; the forecast's is that of `forecast --engine events`, the error forecast over measured
less one. The balanced job takes two steps a round: the second over the first is the A/A spread. Forecasts are to be
within 10 %; exits with 3 where one is not, or where too few steps were undisturbed to tell.

Letters: E experts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TARGET = 0.10
# Of a step, what all our threads together may have waited for a processor; steps of each job that a median needs.
WAITED, FEWEST = 0.05, 10
EXPERTS, RANKS = 4, 2
# Widths of model and expert that the profile is fitted on; the measured job has 256 and 4,096.
FIT = ((256, 2048), (192, 3072), (320, 3072), (192, 5120))
JOB: dict[str, Any] = {
    "model": {
        "name": "one-layer",
        "hidden": 256,
        "vocab": 272,
        "decoder": {
            "layers": 1,
            "attention": {"heads": 1, "head_dim": 32},
            "moe": {"experts": EXPERTS, "top_k": 1, "expert": {"hidden": 4096, "activation": "relu"}},
        },
    },
    "cluster": {"chip": "cpu-host", "devices": RANKS},
    "plan": {"expert": RANKS},
    "batch": {"sequences": 16, "length": 128},
    "training": {"precision": "fp32", "optimizer": "sgd", "capacity": "dropless"},
    "software": {"stack": "moecast"},
}


def counts(tokens: int, skew: float) -> list[int]:
    """Tokens of each expert, the experts of the first rank together at `skew` over the mean rank, and uneven."""
    hot = round(tokens / RANKS * skew)
    first = [round(hot * 0.55), hot - round(hot * 0.55)] if skew > 1 else [hot // 2, hot - hot // 2]
    rest = tokens - hot
    return [*first, rest // 2, rest - rest // 2]


def write_jobs(folder: Path, skews: Sequence[float]) -> dict[float, dict[str, Any]]:
    """The job of each skew, 1 first, with its recorded counts beside it."""
    tokens = JOB["batch"]["sequences"] * JOB["batch"]["length"]
    out = {}
    for skew in (1.0, *skews):
        name = f"counts-{skew:g}.csv"
        rows = [f"0,0,{e},{n}" for e, n in enumerate(counts(tokens, skew))]
        (folder / name).write_text("\n".join(["step,layer,expert,tokens", *rows]) + "\n")
        forced = {"routing": {"model": "replay", "file": name, "forced": True}}
        out[skew] = JOB | {"name": f"skew-{skew:g}", "training": JOB["training"] | forced}
    return out


def fitted(folder: Path) -> Path:
    """A profile of this machine, from its benchmarks and balanced jobs whose widths are not the measured one's."""
    from benchmarks.loop import run

    paths = []
    for width, hidden in FIT:
        job = json.loads(json.dumps(JOB)) | {"name": f"balanced-{width}-{hidden}"}
        job["model"]["hidden"], job["model"]["decoder"]["moe"]["expert"]["hidden"] = width, hidden
        job["training"]["routing"] = {"model": "even", "forced": True}
        paths.append(folder / f"{job['name']}.json")
        paths[-1].write_text(json.dumps(job))
    bench, steps, profile = (str(folder / name) for name in ("bench.parquet", "steps.parquet", "here.yaml"))
    run("bench", "--devices", str(RANKS), "--seconds", "0.05", "-o", bench, to=sys.stderr)
    run("measure", *map(str, paths), "--rounds", "2", "-o", steps, to=sys.stderr)
    run("calibrate", bench, steps, "--base", "cpu-host", "-o", profile, to=sys.stderr)
    return Path(profile)


def forecasts(jobs: Mapping[float, dict[str, Any]], folder: Path, profile: Path) -> dict[float, float]:
    """Seconds of a step of each job by the engine."""
    from moecast import forecast, load_chip_file, load_job

    chip = load_chip_file(profile)
    return {
        skew: forecast(load_job(job), engine="events", chip=chip, profile=str(profile), folder=folder).step_time_s
        for skew, job in jobs.items()
    }


def waited_s() -> float:
    """Seconds that threads of this process that still run have waited for a processor; 0 where nobody counts."""
    total = 0.0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(task.read_text().split()[1]) * 1e-9
    return total


def measured(jobs: Mapping[float, dict[str, Any]], folder: Path, rounds: int, minutes: float) -> dict[str, Any]:
    """(seconds, seconds waited for a processor) of every step of each job, and of the second balanced one (`again`)."""
    from hw_profiles.loader import resolve_cluster
    from moecast.progress import bar
    from moecast.train import prepare
    from simulator.job.load import load_job
    from simulator.job.rules import resolve

    cluster = resolve_cluster(JOB["cluster"])
    prepare(cluster, cluster.devices)
    import jax

    from trainer.batches import Placer
    from trainer.measure import WARM_UP, Steps
    from trainer.step import Trainer

    runs: dict[str, Steps] = {}
    with bar("compiling", len(jobs)) as done, contextlib.ExitStack() as stack:
        for skew, mapping in jobs.items():
            job = load_job(mapping)
            trainer = Trainer.of(job, resolve(job, cluster), jax.devices(), folder)
            placer = Placer(job, folder, trainer)
            stack.callback(placer.close)
            compiled = trainer.step.lower(trainer.state_shapes(), placer.shapes).compile()
            run = runs[f"{skew:g}"] = Steps(trainer, placer, compiled)
            run.some(WARM_UP)
            wanted = counts(JOB["batch"]["sequences"] * JOB["batch"]["length"], skew)
            if any(seen.wanted_E.tolist() != wanted for seen in run.seen):
                raise SystemExit(f"skew {skew:g}: the trainer did not route as forced: {run.seen[0]}")
            done.advance()
        runs["again"] = runs["1"]
        out: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        order, until = list(runs), time.monotonic() + 60 * minutes
        for turn in range(rounds):
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                before = waited_s()
                (took,) = runs[name].some(1)
                out[name].append((took, waited_s() - before))
            if time.monotonic() > until:
                break
    return out


def medians(steps: Mapping[str, Sequence[tuple[float, float]]], expected: Mapping[float, float], most: float) -> Any:
    """Of the steps that waited at most the share `most`: how many, median seconds, slowdowns beside the forecast's."""
    kept = {name: [s for s, waited in found if waited <= most * s] for name, found in steps.items()}
    least = min(map(len, kept.values()))
    if least < FEWEST:
        return {"steps": least, "rows": []}
    middle = {name: float(np.median(found)) for name, found in kept.items()}
    base = (middle["1"] + middle["again"]) / 2
    rows = []
    for skew, forecast_s in expected.items():
        low, slow, high = (float(np.quantile(kept[f"{skew:g}"], q)) / base for q in (0.25, 0.5, 0.75))
        told = forecast_s / expected[1.0]
        rows.append(
            {"skew": skew, "slowdown": slow, "quartiles": [low, high], "forecast": told, "error": told / slow - 1}
        )
    again = middle["again"] / middle["1"]
    return {"steps": least, "balanced_s": base, "again_over_first": again, "rows": rows[1:]}


def main() -> int:
    """Print the tables; 3 where a forecast misses the target or nothing can be told."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", type=Path, help="a chip profile (default: fitted here first)")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5, help="no further round after that")
    parser.add_argument("--skews", type=float, nargs="+", default=[1.25, 1.5, 1.8])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.rounds < 1 or any(not 1 < s <= RANKS for s in asked.skews):
        parser.error(f"--rounds from 1, --skews above 1 and at most {RANKS}")
    with tempfile.TemporaryDirectory(prefix="moecast-skew-") as scratch:
        folder = Path(scratch)
        jobs = write_jobs(folder, sorted(set(asked.skews)))
        expected = forecasts(jobs, folder, asked.profile or fitted(folder))
        load = os.getloadavg()[0]
        steps = measured(jobs, folder, asked.rounds, asked.minutes)
    result = {
        "profile": str(asked.profile or "one fitted here"), "cores": len(os.sched_getaffinity(0)),
        "load_average": [load, os.getloadavg()[0]], "rounds": len(steps["1"]), "forecast_balanced_s": expected[1.0],
        "undisturbed": medians(steps, expected, WAITED), "all": medians(steps, expected, np.inf),
    }  # fmt: skip
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    rows = result["undisturbed"]["rows"]
    return 0 if rows and all(abs(r["error"]) <= TARGET for r in rows) else 3


def show(result: Mapping[str, Any]) -> None:
    """The tables."""
    begun, ended = result["load_average"]
    print(f"{result['rounds']} rounds on {result['cores']} cores, load average {begun:.1f} before, {ended:.1f} after")
    print(f"forecast of the balanced step: {result['forecast_balanced_s'] * 1e3:.0f} ms by {result['profile']}")
    for name, words in (
        ("undisturbed", f"steps that waited at most {WAITED:.0%} for a processor"),
        ("all", "all steps"),
    ):
        found = result[name]
        print(f"\n{words}: {found['steps']} or more of each job", end="")
        if not found["rows"]:
            print(f"; a median needs {FEWEST}")
            continue
        print(f"; balanced {found['balanced_s'] * 1e3:.0f} ms, again over first {found['again_over_first']:.3f}")
        print(f"{'busier rank / mean':>18} {'slowdown':>9} {'quartiles':>15} {'forecast':>9} {'error':>8}")
        for r in found["rows"]:
            quartiles = "{:.3f} to {:.3f}".format(*r["quartiles"])
            far = "" if abs(r["error"]) <= TARGET else f"  above {TARGET:.0%}"
            print(f"{r['skew']:18g} {r['slowdown']:9.3f} {quartiles:>15} {r['forecast']:9.3f} {r['error']:+8.1%}{far}")


if __name__ == "__main__":
    sys.exit(main())
