"""The loop on this machine: forecast, run and measure, calibrate, forecast jobs that the fit has not seen, compare.

    python -m benchmarks.loop [--out runs/loop] [--only 2|8]

Every stage is a moecast command, printed as it runs. Jobs are small mixtures on two CPU devices (as many as a small
machine has cores) and on eight (more than that); held-out ones have other widths, expert counts, capacity factors and
expert degrees. All are measured twice, in turn: no error can be smaller than what the two differ by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

BASE = Path(__file__).parents[1] / "examples" / "tiny-moe.yaml"


@dataclass(frozen=True)
class Variant:
    """What a job changes of examples/tiny-moe.yaml."""

    devices: int
    hidden: int
    ffn: int
    experts: int
    factor: float
    degree: int

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"d{self.devices}-h{self.hidden}-f{self.ffn}-e{self.experts}-c{self.factor:g}-p{self.degree}"

    def job(self) -> dict[str, Any]:
        """The job file."""
        job: dict[str, Any] = yaml.safe_load(BASE.read_text())
        heads = {"heads": self.hidden // 16, "kv_heads": self.hidden // 32, "head_dim": 16}
        moe = {"experts": self.experts, "top_k": 2, "expert": {"hidden": self.ffn}}
        job["model"] |= {"hidden": self.hidden}
        job["model"]["decoder"] |= {"attention": heads, "moe": moe}
        capacity = {"factor": self.factor, "basis": "assignments", "group_tokens": 128}
        return job | {
            "name": self.name,
            "cluster": {"chip": "cpu-host", "devices": self.devices},
            "plan": {"expert": self.degree},
            "batch": {"sequences": 8, "length": 128},
            "training": job["training"] | {"capacity": capacity, "run": {"steps": 50}},
        }


# Wide and narrow experts, many and few, shared out or not: in the fit no two of these go together.
FIT = (
    Variant(2, 64, 128, 4, 1.25, 2), Variant(2, 128, 448, 8, 1.0, 2), Variant(2, 128, 384, 8, 1.25, 1),
    Variant(2, 96, 192, 8, 2.0, 2), Variant(2, 64, 320, 4, 1.5, 1), Variant(2, 160, 320, 4, 1.5, 2),
    Variant(8, 64, 128, 8, 1.25, 8), Variant(8, 128, 256, 8, 1.25, 8),
    Variant(8, 64, 320, 8, 1.0, 4), Variant(8, 128, 192, 8, 1.0, 4),
)  # fmt: skip
HELD_OUT = (
    Variant(2, 96, 320, 8, 1.25, 2), Variant(2, 128, 224, 4, 2.0, 1), Variant(2, 64, 256, 8, 1.5, 2),
    Variant(8, 64, 192, 16, 1.25, 8), Variant(8, 96, 256, 8, 1.5, 4),
)  # fmt: skip


def run(*arguments: str, to: TextIO = sys.stdout) -> None:
    """One of our commands, shown as it runs; this script ends where it fails."""
    print(f"\n$ moecast {' '.join(arguments)}", file=to, flush=True)
    code = subprocess.run([sys.executable, "-m", "moecast", *arguments], stdout=to, check=False).returncode
    if code:
        sys.exit(code)


def answer(*arguments: str) -> Any:
    """The JSON of one of our commands."""
    done = subprocess.run(
        [sys.executable, "-m", "moecast", *arguments, "--json"], stdout=subprocess.PIPE, check=False, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def written(variants: Sequence[Variant], folder: Path) -> list[str]:
    """The job files of `variants`."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for variant in variants:
        path = folder / f"{variant.name}.yaml"
        path.write_text(yaml.safe_dump(variant.job(), sort_keys=False))
        out.append(str(path))
    return out


def main() -> None:
    """The whole loop; prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    parser.add_argument("--only", type=int, choices=(2, 8), help="jobs of so many devices alone")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    begun, out = time.monotonic(), options.out
    fit, held = ([v for v in vs if options.only in (None, v.devices)] for vs in (FIT, HELD_OUT))
    fit_jobs, held_jobs = written(fit, out / "fit"), written(held, out / "held_out")
    benches = []
    for devices in sorted({v.devices for v in fit}):
        benches.append(str(out / f"bench-{devices}.parquet"))
        # What collectives take beside a step's compute the jobs show: those alone are asked of the fewest devices only.
        more = ["--no-collectives"] if len(benches) > 1 else []
        run("bench", "--devices", str(devices), "--seconds", "0.05", *more, "-o", benches[-1])
    table, profile, page = (str(out / name) for name in ("steps.parquet", "here.yaml", "loop.html"))
    # All in turn: a machine whose speed drifts drifts alike for what is fitted and what is held out.
    run("measure", *fit_jobs, *held_jobs, "--steps", str(options.steps), "--traced", "6", "--rounds", "2",
        "--turns", "5", "-o", table)  # fmt: skip
    left = [f"--hold-out={v.name}" for v in held]
    run("calibrate", *benches, table, "--base", "cpu-host", *left, "-o", profile)
    run("validate", table, "--profile", profile, "--html", page)
    with ThreadPoolExecutor() as pool:
        asked = [("validate", table), ("validate", table, "--profile", profile)]
        before, after = pool.map(lambda arguments: answer(*arguments), asked)
    print(f"\n{summary(before, after)}\n\npage: {page}; all of it took {time.monotonic() - begun:.0f} s")


def summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Steps of held-out jobs before and after, all-to-alls, memory, intervals; and the spread of equal jobs."""
    lines = [f"{'held-out job':28} {'measured':>10} {'again':>8} {'before':>8} {'after':>8} {'interval, ms':>14}"]
    old = {r["id"]: r for r in before["per_row"]}
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in after["per_row"]:
        if row["id"].endswith(":step"):
            steps.setdefault(row["id"].partition("#")[0], []).append(row)
    for name, rows in steps.items():
        first, second = rows[0]["measured"], rows[-1]["measured"]
        middle = (first + second) / 2
        low, high = rows[0]["interval"]
        was, now = (r["forecast"] / middle - 1 for r in (old[rows[0]["id"]], rows[0]))
        shown = f"{name:28} {first * 1e3:7.1f} ms {second / first - 1:+8.1%} {was:+8.1%} {now:+8.1%}"
        lines.append(f"{shown} {low * 1e3:6.1f}-{high * 1e3:.1f}")
    for devices in sorted({name.partition("-")[0] for name in steps}):
        own = {n: r for n, r in steps.items() if n.startswith(f"{devices}-")}
        errors = {
            "before": [abs(old[r["id"]]["error"]) for rows in own.values() for r in rows],
            "after": [abs(r["error"]) for rows in own.values() for r in rows],
            "A/A": [abs(rows[-1]["measured"] / rows[0]["measured"] - 1) for rows in own.values()],
        }
        said = ", ".join(f"{k} {statistics.median(v):.1%}" for k, v in errors.items())
        lines.append(f"steps on {devices[1:]} devices, median error: {said}")
    lines.append(said_of("all-to-all of a step", exchanged(before), exchanged(after)) + again(after))
    for what, wanted in (("its calls", "collective"), ("peak memory", "memory")):
        kept = {"collective": "all to all", "memory": "peak"}[wanted]
        rows = [{r["id"]: r["error"] for r in d["per_row"] if (r["kind"], r["op_class"]) == (wanted, kept)}
                for d in (before, after)]  # fmt: skip
        lines.append(said_of(what, *rows))
    stated = [r for r in after["per_row"] if r["interval"]]
    inside = sum(r["interval"][0] <= r["measured"] <= r["interval"][1] for r in stated)
    lines.append(f"80 % intervals hold {inside} of {len(stated)} held-out measurements: {inside / len(stated):.0%}")
    return "\n".join(lines)


def said_of(what: str, before: dict[str, float], after: dict[str, float]) -> str:
    """Median errors before and after of what both have, by id."""
    both = sorted(before.keys() & after.keys())
    was, now = (statistics.median(abs(errors[key]) for key in both) for errors in (before, after))
    return f"{what}, median error: before {was:.1%}, after {now:.1%} of {len(both)}"


def all_to_alls(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Forecast and measured seconds of each measurement's all-to-alls of a step, over scopes and devices, unwaited."""
    sums: dict[str, tuple[float, float]] = {}
    for row in found["per_row"]:
        if (row["kind"], row["op_class"]) == ("op", "all to all"):
            forecast, measured = sums.get(name := row["id"].partition(":")[0], (0.0, 0.0))
            sums[name] = forecast + row["forecast"], measured + row["measured"]
    return sums


def exchanged(found: dict[str, Any]) -> dict[str, float]:
    """Error of each measurement's all-to-alls of a step."""
    return {name: forecast / measured - 1 for name, (forecast, measured) in all_to_alls(found).items()}


def again(found: dict[str, Any]) -> str:
    """By how much the all-to-alls of equal jobs differ."""
    jobs: dict[str, list[float]] = {}
    for name, (_, measured) in all_to_alls(found).items():
        jobs.setdefault(name.partition("#")[0], []).append(measured)
    differ = [abs(seen[-1] / seen[0] - 1) for seen in jobs.values() if len(seen) > 1]
    return f", A/A {statistics.median(differ):.1%}" if differ else ""


if __name__ == "__main__":
    main()
