"""A measurement table on a terminal: whole steps, where their time went, and what a machine reaches."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from reports import units

if TYPE_CHECKING:
    from simulator.results.measurement import MeasurementTable

MOST_SCOPES = 12


def summary(table: MeasurementTable, output: Path) -> dict[str, Any]:
    """As JSON: rows by kind, and the whole steps."""
    kinds: dict[str, int] = defaultdict(int)
    for row in table.rows:
        kinds[row.kind] += 1
    steps = [
        {"id": r.id, "seconds": r.seconds, "p10_s": r.p10_s, "p90_s": r.p90_s, "samples": r.samples}
        for r in table.rows
        if r.kind == "step"
    ]
    routing = {key: str(output.parent / name) for key, name in table.routing.items()}
    return {"table": str(output), "rows": len(table.rows), "kinds": kinds, "steps": steps, "routing": routing}


def print_table(table: MeasurementTable, output: Path) -> None:
    """Print the table's steps, scopes and kernels, and where it was written."""
    from rich.console import Console

    console = Console()
    if any(r.kind == "step" for r in table.rows):
        console.print(_steps(table))
        console.print(_scopes(table))
    if any(r.source == "moecast bench" for r in table.rows):
        console.print(_reached(table, "Reached by each device, all at work"))
    if any(r.kind == "compiler-estimate" for r in table.rows):
        console.print(_reached(table, "What the compiler expects of one device"))
    console.print(f"{len(table.rows)} rows: {output}", highlight=False, soft_wrap=True)


def _new(title: str, *columns: str) -> Any:
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
    return out


def _steps(table: MeasurementTable) -> Any:
    out = _new("Steps without the profiler", "job", "median", "10 %", "90 %", "steps", "compute", "waiting", "gaps")
    for row in table.rows:
        if row.kind == "step":
            start = row.id.removesuffix("step")
            ops = [r for r in table.rows if r.kind == "op" and r.id.startswith(start) and r.name != "window"]
            total = sum(r.seconds or 0 for r in ops) or 1
            waited = sum(r.waited_s for r in ops) / total
            gaps = sum(r.seconds or 0 for r in ops if r.name == "gaps") / total
            out.add_row(
                start.rstrip(":"), units.seconds(row.seconds or 0), units.seconds(row.p10_s or 0),
                units.seconds(row.p90_s or 0), str(row.samples),
                *((f"{1 - waited - gaps:.0%}", f"{waited:.0%}", f"{gaps:.0%}") if ops else ("", "", "")),
            )  # fmt: skip
    return out


def _scopes(table: MeasurementTable) -> Any:
    """The longest scopes, mean over devices, of all jobs together."""
    seconds: dict[str, float] = defaultdict(float)
    jobs = max(1, sum(r.kind == "step" for r in table.rows))
    for row in table.rows:
        if row.kind == "op" and row.name != "window":
            seconds[row.name] += (row.seconds or 0) / row.devices / jobs
    total = sum(seconds.values()) or 1
    out = _new("Where a traced step's time went, a device", "scope", "time", "share")
    longest = sorted(seconds.items(), key=lambda x: -x[1])
    for name, s in longest[:MOST_SCOPES]:
        out.add_row(name, units.seconds(s), f"{s / total:.1%}")
    rest = sum(s for _, s in longest[MOST_SCOPES:])
    if rest:
        out.add_row(f"{len(longest) - MOST_SCOPES} more", units.seconds(rest), f"{rest / total:.1%}")
    return out


def _reached(table: MeasurementTable, title: str) -> Any:
    """The best of each kind."""
    timed = ("kernel", "compiler-estimate")
    out = _new(title, "what", "best", "median", "rows")
    groups: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for r in table.rows:
        if r.seconds and r.flops:
            groups[r.name, "FLOP/s"].append((r.flops / r.seconds, r.id))
        elif r.seconds and r.bytes and r.kind in (*timed, "collective"):
            groups[r.name, "B/s"].append((r.bytes / r.seconds, r.id))
        elif r.seconds and r.kind in timed:
            groups[r.name, "s"].append((r.seconds, r.id))
    for (name, unit), found in groups.items():
        values = [v for v, _ in found]
        if unit == "s":
            out.add_row(name, units.seconds(min(values)), units.seconds(median(values)), str(len(values)))
        else:
            shown = [f"{v * 1e-9:,.1f} G{unit}" for v in (max(values), median(values))]
            out.add_row(name, *shown, str(len(values)))
    return out
