"""`moecast measure` and `moecast bench`: times of a job, and of this machine, as rows of a measurement table.

How many devices a CPU shows is fixed when JAX starts, so each measurement runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, WorkFailed
from moecast.progress import FAILED, bar

if TYPE_CHECKING:
    from simulator.job.job import Job
    from simulator.results.measurement import MeasurementTable

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Table = Annotated[Path, typer.Option("--output", "-o", metavar="TABLE", help="The table to write (.parquet or .csv).")]
# Set in a child.
CHILD = "MOECAST_MEASURE_CHILD"
LONGEST_S = 3600.0


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: moecast measure examples/small/mixtral-8x7b.yaml -o mixtral.parquet")(measure)
    app.command(
        epilog="Examples: moecast bench --devices 2 -o bench.parquet; moecast bench --target tpu:v5p:2x2x1 -o v5p.csv"
    )(bench)


def measure(
    jobs: Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="The job files.")],
    output: Table,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Timed steps, without the profiler.")] = 20,
    traced: Annotated[int, typer.Option(min=0, max=1_000, help="Steps under the profiler after them.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often all jobs are measured, in turn.")] = 1,
    turns: Annotated[
        int, typer.Option(min=1, max=100, help="Parts that each measurement is taken in, between all others'.")
    ] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=4; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run jobs under JAX's profiler: times of whole steps, and of every op by scope, pass and device.

    Beside the table go the tokens that each expert got, as `training.routing: {model: replay}` reads them.
    """
    from hw_profiles.loader import resolve_cluster
    from simulator.job.load import load_job

    changes = list(set_ or ())
    check_table(output)
    loaded = [(path, load_job(path, changes)) for path in jobs]
    if os.environ.get(CHILD):
        _measure_here(loaded, output, steps, traced, rounds, turns)
        return
    same = [path for path, job in loaded if sum(job.name == other.name for _, other in loaded) > 1]
    if same:
        raise QuestionError(f"{same[0]}: another job has the same name; rows are told apart by it")
    counts = {"--steps": steps, "--traced": traced, "--rounds": rounds, "--turns": turns}
    options = [*(text for name, n in counts.items() for text in (name, str(n))), *(f"--set={c}" for c in changes)]
    by_cluster: dict[tuple[str, int], list[Path]] = {}
    for path, job in loaded:
        cluster = resolve_cluster(job.cluster)
        by_cluster.setdefault((cluster.chip.name, cluster.devices), []).append(path)
    parts = []
    with tempfile.TemporaryDirectory(prefix="moecast-") as scratch:
        for i, paths in enumerate(by_cluster.values()):
            parts.append(Path(scratch) / f"{i}.parquet")
            child(["measure", *map(str, paths), "-o", str(parts[-1]), *options])
        whole = _joined(parts, output)
    finish(whole, output, as_json)


def bench(
    output: Table,
    devices: Annotated[
        int | None, typer.Option(min=1, max=512, help="CPU devices at work at once (default: one per core).")
    ] = None,
    chip: Annotated[str | None, typer.Option(metavar="NAME", help="The profile whose chip this is.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, max=60, help="Seconds for each benchmark (default 0.2).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Ask the TPU compiler instead, such as tpu:v5p:2x2x1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine's devices: products, memory streams, launches and every collective.

    With --target nothing is measured: the TPU compiler says how long it expects the same products and streams to take.
    """
    check_table(output)
    if target is not None:
        from moecast.estimates import bench_target

        if (devices, chip, seconds) != (None, None, None):
            raise QuestionError(f"--target {target:.60}: nothing runs: leave --devices, --chip and --seconds out")
        bench_target(target, output, as_json)
        return
    if os.environ.get(CHILD):
        _bench_here(output, devices, chip, seconds or 0.2)
        return
    with tempfile.TemporaryDirectory(prefix="moecast-") as scratch:
        made = Path(scratch) / "bench.parquet"
        arguments = ["bench", "-o", str(made), "--seconds", str(seconds or 0.2), "--devices", str(devices or cores())]
        child([*arguments, *(["--chip", chip] if chip else [])])
        whole = _joined([made], output)
    finish(whole, output, as_json)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_table(path: Path) -> None:
    """QuestionError where no table can be written, before anything long begins."""
    if path.suffix not in (".parquet", ".csv"):
        raise QuestionError(f"--output {path}: must end in .parquet or .csv")
    if not path.parent.is_dir():
        raise QuestionError(f"--output {path}: no such folder: {path.parent}")
    if path.exists() and not path.is_file():
        raise QuestionError(f"--output {path}: is there and is not a file")


def child(arguments: Sequence[str]) -> None:
    """Run a command of ours in a process of its own; its exit code is ours where it fails."""
    command = [sys.executable, "-m", "moecast", *arguments]
    environment = os.environ | {CHILD: "1"}
    try:
        code = subprocess.run(command, env=environment, timeout=LONGEST_S, check=False).returncode
    except subprocess.TimeoutExpired:
        said = " ".join(arguments[:2])
        raise WorkFailed(f"moecast {said}: took longer than {LONGEST_S:g} s, and was ended") from None
    if code:
        raise typer.Exit(code if code > 0 else FAILED)


def _measure_here(
    loaded: Sequence[tuple[Path, Job]], output: Path, steps: int, traced: int, rounds: int, turns: int
) -> None:
    """In a child: jobs of one cluster, measured in turn."""
    from hw_profiles.loader import resolve_cluster
    from moecast.train import check_present, prepare
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable

    cluster = resolve_cluster(loaded[0][1].cluster)
    prepare(cluster, cluster.devices)
    import jax

    from trainer.measure import Asked, count
    from trainer.measure import measure as run
    from trainer.telemetry import write_routing

    check_present(loaded[0][0], cluster, jax.devices(), None)
    with bar("measuring", count(len(loaded), rounds, turns)) as done:

        def say(text: str) -> None:
            done.say(text)
            done.advance()

        asked = [Asked(job, path.parent) for path, job in loaded]
        found = run(asked, jax.devices(), steps=steps, traced=traced, rounds=rounds, turns=turns, say=say)
    routing = {}
    for one in found:
        if one.routing:
            routing[one.job.hash] = f"{one.job.hash[:12]}.routing.parquet"
            write_routing(output.parent / routing[one.job.hash], one.routing)
    jobs = {one.job.hash: one.job.model_dump(mode="json") for one in found}
    timelines = {one.job.hash: one.timeline for one in found if one.timeline}
    rows = tuple(row for one in found for row in one.rows)
    write_table(MeasurementTable(rows, jobs, routing, output.name, timelines), output)


def _bench_here(output: Path, devices: int | None, chip: str | None, seconds: float) -> None:
    from hw_profiles.loader import load_chip, resolve_cluster
    from moecast.train import prepare
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable

    count = devices or cores()
    if chip is None or load_chip(chip).kind == "cpu":
        prepare(resolve_cluster({"chip": "cpu-host", "devices": count}), count)
    import jax

    from trainer.bench import bench as run
    from trainer.bench import count as how_many
    from trainer.timing import Timer

    present = jax.devices()
    on_cpu = present[0].platform == "cpu"
    if chip is None and not on_cpu:
        raise QuestionError(f"--chip: needed for {present[0].device_kind}: the profile whose chip this is")
    dtypes = ("fp32",) if on_cpu else ("fp32", "bf16")
    timer = Timer.of(present, load_chip(chip or "cpu-host").name, seconds)
    with bar("benchmarks", how_many(len(present), dtypes, large=not on_cpu)) as done:

        def say(text: str) -> None:
            done.say(text)
            done.advance()

        rows = run(timer, dtypes, large=not on_cpu, say=say)
    write_table(MeasurementTable(tuple(rows)), output)


def _joined(parts: Sequence[Path], output: Path) -> MeasurementTable:
    """The children's tables as one, and their routing files beside `output`."""
    from hw_profiles.files import write_whole
    from simulator.calibration.tables import read_table
    from simulator.results.measurement import MeasurementTable

    rows: list[Any] = []
    jobs: dict[str, Any] = {}
    routing: dict[str, str] = {}
    timelines: dict[str, Any] = {}
    beside = output.with_name(f"{output.stem}.routing")
    for part in parts:
        table = read_table(part)
        rows += table.rows
        jobs |= table.jobs
        timelines |= table.timelines
        for key, name in table.routing.items():
            beside.mkdir(exist_ok=True)
            write_whole(beside / f"{key[:12]}.parquet", (part.parent / name).read_bytes())
            routing[key] = f"{beside.name}/{key[:12]}.parquet"
    return MeasurementTable(tuple(rows), jobs, routing, output.name, timelines)


def finish(table: MeasurementTable, output: Path, as_json: bool) -> None:
    """Write the table and print it."""
    from moecast.terminal_measured import print_table, summary
    from simulator.calibration.tables import write_table

    write_table(table, output)
    if as_json:
        import json

        print(json.dumps(summary(table, output), indent=2))
    else:
        print_table(table, output)
