"""A CSV table that somebody has, by a mapping of its columns: one row of it is one row of the measurement table."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from simulator.calibration.readers.found import Found, Told, labelled
from simulator.calibration.tables import NAMES, WHOLE
from simulator.results.measurement import KINDS, PASSES, Measurement

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TIMES = ("seconds", "p10_s", "p90_s")
_NUMBERS = (*_TIMES, "bytes", "flops", "calls")


def read_csv(text: str, path: Path, told: Told, date: str) -> Found:
    """Its rows; columns that are not mapped count where they have a name of the table's. QuestionError naming line.

    A row needs `seconds` (or `bytes`, of memory), a kind and a name, from a column or told.
    """
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        columns = list(reader.fieldnames or ())
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise QuestionError(f"{path}: not a CSV table: {error}") from None
    taken = _taken(columns, told, path)
    if told.unit not in UNITS:
        raise QuestionError(f"--unit {told.unit!r:.20}: known: {', '.join(UNITS)}")
    if not lines:
        raise QuestionError(f"{path}: has no rows")
    base = {k: v for k, v in asdict(labelled(told, path, date, "")).items() if v}
    rows, seen = [], set()
    for number, line in lines:
        where = f"{path}, line {number}"
        if None in line or None in line.values():
            raise QuestionError(f"{where}: has not as many fields as the first line")
        said = {name: _plain(name, line[column], column, where) for name, column in taken.items()}
        fields = (
            base | {"id": f"{path.name}:{number}", "kind": told.kind} | {k: v for k, v in said.items() if v is not None}
        )
        made = _made(fields, UNITS[told.unit], where)
        if made.id in seen:
            raise QuestionError(f"{where}: id = {made.id!r:.60}: appears twice")
        seen.add(made.id)
        rows.append(made)
    left = [c for c in columns if c not in taken.values()]
    notes = (f"columns left out: {', '.join(left)}"[:300],) if left else ()
    return Found(str(path), "csv", tuple(rows), notes)


def _taken(columns: list[str], told: Told, path: Path) -> dict[str, str]:
    """Column of the measurement table -> column of the file."""
    if len(set(columns)) < len(columns):
        raise QuestionError(f"{path}: a column appears twice")
    for name, column in told.columns.items():
        if name not in NAMES:
            raise QuestionError(f"--column {name}={column}: no column {name!r:.40} of the table{nearest(name, NAMES)}")
        if column not in columns:
            raise QuestionError(
                f"--column {name}={column}: {path} has no column {column!r:.40}{nearest(column, columns)}"
            )
    taken = {c: c for c in columns if c in NAMES} | dict(told.columns)
    if "seconds" not in taken and "bytes" not in taken:
        raise QuestionError(
            f"{path}: no column is seconds: say --column seconds=..., one of {', '.join(columns)[:200]}"
        )
    return taken


def _plain(name: str, text: str, column: str, where: str) -> Any:
    text = text.strip()
    if not text:
        return None
    try:
        if name == "shape":
            return tuple(int(n) for n in text.split("x"))
        if name in WHOLE or name == "device":
            return int(text)
        if name in _NUMBERS:
            return float(text)
    except ValueError:
        raise QuestionError(f"{where}: {column} = {text!r:.40}: not a number") from None
    return text


def _made(fields: dict[str, Any], unit: float, where: str) -> Measurement:
    """The row; QuestionError where a field that the table needs is missing or out of its range."""
    for name in _TIMES:
        if name in fields:
            fields[name] *= unit
    for name, value in fields.items():
        if name in (*_TIMES, "calls") and not (math.isfinite(value) and value > 0):
            raise QuestionError(f"{where}: {name} = {value:g}: must be a finite number greater than 0")
        if name in ("bytes", "flops") and not (math.isfinite(value) and value >= 0):
            raise QuestionError(f"{where}: {name} = {value:g}: must be a finite number, at least 0")
        if name in WHOLE and value < 1:
            raise QuestionError(f"{where}: {name} = {value}: must be at least 1")
    fields.setdefault("software", "not stated")
    kind = fields["kind"]
    if kind not in KINDS:
        said = (
            f"kind = {kind!r:.40}: known: {', '.join(KINDS)}" if kind else "no kind: say --kind, or --column kind=..."
        )
        raise QuestionError(f"{where}: {said}{nearest(kind, KINDS) if kind else ''}")
    if fields.get("phase", "") not in PASSES:
        raise QuestionError(f"{where}: phase = {fields['phase']!r:.40}: must be forward, recompute, backward or empty")
    if not fields.get("name"):
        if kind not in ("step", "memory"):
            raise QuestionError(f"{where}: no name (of the scope, collective or kernel): say --column name=...")
        fields["name"] = {"step": "step", "memory": "peak"}[kind]
    if fields.get("bytes" if kind == "memory" else "seconds") is None:
        raise QuestionError(f"{where}: {'bytes' if kind == 'memory' else 'seconds'} is empty")
    return Measurement(**fields)
