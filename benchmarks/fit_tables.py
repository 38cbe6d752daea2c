"""The tables that profiles are fitted on: reading, names, and the words in which a fit reports itself."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

Row = dict[str, str]

CHIPS = {
    "A100-40 SXM": "a100-40",
    "A100-80 SXM": "a100-80",
    "A100 SXM": "a100-80",
    "B200": "b200",
    "B300": "b300",
    "Blackwell proxy (unnamed; 275 GB and 1100 W => B300-class)": "b300",
    "GB200": "gb200",
    "GB300": "gb300",
    "H100 SXM": "h100-sxm",
    "H200": "h200",
    "H200 SXM": "h200",
    "H800": "h800",
    "V100": "v100",
    "V100 SXM": "v100",
}


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, each with the profile's chip name under `profile` ("" where there is none)."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row | {"profile": CHIPS.get(row["chip"], "")} for row in csv.DictReader(file)]


def number(row: Row, key: str) -> float:
    """A numeric cell; NaN where it is empty."""
    return float(row[key]) if row[key] else math.nan


def quantiles(ratios: Iterable[float]) -> dict[str, float]:
    """p10, p50 and p90 of measured/modelled time."""
    p10, p50, p90 = np.quantile(list(ratios), [0.1, 0.5, 0.9])
    return {"p10": round(float(p10), 3), "p50": round(float(p50), 3), "p90": round(float(p90), 3)}


def sources(rows: Iterable[Row]) -> str:
    """The tables' own source texts, each once, most rows first, three at most."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["source"]] = counts.get(row["source"], 0) + 1
    names = sorted(counts, key=lambda s: (-counts[s], s))
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
