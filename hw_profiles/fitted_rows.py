"""Which published measurements the shipped profiles were fitted on, or read from: the list beside the chip files.

`fitted_rows.csv` holds, per chip, the short hash of each row and what it was used for. `benchmarks/fitted_rows.py`
writes it from the scripts that fitted the profiles; a test holds the two together. A profile that somebody calibrates
carries such a list itself (`schema.Calibration`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from hw_profiles.schema import Chip

FILE = Path(__file__).parent / "fitted_rows.csv"
# Not a profile's number but the interval of uncalibrated steps rests on these rows.
INTERVAL = "interval"


@cache
def _shipped() -> Mapping[str, Mapping[str, str]]:
    out: dict[str, dict[str, str]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            out.setdefault(row["chip"], {})[row["row_sha256"]] = row["used_for"]
    return out


def rows_used(chip: Chip) -> dict[str, str]:
    """What each row, by its short hash, was used for in `chip`'s numbers: those of the shipped file, and its own list.

    A profile under a shipped name counts as one made from it: copies and calibrated ones keep numbers of their base.
    """
    calibration = chip.calibration
    names = {chip.name, calibration.base or chip.name} if calibration else {chip.name}
    used: dict[str, str] = {}
    for name in sorted(names):
        used |= _shipped().get(name, {})
    for table in calibration.tables if calibration else ():
        used |= dict.fromkeys(table.ids_sha256, f"calibration on {table.name}")
    return used


def interval_rows(chip: str) -> frozenset[str]:
    """Hashes of the steps on `chip` from which the interval of uncalibrated forecasts was read."""
    return frozenset(h for h, use in _shipped().get(chip, {}).items() if use == INTERVAL)
