"""`moecast measure`: times of a job as rows of a measurement table, by one process or several at once.

How many devices a CPU shows is fixed when JAX starts, so each measurement runs in a child. Of several processes each
has one; process 0's writes the rows of all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError
from moecast.progress import bar
from moecast.several import Coordinator, Place, Process, Processes, met, place, supervised

if TYPE_CHECKING:
    from simulator.job.job import Job
    from simulator.results.measurement import MeasurementTable
    from trainer.others import Others

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Table = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="TABLE", help="The table to write (.parquet or .csv).")
]
# Set in a child: the process that started it and waits for it.
CHILD = "MOECAST_MEASURE_CHILD"
LONGEST_S = 3600.0


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Example: moecast measure examples/small/mixtral-8x7b.yaml -o mixtral.parquet. As the first of two"
        " processes: moecast measure examples/tiny-moe.yaml -o tiny.parquet --coordinator 10.0.0.1:8476 --process 0"
        " --processes 2; the second has --process 1 and no -o."
    )(measure)


def measure(
    jobs: Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="The job files.")],
    output: Table = None,
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
    coordinator: Coordinator = None,
    process: Process = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Run jobs under JAX's profiler: times of whole steps, and of every op by scope, pass and device.

    Beside the table go the tokens that each expert got, as `training.routing: {model: replay}` reads them. Of several
    processes all are given the same jobs and counts; process 0 writes the rows of all devices.
    """
    from hw_profiles.loader import resolve_cluster
    from simulator.job.load import load_job

    changes = list(set_ or ())
    loaded = [(path, load_job(path, changes)) for path in jobs]
    clusters = [resolve_cluster(job.cluster) for _, job in loaded]
    where = place(coordinator, process, processes, clusters[0].chip.kind)
    table = check_table(output, where)
    if os.environ.get(CHILD):
        _measure_here(loaded, table, where, steps, traced, rounds, turns)
        return
    same = [path for path, job in loaded if sum(job.name == other.name for _, other in loaded) > 1]
    if same:
        raise QuestionError(f"{same[0]}: another job has the same name; rows are told apart by it")
    by_cluster: dict[tuple[str, int], list[Path]] = {}
    for (path, _), cluster in zip(loaded, clusters, strict=True):
        by_cluster.setdefault((cluster.chip.name, cluster.devices), []).append(path)
        if where.several and len(by_cluster) > 1:
            raise QuestionError(
                f"{path}: has {cluster.devices} devices of {cluster.chip.name}, {jobs[0]} {clusters[0].devices} of"
                f" {clusters[0].chip.name}: several processes measure jobs of equal devices"
            )
    if clusters[0].chip.kind == "cpu":
        where.divides(clusters[0].devices)
    counts = {"--steps": steps, "--traced": traced, "--rounds": rounds, "--turns": turns}
    options = [*(text for name, n in counts.items() for text in (name, str(n))), *(f"--set={c}" for c in changes)]
    parts = []
    with tempfile.TemporaryDirectory(prefix="moecast-") as scratch:
        for i, paths in enumerate(by_cluster.values()):
            parts.append(Path(scratch) / f"{i}.parquet")
            child(["measure", *map(str, paths), "-o", str(parts[-1]), *options], where)
        if not parts[0].exists():
            return
        whole = joined(parts, table)
    finish(whole, table, as_json)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_table(path: Path | None, where: Place) -> Path:
    """The table that this process may write; QuestionError where it can write none, before anything long begins."""
    if os.environ.get(CHILD) and path is not None:
        return path
    if where.process > 0:
        if path is not None:
            raise QuestionError(f"--output {path}: process 0 writes the table; process {where.process} has no --output")
        return Path()
    if path is None:
        raise QuestionError("--output: missing: the table to write, such as -o table.parquet")
    if path.suffix not in (".parquet", ".csv"):
        raise QuestionError(f"--output {path}: must end in .parquet or .csv")
    if not path.parent.is_dir():
        raise QuestionError(f"--output {path}: no such folder: {path.parent}")
    if path.exists() and not path.is_file():
        raise QuestionError(f"--output {path}: is there and is not a file")
    return path


def child(arguments: Sequence[str], where: Place) -> None:
    """Run a command of ours in a process of its own; its exit code is ours where it fails."""
    meeting: list[str] = []
    if where.address is not None:
        address = f"{where.address.host}:{where.address.port}"
        meeting = ["--coordinator", address, "--process", str(where.process), "--processes", str(where.count)]
    code = supervised([*arguments, *meeting], CHILD, limit_s=LONGEST_S)
    if code:
        raise typer.Exit(code)


@contextmanager
def working_here(where: Place) -> Iterator[Others]:
    """In a child: this process among the others, which it has met; the end of its parent ends it."""
    from trainer.processes import Watch

    with met(where) if where.several else nullcontext():
        from trainer.others import Others

        watch = Watch(int(os.environ[CHILD]))
        others = Others(watch)
        try:
            yield others
        finally:
            watch.close()
    # Having left together, all know that process 0 has its rows.
    if not others.lead:
        print(f"process {others.index} of {others.count}: done; process 0 has the table", file=sys.stderr)


def _measure_here(
    loaded: Sequence[tuple[Path, Job]], output: Path, where: Place, steps: int, traced: int, rounds: int, turns: int
) -> None:
    """In a child: jobs of equal devices, measured in turn."""
    from hw_profiles.loader import resolve_cluster
    from moecast.train import check_present, prepare
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable

    cluster = resolve_cluster(loaded[0][1].cluster)
    prepare(cluster, cluster.devices // where.count)
    with working_here(where) as others:
        import jax

        from trainer.measure import Asked, count
        from trainer.measure import measure as run
        from trainer.telemetry import write_routing

        check_present(loaded[0][0], cluster, jax.devices(), None)
        if others.lead:
            _warn_of_hosts(loaded, others.count)
        with bar("measuring", count(len(loaded), rounds, turns), visible=others.lead) as done:

            def say(text: str) -> None:
                done.say(text)
                done.advance()

            found = run(
                [Asked(job, path.parent) for path, job in loaded], jax.devices(), steps=steps, traced=traced,
                rounds=rounds, turns=turns, say=say, others=others,
            )  # fmt: skip
        if not others.lead:
            return
        routing = {}
        for one in found:
            if one.routing:
                routing[one.job.hash] = f"{one.job.hash[:12]}.routing.parquet"
                write_routing(output.parent / routing[one.job.hash], one.routing)
        jobs = {one.job.hash: one.job.model_dump(mode="json") for one in found}
        timelines = {one.job.hash: one.timeline for one in found if one.timeline}
        rows = tuple(row for one in found for row in one.rows)
        write_table(MeasurementTable(rows, jobs, routing, output.name, timelines), output)


def _warn_of_hosts(loaded: Sequence[tuple[Path, Job]], processes: int) -> None:
    """Say of which CPU jobs a forecast has other links than the processes that run them."""
    from hw_profiles.loader import SCALE_OUT_NAMES, resolve_cluster

    for path, job in loaded:
        cluster = resolve_cluster(job.cluster)
        if cluster.chip.kind != "cpu":
            continue
        first = cluster.levels[0]
        hosts = cluster.devices // (1 if first.name in SCALE_OUT_NAMES.values() else first.devices)
        if hosts != processes:
            print(
                f"moecast: {path}: its cluster has {hosts} host{'s' * (hosts > 1)}, and it runs in {processes}"
                f" process{'es' * (processes > 1)}: a forecast has other links (--set cluster.nodes={processes})",
                file=sys.stderr,
            )


def joined(parts: Sequence[Path], output: Path) -> MeasurementTable:
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
