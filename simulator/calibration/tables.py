"""Measurement tables as files: Parquet with jobs in its metadata, or CSV with the same columns.

A table is checked row by row as it is read, so that whoever computes with it need not: a bad row is one line that names
file, row, column and rule.
"""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.files import read_bytes, write_whole
from simulator.results.measurement import KINDS, PASSES, VERSION, Measurement, MeasurementTable

MAX_BYTES = 200_000_000
# A Parquet file of a few bytes can hold any number of rows.
MAX_ROWS = 5_000_000
NAMES = tuple(f.name for f in fields(Measurement))
NEEDED = ("id", "source", "date", "chip", "software", "kind", "name")
WHOLE = ("group_size", "stride", "devices", "nodes", "samples")
AT_LEAST_ZERO = ("bytes", "flops")
_KEY = b"moecast"


def schema() -> Any:
    """The Arrow schema of a table."""
    pa: Any = importlib.import_module("pyarrow")
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    types = {
        "seconds": number, "shape": pa.list_(whole), "bytes": number, "flops": number, "calls": number,
        "group_size": whole, "stride": whole, "devices": whole, "nodes": whole, "device": whole, "samples": whole,
        "p10_s": number, "p90_s": number,
    }  # fmt: skip
    return pa.schema([pa.field(name, types.get(name, text), nullable=name not in NEEDED) for name in NAMES])


def write_table(table: MeasurementTable, path: Path) -> None:
    """Write `table` to `path` (.parquet or .csv), whole or not at all; QuestionError for another ending."""
    rows = [asdict(r) for r in table.rows]
    if path.suffix == ".csv":
        write_whole(path, _csv(rows).encode())
        return
    if path.suffix != ".parquet":
        raise QuestionError(f"{path}: must end in .parquet or .csv")
    pa: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    beside = {"version": VERSION, "jobs": table.jobs, "routing": table.routing, "timelines": table.timelines}
    made = pa.Table.from_pylist([{**r, "shape": list(r["shape"])} for r in rows], schema=schema())
    made = made.replace_schema_metadata({_KEY: json.dumps(beside, sort_keys=True).encode()})
    out = io.BytesIO()
    parquet.write_table(made, out)
    write_whole(path, out.getvalue())


def read_table(path: Path) -> MeasurementTable:
    """The table in `path`; QuestionError, naming file, row and rule, for anything that is none."""
    start = str(path)
    data = read_bytes(path, MAX_BYTES, start)
    if path.suffix == ".csv":
        return MeasurementTable(_rows(_csv_rows(data, start), start, csv=True), name=path.name)
    if path.suffix != ".parquet":
        raise QuestionError(f"{start}: must end in .parquet or .csv")
    rows, beside = _parquet(data, start)
    version = beside.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise QuestionError(f"{start}: version {version!r:.20} of the measurement table; this moecast reads {VERSION}")
    jobs, routing = beside.get("jobs"), beside.get("routing")
    if not isinstance(jobs, dict) or not isinstance(routing, dict):
        raise QuestionError(f"{start}: its metadata has no jobs")
    timelines = _timelines(beside.get("timelines", {}), start)
    return MeasurementTable(_rows(rows, start, csv=False), jobs, routing, path.name, timelines)


def _timelines(found: Any, start: str) -> dict[str, list[tuple[int, str, float, float]]]:
    """The timelines in the metadata; QuestionError where they are none."""
    try:
        return {
            str(key): [(int(d), str(k), float(a), float(b)) for d, k, a, b in parts] for key, parts in found.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise QuestionError(f"{start}: the timelines in its metadata are none") from None


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    import csv

    out = io.StringIO()
    writer = csv.DictWriter(out, NAMES, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({**plain, "shape": "x".join(map(str, row["shape"]))})
    return out.getvalue()


def csv_text_rows(data: bytes, start: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of any CSV table, as texts; QuestionError, naming the line, where it is none."""
    import csv

    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        names = list(reader.fieldnames or ())
        rows = list(reader)
    except UnicodeDecodeError:
        raise QuestionError(f"{start}: not a text file (UTF-8)") from None
    except csv.Error as error:
        raise QuestionError(f"{start}: not a CSV table: {error}") from None
    if len(set(names)) < len(names):
        raise QuestionError(f"{start}: a column appears twice")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise QuestionError(f"{start}, line {i + 2}: has not as many fields as the first line")
    return names, rows


def _csv_rows(data: bytes, start: str) -> list[dict[str, Any]]:
    names, rows = csv_text_rows(data, start)
    _check_columns(names, start)
    return [{k: _plain(k, v, f"{start}, line {i + 2}") for k, v in row.items()} for i, row in enumerate(rows)]


def _plain(name: str, text: str, start: str) -> Any:
    """A field of a CSV table as its type; None where it is empty."""
    if not text:
        return None
    try:
        if name == "shape":
            return [int(n) for n in text.split("x")]
        if name in WHOLE or name == "device":
            return int(text)
        if name in ("seconds", "bytes", "flops", "calls", "p10_s", "p90_s"):
            return float(text)
    except ValueError:
        raise QuestionError(f"{start}: {name} = {text!r:.40}: not a number") from None
    return text


def _parquet(data: bytes, start: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    broken = (OSError, ValueError, TypeError, KeyError, NotImplementedError)
    try:
        opened = parquet.ParquetFile(io.BytesIO(data))
        count = int(opened.metadata.num_rows)
        found = opened.read() if count <= MAX_ROWS else None
        beside = json.loads((opened.schema_arrow.metadata or {}).get(_KEY, b"null"))
    except broken as error:
        raise QuestionError(f"{start}: not a Parquet table: {' '.join(str(error).split()):.80}") from None
    if found is None:
        raise QuestionError(f"{start}: {count:,} rows; at most {MAX_ROWS:,} are read")
    _check_columns(found.column_names, start)
    _check_types(found.schema, start)
    if not isinstance(beside, dict):
        raise QuestionError(f"{start}: not a measurement table: it has no moecast metadata")
    try:
        rows: list[dict[str, Any]] = found.to_pylist()
    except broken as error:
        raise QuestionError(f"{start}: not a Parquet table: {' '.join(str(error).split()):.80}") from None
    return rows, beside


def _check_columns(names: list[str], start: str) -> None:
    missing = next((n for n in NEEDED if n not in names), None)
    if missing is not None:
        raise QuestionError(f"{start}: has no column {missing}; needs {', '.join(NEEDED)}")
    unknown = next((n for n in names if n not in NAMES), None)
    if unknown is not None:
        raise QuestionError(f"{start}: unknown column {unknown!r:.40}{nearest(unknown[:40], NAMES)}")
    if len(set(names)) < len(names):
        raise QuestionError(f"{start}: a column appears twice")


def _check_types(found: Any, start: str) -> None:
    for column in schema():
        if column.name in found.names and found.field(column.name).type != column.type:
            raise QuestionError(f"{start}: column {column.name} is {found.field(column.name).type}, not {column.type}")


def _rows(rows: list[dict[str, Any]], start: str, csv: bool) -> tuple[Measurement, ...]:
    if not rows:
        raise QuestionError(f"{start}: has no rows")
    out, seen = [], set()
    for i, row in enumerate(rows):
        where = f"{start}, line {i + 2}" if csv else f"{start}, row {i}"
        made = _row({k: v for k, v in row.items() if v is not None}, where)
        if made.id in seen:
            raise QuestionError(f"{where}: id = {made.id!r:.60}: appears twice")
        seen.add(made.id)
        out.append(made)
    return tuple(out)


def _row(row: dict[str, Any], where: str) -> Measurement:
    missing = next((n for n in NEEDED if not row.get(n)), None)
    if missing is not None:
        raise QuestionError(f"{where}: {missing} is empty")
    made = Measurement(**{**row, "shape": tuple(row.get("shape", ()))})
    if made.kind not in KINDS:
        raise QuestionError(f"{where}: kind = {made.kind!r:.40}: known: {', '.join(KINDS)}{nearest(made.kind, KINDS)}")
    if made.phase not in PASSES:
        raise QuestionError(f"{where}: phase = {made.phase!r:.40}: must be forward, recompute, backward or empty")
    if made.kind == "memory":
        if made.bytes is None:
            raise QuestionError(f"{where}: bytes is empty: a memory row is a number of bytes")
    elif made.seconds is None:
        raise QuestionError(f"{where}: seconds is empty")
    for name in ("seconds", "calls", "p10_s", "p90_s"):
        value = getattr(made, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise QuestionError(f"{where}: {name} = {value:g}: must be a finite number greater than 0")
    for name in AT_LEAST_ZERO:
        value = getattr(made, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise QuestionError(f"{where}: {name} = {value:g}: must be a finite number, at least 0")
    for name in WHOLE:
        if getattr(made, name) < 1:
            raise QuestionError(f"{where}: {name} = {getattr(made, name)}: must be at least 1")
    if made.devices % made.nodes:
        raise QuestionError(f"{where}: nodes = {made.nodes}: must divide the {made.devices} devices")
    return made
