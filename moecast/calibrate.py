"""`moecast calibrate`: from measurement tables and a base profile to a profile that knows what was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.files import write_whole
from moecast.progress import busy

if TYPE_CHECKING:
    from simulator.calibration.calibrate import Calibrated
    from simulator.results.measurement import MeasurementTable

NUMBER_LIKE = re.compile(r"[-+.\deE_]+")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: moecast calibrate bench.parquet steps.parquet --base cpu-host -o here.yaml")(calibrate)


def calibrate(
    tables: Annotated[list[Path], typer.Argument(metavar="TABLE...", help="Measurement tables to fit on.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The profile to write (YAML).")],
    base: Annotated[
        str, typer.Option(metavar="CHIP|FILE", help="The profile to begin with: a chip's name, or a file.")
    ] = "cpu-host",
    hold_out: Annotated[
        list[str] | None,
        typer.Option("--hold-out", metavar="JOB", help="Leave this job's rows for validation; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Fit a hardware profile on measurements: `moecast forecast JOB --profile FILE` then rests on them.

    Fitted are efficiency over sizes, memory, launches, the network, what devices of one host lose by sharing it, and
    what each class of ops takes; every number keeps its source, and forecasts get an interval from left-out jobs.
    """
    from hw_profiles.loader import load_chip, load_chip_file
    from simulator.calibration.calibrate import calibrate as fit
    from simulator.calibration.tables import read_table

    if output.suffix not in (".yaml", ".yml"):
        raise QuestionError(f"--output {output}: must end in .yaml")
    if not output.parent.is_dir():
        raise QuestionError(f"--output {output}: no such folder: {output.parent}")
    start = load_chip_file(base) if base.endswith((".yaml", ".yml")) else load_chip(base)
    read = [_without(read_table(path), hold_out or ()) for path in tables]
    _check_held(read, tables, hold_out or ())
    with busy(f"fitting on {sum(len(t.rows) for t in read):,} rows"):
        found = fit(read, start, {p.name: sha256(p.read_bytes()).hexdigest() for p in tables})
    write_whole(output, profile_text(found, [p.name for p in tables]).encode())
    if as_json:
        left_out = [{"id": n, "measured_s": m, "forecast_s": f, "error": f / m - 1} for n, m, f in found.left_out]
        spread = found.chip.step_spread
        whole: dict[str, Any] = {"profile": str(output), "notes": found.notes, "left_out": left_out}
        whole["step_spread"] = spread.model_dump() if spread else None
        print(json.dumps(whole, indent=2, allow_nan=False))
    else:
        _show(found, output)


def _without(table: MeasurementTable, names: Sequence[str]) -> MeasurementTable:
    """`table` without the rows of the jobs called `names`."""
    held = {key for key, job in table.jobs.items() if job.get("name") in names}
    return replace(table, rows=tuple(r for r in table.rows if r.job_hash not in held))


def _check_held(read: Sequence[MeasurementTable], tables: Sequence[Path], names: Sequence[str]) -> None:
    """QuestionError for a name that no table has a job of."""
    known = {str(job.get("name")) for table in read for job in table.jobs.values()}
    for name in names:
        if name not in known:
            said = ", ".join(str(p) for p in tables)
            raise QuestionError(f"--hold-out {name:.60}: no such job in {said}{nearest(name, known)}")


def profile_text(found: Calibrated, tables: list[str]) -> str:
    """The profile as a YAML file, whose first lines say where it comes from."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what our reader, unlike YAML 1.1, takes for a number: 12e4567 is one of our hashes."""

    def quoted(dumper: Any, text: str) -> Any:
        style = '"' if NUMBER_LIKE.fullmatch(text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, quoted)
    data = found.chip.model_dump(mode="json", exclude_defaults=True)
    head = f"# Calibrated by moecast calibrate on {', '.join(tables)}. Every number says where it is from.\n"
    return head + yaml.dump(_rounded(data), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _rounded(value: Any) -> Any:
    """Numbers to six digits, which is more than any was measured to."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _show(found: Calibrated, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from reports import units

    console = Console()
    for note in found.notes:
        console.print(note, highlight=False)
    if found.left_out:
        shown = Table(title="Steps that the fit had not seen", title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(("job", "measured", "forecast", "error")):
            shown.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
        for name, measured, modelled in found.left_out:
            off = f"{modelled / measured - 1:+.1%}"
            shown.add_row(name, units.seconds(measured), units.seconds(modelled), off)
        console.print(shown)
    spread = found.chip.step_spread
    if spread is not None:
        console.print(
            f"80 % interval: {spread.quantile:.2f} times a forecast's own spread, about {spread.centre:.3f} of it;"
            f" {spread.covered:.0%} of {spread.steps} left-out steps are within",
            highlight=False,
        )
    console.print(f"profile: {output}", highlight=False, soft_wrap=True)
