"""`moecast bench`: times of this machine apart from any job, by one process or several at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hw_profiles.errors import QuestionError
from moecast.measure import CHILD, Json, Table, check_table, child, cores, finish, joined, working_here
from moecast.progress import bar
from moecast.several import Coordinator, Place, Process, Processes, place

if TYPE_CHECKING:
    from hw_profiles.schema import Chip

SECONDS = 0.2


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Examples: moecast bench --devices 2 -o bench.parquet; moecast bench --target tpu:v5p:2x2x1 -o v5p.csv;"
        " as the first of two processes: moecast bench -o two.parquet --coordinator 10.0.0.1:8476 --process 0"
        " --processes 2; the second has --process 1 and no -o."
    )(bench)


def bench(
    output: Table = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="CPU devices at work at once, of all processes (default: one per core)."),
    ] = None,
    chip: Annotated[str | None, typer.Option(metavar="NAME", help="The profile whose chip this is.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, max=60, help="Seconds for each benchmark (default 0.2).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Ask the TPU compiler instead, such as tpu:v5p:2x2x1.")
    ] = None,
    collectives: Annotated[
        bool, typer.Option(help="Also collectives; without, where measured jobs will show their own.")
    ] = True,
    coordinator: Coordinator = None,
    process: Process = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Measure this machine's devices: products, memory streams, launches and every collective.

    Several processes measure all of it at the same time, each its devices, and collectives within and across processes.
    With --target nothing is measured: the TPU compiler says how long it expects the same products and streams to take.
    """
    if target is not None:
        from moecast.estimates import bench_target

        if (devices, chip, seconds, collectives) != (None, None, None, True):
            raise QuestionError(
                f"--target {target:.60}: nothing runs: leave --devices, --chip, --seconds and --no-collectives out"
            )
        if (coordinator, process, processes) != (None, None, None):
            raise QuestionError(
                f"--target {target:.60}: nothing runs: leave --coordinator, --process and --processes out"
            )
        bench_target(target, check_table(output, Place(None, 0, 1)), as_json)
        return
    from hw_profiles.loader import load_chip

    found = load_chip(chip or "cpu-host")
    where = place(coordinator, process, processes, found.kind)
    table = check_table(output, where)
    count = devices or cores() * where.count
    if found.kind == "cpu":
        where.divides(count)
    if os.environ.get(CHILD):
        _bench_here(table, count, chip, found, where, seconds or SECONDS, collectives)
        return
    with tempfile.TemporaryDirectory(prefix="moecast-") as scratch:
        made = Path(scratch) / "bench.parquet"
        arguments = ["bench", "-o", str(made), "--seconds", str(seconds or SECONDS), "--devices", str(count)]
        arguments += ["--chip", chip] if chip else []
        child(arguments if collectives else [*arguments, "--no-collectives"], where)
        if not made.exists():
            return
        whole = joined([made], table)
    finish(whole, table, as_json)


def _bench_here(
    output: Path, count: int, chip: str | None, found: Chip, where: Place, seconds: float, collectives: bool
) -> None:
    """In a child: all benchmarks on all devices."""
    from hw_profiles.loader import resolve_cluster
    from moecast.train import prepare
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable

    if found.kind == "cpu":
        prepare(resolve_cluster({"chip": found.name, "devices": count}), count // where.count)
    with working_here(where) as others:
        import jax

        from trainer.bench import bench as run
        from trainer.bench import count as how_many
        from trainer.hosts import hosts_of
        from trainer.timing import Timer

        present = jax.devices()
        on_cpu = present[0].platform == "cpu"
        if chip is None and not on_cpu:
            raise QuestionError(f"--chip: needed for {present[0].device_kind}: the profile whose chip this is")
        asked = {"--seconds": seconds, "--chip": found.name, "--collectives": collectives}
        others.same({**asked, "devices": [len(present), jax.local_device_count()]})
        hosts = hosts_of(others, found, len(present))
        dtypes = ("fp32",) if on_cpu else ("fp32", "bf16")
        timer = Timer.of(present, found.name, seconds, others, hosts)
        many = how_many(hosts, dtypes, large=not on_cpu, collectives=collectives)
        with bar("benchmarks", many, visible=others.lead) as done:

            def say(text: str) -> None:
                done.say(text)
                done.advance()

            rows = run(timer, dtypes, large=not on_cpu, say=say, collectives=collectives)
        if others.lead:
            write_table(MeasurementTable(tuple(rows)), output)
