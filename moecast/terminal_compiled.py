"""The comparison of a forecast with the compiler on a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import units

if TYPE_CHECKING:
    from moecast.compiled import Comparison, Row
    from simulator.job.job import Job
    from trainer.hlo import CompiledProgram
    from trainer.targets import Target


def print_comparison(job: Job, target: Target, found: Comparison, program: CompiledProgram) -> None:
    """The rows, the program's collectives, and the ops that differ."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{job.name} on {target.name}: one training step, per device", markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name, side in (("", "left"), ("forecast", "right"), ("compiler", "right"), ("error", "right"), ("", "left")):
        table.add_column(name, justify="left" if side == "left" else "right")
    for row in found.rows:
        error = "" if row.error is None else f"{100 * row.error:+.2f} %"
        table.add_row(row.what, _said(row, row.forecast), _said(row, row.compiled), error, _verdict(row))
    console.print(table)
    console.print("collectives of the program (bytes a call, nccl-tests' size)", markup=False, highlight=False)
    listed = Table(box=box.SIMPLE_HEAD)
    for name in ("kind", "calls", "bytes", "group"):
        listed.add_column(name, justify="left" if name == "kind" else "right")
    listed.add_column("scope", overflow="fold")
    merged: dict[tuple[str, int, int, str], int] = {}
    for c in program.collectives:
        scope = ", ".join(c.scopes[:2]) + (" ..." if len(c.scopes) > 2 else "")
        key = (c.asked, c.bytes, c.group_size, f"{scope} ({c.phase})" if scope else c.phase)
        merged[key] = merged.get(key, 0) + c.count
    rows = sorted(merged.items(), key=lambda item: -item[0][1] * item[1])
    for (kind, size, group, scope), count in rows[:12]:
        listed.add_row(kind, str(count), units.traffic(size), str(group), scope)
    console.print(listed)
    if len(rows) > 12:
        console.print(f"and {len(rows) - 12} smaller ones (--json has all)", style="dim", highlight=False)
    for text in found.differences:
        console.print(f"differs: {text}", markup=False, highlight=False)


def _said(row: Row, value: float) -> str:
    return units.traffic(value) if row.unit == "bytes" else f"{value:.4g}"


def _verdict(row: Row) -> str:
    if row.error is None:
        return ""
    return "" if row.holds else f"above {100 * (row.tolerance or 0):.0f} %"
