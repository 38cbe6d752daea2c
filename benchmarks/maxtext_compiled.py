"""Forecast beside XLA:TPU's compiled MaxText programs: arguments, gathers, executed FLOPs, peak memory.

Usage: python benchmarks/maxtext_compiled.py TABLE.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hw_profiles.errors import QuestionError
from simulator.analysis.forecast import forecast
from simulator.calibration.maxtext_rows import maxtext_job
from simulator.job.load import load_job


def compare(row: dict[str, str]) -> dict[str, tuple[float, float]]:
    """(forecast, compiler) of each quantity that the row has; QuestionError where it cannot be expressed."""
    answer = forecast(load_job(maxtext_job(row)), engine="closed-form")
    gathers = sum(c.bytes for c in answer.collectives if c.kind == "all_gather" and "tensor" not in c.scope)
    measured = {
        "arguments": (answer.memory.argument_bytes, row["argument_bytes"]),
        "gathers": (gathers, row["all_gather_result_bytes"]),
        "FLOPs": (answer.flops.executed_per_device, row["flops_executed_balanced"]),
        "peak": (answer.memory.peak_bytes, row["hbm_total_bytes"] or row["peak_memory_bytes"]),
    }
    if "tensor" in row["mesh"]:
        # The compiler's gathers are then of activations too: not FSDP's alone.
        del measured["gathers"]
    return {name: (ours, float(theirs)) for name, (ours, theirs) in measured.items() if theirs}


def main(path: Path) -> None:
    """Print the table."""
    table = Table(
        title="forecast / compiler - 1, per device",
        caption="peak: total of XLA's memory-usage report (an OOM row: what it asked for)",
    )
    table.add_column("program")
    for name in ("arguments", "gathers", "FLOPs", "peak"):
        table.add_column(name, justify="right")
    table.add_column("peak, GiB", justify="right")
    for row in csv.DictReader(path.open(newline="")):
        try:
            result = compare(row)
        except QuestionError as error:
            table.add_row(row["id"], str(error).removeprefix(f"{row['id']}: "))
            continue
        cells = [
            f"{a / b - 1:+.2%}" if name in result else ""
            for name in ("arguments", "gathers", "FLOPs", "peak")
            for a, b in [result.get(name, (0, 1))]
        ]
        a, b = result["peak"]
        table.add_row(
            row["id"], *cells, f"{a / 2**30:.1f} / {b / 2**30:.1f}" + (" OOM" if row["status"] == "OOM" else "")
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/measured/maxtext_compiled.csv"))
