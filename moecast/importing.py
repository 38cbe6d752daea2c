"""The command that reads what others have measured: profiles, logs and tables, into one measurement table."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError
from moecast.progress import busy

if TYPE_CHECKING:
    from simulator.calibration.readers.found import Found

EXAMPLE = "Example: moecast import trace.json.gz --chip h100-sxm -o measured.parquet"
# Further classes are one line.
MOST_CLASSES, MOST_DEVICES = 30, 8


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="import", epilog=EXAMPLE)(import_)


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Traces, logs or tables; gzip or plain.")],
    chip: Annotated[str, typer.Option(metavar="NAME", help="The chip that was measured (moecast chips).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="TABLE", help="The table to write: .parquet or .csv.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto, kineto, perfetto, nccl-tests, megatron, maxtext or csv.")
    ] = "auto",
    job: Annotated[Path | None, typer.Option(metavar="JOB.yaml", help="The job that was measured.")] = None,
    collective: Annotated[str, typer.Option(help="nccl-tests: which, where no line says it.")] = "",
    group_size: Annotated[int | None, typer.Option(min=1, help="nccl-tests: ranks, where no line says it.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Logs: devices, where no line says it.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Logs: steps of each run to leave out.")] = None,
    kind: Annotated[str, typer.Option(help="csv: what the rows are, such as kernel or collective.")] = "",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="csv: seconds=time_us, and so on; repeatable."),
    ] = None,
    unit: Annotated[str, typer.Option(help="csv: the unit of its times: s, ms, us or ns.")] = "s",
    process: Annotated[str, typer.Option(metavar="TEXT", help="perfetto: text in the names of devices.")] = "",
    stack: Annotated[str, typer.Option(help="Traces: whose scopes: decoder, encoder or mtp.")] = "decoder",
    clocks_apart: Annotated[bool, typer.Option(help="Traces: take devices whose clocks are apart.")] = False,
    source: Annotated[str, typer.Option(help="Whose measurement; default: the file's name.")] = "",
    date: Annotated[str, typer.Option(metavar="YYYY-MM-DD", help="When; default: as the file says.")] = "",
    software: Annotated[str, typer.Option(help="Measured with; default: as the file says.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Read profiles (PyTorch, Perfetto), nccl-tests, logs (Megatron-LM, MaxText) or CSV into one measurement table.

    The format is told by what is in a file. Without -o nothing is written: what was found is printed.
    """
    from hw_profiles.loader import canonical_chip_name
    from simulator.calibration.readers.found import Told
    from simulator.calibration.readers.read import merged, read_file
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable

    _check_output(output)
    _check_words(stack, date)
    jobs = _jobs(job)
    told = Told(
        canonical_chip_name(chip), source, date, software, next(iter(jobs), ""), kind, collective, group_size, devices,
        warmup, process, stack, clocks_apart, unit, _columns(column or []),
    )  # fmt: skip
    found = []
    for path in files:
        with busy(f"reading {path.name}"):
            found.append(read_file(path, told, form))
    found = merged(found)
    rows = tuple(row for one in found for row in one.rows)
    if output is not None:
        with busy(f"writing {output.name}"):
            write_table(MeasurementTable(rows, jobs, name=output.name), output)
    if as_json:
        table = str(output) if output is not None else None
        said = {"table": table, "rows": len(rows), "files": [one.to_dict() for one in found]}
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    _print(found, output, len(rows))


def _check_output(output: Path | None) -> None:
    """Before minutes of reading: QuestionError for an ending that is no table's."""
    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise QuestionError(f"{output}: must end in .parquet or .csv")


def _check_words(stack: str, date: str) -> None:
    from datetime import date as day

    from hw_profiles.errors import nearest
    from simulator.job.scopes import STACKS

    if stack not in STACKS:
        raise QuestionError(f"--stack {stack!r:.40}: known: {', '.join(STACKS)}{nearest(stack, STACKS)}")
    if date:
        try:
            day.fromisoformat(date)
        except ValueError:
            raise QuestionError(f"--date {date!r:.40}: write it as YYYY-MM-DD") from None


def _jobs(path: Path | None) -> dict[str, dict[str, Any]]:
    """The job in `path` by its hash, as a table carries it."""
    if path is None:
        return {}
    from simulator.job.load import load_job

    job = load_job(path)
    return {job.hash: job.model_dump(mode="json")}


def _columns(texts: list[str]) -> dict[str, str]:
    """`seconds=time_us` as {"seconds": "time_us"}."""
    out: dict[str, str] = {}
    for text in texts:
        name, given, of = text.partition("=")
        if not (name and given and of):
            raise QuestionError(f"--column {text!r:.60}: write it as NAME=COLUMN, such as seconds=time_us")
        if name in out:
            raise QuestionError(f"--column {name}: said twice")
        out[name] = of
    return out


def _print(found: list[Found], output: Path | None, rows: int) -> None:
    from rich.console import Console

    console = Console()
    for one in found:
        kinds = ", ".join(f"{n} {kind}" for kind, n in one.to_dict()["rows"].items())
        console.print(f"{one.file}: {one.format}, rows: {kinds}", markup=False, highlight=False, soft_wrap=True)
        if one.profile is not None:
            _print_profile(dict(one.profile), console)
        for note in one.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
    if output is not None:
        console.print(f"{rows} rows: {output}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _print_profile(profile: dict[str, Any], console: Any) -> None:
    """Classes, the dearest first, and how each device used its time."""
    from rich import box
    from rich.table import Table

    from reports import units

    steps = max(1, profile["steps"])
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for c in profile["classes"]:
        one = sums[c["class"], c["phase"]]
        one[0], one[1] = one[0] + c["kernels"], one[1] + c["seconds"]
    whole = profile["kernel_s"]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("class", "pass", "kernels", "a step", "share"):
        table.add_column(name, justify="left" if name in ("class", "pass") else "right")
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    for (name, phase), (count, seconds) in ordered[:MOST_CLASSES]:
        share = f"{100 * seconds / whole:.1f} %" if whole else ""
        table.add_row(name, phase, f"{count / steps:g}", units.seconds(seconds / steps), share)
    console.print(table)
    if len(ordered) > MOST_CLASSES:
        console.print(f"and {len(ordered) - MOST_CLASSES} smaller ones (--json has all)", style="dim", highlight=False)
    classed = f"{100 * profile['classed_share']:.2f} % of kernel time classed"
    lasted = f"; profiler step {units.seconds(sum(profile['step_s']) / steps)}" if profile["step_s"] else ""
    console.print(f"kernels: {profile['kernels']}; steps: {profile['steps']}; {classed}{lasted}", highlight=False)
    for u in profile["unclassed"]:
        console.print(f"other: {units.seconds(u['seconds'])} {u['name'][:60]}", markup=False, highlight=False)
    use = Table(box=box.SIMPLE_HEAD)
    for name in ("device", "span", "compute", "communication", "hidden", "exposed", "idle"):
        use.add_column(name, justify="right")
    for d in profile["devices"][:MOST_DEVICES]:
        use.add_row(str(d["device"]), *(units.seconds(d[f"{column}_s"]) for column in (
            "span", "compute", "communication", "hidden", "exposed", "idle")))  # fmt: skip
    console.print(use)
    if len(profile["devices"]) > MOST_DEVICES:
        console.print(f"and {len(profile['devices']) - MOST_DEVICES} devices more (--json has all)", style="dim")
