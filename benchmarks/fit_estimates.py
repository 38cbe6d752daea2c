"""Fit the compiler's estimates again, without the compiler: `python -m benchmarks.fit_estimates [CHIP ...] [--write]`.

Reads the tables in `hw_profiles/estimates/` (each made by `moecast bench --target`), prints the fits beside the shipped
profile's numbers, and with --write puts them where `cluster: {curves: compiler}` reads them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from hw_profiles import QuestionError, load_chip
from hw_profiles.estimates import FOLDER, Estimates
from hw_profiles.files import write_whole
from simulator.calibration.fit_estimates import DTYPE, fit_estimates
from simulator.calibration.tables import read_table


def fitted(name: str) -> Estimates:
    """The fit of one chip's shipped table."""
    return fit_estimates(load_chip(name), read_table(FOLDER / f"{name}.csv").rows)


def as_yaml(name: str, found: Estimates) -> str:
    data: dict[str, Any] = found.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=118)
    return f"# Fitted on {name}.csv by `python -m benchmarks.fit_estimates --write` (docs/estimates.md).\n{body}"


def show(name: str, found: Estimates) -> None:
    chip, curve = load_chip(name), found.matmul[DTYPE]
    print(f"\n{name}: {curve.rows} products, estimated/modelled {curve.residuals}")
    for title, one in (
        ("compiler", curve),
        (f"shipped ({chip.efficiency.matmul[DTYPE].basis})", chip.efficiency.matmul[DTYPE]),
    ):
        print(f"  {title:20} " + "  ".join(f"{y:.2f}@{x:.0e}" for x, y in one.points))
    for key, new, old in (
        ("memory", found.memory, chip.efficiency.memory),
        ("grouped_slowdown", found.grouped_slowdown, chip.efficiency.grouped_slowdown),
        ("kernel_overhead_us", found.kernel_overhead_us, chip.kernel_overhead_us),
    ):
        print(f"  {key:20} {new.value:g}; shipped {old.value:g} ({old.confidence})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted(path.stem for path in FOLDER.glob("*.csv"))
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--write", action="store_true", help="write hw_profiles/estimates/CHIP.yaml")
    asked = parser.parse_args(argv)
    try:
        for name in asked.chips or names:
            found = fitted(name)
            show(name, found)
            if asked.write:
                write_whole(FOLDER / f"{name}.yaml", as_yaml(name, found).encode())
    except QuestionError as error:
        print(f"fit_estimates: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
