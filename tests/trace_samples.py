"""Saved profiles and logs, read for one chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simulator.calibration.readers.found import Found, Told
from simulator.calibration.readers.read import read_file

SAMPLES = Path(__file__).with_name("samples")
Trace = dict[str, Any]


def read(path: Path, form: str = "auto", **told: Any) -> Found:
    """A file's measurements, said to be of H100s; `told` is what else the person says."""
    return read_file(path, Told(chip="h100-sxm", **told), form)


def seconds(found: Found) -> dict[tuple[str, str, int | None], float | None]:
    """(name, phase, device) of every sum of kernels -> its seconds."""
    return {(r.name, r.phase, r.device): r.seconds for r in found.rows if r.kind == "op"}


def kernels(events: list[Trace]) -> list[Trace]:
    """Those of a trace's events that are kernels."""
    return [e for e in events if e.get("cat") == "kernel"]
