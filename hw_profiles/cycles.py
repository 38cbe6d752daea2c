"""What a cycle of the TPU compiler's estimates is worth: the clock of a device, from its peak and its matrix units."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hw_profiles.errors import QuestionError
from hw_profiles.schema import Chip

_TABLE = Path(__file__).parent / "tpu_cycles.csv"


@dataclass(frozen=True, slots=True)
class Cycle:
    """FLOPs (bf16) of one JAX device in a cycle, of which units; the clock others publish, MHz, or None."""

    flops: int
    units: str
    published_mhz: float | None
    published_by: str


@cache
def cycles() -> dict[str, Cycle]:
    """By name of the chip; the table's first lines say where its numbers come from."""
    lines = [line for line in _TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {
        r["chip"]: Cycle(
            int(r["flops_per_cycle"]),
            r["units"],
            float(r["published_mhz"]) if r["published_mhz"] else None,
            r["published_by"],
        )
        for r in csv.DictReader(lines)
    }


def clock_hz(chip: Chip) -> float:
    """Cycles a second: the device's bf16 peak over its FLOPs in a cycle; QuestionError for a chip not in the table."""
    known = cycles().get(chip.name)
    if known is None:
        raise QuestionError(
            f"{chip.name}: nobody says what its matrix units do in a cycle; known: {', '.join(cycles())}"
        )
    return chip.device_peak_flops_per_s("bf16") / known.flops
