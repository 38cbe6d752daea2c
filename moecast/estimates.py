"""`moecast bench --target`: what the TPU compiler expects of kernels on a TPU that nobody has here.

The compiler runs in a process of its own: libtpu, once loaded, is not to be had twice, and a crash of it is no crash of
ours.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from hw_profiles.errors import QuestionError
from moecast.progress import FAILED, bar

# Set in the child; the target it compiles for.
CHILD = "MOECAST_ESTIMATES_CHILD"
LONGEST_S = 3600.0


def bench_target(text: str, output: Path, as_json: bool) -> None:
    """Write the compiler's estimates for the target `text` to `output`, and print what they come to.

    QuestionError where it is no TPU; exit code 4 where libtpu is missing or the compiler fails.
    """
    from moecast.measure import finish
    from simulator.calibration.tables import read_table
    from trainer.targets import TargetError, check_libtpu, parse_target, run_child

    target = parse_target(text)
    if target.slice is None:
        raise QuestionError(f"--target {text:.60}: only the TPU compiler states cycles; such as tpu:v5p:2x2x1")
    try:
        if os.environ.get(CHILD) == target.name:
            _estimate_here(target, output)
            return
        check_libtpu()
        with tempfile.TemporaryDirectory(prefix="moecast-") as scratch:
            made = Path(scratch) / "estimates.parquet"
            os.environ[CHILD] = target.name
            code = run_child(target, ["-m", "moecast", "bench", "--target", target.name, "-o", str(made)], LONGEST_S)
            if code:
                raise typer.Exit(code if code > 0 else FAILED)
            finish(read_table(made), output, as_json)
    except TargetError as error:
        print(f"moecast: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None


def _estimate_here(target: Any, output: Path) -> None:
    from hw_profiles.cycles import clock_hz
    from hw_profiles.errors import WorkFailed
    from hw_profiles.loader import load_chip
    from simulator.calibration.tables import write_table
    from simulator.results.measurement import MeasurementTable
    from trainer.estimates import count, estimate
    from trainer.hlo_text import HloError

    clock_hz(load_chip(target.slice.chip))
    with bar(f"compiling for {target.name}", count(target)) as done:

        def say(text: str) -> None:
            done.say(text)
            done.advance()

        try:
            found = estimate(target, say)
        except HloError as error:
            raise WorkFailed(f"{target.name}: {error}") from None
    print(f"moecast: {target.name}: no cycles are stated for {', '.join(found.without) or 'nothing'}", file=sys.stderr)
    write_table(MeasurementTable(found.rows), output)
